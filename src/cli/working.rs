//! Volumes that are there for the time of one use: how they are marked and named, and how they go.

use anyhow::{Result, bail};
use uuid::Uuid;

use super::attach::delete_when_idle;
use crate::daemon::Client;
use crate::daemon::attributes::EPHEMERAL;
use crate::daemon::protocol::{Attributes, Bytes, Command, Kind, Volume};

/// The mark of a working volume: what it is for. What is left of one is deleted by the next daemon, and by `plywood prune`.
pub fn ephemeral(purpose: &str) -> Attributes {
    [(EPHEMERAL.to_owned(), Bytes::from(purpose))].into()
}

/// A name for a working volume that has to do with `of`, within the bound of names.
pub fn private_name(of: &str, purpose: &str) -> String {
    format!("{}.{purpose}-{:.8}", head(of), Uuid::new_v4().simple().to_string())
}

/// The beginning of a name, which leaves room for what is put behind it.
pub fn head(name: &str) -> &str {
    let mut end = name.len().min(200);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// Refuses a name that something has, before work is begun that it is for.
///
/// # Errors
/// It is taken, and what the pool answers.
pub fn refuse_taken(client: &Client, name: &str) -> Result<()> {
    match client.volume(name) {
        Ok(_) => bail!("{name} exists already; choose another name"),
        Err(failure) if failure.kind == Kind::NotFound => Ok(()),
        Err(failure) => Err(failure.into()),
    }
}

/// Takes the mark off a working volume that is whole, and gives it the name that it is for. In this order: what has that
/// name and is marked would be deleted by the next daemon.
///
/// # Errors
/// What the pool answers; the name may be taken.
pub fn make_lasting(client: &Client, working: &str, name: &str) -> Result<Volume> {
    let uuid = client.volume(working)?.uuid;
    client.set_attributes(working, [(EPHEMERAL.to_owned(), None)].into())?;
    let renamed = client.call(Command::VolumeRename { name: working.to_owned(), to: name.to_owned() });
    match (renamed, client.volume(name)) {
        // Done by an engine that died before it answered.
        (Err(failure), Ok(volume)) if failure.kind == Kind::NotFound && volume.uuid == uuid => Ok(volume),
        (Err(failure), _) if failure.kind == Kind::AlreadyExists => refuse_taken(client, name).and(Err(failure.into())),
        (Err(failure), _) => Err(failure.into()),
        (Ok(_), volume) => Ok(volume?),
    }
}

/// Detaches and deletes a working volume.
pub fn take_away(client: &Client, name: &str) {
    if let Err(failure) = delete_when_idle(client, name) {
        tracing::warn!("{name} could not be taken away: {failure}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_names_stay_within_the_bound_and_characters_whole() {
        for name in ["a", &"é".repeat(127), &"x".repeat(255), &"€".repeat(85)] {
            let private = private_name(name, "receive");
            assert!(private.len() <= 255, "{} bytes", private.len());
            assert!(private.starts_with(head(name)) && private.contains(".receive-"), "{private}");
        }
        assert_ne!(private_name("a", "mount"), private_name("a", "mount"));
    }
}
