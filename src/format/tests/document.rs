//! `docs/format.md` and the structs say the same.
//!
//! A heading that names a struct in back quotes and its size, and below it a table of offset, size, field and meaning, is
//! what this reads. Both directions are checked: each struct is documented, field by field and in order, and the document
//! has no table for a struct that is not there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::format::attributes::{RawAttributeHeader, RawAttributesHeader};
use crate::format::carcass::{RawCarcass, RawCarcassPage};
use crate::format::checksum::RawSeed;
use crate::format::entry::{RawEntry, RawRoot};
use crate::format::group_descriptor::{RawGroupDescriptor, RawPageRef};
use crate::format::group_index::{RawGroupIndex, RawGroupIndexEntry};
use crate::format::host_claim::RawHostClaim;
use crate::format::journal::{RawBatchHeader, RawStamp, raw_records as records};
use crate::format::layout::Layout;
use crate::format::node::RawNode;
use crate::format::space_map::RawPage;
use crate::format::superblock::{RawGroupIndexRef, RawSuperblock};
use crate::format::volume_record::{RawAccountSpan, RawAttributeBlockRef, RawVolumeRecord};

/// Offset, size and name of each field, one a line, under the size of the whole.
type Structures = BTreeMap<String, String>;

fn describe(size: usize, fields: &[(&str, usize, usize)]) -> String {
    let mut text = format!("{size} bytes");
    for (name, offset, size) in fields {
        write!(text, "\n{offset} {size} {name}").expect("memory");
    }
    text
}

macro_rules! structures {
    ($($type:ty),* $(,)?) => {
        BTreeMap::from([$((
            <$type as Layout>::NAME.to_owned(),
            describe(<$type as Layout>::SIZE, <$type as Layout>::FIELDS),
        )),*])
    };
}

fn in_code() -> Structures {
    structures![
        RawAccountSpan,
        RawAttributeBlockRef,
        RawAttributeHeader,
        RawAttributesHeader,
        RawBatchHeader,
        RawCarcass,
        RawCarcassPage,
        RawEntry,
        RawGroupDescriptor,
        RawGroupIndex,
        RawGroupIndexEntry,
        RawGroupIndexRef,
        RawHostClaim,
        RawNode,
        RawPage,
        RawPageRef,
        RawRoot,
        RawSeed,
        RawStamp,
        RawSuperblock,
        RawVolumeRecord,
        records::RawMap,
        records::RawPoolGrown,
        records::RawRecordHeader,
        records::RawUnmap,
        records::RawVolumeDeleted,
        records::RawVolumeRolledBack,
        records::RawVolumeShared,
    ]
}

/// `RawName` and the number before "bytes" in a heading.
fn structure_heading(line: &str) -> Option<(&str, &str)> {
    let heading = line.strip_prefix('#')?;
    let name = heading.split('`').nth(1).filter(|name| name.starts_with("Raw"))?;
    let size = heading.split_once(" bytes")?.0.rsplit(|character: char| !character.is_ascii_digit()).next()?;
    Some((name, size))
}

fn in_document() -> Structures {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format.md");
    let document = fs::read_to_string(&path).expect("docs/format.md is there");
    let mut structures = Structures::new();
    let mut current: Option<&str> = None;
    for line in document.lines() {
        if line.starts_with('#') {
            current = structure_heading(line).map(|(name, size)| {
                let earlier = structures.insert(name.to_owned(), format!("{size} bytes"));
                assert!(earlier.is_none(), "{name} has two tables");
                name
            });
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some((name, [_, offset, size, field, ..])) = current.zip(cells.get(..5)) else { continue };
        if offset.parse::<usize>().is_ok() && size.parse::<usize>().is_ok() {
            let text = structures.get_mut(name).expect("its heading was read");
            write!(text, "\n{offset} {size} {}", field.trim_matches('`')).expect("memory");
        }
    }
    structures
}

#[test]
fn document_and_structs_agree() {
    let (code, document) = (in_code(), in_document());
    for (name, expected) in &code {
        let found = document.get(name).unwrap_or_else(|| panic!("docs/format.md has no table of {name}"));
        assert_eq!(found, expected, "{name}: left docs/format.md, right the struct");
    }
    for name in document.keys() {
        assert!(code.contains_key(name), "docs/format.md has a table of {name}, which does not exist");
    }
}

/// The list above is complete: every declaration in the sources is in it.
#[test]
fn every_declared_struct_is_compared() {
    fn declared(folder: &Path, names: &mut Vec<String>) {
        for item in fs::read_dir(folder).expect("sources") {
            let path = item.expect("sources").path();
            if path.is_dir() {
                declared(&path, names);
            } else {
                let source = fs::read_to_string(&path).expect("sources");
                let lines = source.lines().map(str::trim).filter(|line| line.starts_with("Raw"));
                names.extend(lines.filter_map(|line| {
                    let (name, size) = line.strip_suffix(" {")?.split_once(": ")?;
                    size.parse::<usize>().is_ok().then(|| name.to_owned())
                }));
            }
        }
    }
    let mut names = Vec::new();
    declared(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/format"), &mut names);
    names.sort();
    assert_eq!(names, in_code().into_keys().collect::<Vec<_>>());
}
