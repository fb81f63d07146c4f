//! A registry of images of a test's own, with its files in the pool's folder, and the kubelet's side of containerd's socket.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use crate::engine::Engine;
use crate::image::Image;
use crate::support::command::{Background, run, wait_until};
use crate::support::pool::TestPool;

/// `docker-registry` on a port that is free. It is killed when this is dropped.
pub struct Registry {
    _process: Background,
    log: PathBuf,
    address: String,
}

impl Registry {
    #[track_caller]
    pub fn start(pool: &TestPool) -> Self {
        let folder = pool.folder().join("registry");
        fs::create_dir(&folder).expect("a folder");
        let shown = folder.display();
        let configuration = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {shown}/images\nhttp:\n  addr: 127.0.0.1:0\n"
        );
        fs::write(folder.join("config.yml"), configuration).expect("a file");
        let log = folder.join("log");
        let line = format!("exec docker-registry serve '{shown}/config.yml' >'{}' 2>&1", log.display());
        let process = Background::start("sh", ["-c".to_owned(), line]);
        let mut address = None;
        wait_until("the registry", Duration::from_secs(60), || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            address = said
                .split_once("listening on ")
                .and_then(|(_, rest)| rest.split_once(['"', ',']).map(|(address, _)| address.to_owned()));
            address.is_some()
        });
        Self { _process: process, log, address: address.expect("waited for") }
    }

    /// Puts an image there; answers its name.
    #[track_caller]
    pub fn push(&self, image: &Image) -> String {
        let name = format!("{}/small:test", self.address);
        let source = format!("oci:{}:test", image.layout());
        run("skopeo", ["--insecure-policy", "copy", "--dest-tls-verify=false", &source, &format!("docker://{name}")])
            .expect();
        name
    }

    /// Digests of the blobs that were fetched: of configurations and layers, not of manifests.
    pub fn fetched(&self) -> BTreeSet<String> {
        let log = fs::read_to_string(&self.log).expect("its log");
        log.lines()
            .filter_map(|line| line.split_once("\"GET /v2/small/blobs/"))
            .filter_map(|(_, rest)| rest.split_once(' ').map(|(digest, _)| digest.to_owned()))
            .collect()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// Request of `PullImage` and of `RemoveImage`, without what is not needed.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// Answer to both, of which nothing is looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct Answer {}

/// A call of `runtime.v1.ImageService`, as a kubelet makes it (CRI, `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`).
///
/// # Errors
/// What containerd answers.
pub fn image_service(containerd: &Engine, method: &str, image: &str) -> Result<(), Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("unix://{}", containerd.socket().display())).expect("an address");
        let mut client = tonic::client::Grpc::new(endpoint.connect().await.expect("containerd listens"));
        client.ready().await.expect("it is connected");
        let path: PathAndQuery = format!("/runtime.v1.ImageService/{method}").parse().expect("a path");
        let request = ImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
        let codec = ProstCodec::<ImageRequest, Answer>::default();
        client.unary(Request::new(request), path, codec).await.map(drop)
    })
}
