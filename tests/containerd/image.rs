//! Images for a real containerd, put together by umoci as others leave them: this machine's shell and what it needs, and what
//! a test lays beside or over that.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::support::command::{run, shell};
use crate::support::pool::TestPool;

/// Name of what is imported, whatever it holds.
pub const NAME: &str = "example.invalid/small:test";
/// Import under that name: the tag stands in the archive.
pub const IMPORT: &str = "image import --snapshotter plywood --base-name example.invalid/small";
/// What stands in /greeting of those that have one.
pub const GREETING: &str = "hello from the second layer\n";
/// What a container finds to run.
const PROGRAMS: &str = "sh cat ls rm sleep";

/// An image in an OCI layout, with the roots of its layers beside it.
pub struct Image {
    folder: PathBuf,
}

impl Image {
    /// One layer, `system`: this machine's shell and what it needs, and what `more` puts beside them.
    #[track_caller]
    pub fn create(pool: &TestPool, name: &str, more: impl FnOnce(&Path)) -> Self {
        let image = Self { folder: pool.folder().join(name) };
        fs::create_dir_all(&image.folder).expect("a folder");
        run("umoci", ["init", "--layout", &image.layout()]).expect();
        run("umoci", ["new", "--image", &image.tag()]).expect();
        image.add_layer("system", |root| {
            let shown = root.display();
            shell(&format!(
                "set -eu; cd '{shown}'; mkdir -p bin root proc sys dev tmp etc; \
                 programs=$(for name in {PROGRAMS}; do command -v $name; done); cp -L $programs bin/; \
                 cp -L --parents $(ldd $programs | grep -o '/[^ :]*\\.so[^ :]*' | sort -u) .; \
                 echo 12 >etc/debian_version"
            ))
            .expect();
            more(root);
        });
        image
    }

    /// Two layers, the second with the greeting alone.
    #[track_caller]
    pub fn small(pool: &TestPool) -> Self {
        let image = Self::create(pool, "image", |_| ());
        let greeting = image.folder.join("greeting");
        fs::write(&greeting, GREETING).expect("a file");
        let greeting = greeting.display().to_string();
        run("umoci", ["insert", "--image", &image.tag(), &greeting, "/greeting"]).expect();
        image
    }

    /// Adds a layer of what `fill` makes in an empty folder.
    #[track_caller]
    pub fn add_layer(&self, name: &str, fill: impl FnOnce(&Path)) {
        let root = self.root(name);
        fs::create_dir(&root).expect("a folder");
        fill(&root);
        let layer = archive_of(&root.display().to_string());
        run("umoci", ["raw", "add-layer", "--image", &self.tag(), &layer]).expect();
    }

    /// What a layer was made of.
    pub fn root(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn layout(&self) -> String {
        self.folder.join("layout").display().to_string()
    }

    fn tag(&self) -> String {
        format!("{}:test", self.layout())
    }

    /// The archive, as `skopeo copy` leaves it.
    #[track_caller]
    pub fn archive(&self) -> String {
        archive_of(&self.layout())
    }
}

/// All of a folder as a tar beside it.
#[track_caller]
pub fn archive_of(folder: &str) -> String {
    let archive = format!("{folder}.tar");
    run("tar", ["-C", folder, "-cf", &archive, "."]).expect();
    archive
}

/// A file that takes all its bytes in a pool, and hardly any in a compressed layer.
#[track_caller]
pub fn filler(path: &Path, mebibytes: usize) {
    let text = "y\n".repeat(1 << 19);
    let mut file = File::create(path).expect("a file");
    for _ in 0..mebibytes {
        file.write_all(text.as_bytes()).expect("writing it");
    }
}
