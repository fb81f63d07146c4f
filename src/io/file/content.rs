//! What a file or device holds already, so that creating a pool destroys nothing by mistake.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// How much of each end is looked at.
const SNIFFED_BYTES: u64 = 1 << 20;

/// Signatures by offset from the start. The first that fits names the content.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"plyw", "a plywood pool"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an xfs file system"),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs file system"),
    (0, b"hsqs", "a squashfs file system"),
    (1024, b"\xe2\xe1\xf5\xe0", "an erofs file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of a RAID array"),
    (4086, b"SWAPSPACE2", "swap space"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (512, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "a boot sector or partition table"),
];

/// Says what the first or last MiB of a file of `size_bytes` holds; none when both are all zeros.
pub(super) fn sniff(file: &File, size_bytes: u64) -> io::Result<Option<&'static str>> {
    let mut head = vec![0; size_bytes.min(SNIFFED_BYTES) as usize];
    file.read_exact_at(&mut head, 0)?;
    for &(offset, signature, name) in SIGNATURES {
        if head.get(offset..).is_some_and(|rest| rest.starts_with(signature)) {
            return Ok(Some(name));
        }
    }
    if head.iter().any(|&byte| byte != 0) {
        return Ok(Some("data"));
    }
    let mut tail = head;
    file.read_exact_at(&mut tail, size_bytes - size_bytes.min(SNIFFED_BYTES))?;
    Ok(tail.iter().any(|&byte| byte != 0).then_some("data"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sniff_bytes(size_bytes: u64, offset: u64, bytes: &[u8]) -> Option<&'static str> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size_bytes).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        sniff(&file, size_bytes).unwrap()
    }

    #[test]
    fn known_content_is_named() {
        for &(offset, signature, name) in SIGNATURES {
            assert_eq!(sniff_bytes(4 << 20, offset as u64, signature), Some(name));
        }
    }

    #[test]
    fn any_byte_at_either_end_is_content_and_zeros_are_not() {
        assert_eq!(sniff_bytes(4 << 20, 1234, b"x"), Some("data"));
        assert_eq!(sniff_bytes(4 << 20, (4 << 20) - 1, b"x"), Some("data"));
        assert_eq!(sniff_bytes(3, 2, b"x"), Some("data"));
        assert_eq!(sniff_bytes(4 << 20, 0, &[0; 4096]), None);
        assert_eq!(sniff_bytes(0, 0, b""), None);
    }
}
