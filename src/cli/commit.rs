//! `plywood commit`: an image of what a container holds.

use std::slice;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Map, Value, json};

use super::hold::hold_still;
use super::image::{labels, layers};
use super::{Context, Name, output, size};
use crate::daemon::protocol::{Attributes, Bytes};

/// Makes an image of a container.
#[derive(Debug, Args)]
#[command(after_help = "\
plywood run debian --name build -- apt-get install --yes nginx
plywood commit build nginx --change 'CMD [\"nginx\", \"-g\", \"daemon off;\"]'

A change is CMD or ENTRYPOINT (a JSON list, or a line for /bin/sh), ENV NAME=VALUE, LABEL NAME=VALUE, WORKDIR DIRECTORY or \
USER NAME. The image is a snapshot: it takes milliseconds, and what the container wrote is not copied.")]
pub struct CommitArguments {
    /// The container, running or not
    container: Name,
    /// Name of the image
    image: Name,
    /// Change the image's configuration
    #[arg(long, short, value_name = "INSTRUCTION", value_parser = Instruction::parse)]
    change: Vec<Instruction>,
    /// A remark in the image's history
    #[arg(long, short, value_name = "TEXT")]
    message: Option<String>,
    /// Do not hold the file system still meanwhile: what was being written is as after a crash
    #[arg(long)]
    no_freeze: bool,
}

/// A change of an image's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Instruction {
    key: &'static str,
    value: Value,
}

impl Instruction {
    fn parse(typed: &str) -> Result<Self> {
        let (word, rest) = typed.trim().split_once(char::is_whitespace).unwrap_or((typed.trim(), ""));
        let rest = rest.trim();
        let pair = || -> Result<Value> {
            let (name, _) = rest.split_once('=').with_context(|| format!("{typed}: give NAME=VALUE"))?;
            ensure!(!name.is_empty(), "{typed}: give NAME=VALUE");
            Ok(json!(rest))
        };
        let (key, value) = match word.to_ascii_uppercase().as_str() {
            "CMD" => ("Cmd", list(rest)?),
            "ENTRYPOINT" => ("Entrypoint", list(rest)?),
            "ENV" => ("Env", pair()?),
            "LABEL" => ("Labels", pair()?),
            "WORKDIR" => ("WorkingDir", json!(rest)),
            "USER" => ("User", json!(rest)),
            _ => bail!("{typed}: one of CMD, ENTRYPOINT, ENV, LABEL, WORKDIR and USER is understood"),
        };
        ensure!(!rest.is_empty(), "{typed}: says nothing");
        Ok(Self { key, value })
    }

    fn apply(&self, config: &mut Map<String, Value>) {
        match (self.key, self.value.as_str().and_then(|pair| pair.split_once('='))) {
            ("Env", Some((name, _))) => {
                let known = config.remove("Env").and_then(|known| serde_json::from_value::<Vec<String>>(known).ok());
                let mut variables = known.unwrap_or_default();
                variables.retain(|variable| variable.split('=').next() != Some(name));
                variables.extend(self.value.as_str().map(str::to_owned));
                config.insert("Env".into(), json!(variables));
            }
            ("Labels", Some((name, value))) => {
                let known = config.remove("Labels");
                let mut labels = known.and_then(|known| known.as_object().cloned()).unwrap_or_default();
                labels.insert(name.into(), value.into());
                config.insert("Labels".into(), labels.into());
            }
            _ => {
                config.insert(self.key.into(), self.value.clone());
            }
        }
    }
}

/// A JSON list of words, or a line for the shell.
fn list(text: &str) -> Result<Value> {
    if !text.starts_with('[') {
        return Ok(json!(["/bin/sh", "-c", text]));
    }
    let words: Vec<String> = serde_json::from_str(text).with_context(|| format!("{text}: no list of words in JSON"))?;
    Ok(json!(words))
}

/// Does it.
///
/// # Errors
/// What is no container, a name that is taken, and what the pool answers.
pub fn commit(context: &Context, arguments: &CommitArguments) -> Result<()> {
    let (container, image) = (arguments.container.text()?, arguments.image.text()?);
    let client = context.client()?;
    let volume = client.volume(&container)?;
    ensure!(!volume.snapshot, "{container} is a snapshot, which is an image or none already");
    let held = client.attributes(&container)?;
    let all = layers::known(&client)?;
    let base = all.iter().find(|known| Some(known.volume.uuid) == volume.origin_uuid && known.is_image());
    let base = base.with_context(|| {
        format!("{container} was not started from an image that is still there; take a snapshot with plywood snapshot create")
    })?;
    let command = labels::text(&held, labels::CONTAINER_COMMAND);
    let configuration = configuration(&base.attributes, &base.volume.name, arguments, command.as_deref())?;
    let parsed = serde_json::from_slice(&configuration).context("the image's configuration")?;
    let number = labels::text(&base.attributes, labels::LAYER).and_then(|text| text.parse::<u64>().ok()).unwrap_or(1);
    let mut attributes: Attributes = [
        (labels::CONFIGURATION.to_owned(), Bytes(labels::configuration_to_keep(&configuration, &parsed)?)),
        (labels::SOURCE.to_owned(), format!("commit of {container}").as_str().into()),
        (labels::LAYER.to_owned(), (number + 1).to_string().as_str().into()),
        (labels::BELOW.to_owned(), base.volume.uuid.to_string().as_str().into()),
    ]
    .into();
    if let Some(filesystem) = base.attributes.get(labels::FILESYSTEM) {
        attributes.insert(labels::FILESYSTEM.to_owned(), filesystem.clone());
    }
    let to_hold = if arguments.no_freeze { &[] } else { slice::from_ref(&volume) };
    let held = hold_still(to_hold, "or give --no-freeze")?;
    let taken = client.create_snapshot(&container, &image, attributes);
    // Whatever came of it: a file system that stays frozen stops its users.
    held.let_go()?;
    let taken = taken?;
    if context.json {
        let value = json!({"name": taken.name, "uuid": taken.uuid, "layers": number + 1, "base": base.volume.name,
            "own_bytes": volume.own_bytes, "mapped_bytes": taken.mapped_bytes, "size_bytes": taken.size_bytes});
        return Ok(output::json("image", &value)?);
    }
    let own = size::show(volume.own_bytes);
    Ok(output::line(&format!("{image}: {} and {own} that {container} wrote", base.volume.name))?)
}

/// The configuration of the image below, changed.
fn configuration(
    below: &Attributes,
    name: &str,
    arguments: &CommitArguments,
    command: Option<&str>,
) -> Result<Vec<u8>> {
    let mut object = labels::raw_configuration(below, name)?;
    let now = jiff::Timestamp::now().to_string();
    object.insert("created".into(), json!(now));
    if !arguments.change.is_empty() {
        let mut config = object.remove("config").and_then(|config| config.as_object().cloned()).unwrap_or_default();
        arguments.change.iter().for_each(|change| change.apply(&mut config));
        object.insert("config".into(), config.into());
    }
    let by = command.and_then(|command| serde_json::from_str::<Vec<String>>(command).ok()).unwrap_or_default();
    let mut step = json!({"created": now, "created_by": by.join(" ")});
    if let Some(message) = &arguments.message {
        step["comment"] = json!(message);
    }
    // An image without a history may have any number of layers; one step alone would be too few.
    if let Some(history) = object.get_mut("history").and_then(Value::as_array_mut) {
        history.push(step);
    }
    Ok(serde_json::to_vec(&object)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_made_where_they_belong() {
        let mut config = json!({"Env": ["A=1", "B=2"], "Cmd": ["x"]}).as_object().unwrap().clone();
        for change in [
            "CMD [\"run\", \"it\"]",
            "entrypoint exec /init $A",
            "ENV A=3 and more",
            "LABEL a.b=c",
            "WORKDIR /srv",
            "USER web",
        ] {
            Instruction::parse(change).unwrap().apply(&mut config);
        }
        let expected = json!({"Cmd": ["run", "it"], "Entrypoint": ["/bin/sh", "-c", "exec /init $A"],
            "Env": ["B=2", "A=3 and more"], "Labels": {"a.b": "c"}, "WorkingDir": "/srv", "User": "web"});
        assert_eq!(Value::Object(config), expected);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for wrong in ["", "CMD", "CMD [1]", "CMD [\"x\"", "ENV A", "ENV =b", "RUN x", "LABEL", "USER "] {
            assert!(Instruction::parse(wrong).is_err(), "{wrong}");
        }
    }
}
