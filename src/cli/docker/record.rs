//! What the plugin keeps in the attributes of a volume: what it was asked for, and the ids of its mounts.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::options::Options;
use crate::daemon::attributes::{DOCKER_MOUNTS, DOCKER_OPTIONS, EPHEMERAL};
use crate::daemon::protocol::{Attributes, Bytes};

/// [`EPHEMERAL`] of a volume whose creation has not ended.
pub const UNFINISHED: &str = "docker-create";
/// [`EPHEMERAL`] of a volume that goes with its last mount.
pub const THROWN_AWAY: &str = "docker";
/// Most mounts of one volume.
const MOUNTS: usize = 512;

/// What a volume's attributes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it was asked for.
    pub options: Options,
    /// Its creation has not ended: it is not there yet.
    pub unfinished: bool,
    /// It goes with its last mount.
    pub ephemeral: bool,
    /// The mounts, of this boot. They mean nothing where the volume is not mounted.
    pub mounts: Mounts,
    /// There are mounts, of this boot or another.
    pub was_mounted: bool,
}

impl Record {
    /// What the attributes say. None: it is no volume of Docker's.
    pub fn read(attributes: &Attributes, boot: &str) -> Option<Self> {
        let options = attributes.get(DOCKER_OPTIONS)?;
        let ephemeral = attributes.get(EPHEMERAL).map(|value| value.0.as_slice());
        let mounts: Option<Mounts> = attributes.get(DOCKER_MOUNTS).map(|value| {
            // Damaged, it names nobody: then there are none.
            serde_json::from_slice(&value.0).unwrap_or_default()
        });
        Some(Self {
            options: serde_json::from_slice(&options.0).unwrap_or_default(),
            unfinished: ephemeral == Some(UNFINISHED.as_bytes()),
            ephemeral: ephemeral == Some(THROWN_AWAY.as_bytes()),
            was_mounted: mounts.is_some(),
            mounts: mounts.filter(|mounts| mounts.boot == boot).unwrap_or_else(|| Mounts::none(boot)),
        })
    }
}

/// The ids under which a volume is mounted. A set: Docker and Podman may say the same twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounts {
    /// The boot that they are of: no mount outlives one.
    boot: String,
    /// The ids.
    pub ids: BTreeSet<String>,
}

impl Mounts {
    /// None, in this boot.
    pub fn none(boot: &str) -> Self {
        Self { boot: boot.to_owned(), ids: BTreeSet::new() }
    }

    /// One more.
    ///
    /// # Errors
    /// When there are too many.
    pub fn add(&mut self, id: &str) -> Result<()> {
        ensure!(
            self.ids.len() < MOUNTS || self.ids.contains(id),
            "it is mounted {MOUNTS} times already; remove containers that are not needed"
        );
        self.ids.insert(id.to_owned());
        Ok(())
    }

    /// As an attribute.
    ///
    /// # Errors
    /// None that is known.
    pub fn encode(&self) -> Result<Bytes> {
        Ok(Bytes(serde_json::to_vec(self)?))
    }
}

/// The id of this boot.
///
/// # Errors
/// When the kernel does not say it.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).context(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(pairs: &[(&str, &str)]) -> Attributes {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), Bytes::from(*value))).collect()
    }

    #[test]
    fn ids_are_a_set_of_one_boot() {
        let mut mounts = Mounts::none("boot 1");
        for id in ["a", "b", "a"] {
            mounts.add(id).unwrap();
        }
        let kept = String::from_utf8(mounts.encode().unwrap().0).unwrap();
        let found = attributes(&[(DOCKER_OPTIONS, "{\"size_bytes\":4096}"), (DOCKER_MOUNTS, &kept)]);
        let record = Record::read(&found, "boot 1").unwrap();
        assert_eq!(record.mounts.ids.iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(record.options.size_bytes, Some(4096));
        // After a reboot they are of nobody, and it is known that there were some.
        let later = Record::read(&found, "boot 2").unwrap();
        assert!(later.mounts.ids.is_empty() && later.was_mounted);
    }

    #[test]
    fn volumes_of_others_and_unfinished_ones_are_told_apart() {
        assert_eq!(Record::read(&attributes(&[(EPHEMERAL, "mount")]), "b"), None);
        let of = |mark| Record::read(&attributes(&[(DOCKER_OPTIONS, "{}"), (EPHEMERAL, mark)]), "b").unwrap();
        assert!(of(UNFINISHED).unfinished && !of(UNFINISHED).ephemeral);
        assert!(of(THROWN_AWAY).ephemeral && !of(THROWN_AWAY).unfinished);
        assert!(!of("mount").ephemeral && !of("mount").unfinished);
    }

    #[test]
    fn damaged_attributes_are_no_panic() {
        let record = Record::read(&attributes(&[(DOCKER_OPTIONS, "x"), (DOCKER_MOUNTS, "[7]")]), "b").unwrap();
        assert!(record.mounts.ids.is_empty() && record.options == Options::default());
    }

    #[test]
    fn mounts_are_bounded() {
        let mut mounts = Mounts::none("b");
        for number in 0..MOUNTS {
            mounts.add(&number.to_string()).unwrap();
        }
        assert!(mounts.add("one more").is_err());
        mounts.add("7").unwrap();
        // With the longest ids they still fit among the attributes.
        let mut long = Mounts::none("b");
        (0..MOUNTS).for_each(|number| long.add(&format!("{number:0>255}")).unwrap());
        assert!(long.encode().unwrap().0.len() < 192 << 10);
    }
}
