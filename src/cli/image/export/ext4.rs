//! Reads the metadata of an ext4 file system from its blocks: enough to tell which files some blocks are of.
//!
//! Layout: `Documentation/filesystems/ext4` of Linux 6.12. What is not known here is refused, never guessed at, and whoever
//! asked takes the way by the mounted trees instead. All that is read may be damaged: every count and address is held
//! against its bound, and nothing read makes a loop go on for longer than the file system is large.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::Advice;

pub(super) const BLOCK_BYTES: usize = 4096;
/// The root directory's inode.
pub(super) const ROOT: u32 = 2;
const RESIZE: u32 = 7;

const MAGIC: u16 = 0xef53;
const EXTENT_MAGIC: u16 = 0xf30a;
const INCOMPAT_FILETYPE: u32 = 0x2;
/// A journal is to be replayed, or the file system is mounted.
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_EXTENTS: u32 = 0x40;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_FLEX_BG: u32 = 0x200;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const INCOMPAT_LARGEDIR: u32 = 0x4000;
const INCOMPAT_KNOWN: u32 = INCOMPAT_FILETYPE
    | INCOMPAT_RECOVER
    | INCOMPAT_EXTENTS
    | INCOMPAT_64BIT
    | INCOMPAT_FLEX_BG
    | INCOMPAT_CSUM_SEED
    | INCOMPAT_LARGEDIR;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const COMPAT_ORPHAN_FILE: u32 = 0x1000;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_GDT_CSUM: u32 = 0x10;
const RO_COMPAT_BIGALLOC: u32 = 0x200;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const GROUP_BLOCKS_UNINIT: u16 = 0x2;
const INODE_EXTENTS: u32 = 0x8_0000;
const INODE_TYPE: u16 = 0xf000;
const TYPE_DIRECTORY: u16 = 0x4000;
const TYPE_FILE: u16 = 0x8000;
const TYPE_LINK: u16 = 0xa000;
/// Deepest tree of extents.
const DEPTH_MAX: u16 = 5;
/// Largest directory that is read.
const DIRECTORY_BYTES_MAX: u64 = 1 << 30;
/// Most groups, which take 40 bytes each in memory: 128 TiB.
const GROUPS_MAX: u64 = 1 << 20;
/// Blocks kept in memory (32 MiB).
const CACHE_BLOCKS: usize = 8192;

type Block = Rc<[u8; BLOCK_BYTES]>;

/// A file system by its device, which is only read.
pub(in super::super) struct Ext4 {
    file: File,
    cache: RefCell<HashMap<u64, Block>>,
    read_blocks: Cell<u64>,
    /// Blocks of the file system.
    pub(in super::super) blocks: u64,
    blocks_per_group: u64,
    inodes_per_group: u32,
    inode_bytes: usize,
    first_inode: u32,
    orphan_file: u32,
    descriptor_bytes: usize,
    counts_unused_inodes: bool,
    is_sparse: bool,
    reserved_descriptor_blocks: u64,
    /// Whether its journal is to be replayed, or it is mounted.
    pub(super) is_unclean: bool,
    groups: Vec<Group>,
    /// Where inode tables begin, and of which groups they are, ascending. Those of neighbouring groups stand together
    /// (flex_bg), not in the groups' own places.
    tables: Vec<(u64, usize)>,
}

struct Group {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    unused_inodes: u32,
    is_blocks_uninit: bool,
}

/// An inode, parsed as far as needed.
pub(super) struct Inode {
    pub(super) number: u32,
    mode: u16,
    pub(super) links: u16,
    flags: u32,
    pub(super) generation: u32,
    size_bytes: u64,
    attribute_block: u64,
    data: [u8; 60],
    /// All of it but the time of last access and the checksum.
    compared: Vec<u8>,
}

impl Inode {
    /// Whether it stands for something that has a name.
    pub(super) fn is_used(&self) -> bool {
        self.mode != 0 && self.links > 0
    }

    pub(super) fn is_directory(&self) -> bool {
        self.mode & INODE_TYPE == TYPE_DIRECTORY
    }

    /// Whether it says the same, the time of last access aside.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.compared == other.compared
    }

    /// Without what [`is_same`](Self::is_same) needs: of a million there is nothing else to be kept.
    pub(super) fn compared_already(self) -> Self {
        Self { compared: Vec::new(), ..self }
    }

    fn has_extents(&self) -> bool {
        self.flags & INODE_EXTENTS != 0
    }
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Named {
    pub(super) name: Vec<u8>,
    pub(super) inode: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn wide(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Ext4 {
    /// Opens the file system on a device or in a file.
    ///
    /// # Errors
    /// It is none, is damaged, or has features that are not known here.
    pub(in super::super) fn open(device: &Path) -> Result<Self> {
        let file = File::open(device).with_context(|| device.display().to_string())?;
        // What stands beside a block that is wanted is seldom wanted.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
        let mut start = [0; BLOCK_BYTES];
        file.read_exact_at(&mut start, 0).context("superblock")?;
        let superblock = &start[1024..2048];
        ensure!(u16_at(superblock, 0x38) == MAGIC, "not an ext4 file system");
        let (compat, incompat) = (u32_at(superblock, 0x5c), u32_at(superblock, 0x60));
        let read_only = u32_at(superblock, 0x64);
        let wanted = INCOMPAT_FILETYPE | INCOMPAT_EXTENTS;
        ensure!(
            u32_at(superblock, 0x4c) >= 1
                && u32_at(superblock, 0x18) == 2
                && incompat & !INCOMPAT_KNOWN == 0
                && incompat & wanted == wanted
                && compat & COMPAT_SPARSE_SUPER2 == 0
                && read_only & RO_COMPAT_BIGALLOC == 0,
            "has features that are not known here"
        );
        let is_wide = incompat & INCOMPAT_64BIT != 0;
        let descriptor_bytes = if is_wide { usize::from(u16_at(superblock, 0xfe)) } else { 32 };
        let mut found = Self {
            file,
            cache: RefCell::default(),
            read_blocks: Cell::new(1),
            blocks: wide(u32_at(superblock, 0x4), if is_wide { u32_at(superblock, 0x150) } else { 0 }),
            blocks_per_group: u32_at(superblock, 0x20).into(),
            inodes_per_group: u32_at(superblock, 0x28),
            inode_bytes: u16_at(superblock, 0x58).into(),
            first_inode: u32_at(superblock, 0x54),
            orphan_file: if compat & COMPAT_ORPHAN_FILE == 0 { 0 } else { u32_at(superblock, 0x280) },
            descriptor_bytes,
            counts_unused_inodes: read_only & (RO_COMPAT_GDT_CSUM | RO_COMPAT_METADATA_CSUM) != 0,
            is_sparse: read_only & RO_COMPAT_SPARSE_SUPER != 0,
            reserved_descriptor_blocks: u16_at(superblock, 0xce).into(),
            is_unclean: incompat & INCOMPAT_RECOVER != 0,
            groups: Vec::new(),
            tables: Vec::new(),
        };
        ensure!(
            matches!(descriptor_bytes, 32 | 64)
                && matches!(found.inode_bytes, 128 | 256 | 512 | 1024)
                && (1..=8 * BLOCK_BYTES as u64).contains(&found.blocks_per_group)
                && (1..=8 * BLOCK_BYTES as u32).contains(&found.inodes_per_group)
                && (found.inodes_per_group as usize * found.inode_bytes).is_multiple_of(BLOCK_BYTES)
                && (11..=1024).contains(&found.first_inode)
                && (1..1 << 36).contains(&found.blocks),
            "superblock is damaged"
        );
        found.read_groups()?;
        Ok(found)
    }

    fn read_groups(&mut self) -> Result<()> {
        let count = self.blocks.div_ceil(self.blocks_per_group);
        let inodes = count.saturating_mul(self.inodes_per_group.into());
        ensure!(count <= GROUPS_MAX && inodes <= u32::MAX.into(), "superblock is damaged");
        for group in 0..count {
            let at = group as usize * self.descriptor_bytes;
            let block = self.block(1 + (at / BLOCK_BYTES) as u64)?;
            let bytes = &block[at % BLOCK_BYTES..][..self.descriptor_bytes];
            let high = |at: usize| if bytes.len() < 64 { 0 } else { u32_at(bytes, at) };
            let unused = if bytes.len() < 64 { 0 } else { u32::from(u16_at(bytes, 0x32)) << 16 };
            let unused_inodes = u32::from(u16_at(bytes, 0x1c)) | unused;
            let group = Group {
                block_bitmap: wide(u32_at(bytes, 0x0), high(0x20)),
                inode_bitmap: wide(u32_at(bytes, 0x4), high(0x24)),
                inode_table: wide(u32_at(bytes, 0x8), high(0x28)),
                unused_inodes: if self.counts_unused_inodes { unused_inodes } else { 0 },
                is_blocks_uninit: self.counts_unused_inodes && u16_at(bytes, 0x12) & GROUP_BLOCKS_UNINIT != 0,
            };
            let table_end = group.inode_table.saturating_add(self.table_blocks());
            ensure!(
                group.block_bitmap.max(group.inode_bitmap) < self.blocks
                    && table_end <= self.blocks
                    && group.unused_inodes <= self.inodes_per_group,
                "descriptor of a group is damaged"
            );
            self.groups.push(group);
        }
        self.tables = self.groups.iter().enumerate().map(|(number, group)| (group.inode_table, number)).collect();
        self.tables.sort_unstable();
        Ok(())
    }

    /// Blocks of a group's inode table.
    fn table_blocks(&self) -> u64 {
        (self.inodes_per_group as usize * self.inode_bytes / BLOCK_BYTES) as u64
    }

    fn inodes_per_block(&self) -> u32 {
        (BLOCK_BYTES / self.inode_bytes) as u32
    }

    /// Whether structures stand at the same places in another.
    pub(super) fn is_laid_out_as(&self, other: &Self) -> bool {
        let of = |one: &Self| (one.blocks, one.blocks_per_group, one.inodes_per_group, one.inode_bytes);
        of(self) == of(other) && self.tables == other.tables
    }

    /// Blocks read so far.
    pub(super) fn read_blocks(&self) -> u64 {
        self.read_blocks.get()
    }

    fn block(&self, number: u64) -> Result<Block> {
        if let Some(block) = self.cache.borrow().get(&number) {
            return Ok(Rc::clone(block));
        }
        let mut bytes = [0; BLOCK_BYTES];
        let at = number.checked_mul(BLOCK_BYTES as u64).filter(|_| number < self.blocks);
        let at = at.with_context(|| format!("block {number} is outside of the file system"))?;
        self.file.read_exact_at(&mut bytes, at).with_context(|| format!("block {number}"))?;
        self.read_blocks.set(self.read_blocks.get() + 1);
        let block = Rc::new(bytes);
        let mut cache = self.cache.borrow_mut();
        if cache.len() >= CACHE_BLOCKS {
            cache.clear();
        }
        cache.insert(number, Rc::clone(&block));
        Ok(block)
    }

    /// The group and place in its table of an inode.
    fn place_of(&self, number: u32) -> Result<(usize, u32)> {
        let index = number.checked_sub(1).context("inode 0")?;
        let group = (index / self.inodes_per_group) as usize;
        ensure!(group < self.groups.len(), "inode {number} is outside of the file system");
        Ok((group, index % self.inodes_per_group))
    }

    /// The inode of that number, used or not.
    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        let (group, index) = self.place_of(number)?;
        let at = index as usize * self.inode_bytes;
        let block = self.block(self.groups[group].inode_table + (at / BLOCK_BYTES) as u64)?;
        Ok(self.parse(number, &block[at % BLOCK_BYTES..][..self.inode_bytes]))
    }

    fn parse(&self, number: u32, bytes: &[u8]) -> Inode {
        let mut compared = bytes.to_vec();
        // Access time, checksum, and the parts of both in the larger inode.
        compared[0x8..0xc].fill(0);
        compared[0x7c..0x7e].fill(0);
        if bytes.len() > 0x90 {
            compared[0x82..0x84].fill(0);
            compared[0x8c..0x90].fill(0);
        }
        let mut data = [0; 60];
        data.copy_from_slice(&bytes[0x28..0x64]);
        Inode {
            number,
            mode: u16_at(bytes, 0x0),
            links: u16_at(bytes, 0x1a),
            flags: u32_at(bytes, 0x20),
            generation: u32_at(bytes, 0x64),
            size_bytes: wide(u32_at(bytes, 0x4), u32_at(bytes, 0x6c)),
            attribute_block: wide(u32_at(bytes, 0x68), u16_at(bytes, 0x76).into()),
            data,
            compared,
        }
    }

    /// The inodes that a block of the inode tables holds; none for another block.
    pub(super) fn inodes_at(&self, block: u64) -> Option<Range<u32>> {
        let before = self.tables.partition_point(|(start, _)| *start <= block);
        let (start, group) = *self.tables.get(before.checked_sub(1)?)?;
        if block - start >= self.table_blocks() {
            return None;
        }
        let in_block = self.inodes_per_block();
        let first = group as u32 * self.inodes_per_group + (block - start) as u32 * in_block + 1;
        Some(first..first + in_block)
    }

    /// Where the inode tables are of the groups from `first` on.
    pub(in super::super) fn tables_from(&self, first: usize) -> Vec<Range<u64>> {
        self.groups.iter().skip(first).map(|group| group.inode_table..group.inode_table + self.table_blocks()).collect()
    }

    /// The inode tables, ascending.
    pub(super) fn tables(&self) -> Vec<Range<u64>> {
        self.tables.iter().map(|(start, _)| *start..start + self.table_blocks()).collect()
    }

    /// What says where things are, and what is of no file: superblocks, descriptors, bitmaps, and inode tables.
    pub(super) fn administration(&self) -> Vec<Range<u64>> {
        let mut ranges = self.tables();
        let descriptors = (self.groups.len() * self.descriptor_bytes).div_ceil(BLOCK_BYTES) as u64;
        for (number, group) in self.groups.iter().enumerate() {
            for bitmap in [group.block_bitmap, group.inode_bitmap] {
                ranges.push(bitmap..bitmap + 1);
            }
            if !self.is_sparse || has_backup(number as u64) {
                let start = number as u64 * self.blocks_per_group;
                ranges.push(start..start + 1 + descriptors + self.reserved_descriptor_blocks);
            }
        }
        ranges
    }

    /// Inodes of the file system's own: the journal, quotas, and others without a name.
    pub(super) fn own_inodes(&self) -> impl Iterator<Item = u32> + use<> {
        let orphans = (self.orphan_file != 0).then_some(self.orphan_file);
        (1..self.first_inode).filter(|number| *number != ROOT).chain(orphans)
    }

    /// Whether no file has a block.
    pub(super) fn is_free(&self, block: u64) -> Result<bool> {
        let (group, index) = ((block / self.blocks_per_group) as usize, (block % self.blocks_per_group) as usize);
        let Some(group) = self.groups.get(group) else { return Ok(true) };
        if group.is_blocks_uninit {
            return Ok(true);
        }
        Ok(self.block(group.block_bitmap)?[index / 8] & 1 << (index % 8) == 0)
    }

    /// Shows the blocks of a file: content, the nodes of its tree, and the block of its attributes.
    pub(super) fn blocks_of(&self, inode: &Inode, mut each: impl FnMut(Range<u64>)) -> Result<()> {
        if inode.attribute_block != 0 {
            each(inode.attribute_block..inode.attribute_block + 1);
        }
        if inode.has_extents() {
            return self.extents(inode, |_, blocks| {
                each(blocks);
                Ok(())
            });
        }
        if inode.number == RESIZE {
            // Its blocks are descriptors to come; the one that lists them stands elsewhere.
            inode.data.chunks_exact(4).map(|bytes| u32_at(bytes, 0)).filter(|block| *block != 0).for_each(|block| {
                each(block.into()..u64::from(block) + 1);
            });
            return Ok(());
        }
        let has_none = match inode.mode & INODE_TYPE {
            TYPE_LINK => inode.size_bytes < 60,
            TYPE_DIRECTORY | TYPE_FILE => inode.size_bytes == 0 && inode.data == [0; 60],
            _ => true,
        };
        ensure!(has_none, "inode {} is mapped block by block", inode.number);
        Ok(())
    }

    /// Goes through the extents in their order, each with its place in the file, and the blocks of the tree above them, which
    /// have none.
    fn extents(&self, inode: &Inode, mut each: impl FnMut(Option<u64>, Range<u64>) -> Result<()>) -> Result<()> {
        let (depth, root) = pointers(&inode.data)?;
        ensure!(depth <= DEPTH_MAX, "tree of extents is too deep");
        let mut waiting = vec![(depth, root.into_iter())];
        let (mut next_logical, mut nodes) = (0, 0);
        while let Some((depth, left)) = waiting.last_mut() {
            let (depth, Some(pointer)) = (*depth, left.next()) else {
                waiting.pop();
                continue;
            };
            ensure!(pointer.logical >= next_logical, "extents are out of order");
            let end = pointer.start.checked_add(pointer.blocks).filter(|end| *end <= self.blocks);
            let blocks = pointer.start..end.context("an extent is outside of the file system")?;
            if depth == 0 {
                next_logical = pointer.logical + pointer.blocks;
                each(Some(pointer.logical), blocks)?;
                continue;
            }
            nodes += 1;
            ensure!(nodes <= self.blocks, "tree of extents has no end");
            let (below, children) = pointers(&self.block(pointer.start)?[..])?;
            // With an extent in each the walk gets on.
            ensure!(below + 1 == depth && !children.is_empty(), "tree of extents is damaged");
            each(None, blocks)?;
            waiting.push((below, children.into_iter()));
        }
        Ok(())
    }

    /// What a directory holds.
    pub(super) fn directory(&self, inode: &Inode) -> Result<Directory> {
        ensure!(inode.is_directory() && inode.has_extents(), "inode {} is no directory", inode.number);
        ensure!(inode.size_bytes <= DIRECTORY_BYTES_MAX, "directory {} is too large", inode.number);
        let end = inode.size_bytes / BLOCK_BYTES as u64;
        let mut directory = Directory::default();
        self.extents(inode, |logical, blocks| {
            let Some(logical) = logical else { return Ok(()) };
            for (index, block) in blocks.enumerate() {
                if logical + index as u64 >= end {
                    break;
                }
                directory.take(&self.block(block)?[..]).with_context(|| format!("directory {}", inode.number))?;
            }
            Ok(())
        })?;
        ensure!(directory.parent != 0, "directory {} has no parent", inode.number);
        Ok(directory)
    }

    /// The numbers of all inodes.
    pub(super) fn inodes(&self) -> Range<u32> {
        1..self.groups.len() as u32 * self.inodes_per_group + 1
    }

    /// Whether the group of an inode has never come to use it.
    pub(super) fn was_never_used(&self, number: u32) -> Result<bool> {
        let (group, _) = self.place_of(number)?;
        Ok(!self.inodes_of(group).contains(&number))
    }

    /// The inodes of each group that may be in use.
    pub(in super::super) fn groups(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        (0..self.groups.len()).map(|group| self.inodes_of(group))
    }

    fn inodes_of(&self, group: usize) -> Range<u32> {
        let first = group as u32 * self.inodes_per_group + 1;
        first..first + self.inodes_per_group - self.groups[group].unused_inodes
    }
}

/// What stands in a directory, `.` and `..` aside.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// The inode of the directory that it is in.
    pub(super) parent: u32,
    pub(super) names: Vec<Named>,
}

impl Directory {
    /// Takes what a block of the directory holds; the nodes of its index look like empty ones.
    fn take(&mut self, block: &[u8]) -> Result<()> {
        let mut at = 0;
        while at + 8 <= block.len() {
            let (inode, length) = (u32_at(block, at), usize::from(u16_at(block, at + 4)));
            let name_length = usize::from(block[at + 6]);
            ensure!(
                length >= 8 && length.is_multiple_of(4) && at + length <= block.len() && name_length + 8 <= length,
                "an entry is damaged"
            );
            let name = &block[at + 8..at + 8 + name_length];
            match name {
                _ if inode == 0 => {}
                b"" | b"." => {}
                b".." => self.parent = inode,
                _ => self.names.push(Named { name: name.to_vec(), inode }),
            }
            at += length;
        }
        Ok(())
    }
}

struct Pointer {
    logical: u64,
    start: u64,
    blocks: u64,
}

/// The depth of a node of a tree of extents, and what it points to.
fn pointers(node: &[u8]) -> Result<(u16, Vec<Pointer>)> {
    let (magic, count, depth) = (u16_at(node, 0), usize::from(u16_at(node, 2)), u16_at(node, 6));
    ensure!(magic == EXTENT_MAGIC && count <= (node.len() - 12) / 12, "tree of extents is damaged");
    let pointers = node[12..].chunks_exact(12).take(count).map(|bytes| {
        let logical = u32_at(bytes, 0).into();
        if depth > 0 {
            return Pointer { logical, start: wide(u32_at(bytes, 4), u16_at(bytes, 8).into()), blocks: 1 };
        }
        // Above 32768 stands for blocks that are allocated and not written.
        let length = u16_at(bytes, 4);
        let blocks = if length > 0x8000 { length - 0x8000 } else { length };
        Pointer { logical, start: wide(u32_at(bytes, 8), u16_at(bytes, 6).into()), blocks: blocks.into() }
    });
    Ok((depth, pointers.collect()))
}

/// Groups 0 and 1, and powers of 3, 5 and 7, have a copy of superblock and descriptors (sparse_super).
fn has_backup(group: u64) -> bool {
    let is_power = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power)
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use super::*;

    /// A file system made of a directory, without being mounted.
    pub(in super::super) fn image(content: &Path) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let mut make = Command::new("mkfs.ext4");
        make.args(["-q", "-F", "-b", "4096", "-d"]).arg(content).arg(file.path());
        let said = make.output().expect("mkfs.ext4");
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        file
    }

    fn names_below(ext4: &Ext4, directory: u32, path: &Path, found: &mut BTreeMap<std::path::PathBuf, u32>) {
        let content = ext4.directory(&ext4.inode(directory).unwrap()).unwrap();
        for Named { name, inode } in content.names {
            let path = path.join(std::str::from_utf8(&name).unwrap());
            let below = ext4.inode(inode).unwrap();
            assert!(below.is_used());
            found.insert(path.clone(), inode);
            if below.is_directory() {
                assert_eq!(ext4.directory(&below).unwrap().parent, directory);
                names_below(ext4, inode, &path, found);
            }
        }
    }

    #[test]
    fn tree_is_read_as_it_was_made() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
        fs::create_dir(folder.path().join("many")).unwrap();
        for number in 0..1200 {
            fs::write(folder.path().join(format!("many/a name of some length {number:0100}")), b"x").unwrap();
        }
        fs::write(folder.path().join("a/large"), vec![7; 3 << 20]).unwrap();
        std::os::unix::fs::symlink("a/b", folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("x".repeat(200), folder.path().join("long link")).unwrap();
        let file = image(folder.path());
        let ext4 = Ext4::open(file.path()).unwrap();
        let mut found = BTreeMap::new();
        names_below(&ext4, ROOT, Path::new(""), &mut found);
        assert!(found.remove(Path::new("lost+found")).is_some());
        let expected = walkdir::WalkDir::new(folder.path()).min_depth(1).into_iter().map(Result::unwrap);
        let expected: Vec<_> =
            expected.map(|entry| entry.path().strip_prefix(folder.path()).unwrap().to_owned()).collect();
        assert_eq!(found.len(), expected.len());
        assert!(expected.iter().all(|path| found.contains_key(path)));
        let mut blocks = 0;
        let large = ext4.inode(found[Path::new("a/large")]).unwrap();
        ext4.blocks_of(&large, |range| blocks += range.end - range.start).unwrap();
        assert!(blocks >= 768, "{blocks}");
        ext4.blocks_of(&large, |range| assert!(range.into_iter().all(|block| !ext4.is_free(block).unwrap()))).unwrap();
        for number in ext4.own_inodes() {
            ext4.blocks_of(&ext4.inode(number).unwrap(), |_| ()).unwrap();
        }
        assert_eq!(fs::metadata(folder.path()).unwrap().nlink() as u16 + 1, ext4.inode(ROOT).unwrap().links);
    }

    /// Every byte of the metadata changed, one at a time: an answer or an error, and an end.
    #[test]
    fn damage_ends_in_an_error_or_an_answer() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("d/f"), vec![1; 9000]).unwrap();
        let file = image(folder.path());
        let ext4 = Ext4::open(file.path()).unwrap();
        let root = ext4.inode(ROOT).unwrap();
        let table = ext4.groups[0].inode_table * BLOCK_BYTES as u64;
        let mut places: Vec<u64> = (1024..1024 + 0x160).chain(4096..4096 + 64).collect();
        places.extend(table..table + 16 * ext4.inode_bytes as u64);
        ext4.blocks_of(&root, |range| places.extend(range.start * 4096..range.start * 4096 + 128)).unwrap();
        for at in places {
            let mut byte = [0];
            file.as_file().read_exact_at(&mut byte, at).unwrap();
            for changed in [!byte[0], byte[0] ^ 1, 0xff] {
                file.as_file().write_all_at(&[changed], at).unwrap();
                if let Ok(ext4) = Ext4::open(file.path()) {
                    for number in 1..16 {
                        let Ok(inode) = ext4.inode(number) else { continue };
                        let _ = ext4.blocks_of(&inode, |_| ());
                        let _ = ext4.directory(&inode);
                    }
                    let _ = ext4.administration();
                }
            }
            file.as_file().write_all_at(&byte, at).unwrap();
        }
    }

    #[test]
    fn copies_of_the_superblock_are_where_they_are() {
        let with: Vec<u64> = (0..60).filter(|group| has_backup(*group)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49]);
    }
}
