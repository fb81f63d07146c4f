//! Two layers of an image that say all that layers can: what is in the lower one, and what the upper one makes of that.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::command::run;
use super::tree::Tree;

/// `security.capability` of a program that may use raw sockets (`cap_net_raw+ep`).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// In the lower layer: one for each way in which the upper one changes something. All of it stands in one directory, since
/// containerd's overlayfs gives the directories above what is in a layer, where these are not in it, the time of unpacking.
pub fn fill(root: &Path) {
    let at = |name: &str| root.join("data").join(name);
    for folder in ["kept", "gone/deep", "replaced/old", "file-now/old"] {
        fs::create_dir_all(at(folder)).expect("a folder");
    }
    let within = ["kept/file", "gone/deep/file", "replaced/file", "replaced/old/file", "file-now/old/file"];
    let changed = [
        "changed",
        "empty",
        "old",
        "mode",
        "owner",
        "noted",
        "capable",
        "linked",
        "gone-file",
        "folder-now",
        "socket-now",
    ];
    for name in within.into_iter().chain(changed).chain(["same"]) {
        fs::write(at(name), name.repeat(1000)).expect("a file");
    }
    symlink("same", at("pointer")).expect("a link");
}

/// All that a layer can say of a name.
pub fn change(root: &Path) {
    let at = |name: &str| root.join("data").join(name);
    fs::write(at("changed"), "something else").expect("a file");
    fs::write(at("empty"), "").expect("a file");
    fs::write(at("new"), "new").expect("a file");
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::options().write(true).open(at("old")).and_then(|file| file.set_modified(time)).expect("a time");
    fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o6711)).expect("a mode");
    fs::set_permissions(at("kept"), fs::Permissions::from_mode(0o1777)).expect("a mode of a folder");
    // Larger than the octal digits of a tar's header hold.
    chown(at("owner"), Some(3_000_000), Some(70_000)).expect("an owner");
    xattr::set(at("noted"), "user.note", b"a\nb\0c").expect("an attribute");
    xattr::set(at("kept"), "user.note", b"of a folder").expect("an attribute");
    xattr::set(at("capable"), "security.capability", &CAPABILITY).expect("an attribute");
    fs::remove_file(at("pointer")).expect("a link");
    symlink("nowhere/".repeat(30), at("pointer")).expect("a long link");
    lchown(at("pointer"), Some(1000), Some(1001)).expect("an owner of a link");
    fs::hard_link(at("linked"), at("another-link")).expect("a link to what was there");
    run("mkfifo", [at("pipe").as_os_str()]).expect();
    run("mknod", [at("node").as_os_str(), "c".as_ref(), "1".as_ref(), "3".as_ref()]).expect();
    fs::remove_file(at("gone-file")).expect("a file");
    fs::remove_dir_all(at("gone")).expect("a folder");
    // The same name, and nothing of what was below it.
    fs::remove_dir_all(at("replaced")).expect("a folder");
    fs::create_dir(at("replaced")).expect("a folder");
    fs::write(at("replaced/new"), "new").expect("a file");
    fs::remove_dir_all(at("file-now")).expect("a folder");
    fs::write(at("file-now"), "a file").expect("a file");
    fs::remove_file(at("folder-now")).expect("a file");
    fs::create_dir(at("folder-now")).expect("a folder");
    fs::write(at("folder-now/file"), "in a folder").expect("a file");
    // No layer holds a socket: what was there before it has gone all the same.
    fs::remove_file(at("socket-now")).expect("a file");
    drop(UnixListener::bind(at("socket-now")).expect("a socket"));
}

/// What others find in such layers whose tree is `tree` here.
pub fn without_sockets(mut tree: Tree) -> Tree {
    tree.remove(Path::new("data/socket-now")).expect("the socket");
    tree
}
