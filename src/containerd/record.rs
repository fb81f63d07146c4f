//! What stands on a volume that is a snapshot of containerd's, and how keys become names of volumes.
//!
//! **The pool is the only truth.** A volume is the snapshot KEY when its name is [`volume_name`]`(KEY)` and it has the
//! attribute [`RECORD`] of that key. Both come with the volume, in one commit. So a rename ends a snapshot at once, also one
//! that is mounted and cannot be deleted yet; and since two volumes cannot have one name, two snapshots cannot have one key.
//!
//! **A commit is one change as well**: a volume of which there is a committed snapshot that says so ([`Record::of`]) is no
//! snapshot of containerd's any more, whatever its own name and attribute say.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{Error, Result};
use super::filter::Fields;

/// The attribute that makes a volume a snapshot of containerd's: a [`Record`] as JSON.
pub const RECORD: &str = "plywood.containerd.snapshot";
/// The label by which containerd finds a layer: its chain id.
pub const REFERENCE: &str = "containerd.io/snapshot.ref";
/// What the names of all volumes begin with that are containerd's, or were made for it.
pub const PREFIX: &str = "containerd-";
/// What the names of volumes begin with that are about to go: removed, committed, or not finished.
pub const GONE: &str = "containerd-gone-";
/// What the names of the formatted, empty file systems begin with.
pub const BASE: &str = "containerd-base-";

/// Longest key or name in bytes.
const KEY_BYTES: usize = 8 << 10;
/// Longest label, key and value together, in bytes: containerd's own bound.
const LABEL_BYTES: usize = 4096;
/// Most bytes of all labels together; a volume has room for 256 KiB of attributes.
const LABELS_BYTES: usize = 128 << 10;
/// Characters of the key that are shown in the name of its volume.
const SHOWN: usize = 80;

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// Kinds of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// To be read only, through a private clone.
    View,
    /// To be written.
    Active,
    /// Final; others are made from it.
    Committed,
}

impl Kind {
    /// Its name in filters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A snapshot as containerd knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Key, or name of what is committed.
    pub key: String,
    /// Name of the snapshot it was made from; empty for none.
    pub parent: String,
    /// What it is.
    pub kind: Kind,
    /// Creation, in nanoseconds since 1970 UTC.
    pub created_ns: u64,
    /// Last change, likewise.
    pub updated_ns: u64,
    /// What its makers have noted on it.
    pub labels: Labels,
    /// File system on it, as mount(2) calls it.
    pub filesystem: String,
    /// On what is committed: the volume that was active until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<Uuid>,
}

impl Record {
    /// Name of its volume.
    pub fn volume(&self) -> String {
        volume_name(&self.key)
    }

    /// As it is written.
    ///
    /// # Errors
    /// Never: it is plain data.
    pub fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::Invalid(format!("snapshot {:?}: {error}", self.key)))
    }

    /// The record of the volume `name`; none when what it holds belongs to another one or is damaged.
    pub fn decode(name: &str, bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|record: &Self| record.volume() == name)
    }
}

impl Fields for Record {
    fn field(&self, path: &[String]) -> Option<&str> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "name" => Some(&self.key),
            "parent" => Some(&self.parent),
            "kind" => Some(self.kind.name()),
            "labels" => self.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

/// Name of the volume of a key. Keys may be long and hold anything, so the digest tells them apart; what follows it is for
/// people. Names that users choose do not look like this by accident, and one that does is in the way of that key only.
pub fn volume_name(key: &str) -> String {
    let digest = blake3::hash(key.as_bytes()).to_hex();
    let plain = |character: char| character.is_ascii_alphanumeric() || matches!(character, '.' | '_' | ':' | '-' | '@');
    let shown: String =
        key.chars().take(SHOWN).map(|character| if plain(character) { character } else { '_' }).collect();
    format!("{PREFIX}{:.40}-{shown}", digest.as_str())
}

/// Refuses keys and names that cannot be kept.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_key(key: &str) -> Result<()> {
    match key.len() {
        0 => Err(Error::Invalid("snapshot key is empty".into())),
        1..=KEY_BYTES => Ok(()),
        length => Err(Error::Invalid(format!("snapshot key of {length} bytes; at most {KEY_BYTES} are allowed"))),
    }
}

/// Refuses labels that cannot be kept.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_labels(labels: &Labels) -> Result<()> {
    let mut total = 0;
    for (key, value) in labels {
        let length = key.len() + value.len();
        if length > LABEL_BYTES {
            let shown: String = key.chars().take(64).collect();
            let words = format!("label {shown:?} has {length} bytes with its value; at most {LABEL_BYTES} are allowed");
            return Err(Error::Invalid(words));
        }
        total += length;
    }
    if total > LABELS_BYTES {
        return Err(Error::Invalid(format!("labels of {total} bytes; at most {LABELS_BYTES} are allowed")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::format::check_name;

    fn record(key: &str) -> Record {
        Record {
            key: key.into(),
            parent: "p".into(),
            kind: Kind::Active,
            created_ns: 1,
            updated_ns: 2,
            labels: [("a.b/c".to_owned(), "d".to_owned())].into(),
            filesystem: "ext4".into(),
            of: None,
        }
    }

    #[test]
    fn every_key_has_a_volume_name_of_its_own() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut names = BTreeSet::new();
        let mut keys: Vec<String> =
            ["a", "a/b", "a_b", "a b", "default/12/sha256:ab", "..", "-x", "\n", "é"].map(String::from).into();
        keys.push("x".repeat(KEY_BYTES));
        keys.push(format!("{}y", "x".repeat(KEY_BYTES - 1)));
        keys.extend((0..500).map(|_| (0..random.usize(1..40)).map(|_| random.char(..)).collect()));
        keys.sort();
        keys.dedup();
        for key in &keys {
            check_key(key).unwrap();
            let name = volume_name(key);
            check_name(&name).unwrap_or_else(|error| panic!("{key:?}: {error}"));
            assert!(name.starts_with(PREFIX) && !name.starts_with(GONE) && !name.starts_with(BASE), "{name}");
            assert_eq!(name, volume_name(key), "the same at any time");
            assert!(names.insert(name), "{key:?} has the name of another key");
        }
        assert_eq!(names.len(), keys.len());
    }

    #[test]
    fn record_is_read_from_its_own_volume_only() {
        let record = record("default/1/x y");
        let bytes = record.encode().unwrap();
        assert_eq!(Record::decode(&record.volume(), &bytes), Some(record.clone()));
        assert_eq!(Record::decode(&format!("{GONE}1"), &bytes), None, "renamed: removed");
        assert_eq!(Record::decode(&record.volume(), b"{}"), None);
    }

    #[test]
    fn fields_are_those_of_filters() {
        let record = record("k");
        let field = |path: &[&str]| {
            let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
            record.field(&path).map(str::to_owned)
        };
        assert_eq!(field(&["name"]).as_deref(), Some("k"));
        assert_eq!(field(&["parent"]).as_deref(), Some("p"));
        assert_eq!(field(&["kind"]).as_deref(), Some("active"));
        assert_eq!(field(&["labels", "a.b/c"]).as_deref(), Some("d"));
        assert_eq!(field(&["labels", "a", "b/c"]).as_deref(), Some("d"), "parts are joined again");
        assert_eq!(field(&["labels"]), None);
        assert_eq!(field(&["size"]), None);
    }

    #[test]
    fn keys_and_labels_have_bounds() {
        assert!(check_key("").is_err());
        assert!(check_key(&"x".repeat(KEY_BYTES + 1)).is_err());
        let label = |key: usize, value: usize| Labels::from([("k".repeat(key), "v".repeat(value))]);
        check_labels(&label(96, 4000)).unwrap();
        assert!(check_labels(&label(97, 4000)).is_err());
        let many: Labels = (0..40).map(|number| (number.to_string(), "v".repeat(4000))).collect();
        assert!(check_labels(&many).is_err());
    }
}
