//! Kubernetes' way: an image comes from a registry, through the part of containerd that kubelets talk to.

use std::collections::BTreeSet;
use std::fs;

use crate::engine::Engine;
use crate::image::{GREETING, Image};
use crate::registry::{Registry, image_service};
use crate::snapshotter::{Snapshotter, nothing_is_left};
use crate::support::command::run;
use crate::support::pool::{TestPool, Transport};

/// Digests of the configuration and of the layers of an image that `skopeo` finds.
#[track_caller]
fn blobs(layout: &str) -> (String, Vec<String>) {
    let said = run("skopeo", ["inspect", "--raw", &format!("oci:{layout}:test")]).expect();
    let manifest: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let digest = |of: &serde_json::Value| of["digest"].as_str().expect("a digest").to_owned();
    let layers = manifest["layers"].as_array().expect("a list").iter().map(digest).collect();
    (digest(&manifest["config"]), layers)
}

/// Layers that the pool has, since `plywood image import` brought them, are neither unpacked nor fetched; the one above is.
pub fn layers_of_the_pool_are_not_fetched() {
    let pool = TestPool::create("10G", Transport::Auto);
    let image = Image::small(&pool);
    pool.done(&format!("image import oci:{}:test web", image.layout()));
    image.add_layer("third", |root| fs::write(root.join("third"), "third\n").expect("a file"));
    let registry = Registry::start(&pool);
    let name = registry.push(&image);
    let snapshotter = Snapshotter::start(&pool, &["--size", "3GiB"]);
    let mut client = snapshotter.client();
    let containerd = Engine::start_for_kubelets(&pool, snapshotter.socket());
    assert_eq!(registry.fetched(), BTreeSet::new(), "before anything was pulled");

    image_service(&containerd, "PullImage", &name).expect("a pull");
    let (configuration, layers) = blobs(&image.layout());
    let [_, _, third] = &layers[..] else { panic!("not three layers: {layers:?}") };
    assert_eq!(registry.fetched(), BTreeSet::from([configuration, third.clone()]), "of {layers:?}");
    assert_eq!(client.keys(&["kind==committed"]).len(), 3);

    let script = format!(
        "test \"$(cat /greeting)\" = '{}' && test \"$(cat /third)\" = third && test -f /etc/debian_version",
        GREETING.trim_end()
    );
    let line = format!("--namespace k8s.io run --rm --snapshotter plywood {name} pulled");
    containerd.ctr_with(&line, &["/bin/sh", "-c", &script]).expect();

    // A second pull finds all there.
    let before = registry.fetched();
    image_service(&containerd, "PullImage", &name).expect("a pull");
    assert_eq!(registry.fetched(), before);

    image_service(&containerd, "RemoveImage", &name).expect("a removal");
    assert_eq!(client.keys(&[]), Vec::<String>::new());
    pool.done("image delete web --yes");
    nothing_is_left(&pool);
    drop(containerd);
    drop(snapshotter);
    pool.check();
}
