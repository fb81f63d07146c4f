//! `tools/install`: what it puts somewhere it takes away again, and nothing names another prefix.

use std::fs;
use std::path::{Path, PathBuf};

use crate::scratch::Scratch;
use crate::support::command::{binary, run};

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // A link to nowhere is a file of ours, too.
        if entry.file_type().expect("a type").is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn installed_files_name_their_prefix_and_are_all_taken_away() {
    let scratch = Scratch::empty();
    let root = scratch.path("root");
    let (script, program) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tools/install"), binary());
    let destination =
        ["--prefix".to_owned(), "/opt/plywood".to_owned(), "--destdir".to_owned(), root.display().to_string()];
    let install = |more: &[String]| run(script, destination.iter().chain(more).cloned().collect::<Vec<_>>()).expect();
    install(&["--program".to_owned(), program.display().to_string()]);
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    for path in [
        "opt/plywood/lib/systemd/system/plywood@.service",
        "opt/plywood/lib/systemd/system/plywood-docker@.service",
        "opt/plywood/lib/udev/rules.d/60-loop-plywood.rules",
    ] {
        let text = text(path);
        assert!(text.contains("/opt/plywood/bin/plywood") && !text.contains("/usr/bin/plywood"), "{path}:\n{text}");
    }
    for helper in ["sbin/mount.plywood", "sbin/umount.plywood"] {
        assert_eq!(fs::read_link(root.join(helper)).expect(helper), Path::new("/opt/plywood/bin/plywood"));
    }
    assert!(text("opt/plywood/share/man/man1/plywood-attach.1").contains(".TH"));
    run(&root.join("opt/plywood/bin/plywood").display().to_string(), ["--version"]).expect();

    // An administrator's file stays.
    let settings = root.join("etc/plywood/pools.d/main.conf");
    fs::write(&settings, "PLYWOOD_POOL=/srv/main.pool\n").expect("a file");
    install(&["--uninstall".to_owned()]);
    assert_eq!(files_below(&root), [settings]);
}
