//! Sources written by hand, so that each thing can be wrong alone, and by the real tools where they are installed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::Command;

use serde_json::{Value, json};

use super::super::stream::sha256_of;
use super::super::tree::open_root;
use super::*;

/// An OCI layout being written.
struct Layout {
    place: tempfile::TempDir,
    entries: Vec<Value>,
}

impl Layout {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("blobs/sha256")).unwrap();
        fs::write(place.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { place, entries: Vec::new() }
    }

    fn path(&self) -> &Path {
        self.place.path()
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replace(':', "/"))
    }

    fn blob(&self, kind: &str, content: &[u8]) -> Value {
        let digest = sha256_of(content);
        fs::write(self.blob_path(&digest), content).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": content.len()})
    }

    /// An image of the given layers; answers the descriptor of its manifest.
    fn image(&self, platform: &str, layers: &[Vec<u8>]) -> Value {
        let (os, architecture) = platform.split_once('/').unwrap();
        let diff_ids: Vec<String> = layers.iter().map(|layer| sha256_of(layer)).collect();
        let configuration = json!({"os": os, "architecture": architecture,
            "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let configuration = self.blob("application/vnd.oci.image.config.v1+json", configuration.to_string().as_bytes());
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| {
                // Of a type that it is not: what counts are its bytes.
                self.blob("application/vnd.oci.image.layer.v1.tar+zstd", &gzip(layer))
            })
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": configuration, "layers": layers});
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())
    }

    fn add(&mut self, tag: &str, mut descriptor: Value) {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.entries.push(descriptor);
        self.write();
    }

    fn write(&self) {
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn open(&self, tag: Option<&str>) -> Result<Image> {
        let source = Source::Oci { directory: self.path().to_owned(), tag: tag.map(str::to_owned) };
        source.open().map(Option::unwrap)
    }

    fn refuses(&self, tag: Option<&str>, message: &str) {
        let error = format!("{:#}", self.open(tag).unwrap_err());
        assert!(error.contains(message), "{error}");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        builder.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Unpacks all layers; answers the files that come out.
fn unpack(image: &Image) -> Result<BTreeMap<String, String>> {
    let place = tempfile::tempdir().unwrap();
    for layer in &image.layers {
        layer.unpack(open_root(place.path())?, &Interrupt::default())?;
    }
    let mut files = BTreeMap::new();
    for found in walkdir::WalkDir::new(place.path()) {
        let found = found?;
        if found.file_type().is_file() {
            let name = found.path().strip_prefix(place.path())?.display().to_string();
            files.insert(name, fs::read_to_string(found.path())?);
        }
    }
    Ok(files)
}

fn two_layers() -> [Vec<u8>; 2] {
    [archive(&[("a", "one"), ("b", "one"), ("c/d", "one")]), archive(&[("a", "two"), (".wh.b", ""), ("e", "two")])]
}

fn expected() -> BTreeMap<String, String> {
    [("a", "two"), ("c/d", "one"), ("e", "two")].map(|(name, text)| (name.to_owned(), text.to_owned())).into()
}

#[test]
fn layout_of_one_image_is_read_without_its_name() {
    let mut layout = Layout::new();
    layout.add("latest", layout.image(&platform(), &two_layers()));
    for tag in [None, Some("latest")] {
        let image = layout.open(tag).unwrap();
        assert_eq!(unpack(&image).unwrap(), expected());
        let configuration = image.configuration.unwrap();
        assert_eq!(configuration.parsed.config().as_ref().unwrap().cmd().as_ref().unwrap(), &["/bin/sh"]);
    }
    layout.refuses(Some("absent"), "there are: latest");
}

#[test]
fn one_of_several_images_must_be_named() {
    let mut layout = Layout::new();
    layout.add("one", layout.image(&platform(), &[archive(&[("a", "1")])]));
    layout.add("two", layout.image(&platform(), &[archive(&[("a", "2")])]));
    layout.refuses(None, "one, two");
    assert_eq!(unpack(&layout.open(Some("two")).unwrap()).unwrap()["a"], "2");
}

#[test]
fn index_leads_to_the_image_for_this_machine() {
    let mut layout = Layout::new();
    let mut entries = Vec::new();
    for platform in ["linux/riscv64".to_owned(), platform()] {
        let mut entry = layout.image(&platform, &[archive(&[("platform", &platform)])]);
        let (os, architecture) = platform.split_once('/').unwrap();
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entries.push(entry);
    }
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries});
    layout.add("both", layout.blob(kind, index.to_string().as_bytes()));
    assert_eq!(unpack(&layout.open(Some("both")).unwrap()).unwrap()["platform"], platform());
    let foreign = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [entries[0]]});
    layout.add("foreign", layout.blob(kind, foreign.to_string().as_bytes()));
    layout.refuses(Some("foreign"), "linux/riscv64, this machine is");
    // Without a word in the index, the configuration tells.
    layout.add("untold", layout.image("linux/s390x", &two_layers()));
    layout.refuses(Some("untold"), "linux/s390x, this machine is");
}

#[test]
fn damage_is_found_wherever_it_is() {
    let fresh = || {
        let mut layout = Layout::new();
        layout.add("x", layout.image(&platform(), &two_layers()));
        layout
    };
    let layout = fresh();
    let manifest = layout.entries[0]["digest"].as_str().unwrap().to_owned();
    let document: Value = serde_json::from_slice(&fs::read(layout.blob_path(&manifest)).unwrap()).unwrap();
    let configuration = document["config"]["digest"].as_str().unwrap().to_owned();
    let layer = document["layers"][1]["digest"].as_str().unwrap().to_owned();
    for digest in [&manifest, &configuration] {
        let layout = fresh();
        let mut bytes = fs::read(layout.blob_path(digest)).unwrap();
        bytes.push(b' ');
        fs::write(layout.blob_path(digest), bytes).unwrap();
        layout.refuses(None, "it is damaged");
    }
    for digest in [&manifest, &configuration, &layer] {
        let layout = fresh();
        fs::remove_file(layout.blob_path(digest)).unwrap();
        layout.refuses(None, "is missing");
    }
    // A layer that is cut short is seen by its length, one that was changed while it is read.
    let layout = fresh();
    let bytes = fs::read(layout.blob_path(&layer)).unwrap();
    fs::write(layout.blob_path(&layer), &bytes[..bytes.len() - 1]).unwrap();
    layout.refuses(None, "cut short");
    fs::write(layout.blob_path(&layer), gzip(&archive(&[("a", "evil")]))).unwrap();
    let outcome = layout.open(None).and_then(|image| unpack(&image));
    assert!(outcome.is_err());
    // Blobs that are as they should be, and layers that are not those of the configuration.
    let layout = fresh();
    let mut forged = document;
    forged["layers"][1] = layout.blob("application/vnd.oci.image.layer.v1.tar", &archive(&[("a", "evil")]));
    let mut layout = layout;
    layout.entries.clear();
    layout.add("forged", layout.blob("application/vnd.oci.image.manifest.v1+json", forged.to_string().as_bytes()));
    let error = format!("{:#}", unpack(&layout.open(None).unwrap()).unwrap_err());
    assert!(error.contains("digest of the uncompressed layer"), "{error}");
}

#[test]
fn what_is_no_image_is_named() {
    let mut layout = Layout::new();
    layout.write();
    layout.refuses(None, "no image");
    let empty = layout.blob("application/vnd.oci.empty.v1+json", b"{}");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let artifact = json!({"schemaVersion": 2, "mediaType": kind, "config": empty, "layers": [empty]});
    layout.add("artifact", layout.blob(kind, artifact.to_string().as_bytes()));
    layout.refuses(None, "an artifact of type");
    fs::write(layout.path().join("index.json"), "{").unwrap();
    layout.refuses(None, "damaged");
    fs::remove_file(layout.path().join("index.json")).unwrap();
    layout.refuses(None, "not an OCI image layout");
    let absent = Source::Oci { directory: "/absent".into(), tag: None };
    assert!(absent.open().unwrap_err().to_string().contains("no such directory"));
}

#[test]
fn digest_that_climbs_out_of_the_layout_is_refused() {
    let mut layout = Layout::new();
    for digest in ["sha256:../../../../etc/passwd", "../x:abc", "sha256:", "sha256:ABC"] {
        layout.entries = vec![json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest, "size": 10})];
        layout.write();
        assert!(layout.open(None).is_err(), "{digest}");
    }
}

/// The archive of `docker save`: the second layer stored before the first, and compressed as a whole or not.
fn docker_archive(layers: &[Vec<u8>; 2], diff_ids: &[String], compressed: bool) -> tempfile::NamedTempFile {
    let (os, architecture) = ("linux", platform().replace("linux/", ""));
    let configuration =
        json!({"os": os, "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
    let name = format!("{}.json", sha256_of(configuration.as_bytes()).replace("sha256:", ""));
    let manifest = json!([{"Config": name, "RepoTags": ["x:1"], "Layers": ["1/layer.tar", "2/layer.tar"]}]).to_string();
    let mut builder = tar::Builder::new(Vec::new());
    let files = [
        ("2/layer.tar", layers[1].as_slice()),
        ("manifest.json", manifest.as_bytes()),
        (&name, configuration.as_bytes()),
        ("1/layer.tar", &layers[0]),
    ];
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, content).unwrap();
    }
    let bytes = builder.into_inner().unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&if compressed { gzip(&bytes) } else { bytes }).unwrap();
    file
}

#[test]
fn docker_archive_is_read_in_the_order_of_its_manifest() {
    let layers = two_layers();
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256_of(layer)).collect();
    for compressed in [false, true] {
        let file = docker_archive(&layers, &diff_ids, compressed);
        let image = Source::DockerArchive(file.path().to_owned()).open().unwrap().unwrap();
        assert_eq!(unpack(&image).unwrap(), expected());
    }
    let swapped: Vec<String> = diff_ids.into_iter().rev().collect();
    let file = docker_archive(&layers, &swapped, false);
    let image = Source::DockerArchive(file.path().to_owned()).open().unwrap().unwrap();
    assert!(unpack(&image).unwrap_err().to_string().contains("layer 1/layer.tar"));
    let none = docker::open(Path::new("/etc/passwd")).unwrap_err();
    assert!(format!("{none:#}").contains("/etc/passwd"));
}

#[test]
fn images_of_umoci_and_skopeo_are_read() {
    let place = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).current_dir(&place).args(arguments).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !rustix::process::geteuid().is_root() || !run("umoci", &["--version"]) || !run("skopeo", &["--version"]) {
        std::io::stdout().write_all(b"skipped: needs root, umoci and skopeo\n").unwrap();
        return;
    }
    fs::create_dir(place.path().join("tree")).unwrap();
    fs::write(place.path().join("tree/inserted"), "by umoci").unwrap();
    assert!(run("umoci", &["init", "--layout", "layout"]));
    assert!(run("umoci", &["new", "--image", "layout:first"]));
    assert!(run("umoci", &["insert", "--image", "layout:first", "tree", "/srv"]));
    fs::write(place.path().join("tree/inserted"), "again").unwrap();
    assert!(run("umoci", &["insert", "--image", "layout:first", "--tag", "second", "tree", "/srv"]));
    let read = |source: &str| {
        let source = Source::parse(OsStr::new(&source.replace('@', &place.path().display().to_string()))).unwrap();
        unpack(&source.open().unwrap().unwrap()).unwrap()
    };
    assert_eq!(read("oci:@/layout:first")["srv/inserted"], "by umoci");
    assert_eq!(read("oci:@/layout:second")["srv/inserted"], "again");
    assert!(run("skopeo", &["--insecure-policy", "copy", "oci:layout:second", "docker-archive:saved.tar:name:1"]));
    assert_eq!(read("docker-archive:@/saved.tar")["srv/inserted"], "again");
    let zstd = ["--insecure-policy", "copy", "--dest-compress-format", "zstd", "oci:layout:second", "oci:zstd:x"];
    assert!(run("skopeo", &zstd));
    assert_eq!(read("oci:@/zstd:x")["srv/inserted"], "again");
}

#[test]
fn directory_is_copied_with_everything_that_is_in_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let script = "mkdir -p d/e && echo x > d/f && ln d/f d/g && ln -s f d/l && mkfifo d/p && mknod d/n c 1 3 \
        && chown 5:6 d/f && chmod 4711 d/f && touch -d @1000000000.25 d/f && touch -d @999 d \
        && setfattr -n user.a -v b d/f 2>/dev/null; echo literal > .wh.x; truncate -s 1M sparse";
    assert!(Command::new("sh").current_dir(&from).args(["-c", script]).status().unwrap().success());
    let image = Source::Directory(from.path().to_owned()).open().unwrap().unwrap();
    image.layers[0].unpack(open_root(to.path()).unwrap(), &Interrupt::default()).unwrap();
    let list = |path: &Path| {
        let script =
            "find . -mindepth 1 -printf '%p %y %m %U %G %s %n %T@ %l\n' | sort; stat -c %t:%T d/n; cat d/g .wh.x";
        Command::new("sh").current_dir(path).args(["-c", script]).output().unwrap().stdout
    };
    assert_eq!(String::from_utf8(list(to.path())).unwrap(), String::from_utf8(list(from.path())).unwrap());
}

#[test]
fn notations_are_told_apart() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("with:colon");
    std::fs::create_dir(&directory).unwrap();
    let parse = |text: String| Source::parse(OsStr::new(&text)).unwrap();
    let shown = directory.display();
    assert_eq!(parse(format!("oci:{shown}")), Source::Oci { directory: directory.clone(), tag: None });
    assert_eq!(
        parse(format!("oci:{shown}:name:1.0")),
        Source::Oci { directory: directory.clone(), tag: Some("name:1.0".into()) }
    );
    assert_eq!(parse("oci:/absent:x".into()), Source::Oci { directory: "/absent:x".into(), tag: None });
    assert_eq!(parse("tar:a:b".into()), Source::Tar("a:b".into()));
    assert_eq!(parse("qcow2:a".into()), Source::Qcow2("a".into()));
    for text in ["debian", "docker://debian", "tar:", "", ":", "OCI:x"] {
        assert!(Source::parse(OsStr::new(text)).unwrap_err().to_string().contains("not a source"), "{text}");
    }
}

#[test]
fn configuration_for_another_machine_is_refused() {
    let json = |platform: &str| {
        let (os, architecture) = platform.split_once('/').unwrap();
        let rootfs = serde_json::json!({"type": "layers", "diff_ids": []});
        serde_json::json!({"os": os, "architecture": architecture, "rootfs": rootfs}).to_string().into_bytes()
    };
    Configuration::parse(json(&platform())).unwrap();
    for other in ["linux/riscv64", "windows/amd64", "linux/imaginary"] {
        let error = Configuration::parse(json(other)).unwrap_err().to_string();
        assert!(error.contains(other) && error.contains(&platform()), "{error}");
    }
    assert!(Configuration::parse(b"{}".to_vec()).is_err());
}

/// It would wait for a writer, and no signal would end that.
#[test]
fn pipe_in_the_place_of_a_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("blob");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let refused = open_file(&pipe).unwrap_err().to_string();
    assert!(refused.contains("not a file"), "{refused}");
}
