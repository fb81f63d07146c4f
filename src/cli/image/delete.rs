//! `plywood image delete`: images, and the layers that were theirs alone.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use clap::Args;

use super::labels;
use super::layers::{self, Known, known};
use crate::cli::output::{self, confirm};
use crate::cli::{Context, Name, volume};
use crate::daemon::making;
use crate::daemon::protocol::{Command, Kind};

/// Deletes images.
#[derive(Debug, Args)]
pub struct DeleteArguments {
    /// The images
    #[arg(required = true)]
    names: Vec<Name>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Does it. Containers and other images keep what they have of them.
///
/// # Errors
/// A name is no image's, and what the pool answers.
pub fn delete(context: &Context, arguments: &DeleteArguments) -> Result<()> {
    let client = context.client()?;
    for name in &arguments.names {
        let name = name.text()?;
        let all = known(&client)?;
        let Some(image) = all.iter().find(|known| known.volume.name == name) else {
            // In the pool's own words.
            client.volume(&name)?;
            bail!("{name}: not found");
        };
        if !image.is_image() {
            bail!("{name} is no image; delete it with plywood volume delete");
        }
        let orphans = orphans(&all, image);
        let asked = format!("delete image {name}{}{}?", volume::frees(&image.volume), orphans.as_deref().unwrap_or(""));
        confirm(&asked, arguments.yes)?;
        client.call(Command::SnapshotDelete { name: name.clone() })?;
        let mut deleted = vec![name.clone()];
        // A layer may be about to be used by who imports; it is pruned later.
        let alone = if client.is_daemon() { making::alone(client.pool_uuid()?)? } else { None };
        if alone.is_some() || !client.is_daemon() {
            for layer in layers_of_it(&all, image, &known(&client)?)? {
                match client.delete(&layer) {
                    Ok(()) => deleted.push(layer),
                    Err(failure) if matches!(failure.kind, Kind::Busy | Kind::NotFound) => {}
                    Err(failure) => return Err(failure.into()),
                }
            }
        }
        if context.json {
            output::json("deleted", &deleted)?;
        } else {
            let layers = match deleted.len() - 1 {
                0 => String::new(),
                1 => " and a layer that was its alone".to_owned(),
                count => format!(" and {count} layers that were its alone"),
            };
            output::line(&format!("deleted {name}{layers}{}", orphans.as_deref().unwrap_or("")))?;
        }
    }
    Ok(())
}

/// What is said of the containers that were started from an image.
fn orphans(all: &[Known], image: &Known) -> Option<String> {
    let is_its = |known: &&Known| {
        known.volume.origin_uuid == Some(image.volume.uuid)
            && !known.volume.snapshot
            && known.attributes.contains_key(labels::CONTAINER_IMAGE)
    };
    let names: Vec<&str> = all.iter().filter(is_its).map(|known| known.volume.name.as_str()).collect();
    match &names[..] {
        [] => None,
        [name] => Some(format!("; its container {name} goes on without it, and can no longer be committed")),
        [.., last] if names.len() > 3 => Some(format!(
            "; its {} containers, {last} for one, go on without it, and can no longer be committed",
            names.len()
        )),
        [first @ .., last] => Some(format!(
            "; its containers {} and {last} go on without it, and can no longer be committed",
            first.join(", ")
        )),
    }
}

/// Names of the layers of an image among `all` that nobody needs who is there `now`, when it has gone.
fn layers_of_it(all: &[Known], image: &Known, now: &[Known]) -> Result<Vec<String>> {
    let its: BTreeSet<_> = layers::chain(all, image)?.into_iter().map(|known| known.volume.uuid).collect();
    let unneeded = layers::unneeded(now, &BTreeSet::new())?;
    Ok(unneeded
        .iter()
        .filter(|known| its.contains(&known.volume.uuid))
        .map(|known| known.volume.name.clone())
        .collect())
}
