//! Which file system stands on a device, and how large it believes to be: parsed from the first blocks, nothing else.
//!
//! Used to refuse shrinking a volume below its file system, and to choose mount options. The bytes may be anything.

/// How many bytes from the start [`FileSystem::recognise`] wants to see. The last superblock looked at is btrfs's.
pub const HEAD_BYTES: usize = 128 << 10;

/// A file system and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its name for `mount(2)`.
    pub kind: &'static str,
    /// Size that its superblock states.
    pub size_bytes: u64,
}

impl FileSystem {
    /// Recognises ext2/3/4, xfs and btrfs by the first [`HEAD_BYTES`] of a device. Fewer bytes are all right.
    pub fn recognise(head: &[u8]) -> Option<Self> {
        extended(head).or_else(|| xfs(head)).or_else(|| btrfs(head))
    }
}

/// What a device or file holds, in words, when it is something known.
pub fn describe(head: &[u8]) -> Option<String> {
    if let Some(found) = FileSystem::recognise(head) {
        return Some(format!("a {} file system", found.kind));
    }
    let marks: [(usize, &[u8], &str); 12] = [
        (0, b"LUKS\xba\xbe", "a LUKS container"),
        (512, b"LABELONE", "an LVM physical volume"),
        (512, b"EFI PART", "a GPT partition table"),
        (4096 - 10, b"SWAPSPACE2", "swap space"),
        (0, b"QFI\xfb", "a qcow2 image"),
        (0, b"hsqs", "a squashfs file system"),
        (0x8001, b"CD001", "an ISO 9660 file system"),
        (257, b"ustar", "a tar archive"),
        (0, b"\x1f\x8b", "a gzip archive"),
        (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (0x1018, b"\x10\x20\xf5\xf2", "a f2fs file system"),
        (510, b"\x55\xaa", "a boot sector or partition table"),
    ];
    let found = marks.iter().find(|(offset, mark, _)| bytes(head, *offset, mark.len()) == Some(mark));
    found.map(|(_, _, words)| (*words).to_owned())
}

/// What a kind of file system is mounted with on a volume, unless other options are given.
pub fn mount_options(kind: &str) -> &'static str {
    match kind {
        // A clone carries its origin's uuid; xfs would refuse the second.
        "xfs" => "discard,nouuid",
        "btrfs" => "discard=async",
        _ => "discard",
    }
}

/// The superblock of ext2/3/4 at byte 1024, as `fs/ext4/ext4.h` has it.
fn extended(head: &[u8]) -> Option<FileSystem> {
    let superblock = bytes(head, 1024, 1024)?;
    if u16_le(superblock, 0x38)? != 0xef53 {
        return None;
    }
    // The block size is 1024 << this; ext4 knows 1 KiB to 64 KiB.
    let shift = u32_le(superblock, 0x18)?;
    if shift > 6 {
        return None;
    }
    let (compatible, incompatible) = (u32_le(superblock, 0x5c)?, u32_le(superblock, 0x60)?);
    let wide = incompatible & 0x80 != 0;
    let high = if wide { u64::from(u32_le(superblock, 0x150)?) << 32 } else { 0 };
    let blocks = u64::from(u32_le(superblock, 4)?) | high;
    // ext4 from 64bit (0x80), extents (0x40) or flexible groups (0x200) on; else a journal makes it ext3.
    let kind = match (incompatible & 0x2c0 != 0, compatible & 4 != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    Some(FileSystem { kind, size_bytes: blocks.checked_mul(1024 << shift)? })
}

/// The superblock of XFS at byte 0, big-endian, as `fs/xfs/libxfs/xfs_format.h` has it.
fn xfs(head: &[u8]) -> Option<FileSystem> {
    if bytes(head, 0, 4)? != b"XFSB" {
        return None;
    }
    let block_bytes = u32::from_be_bytes(bytes(head, 4, 4)?.try_into().ok()?);
    let blocks = u64::from_be_bytes(bytes(head, 8, 8)?.try_into().ok()?);
    (512..=65536).contains(&block_bytes).then_some(())?;
    Some(FileSystem { kind: "xfs", size_bytes: blocks.checked_mul(u64::from(block_bytes))? })
}

/// The superblock of btrfs at byte 65536. Its own device's size stands in the embedded `dev_item`.
fn btrfs(head: &[u8]) -> Option<FileSystem> {
    let superblock = bytes(head, 65536, 4096)?;
    if bytes(superblock, 0x40, 8)? != b"_BHRfS_M" {
        return None;
    }
    let size_bytes = u64::from_le_bytes(bytes(superblock, 0xc9 + 8, 8)?.try_into().ok()?);
    Some(FileSystem { kind: "btrfs", size_bytes })
}

fn bytes(from: &[u8], offset: usize, len: usize) -> Option<&[u8]> {
    from.get(offset..)?.get(..len)
}

fn u16_le(from: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes(from, offset, 2)?.try_into().ok()?))
}

fn u32_le(from: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes(from, offset, 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Command;

    use super::*;

    #[test]
    fn arbitrary_bytes_are_nothing_and_no_panic() {
        assert_eq!(FileSystem::recognise(&[]), None);
        assert_eq!(FileSystem::recognise(&vec![0; HEAD_BYTES]), None);
        for len in [1, 1023, 1024, 1100, 2047, 65536, 65540, HEAD_BYTES] {
            assert_eq!(FileSystem::recognise(&vec![0xff; len]), None, "{len} bytes");
        }
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let mut head = vec![0; HEAD_BYTES];
        head[..4].copy_from_slice(b"XFSB");
        head[4..8].copy_from_slice(&65536_u32.to_be_bytes());
        head[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(FileSystem::recognise(&head), None);
    }

    /// Asks the real mkfs programs; one that is not installed is skipped with a line.
    #[test]
    fn what_mkfs_makes_is_recognised_with_its_size() {
        let size_bytes = 320_u64 << 20;
        let cases = [
            ("ext4", "mkfs.ext4", vec!["-q", "-F"]),
            ("ext4", "mkfs.ext4", vec!["-q", "-F", "-b", "1024", "-O", "^64bit"]),
            ("ext2", "mkfs.ext2", vec!["-q", "-F"]),
            ("xfs", "mkfs.xfs", vec!["-q", "-f"]),
            ("btrfs", "mkfs.btrfs", vec!["-q", "-f"]),
        ];
        for (kind, program, arguments) in cases {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(size_bytes).unwrap();
            match Command::new(program).args(&arguments).arg(file.path()).output() {
                Ok(output) => assert!(output.status.success(), "{program}: {output:?}"),
                Err(error) => {
                    println!("skipped {kind}: {program}: {error}");
                    continue;
                }
            }
            let mut head = vec![0; HEAD_BYTES];
            file.reopen().unwrap().read_exact(&mut head).unwrap();
            assert_eq!(FileSystem::recognise(&head), Some(FileSystem { kind, size_bytes }), "{arguments:?}");
            assert_eq!(describe(&head), Some(format!("a {kind} file system")));
        }
    }
}
