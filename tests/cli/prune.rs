//! What prune takes away, and what it must not.

use std::collections::BTreeMap;

use plywood::daemon::protocol::{Attributes, Bytes};
use plywood::daemon::{Client, attributes, find_pool};

use crate::scratch::{Scratch, digest};

const MIB: u64 = 1 << 20;

fn marks(pairs: &[(&str, &str)]) -> Attributes {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), Bytes::from(*value))).collect()
}

fn client(scratch: &Scratch) -> Client {
    Client::open(&find_pool(&scratch.pool().to_string_lossy()).expect("the pool")).expect("a client")
}

fn names(scratch: &Scratch) -> Vec<String> {
    let mut names: Vec<String> = client(scratch).volumes().expect("volumes").into_iter().map(|it| it.name).collect();
    names.sort();
    names
}

/// A layer with what an import notes about it.
fn layer(client: &Client, name: &str, chain: &str, more: &[(&str, &str)]) {
    client.create_volume("working", MIB, 4096, Attributes::new()).expect("a volume");
    let own = [("plywood.image.layer", "1"), ("plywood.image.filesystem", "ext4"), ("plywood.image.chain-id", chain)];
    client.create_snapshot("working", name, marks(&[&own, more].concat())).expect("a snapshot");
    client.delete("working").expect("deleting");
}

#[test]
fn what_nothing_refers_to_is_deleted_and_nothing_else() {
    let scratch = Scratch::with_pool();
    {
        let client = client(&scratch);
        let volume = |name: &str, pairs: &[(&str, &str)]| {
            client.create_volume(name, MIB, 4096, marks(pairs)).expect("a volume");
        };
        volume("plain", &[]);
        volume("of-import", &[(attributes::EPHEMERAL, "import")]);
        volume("of-mount", &[(attributes::EPHEMERAL, "mount")]);
        volume("of-run", &[(attributes::EPHEMERAL, "run")]);
        volume("of-create", &[(attributes::EPHEMERAL, "docker-create"), (attributes::DOCKER_OPTIONS, "{}")]);
        volume("of-another", &[(attributes::EPHEMERAL, "some other use")]);
        volume("protected", &[(attributes::EPHEMERAL, "mount")]);
        volume("docker", &[(attributes::DOCKER_OPTIONS, "{}")]);
        volume("docker-unused", &[(attributes::EPHEMERAL, "docker"), (attributes::DOCKER_OPTIONS, "{}")]);
        let used =
            [(attributes::EPHEMERAL, "docker"), (attributes::DOCKER_OPTIONS, "{}"), (attributes::DOCKER_MOUNTS, "")];
        volume("docker-used", &used);
        client.create_snapshot("plain", "snapshot", Attributes::new()).expect("a snapshot");
        layer(&client, "loose", "sha256:aa", &[]);
        layer(&client, "cloned", "sha256:bb", &[]);
        layer(&client, "needed", "sha256:cc", &[]);
        let configuration =
            r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:cc","sha256:dd"]}}"#;
        layer(&client, "image", "sha256:ee", &[("plywood.image.config", configuration), ("plywood.image.layer", "2")]);
        client.create_clone("cloned", "clone", Attributes::new()).expect("a clone");
        client.create_clone("loose", "of-import-2", marks(&[(attributes::EPHEMERAL, "import")])).expect("a clone");
    }
    scratch.done("volume protect protected");
    let before = (names(&scratch), digest(&scratch.pool()));
    let told = scratch.json("prune --dry-run");
    let mut pruned: BTreeMap<String, String> = BTreeMap::new();
    for loose in told["pruned"]["volumes"].as_array().expect("a list") {
        pruned.insert(loose["name"].as_str().expect("a name").into(), loose["reason"].as_str().expect("why").into());
    }
    let expected = ["docker-used", "loose", "of-create", "of-import", "of-import-2", "of-mount", "of-run"];
    assert_eq!(pruned.keys().collect::<Vec<_>>(), expected);
    assert!(told["pruned"]["frees_at_least_bytes"].is_u64(), "{told}");
    assert_eq!(pruned["loose"], "a layer of no image");
    assert_eq!((names(&scratch), digest(&scratch.pool())), before, "a dry run changes nothing");

    let text = scratch.done("prune");
    assert!(text.contains("of-run") && text.contains("7 deleted; freed "), "{text}");
    let left: Vec<_> = before.0.iter().filter(|name| !expected.contains(&name.as_str())).cloned().collect();
    assert_eq!(names(&scratch), left);
    assert_eq!(scratch.done("prune"), "nothing to prune");
    scratch.done("pool check");
}

#[test]
fn freed_bytes_are_those_of_what_was_deleted() {
    let scratch = Scratch::with_pool();
    client(&scratch).create_volume("loose", MIB, 4096, marks(&[(attributes::EPHEMERAL, "import")])).expect("a volume");
    let before = scratch.json("pool info")["pool"]["used_bytes"].as_u64().expect("bytes");
    let freed = scratch.json("prune --yes")["pruned"]["freed_bytes"].as_u64().expect("bytes");
    let after = scratch.json("pool info")["pool"]["used_bytes"].as_u64().expect("bytes");
    assert!(freed > 0 && before - after == freed, "{before} - {after}, said {freed}");
}

#[test]
fn image_that_cannot_be_read_keeps_all_layers() {
    let scratch = Scratch::with_pool();
    {
        let client = client(&scratch);
        layer(&client, "image", "sha256:aa", &[("plywood.image.config", "not JSON")]);
        layer(&client, "layer", "sha256:bb", &[]);
    }
    scratch.refused("prune", &["image", "damaged"]);
    assert_eq!(names(&scratch), ["image", "layer"]);
}
