//! What a volume is asked for: the options of `docker volume create -o KEY=VALUE`.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::cli::image::Filesystem;
use crate::cli::size;

/// The options, understood. They are kept with the volume: the same again is the same volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Virtual size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// The snapshot or image that it begins as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The file system, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<String>,
    /// Most own bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// It goes away with its last mount.
    pub ephemeral: bool,
}

/// What there is, for those who ask for something else.
const KNOWN: &str = "size=SIZE, from=SNAPSHOT|IMAGE, fs=ext4|xfs|btrfs, quota=SIZE, ephemeral=true|false";

impl Options {
    /// Reads them.
    ///
    /// # Errors
    /// An option that is not known, a value that cannot be read, and options that do not go together.
    pub fn read(given: &BTreeMap<String, String>) -> Result<Self> {
        let mut options = Self::default();
        for (key, value) in given {
            match key.as_str() {
                "size" => options.size_bytes = Some(bytes(key, value)?),
                "quota" => options.quota_bytes = Some(bytes(key, value)?),
                "from" if value.is_empty() => bail!("from= names no snapshot or image"),
                "from" => options.from = Some(value.clone()),
                "fs" => options.fs = Some(filesystem(value)?.to_string()),
                "ephemeral" => options.ephemeral = truth(key, value)?,
                _ => bail!("there is no option {:?}; there are {KNOWN}", short(key)),
            }
        }
        ensure!(
            options.from.is_none() || options.fs.is_none(),
            "fs= does not go with from=: a clone has the file system of what it is cloned from"
        );
        Ok(options)
    }

    /// The file system to make.
    pub fn filesystem(&self) -> Result<Filesystem> {
        self.fs.as_deref().map_or(Ok(Filesystem::default()), filesystem)
    }

    /// As they were given.
    pub fn describe(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        words.extend(self.size_bytes.map(|bytes| format!("size={bytes}")));
        words.extend(self.from.as_ref().map(|from| format!("from={from}")));
        words.extend(self.fs.as_ref().map(|fs| format!("fs={fs}")));
        words.extend(self.quota_bytes.map(|bytes| format!("quota={bytes}")));
        words.extend(self.ephemeral.then(|| "ephemeral=true".into()));
        if words.is_empty() { "no options".into() } else { words.join(" ") }
    }
}

fn bytes(key: &str, value: &str) -> Result<u64> {
    match size::parse(value) {
        Ok(0) => bail!("{key}=0 leaves no room; give more, or leave {key}= out"),
        Ok(bytes) => Ok(bytes),
        Err(reason) => bail!("{key}={:?}: {reason}", short(value)),
    }
}

fn filesystem(value: &str) -> Result<Filesystem> {
    Filesystem::from_str(value, true).map_err(|_| anyhow!("fs={:?}: there are ext4, xfs and btrfs", short(value)))
}

fn truth(key: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        // `-o ephemeral` alone is an empty value.
        "" | "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => bail!("{key}={:?}: give true or false", short(value)),
    }
}

/// The head of what somebody sent, for a message.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<Options> {
        Options::read(&given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn options_are_read_and_kept_as_they_are() {
        let options = read(&[("size", "2G"), ("fs", "XFS"), ("quota", "512M"), ("ephemeral", "true")]).unwrap();
        assert_eq!(options.size_bytes, Some(2 << 30));
        assert_eq!(options.filesystem().unwrap(), Filesystem::Xfs);
        assert_eq!(options.quota_bytes, Some(512 << 20));
        assert!(options.ephemeral);
        let kept = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<Options>(&kept).unwrap(), options);
        assert_eq!(options.describe(), "size=2147483648 fs=xfs quota=536870912 ephemeral=true");
        assert_eq!(Options::default().describe(), "no options");
    }

    #[test]
    fn same_size_in_other_words_is_the_same() {
        let options = ["1073741824", "1048576K", "1024M", "1G", "1GiB"].map(|size| read(&[("size", size)]).unwrap());
        assert!(options.iter().all(|same| *same == options[0]));
        assert_eq!(read(&[("ephemeral", "false")]).unwrap(), Options::default());
        assert!(read(&[("ephemeral", "")]).unwrap().ephemeral);
    }

    #[test]
    fn refusals_say_what_there_is() {
        for (given, word) in [
            (vec![("sise", "1G")], "size=SIZE"),
            (vec![("size", "big")], "10G"),
            (vec![("size", "0")], "no room"),
            (vec![("size", "-1")], "10G"),
            (vec![("fs", "ntfs")], "ext4"),
            (vec![("from", "")], "from="),
            (vec![("ephemeral", "perhaps")], "true or false"),
            (vec![("from", "a"), ("fs", "xfs")], "does not go with"),
            (vec![("o", "uid=1000")], "there is no option"),
        ] {
            let error = read(&given).unwrap_err().to_string();
            assert!(error.contains(word), "{given:?}: {error}");
        }
    }
}
