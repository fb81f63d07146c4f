//! An OCI image layout, or an archive of `docker save`: index, manifest, configuration, layers. Digests and sizes are made
//! right where the input leaves a document out, so that the fuzzer gets past them.
//!
//! * Opening and unpacking never panic and always end.
//! * A layer that was read to its end has the digests that the documents say; nothing is written outside of the root.
//! * Memory: the bound on documents (4 MiB, parsed), buffers of the decompressors, and a small multiple of the input.
#![no_main]

use std::cell::OnceCell;
use std::fs;
use std::io::Read;
use std::path::Path;

use indicatif::ProgressBar;
use libfuzzer_sys::fuzz_target;
use plywood::cli::image::{Interrupt, Source, apply_archive};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::imports::{Ground, sample_archive};
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::{patches, seeds};
use sha2::{Digest, Sha256};

const BOUND: Bound = Bound { fixed_bytes: 16 << 20, multiple: 256 };
/// Bytes of an unpacked layer that are looked at: a small input can hold gigabytes.
const LAYER_BYTES_MAX: u64 = 1 << 20;
/// Stands in the configuration where the digest of the plain layer belongs.
const DIFF_ID: &str = "DIFFID";

thread_local! {
    static GROUND: OnceCell<Ground> = const { OnceCell::new() };
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn put_blob(directory: &Path, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    fs::write(directory.join("blobs/sha256").join(&digest), bytes).expect("room for a blob");
    digest
}

/// Writes the layout that the input says: configuration, layer, manifest, index; of the last two an empty one is made.
fn lay_out(directory: &Path, fields: &mut Fields<'_>) {
    let [configuration, layer, manifest, index] = [(); 4].map(|()| fields.counted());
    fs::create_dir_all(directory.join("blobs/sha256")).expect("room for a directory");
    let layer_digest = put_blob(directory, layer);
    let text = String::from_utf8_lossy(configuration).replace(DIFF_ID, &layer_digest);
    let configuration = if std::str::from_utf8(configuration).is_ok() { text.as_bytes() } else { configuration };
    let configuration_digest = put_blob(directory, configuration);
    let made = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{configuration_digest}"),
            "size": configuration.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer_digest}"),
            "size": layer.len(),
        }],
    });
    let made = made.to_string();
    let manifest = if manifest.is_empty() { made.as_bytes() } else { manifest };
    let manifest_digest = put_blob(directory, manifest);
    let made = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{manifest_digest}"),
            "size": manifest.len(),
        }],
    });
    let made = made.to_string();
    fs::write(directory.join("index.json"), if index.is_empty() { made.as_bytes() } else { index }).expect("room");
}

fn import(source: &Source, ground: &Ground) {
    let Ok(Some(image)) = source.open() else { return };
    let _ = image.stored_bytes();
    for layer in &image.layers {
        let _ = (layer.name(), layer.diff_id(), layer.stored_bytes());
        let Ok(mut reader) = layer.read(&ProgressBar::hidden(), &Interrupt::default()) else { continue };
        let mut limited = (&mut reader).take(LAYER_BYTES_MAX);
        let unpacked = apply_archive(ground.root(), &mut limited);
        if limited.limit() > 0 && unpacked.is_ok() {
            let _ = reader.verify();
        }
    }
}

/// Bytes at which the archives of `docker save` that are compressed begin: unpacked they are as large as they like.
fn is_compressed(bytes: &[u8]) -> bool {
    !bytes.get(257..).is_some_and(|rest| rest.starts_with(b"ustar"))
}

fn configuration() -> Vec<u8> {
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let configuration = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "Labels": { "a": "b" } },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{DIFF_ID}")] },
        "history": [{ "created_by": "fuzz" }],
    });
    configuration.to_string().into_bytes()
}

/// What `docker save` writes.
fn docker_archive() -> Vec<u8> {
    let layer = sample_archive();
    let configuration = String::from_utf8_lossy(&configuration()).replace(DIFF_ID, &digest(&layer));
    let name = format!("{}.json", digest(configuration.as_bytes()));
    let manifest = serde_json::json!([{ "Config": name, "RepoTags": ["fuzz:1"], "Layers": ["1/layer.tar"] }]);
    let mut builder = tar::Builder::new(Vec::new());
    let manifest = manifest.to_string().into_bytes();
    for (path, content) in
        [(name.as_str(), configuration.as_bytes()), ("1/layer.tar", &layer), ("manifest.json", &manifest)]
    {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, content).expect("memory takes it");
    }
    builder.into_inner().expect("memory takes it")
}

fuzz_target!(
    init: seeds::offer(|| {
        let (configuration, layer) = (configuration(), sample_archive());
        let manifest = br#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1},"layers":[]}"#;
        let index = br#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":2,"platform":{"os":"linux","architecture":"amd64"},"annotations":{"org.opencontainers.image.ref.name":"x"}}]}"#;
        vec![
            [&[0][..], &patches::counted(&[&configuration, &layer, b"", b""])].concat(),
            [&[0][..], &patches::counted(&[&configuration, &layer[..1024], b"", b""])].concat(),
            [&[0][..], &patches::counted(&[&configuration, &layer[..1024], manifest, b""])].concat(),
            [&[0][..], &patches::counted(&[b"{}", b"", b"", index])].concat(),
            [&[1][..], &docker_archive()].concat(),
        ]
    }),
    |input: &[u8]| GROUND.with(|ground| {
        let ground = ground.get_or_init(Ground::new);
        let mut fields = Fields(input);
        let source = if fields.byte() & 1 == 0 {
            let directory = ground.empty("layout");
            lay_out(&directory, &mut fields);
            Source::Oci { directory, tag: None }
        } else if is_compressed(fields.0) {
            return;
        } else {
            let file = ground.empty("layout").join("archive");
            fs::write(&file, fields.0).expect("room for a file");
            Source::DockerArchive(file)
        };
        bounded(BOUND, input.len(), || import(&source, ground));
        ground.assert_untouched(&["layout", "root"]);
    })
);
