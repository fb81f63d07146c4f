//! Layers with every hard case, unpacked onto a plain directory. Most need root (owners, devices).

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};

use super::*;

/// A directory with the tree in `root` and something that must not be touched beside it.
struct Place {
    place: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("root")).unwrap();
        std::fs::create_dir(place.path().join("outside")).unwrap();
        std::fs::write(place.path().join("outside/victim"), "untouched").unwrap();
        Self { place }
    }

    fn outside(&self) -> PathBuf {
        self.place.path().join("outside")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join("root").join(name)
    }

    fn apply(&self, layer: &Layer) -> Result<Summary> {
        let outcome = apply_archive(tree::open_root(&self.path(""))?, layer.bytes().as_slice());
        let names: Vec<_> =
            std::fs::read_dir(self.outside()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["victim"], "something was made outside the root");
        assert_eq!(std::fs::read(self.outside().join("victim")).unwrap(), b"untouched");
        let victim = self.outside().join("victim").metadata().unwrap();
        assert_eq!((victim.nlink(), victim.mode() & 0o7777), (1, 0o644));
        let (summary, end) = outcome?;
        assert_eq!(end, End::Marked);
        Ok(summary)
    }

    fn refuses(&self, layer: &Layer, message: &str) {
        let error = format!("{:#}", self.apply(layer).unwrap_err());
        assert!(error.contains(message), "{error}");
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }
}

/// A layer being written, header by header: `tar::Builder` would tidy up the names that matter here.
#[derive(Default)]
struct Layer {
    bytes: Vec<u8>,
    mode: Option<u32>,
}

impl Layer {
    fn raw(mut self, kind: EntryType, name: &[u8], link: &[u8], content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        for (field, value) in [(0, name), (157, link)] {
            assert!(value.len() <= 100);
            header.as_mut_bytes()[field..field + value.len()].copy_from_slice(value);
        }
        let mode = if kind == EntryType::Directory { 0o755 } else { 0o644 };
        header.set_mode(self.mode.take().unwrap_or(mode));
        header.set_uid(12);
        header.set_gid(34);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.raw(EntryType::Regular, name.as_bytes(), b"", content.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.raw(EntryType::Directory, name.as_bytes(), b"", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(EntryType::Link, name.as_bytes(), target.as_bytes(), b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while body + length.to_string().len() != length {
                length = body + length.to_string().len();
            }
            content.extend([format!("{length} {key}=").as_bytes(), value, b"\n"].concat());
        }
        self.raw(EntryType::XHeader, b"pax", b"", &content)
    }

    fn bytes(&self) -> Vec<u8> {
        [self.bytes.as_slice(), &[0; 1024]].concat()
    }
}

fn layer() -> Layer {
    Layer::default()
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        io::Write::write_all(&mut io::stdout(), b"skipped: needs root\n").unwrap();
    }
    root
}

#[test]
fn ordinary_layer_has_content_owner_mode_and_times() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let summary = place
        .apply(&layer().mode(0o750).directory("d/").mode(0o4755).file("d/f", "hello").symlink("d/l", "f"))
        .unwrap();
    assert_eq!((summary.entries, summary.content_bytes), (3, 5));
    for (name, mode) in [("d", 0o750), ("d/f", 0o4755)] {
        let metadata = place.path(name).symlink_metadata().unwrap();
        assert_eq!(metadata.mode() & 0o7777, mode, "{name}");
        assert_eq!((metadata.uid(), metadata.gid()), (12, 34), "{name}");
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1_000_000_000, 0), "{name}");
    }
    let link = place.path("d/l").symlink_metadata().unwrap();
    assert_eq!((link.uid(), link.mtime()), (12, 1_000_000_000));
    assert_eq!(place.read("d/l"), "hello");
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["../outside/new", "a/../../outside/new", "..", "a/b/../../../outside/victim"] {
        Place::new().refuses(&layer().file(name, "x"), "climbs out of the root");
    }
    Place::new().refuses(&layer().directory("../outside/new/"), "climbs out of the root");
    Place::new().refuses(&layer().file("a/../../.wh.victim", ""), "climbs out of the root");
}

#[test]
fn absolute_names_start_at_the_root_of_the_tree() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let absolute = format!("{}/new", place.outside().display());
    place.apply(&layer().file(&absolute, "inside").file("a/./b//../c", "tidied")).unwrap();
    assert_eq!(place.read(absolute.trim_start_matches('/')), "inside");
    assert_eq!(place.read("a/c"), "tidied");
}

#[test]
fn file_through_a_link_that_leaves_the_root_is_refused() {
    let place = Place::new();
    let outside = place.outside().display().to_string();
    place.refuses(&layer().symlink("l", &outside).file("l/new", "x"), "symbolic link");
    Place::new().refuses(&layer().symlink("l", "../outside").file("l/new", "x"), "climbs out of the root");
    Place::new().refuses(&layer().symlink("l", "../outside").directory("l/new/"), "climbs out of the root");
    // A whiteout through it must not remove anything either.
    Place::new().refuses(&layer().symlink("l", "../outside").file("l/.wh.victim", ""), "climbs out of the root");
    Place::new().refuses(&layer().symlink("l", "../outside").file("l/.wh..wh..opq", ""), "climbs out of the root");
    // The race: a directory that the reader has been in turns into a link.
    let race = layer().directory("d/").file("d/one", "1").symlink("d", "../outside").file("d/new", "x");
    Place::new().refuses(&race, "climbs out of the root");
    // Link by link, each innocent alone.
    let steps = layer().directory("a/").symlink("a/up", "..").symlink("b", "a/up/../outside").file("b/new", "x");
    Place::new().refuses(&steps, "climbs out of the root");
}

#[test]
fn file_at_the_name_of_a_link_replaces_the_link() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let victim = place.outside().join("victim").display().to_string();
    place.apply(&layer().symlink("l", &victim).file("l", "mine")).unwrap();
    assert!(place.path("l").symlink_metadata().unwrap().is_file());
    assert_eq!(place.read("l"), "mine");
    // A mode, an owner or a time on a link must not reach what it points to.
    place.apply(&layer().mode(0o777).symlink("l", &victim)).unwrap();
}

#[test]
fn links_inside_the_root_are_followed() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let base = layer().directory("usr/").directory("usr/bin/").symlink("bin", "usr/bin").symlink("abs", "/usr/bin");
    place.apply(&base.file("bin/a", "a").file("abs/b", "b")).unwrap();
    assert_eq!((place.read("usr/bin/a").as_str(), place.read("usr/bin/b").as_str()), ("a", "b"));
    assert!(place.path("bin").symlink_metadata().unwrap().is_symlink());
    place.apply(&layer().file("abs/.wh.a", "")).unwrap();
    assert!(!place.exists("usr/bin/a"));
    Place::new().refuses(&layer().symlink("x", "y").symlink("y", "x").file("x/f", ""), "symbolic links");
    Place::new().refuses(&layer().file("f", "").file("f/g", ""), "ot a directory");
}

#[test]
fn hard_links_stay_inside() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.refuses(&layer().hard_link("h", "../outside/victim"), "climbs out of the root");
    place.refuses(&layer().symlink("l", "../outside").hard_link("h", "l/victim"), "climbs out of the root");
    let absolute = place.outside().join("victim").display().to_string();
    place.refuses(&layer().hard_link("h", &absolute), "does not exist");
    place.refuses(&layer().directory("d/").hard_link("h", "d"), "a directory");
    // Onto a link: the link itself gets the further name, not what it points to.
    let place = Place::new();
    place.apply(&layer().symlink("l", "../outside/victim").hard_link("h", "l")).unwrap();
    assert!(place.path("h").symlink_metadata().unwrap().is_symlink());
}

#[test]
fn hard_link_shares_and_replacing_a_file_does_not_write_through_it() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.apply(&layer().file("a", "one").hard_link("b", "/a").hard_link("a", "a")).unwrap();
    assert_eq!(place.path("a").metadata().unwrap().ino(), place.path("b").metadata().unwrap().ino());
    place.apply(&layer().file("a", "two").hard_link("c", "b")).unwrap();
    assert_eq!((place.read("a").as_str(), place.read("b").as_str(), place.read("c").as_str()), ("two", "one", "one"));
}

#[test]
fn whiteouts_remove_what_is_below_and_nothing_of_their_own_layer() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place
        .apply(&layer().file("d/old", "").file("d/deep/er/old", "").file("f", "").file("g", "").file("k/old", ""))
        .unwrap();
    let second = layer()
        .file("d/new", "new")
        .file(".wh.d", "")
        .file(".wh.f", "")
        .file(".wh.absent", "")
        .file("nowhere/.wh.absent", "")
        .file("g", "again")
        .file(".wh.g", "")
        .file(".wh..wh.plnk", "")
        .file("k/.wh.old", "")
        .file("k/old", "again");
    let summary = place.apply(&second).unwrap();
    assert_eq!(summary.whiteouts, 6);
    assert_eq!(place.read("d/new"), "new");
    for gone in ["d/old", "d/deep", "f", "nowhere", ".wh.d", ".wh.f", ".wh..wh.plnk"] {
        assert!(!place.exists(gone), "{gone}");
    }
    assert_eq!((place.read("g").as_str(), place.read("k/old").as_str()), ("again", "again"));
    for name in [".wh.", "d/.wh..", "d/.wh..."] {
        place.refuses(&layer().file(name, ""), "names nothing");
    }
}

#[test]
fn opaque_mark_after_its_siblings_keeps_them() {
    if !is_root() {
        return;
    }
    for opaque_first in [false, true] {
        let place = Place::new();
        place.apply(&layer().file("d/old", "").file("d/sub/old", "").file("d/gone/x", "").file("e", "")).unwrap();
        let second = match opaque_first {
            true => layer().directory("d/").file("d/.wh..wh..opq", "").file("d/sub/new", "").file("d/old", "mine"),
            false => layer().directory("d/").file("d/sub/new", "").file("d/old", "mine").file("d/.wh..wh..opq", ""),
        };
        place.apply(&second).unwrap();
        assert!(place.exists("d/sub/new") && place.exists("e"));
        assert_eq!(place.read("d/old"), "mine");
        assert!(!place.exists("d/sub/old") && !place.exists("d/gone"));
        assert_eq!(place.path("d").metadata().unwrap().mtime(), 1_000_000_000);
    }
}

#[test]
fn whiteout_of_a_name_that_links_to_a_file_of_this_layer_removes_the_name() {
    if !is_root() {
        return;
    }
    // The inode is the layer's own by its new link, the old name is not.
    let place = Place::new();
    place.apply(&layer().file("old", "x")).unwrap();
    place.apply(&layer().hard_link("new", "old").file(".wh.old", "")).unwrap();
    assert!(!place.exists("old"));
    assert_eq!(place.read("new"), "x");
}

#[test]
fn replacing_across_kinds_removes_first() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.apply(&layer().file("a/b/c", "").file("f", "").symlink("l", "a").file("m/keep", "").directory("n/")).unwrap();
    let second =
        layer().file("a", "file").directory("f/").directory("l/").mode(0o700).directory("m/").symlink("n", "f");
    place.apply(&second.file("f/x", "x")).unwrap();
    assert_eq!((place.read("a").as_str(), place.read("f/x").as_str()), ("file", "x"));
    assert!(place.path("l").symlink_metadata().unwrap().is_dir());
    assert!(place.path("n").symlink_metadata().unwrap().is_symlink());
    assert!(place.exists("m/keep"));
    assert_eq!(place.path("m").metadata().unwrap().mode() & 0o777, 0o700);
}

#[test]
fn duplicate_entries_the_last_one_wins() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.apply(&layer().file("a", "1").file("./a", "2").directory("d/").file("d", "3").directory("d/")).unwrap();
    assert_eq!(place.read("a"), "2");
    assert!(place.path("d").is_dir());
}

#[test]
fn devices_and_pipes_are_made() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let nodes = layer().raw(EntryType::Char, b"null", b"", b"").raw(EntryType::Block, b"ram", b"", b"");
    place.apply(&nodes.mode(0o620).raw(EntryType::Fifo, b"pipe", b"", b"")).unwrap();
    let null = place.path("null").metadata().unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    assert!(place.path("ram").metadata().unwrap().file_type().is_block_device());
    let pipe = place.path("pipe").metadata().unwrap();
    assert!(pipe.file_type().is_fifo() && pipe.mode() & 0o777 == 0o620 && pipe.uid() == 12);
    // Mode and owner of a device are changed without opening it, and again over an existing one.
    place.apply(&layer().mode(0o600).raw(EntryType::Char, b"null", b"", b"")).unwrap();
    assert_eq!(place.path("null").metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
fn attributes_survive_the_change_of_owner() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    // cap_net_raw+ep, as `getfattr -n security.capability` shows it; no UTF-8, and with bytes 0 inside.
    let capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let binary = b"\x00\n\xff=\n12 path=x\n";
    let records: &[(&str, &[u8])] =
        &[("SCHILY.xattr.security.capability", capability), ("SCHILY.xattr.user.binary", binary)];
    place
        .apply(
            &layer()
                .pax(records)
                .mode(0o4755)
                .file("ping", "x")
                .pax(&records[1..])
                .directory("d/")
                .pax(&records[1..])
                .symlink("l", "ping"),
        )
        .map(|summary| assert_eq!(summary.attributes_dropped, 1))
        .unwrap();
    let get = |file: &str, name: &str| xattr::get(place.path(file), name).unwrap();
    assert_eq!(get("ping", "security.capability").unwrap(), capability);
    assert_eq!(get("ping", "user.binary").unwrap(), binary);
    assert_eq!(get("d", "user.binary").unwrap(), binary);
    assert_eq!(place.path("ping").metadata().unwrap().mode() & 0o7777, 0o4755);
}

#[test]
fn long_and_odd_names_in_every_format() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let other = format!("{}/{}", "e".repeat(200), "\u{e9}".repeat(100));
    let odd: &[u8] = b"odd \xff\xfe\n\tname";
    let bytes = layer()
        .raw(EntryType::GNULongName, b"././@LongLink", b"", &[long.as_bytes(), b"\0"].concat())
        .file("cut", "gnu")
        .pax(&[("path", other.as_bytes()), ("uid", b"4000000000"), ("mtime", b"12.5")])
        .file("cut", "pax")
        .raw(EntryType::GNULongLink, b"././@LongLink", b"", &[long.as_bytes(), b"\0"].concat())
        .hard_link("link", "cut")
        .raw(EntryType::Regular, odd, b"", b"odd")
        .pax(&[("path", b"\xfe\nodd too")])
        .file("cut", "odd too");
    place.apply(&bytes).unwrap();
    assert_eq!(
        (place.read(&long).as_str(), place.read(&other).as_str(), place.read("link").as_str()),
        ("gnu", "pax", "gnu")
    );
    let metadata = place.path(&other).metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.mtime(), metadata.mtime_nsec()), (4_000_000_000, 12, 500_000_000));
    assert_eq!(std::fs::read(place.path("").join(std::ffi::OsStr::from_bytes(odd))).unwrap(), b"odd");
    assert_eq!(std::fs::read(place.path("").join(std::ffi::OsStr::from_bytes(b"\xfe\nodd too"))).unwrap(), b"odd too");
    place.refuses(&layer().pax(&[("path", b"nul\0byte")]).file("x", ""), "byte 0");
    let too_long = "f".repeat(256);
    place.refuses(&layer().pax(&[("path", too_long.as_bytes())]).file("x", ""), "too long");
}

#[test]
fn zeros_become_holes_and_read_as_zeros() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let mut content = vec![0_u8; 3 << 20];
    content[1 << 20] = 1;
    content.extend([0; 100]);
    place
        .apply(&layer().raw(EntryType::Regular, b"sparse", b"", &content).raw(
            EntryType::Regular,
            b"zeros",
            b"",
            &[0; 8192],
        ))
        .unwrap();
    assert_eq!(std::fs::read(place.path("sparse")).unwrap(), content);
    assert_eq!(std::fs::read(place.path("zeros")).unwrap(), [0; 8192]);
    assert!(place.path("sparse").metadata().unwrap().blocks() < 100);
}

#[test]
fn deep_tree_is_removed_with_few_descriptors() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    // Deeper than the 1024 descriptors a process may have by default.
    let deep = "d/".repeat(1900);
    place.apply(&layer().pax(&[("path", format!("{deep}f").as_bytes())]).file("x", "")).unwrap();
    assert!(place.exists("d/d/d"));
    place.apply(&layer().file(".wh.d", "")).unwrap();
    assert!(!place.exists("d"));
}

#[test]
fn garbage_never_panics_and_never_escapes() {
    if !is_root() {
        return;
    }
    // Whole archives with a few bytes changed, and the header's checksum put right again, so that the change gets
    // through to the unpacking.
    let base =
        layer().directory("d/").file("d/f", "content").symlink("d/l", "../..").hard_link("h", "d/f").file(".wh.x", "");
    let mut random = fastrand::Rng::with_seed(7);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..400 {
        let mut bytes = base.bytes();
        let block = random.usize(..bytes.len() / 512 - 2) * 512;
        for _ in 0..random.usize(1..4) {
            let at = block + random.usize(..345);
            bytes[at] = *random.choice(b"./\0dfl0123456789x\xff".as_slice()).unwrap();
        }
        bytes[block + 148..block + 156].fill(b' ');
        let sum: u32 = bytes[block..block + 512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let place = Place::new();
        let layer = Layer { bytes: bytes[..bytes.len() - 1024].to_vec(), mode: None };
        match place.apply(&layer) {
            Ok(_) => accepted += 1,
            Err(_) => refused += 1,
        }
        assert!(Path::new("/etc/passwd").exists());
    }
    assert!(accepted > 20 && refused > 20, "{accepted} accepted, {refused} refused");
}

#[test]
fn directory_that_is_a_mount_or_link_at_the_root_is_opened_once() {
    if !is_root() {
        return;
    }
    // The root may itself be reached through a link; nothing below is resolved through its path again.
    let place = Place::new();
    let alias = place.place.path().join("alias");
    symlink(place.path(""), &alias).unwrap();
    let root = tree::open_root(&alias).unwrap();
    std::fs::remove_file(&alias).unwrap();
    symlink(place.outside(), &alias).unwrap();
    apply_archive(root, layer().file("f", "x").bytes().as_slice()).unwrap();
    assert_eq!(place.read("f"), "x");
    assert!(!place.outside().join("f").exists());
    assert_eq!(place.path("f").metadata().unwrap().permissions().mode() & 0o777, 0o644);
}
