//! Which names of an ext4 file system its changed blocks are about.
//!
//! The blocks that differ between a file system and a later state of it are: inodes, which are held against what they
//! were; directories, whose names are; content, which is of an inode that has changed as well, since a write sets its times.
//! Where content has changed and its inode has not (a state that was taken while the file system was in use), all inodes
//! are looked through for whose blocks these are. So nothing that has changed is missed, whatever its times say.
//!
//! A changed inode has its name somewhere, which ext4 does not tell of anything but directories. ext4 puts files near
//! their directory: directories are looked at beginning with those whose inodes stand next to the file's. What cannot be
//! told is an error, and the trees are walked instead.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};

use super::changes::{Change, Changes};
use super::ext4::{Directory, Ext4, Inode, Named, ROOT};
use super::ranges::Blocks;

/// Inodes that are looked at for each file whose directory is looked for: those of four groups of the usual size (8 MiB).
const NEIGHBOURS: usize = 32_768;
/// Directories that one may be below; more is a circle.
const DEPTH_MAX: usize = 4096;

/// What is to be said of the names in `new`, of which the blocks in `changed` differ from those of `old`.
///
/// # Errors
/// It cannot be told from the blocks.
pub(super) fn changes(old: &Ext4, new: &Ext4, changed: &Blocks) -> Result<Changes> {
    ensure!(new.is_laid_out_as(old), "the file system was made larger or anew");
    let changed = changed.both(&std::iter::once(0..new.blocks).collect());
    let mut trace = Trace { new, changed: BTreeMap::new(), directories: HashMap::new(), paths: HashMap::new() };
    trace.find_inodes(old, &changed)?;
    trace.find_owners(old, &changed)?;
    trace.find_names(old)
}

/// An inode that has changed, and what it was, if it was anything.
struct Pair {
    old: Option<Inode>,
    new: Inode,
}

struct Trace<'a> {
    new: &'a Ext4,
    /// Inodes that are used now, by their number.
    changed: BTreeMap<u32, Pair>,
    directories: HashMap<u32, Rc<Directory>>,
    paths: HashMap<u32, Vec<u8>>,
}

/// A file of which names are looked for.
struct Wanted {
    links: usize,
    names: HashSet<(u32, Vec<u8>)>,
}

impl Trace<'_> {
    /// The inodes that say something else than they did.
    fn find_inodes(&mut self, old: &Ext4, changed: &Blocks) -> Result<()> {
        for block in changed.both(&self.new.tables().into_iter().collect()).iter() {
            let Some(numbers) = self.new.inodes_at(block) else { continue };
            for number in numbers {
                let (was, is) = (old.inode(number)?, self.new.inode(number)?);
                if is.is_used() && !(was.is_used() && was.is_same(&is)) {
                    self.note(was, is);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, was: Inode, is: Inode) {
        let is_known = was.is_used() && was.generation == is.generation && was.is_directory() == is.is_directory();
        let was = is_known.then(|| was.compared_already());
        self.changed.insert(is.number, Pair { old: was, new: is.compared_already() });
    }

    /// What of `changed` is of no inode that is known to have changed gets its owner looked for.
    fn find_owners(&mut self, old: &Ext4, changed: &Blocks) -> Result<()> {
        let mut known = self.new.administration();
        for number in self.new.own_inodes() {
            for ext4 in [old, self.new] {
                ext4.blocks_of(&ext4.inode(number)?, |range| known.push(range))?;
            }
        }
        for pair in self.changed.values() {
            self.new.blocks_of(&pair.new, |range| known.push(range))?;
            // What a file no longer has may have changed for nobody.
            if let Some(was) = &pair.old {
                old.blocks_of(was, |range| known.push(range))?;
            }
        }
        let rest = changed.without(&known.into_iter().collect());
        let mut left = Vec::new();
        for block in rest.iter() {
            if !self.new.is_free(block)? {
                left.push(block..block + 1);
            }
        }
        let left: Blocks = left.into_iter().collect();
        if left.is_empty() {
            return Ok(());
        }
        tracing::debug!(
            ranges = left.ranges().len(),
            "blocks have changed, and no inode tells: looking for their owners"
        );
        let mut found = Vec::new();
        for numbers in self.new.groups() {
            for number in numbers {
                let inode = self.new.inode(number)?;
                if !inode.is_used() || self.changed.contains_key(&number) {
                    continue;
                }
                let mut is_owner = false;
                self.new.blocks_of(&inode, |range| {
                    if left.meets(&range) {
                        is_owner = true;
                        found.push(range);
                    }
                })?;
                if is_owner {
                    self.note(old.inode(number)?, inode);
                }
            }
        }
        let left = left.without(&found.into_iter().collect());
        ensure!(left.is_empty(), "some changed blocks are of no file: {:?}", left.ranges().first());
        Ok(())
    }

    fn directory(&mut self, number: u32) -> Result<Rc<Directory>> {
        if let Some(directory) = self.directories.get(&number) {
            return Ok(Rc::clone(directory));
        }
        let directory = Rc::new(self.new.directory(&self.new.inode(number)?)?);
        self.directories.insert(number, Rc::clone(&directory));
        Ok(directory)
    }

    /// The path of a directory: names joined by slashes, empty for the root.
    fn path_of(&mut self, number: u32) -> Result<Vec<u8>> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut at = number;
        let known = loop {
            if at == ROOT {
                break Vec::new();
            }
            if let Some(path) = self.paths.get(&at) {
                break path.clone();
            }
            ensure!(names.len() < DEPTH_MAX, "directory {number} is in a circle");
            let parent = self.directory(at)?.parent;
            let above = self.directory(parent)?;
            let named = above.names.iter().find(|named| named.inode == at);
            names.push(named.with_context(|| format!("directory {at} has no name"))?.name.clone());
            at = parent;
        };
        let path = names.into_iter().rev().fold(known, |path, name| join(&path, &name));
        self.paths.insert(number, path.clone());
        Ok(path)
    }

    /// What is to be said of which names.
    fn find_names(&mut self, old: &Ext4) -> Result<Changes> {
        let mut changes = Changes::default();
        let numbers: Vec<u32> = self.changed.keys().copied().filter(|number| *number != ROOT).collect();
        let own: HashSet<u32> = self.new.own_inodes().collect();
        let mut wanted: BTreeMap<u32, Wanted> = BTreeMap::new();
        let mut directories = Vec::new();
        if self.changed.contains_key(&ROOT) {
            directories.push(ROOT);
        }
        for number in numbers.into_iter().filter(|number| !own.contains(number)) {
            let inode = &self.changed[&number].new;
            if inode.is_directory() {
                directories.push(number);
            } else {
                wanted.insert(number, Wanted { links: inode.links.into(), names: HashSet::new() });
            }
        }
        for number in &directories {
            let content = self.directory(*number)?;
            look_for(&mut wanted, *number, &content);
            // One that is new is under a name that is new.
            let Some(was) = &self.changed[number].old else { continue };
            let was: BTreeMap<Vec<u8>, u32> =
                old.directory(was)?.names.into_iter().map(|Named { name, inode }| (name, inode)).collect();
            let is: BTreeMap<&[u8], u32> = content.names.iter().map(|named| (&named.name[..], named.inode)).collect();
            let path = self.path_of(*number)?;
            for name in was.keys().filter(|name| !is.contains_key(&name[..])) {
                changes.add(join(&path, name), Change::Gone);
            }
            for (name, inode) in is {
                let is_made_anew = self.changed.get(&inode).is_some_and(|pair| pair.old.is_none());
                if was.get(name) != Some(&inode) || is_made_anew {
                    let is_directory = self.new.inode(inode)?.is_directory();
                    changes.add(join(&path, name), if is_directory { Change::Tree } else { Change::Entry });
                }
            }
            if *number != ROOT {
                changes.add(path, Change::Entry);
            }
        }
        let seen: HashSet<u32> = directories.into_iter().collect();
        self.search(&mut wanted, seen)?;
        for Wanted { names, .. } in wanted.into_values() {
            for (directory, name) in names {
                let path = self.path_of(directory)?;
                changes.add(join(&path, &name), Change::Entry);
            }
        }
        Ok(changes)
    }

    /// Finds the names of files in directories that have not changed.
    fn search(&mut self, wanted: &mut BTreeMap<u32, Wanted>, mut seen: HashSet<u32>) -> Result<()> {
        let numbers: Vec<u32> = wanted.keys().copied().collect();
        for number in numbers {
            for candidate in around(number, self.new.inodes()).take(NEIGHBOURS) {
                if is_found(&wanted[&number]) {
                    break;
                }
                if seen.contains(&candidate) || self.new.was_never_used(candidate)? {
                    continue;
                }
                let inode = self.new.inode(candidate)?;
                if inode.is_used() && inode.is_directory() {
                    seen.insert(candidate);
                    let content = self.directory(candidate)?;
                    look_for(wanted, candidate, &content);
                }
            }
        }
        // Whatever stands elsewhere: all directories, from the root down.
        if let Some((number, _)) = wanted.iter().find(|(_, wanted)| !is_found(wanted)) {
            tracing::debug!(inode = number, "its directory does not stand near it: looking through all directories");
        }
        let mut waiting = vec![ROOT];
        let mut walked: HashSet<u32> = HashSet::new();
        while let Some(number) = waiting.pop().filter(|_| !wanted.values().all(is_found)) {
            if !walked.insert(number) {
                continue;
            }
            let content = self.new.directory(&self.new.inode(number)?)?;
            look_for(wanted, number, &content);
            for Named { inode, .. } in content.names {
                if self.new.inode(inode)?.is_directory() {
                    waiting.push(inode);
                }
            }
        }
        let lost = wanted.iter().find(|(_, wanted)| !is_found(wanted));
        ensure!(lost.is_none(), "inode {} has fewer names than links", lost.map_or(0, |(number, _)| *number));
        Ok(())
    }
}

fn is_found(wanted: &Wanted) -> bool {
    wanted.names.len() >= wanted.links
}

fn look_for(wanted: &mut BTreeMap<u32, Wanted>, directory: u32, content: &Directory) {
    for Named { name, inode } in &content.names {
        if let Some(wanted) = wanted.get_mut(inode) {
            wanted.names.insert((directory, name.clone()));
        }
    }
}

/// The numbers of a range by how near they are, smaller ones first: a directory is made before what is in it.
fn around(number: u32, range: std::ops::Range<u32>) -> impl Iterator<Item = u32> {
    let below = (range.start..number.min(range.end)).rev();
    let above = number.saturating_add(1).max(range.start)..range.end;
    // Two steps down for one up.
    let (mut below, mut above, mut turn) = (below, above, 0);
    std::iter::from_fn(move || {
        turn += 1;
        let (first, second): (Option<u32>, _) = if turn % 3 == 0 {
            let next = above.next();
            (next, if next.is_none() { below.next() } else { None })
        } else {
            let next = below.next();
            (next, if next.is_none() { above.next() } else { None })
        };
        first.or(second)
    })
}

pub(super) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::super::ext4::BLOCK_BYTES;
    use super::super::ext4::tests::image;
    use super::*;

    /// What is said of a file system to which something was done by debugfs, without being mounted.
    fn changes_by(folder: &std::path::Path, script: &[&str]) -> Vec<(String, Change)> {
        let old = image(folder);
        let new = tempfile::NamedTempFile::new().unwrap();
        fs::copy(old.path(), new.path()).unwrap();
        for line in script {
            let said = Command::new("debugfs").args(["-w", "-R", line]).arg(new.path()).output().expect("debugfs");
            assert!(said.status.success(), "{line}: {}", String::from_utf8_lossy(&said.stderr));
        }
        let (before, after) = (fs::read(old.path()).unwrap(), fs::read(new.path()).unwrap());
        let blocks = before.chunks(BLOCK_BYTES).zip(after.chunks(BLOCK_BYTES)).enumerate();
        let changed: Blocks = blocks
            .filter(|(_, (before, after))| before != after)
            .map(|(block, _)| block as u64..block as u64 + 1)
            .collect();
        let (old, new) = (Ext4::open(old.path()).unwrap(), Ext4::open(new.path()).unwrap());
        changes(&old, &new, &changed).unwrap().all()
    }

    /// debugfs changes directories without a word in their inodes: their blocks alone tell.
    #[test]
    fn names_are_found_by_blocks() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        for name in ["a/b/one", "a/two", "a/three"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        fs::hard_link(folder.path().join("a/three"), folder.path().join("a/b/also three")).unwrap();
        for number in 0..300 {
            fs::write(folder.path().join(format!("a/b/{number}")), "x").unwrap();
        }
        let host = folder.path().join("a/two").display().to_string();
        let write = format!("write {host} /new/file");
        let script = [
            "rm /a/two",
            "mkdir /new",
            write.as_str(),
            "set_inode_field /a/b/one mode 0100600",
            "set_inode_field /a/three mtime 1000",
        ];
        let expected = [
            ("a", Change::Entry),
            ("a/b/also three", Change::Entry),
            ("a/b/one", Change::Entry),
            ("a/three", Change::Entry),
            ("a/two", Change::Gone),
            ("new", Change::Tree),
            ("new/file", Change::Entry),
        ];
        let expected = expected.map(|(name, change)| (name.to_owned(), change));
        assert_eq!(changes_by(folder.path(), &script), expected);
        assert_eq!(changes_by(folder.path(), &[]), []);
        assert_eq!(changes_by(folder.path(), &["set_inode_field /a/b/one atime 77"]), []);
    }

    #[test]
    fn neighbours_come_first_and_all_of_them_come() {
        assert_eq!(around(5, 1..9).collect::<Vec<_>>(), [4, 3, 6, 2, 1, 7, 8]);
        assert_eq!(around(1, 1..4).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(around(9, 1..4).collect::<Vec<_>>(), [3, 2, 1]);
    }
}
