//! The process under test, and the client's side of its socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use plywood::containerd::api::snapshots::snapshots_client::SnapshotsClient;
use plywood::containerd::api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use plywood::containerd::api::types::Mount;
use prost_types::FieldMask;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::support::command::{Background, run, wait_until};
use crate::support::pool::TestPool;

/// `plywood containerd` on a pool. It is killed when this is dropped.
pub struct Snapshotter {
    process: Option<Background>,
    socket: PathBuf,
    pool_file: PathBuf,
    arguments: Vec<String>,
}

impl Snapshotter {
    /// Starts it, and waits until it listens.
    #[track_caller]
    pub fn start(pool: &TestPool, arguments: &[&str]) -> Self {
        let socket = pool.folder().join("containerd.sock");
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut made = Self { process: None, socket, pool_file: pool.file().to_owned(), arguments };
        made.restart();
        made
    }

    /// Kills it (-9) if it runs, and starts it again.
    #[track_caller]
    pub fn restart(&mut self) {
        self.process = None;
        let mut arguments: Vec<String> = vec!["--pool".into(), self.pool_file.to_string_lossy().into_owned()];
        arguments.extend(["containerd".into(), "--socket".into(), self.socket.to_string_lossy().into_owned()]);
        arguments.extend(self.arguments.iter().cloned());
        // What is left of the last one is no sign of life.
        let _ = std::fs::remove_file(&self.socket);
        let program = crate::support::command::binary();
        let mut process = Background::start(&program.to_string_lossy(), arguments);
        wait_until("the snapshotter", Duration::from_secs(120), || {
            if !process.is_running() {
                return true;
            }
            std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
        });
        if !process.is_running() {
            process.finish().expect();
            panic!("the snapshotter ended at once");
        }
        self.process = Some(process);
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("running").id()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.socket)
    }
}

/// Calls that wait for their answer.
pub struct Client {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
}

/// Labels from pairs.
pub fn labels<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

impl Client {
    fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
        let channel = {
            let _inside = runtime.enter();
            endpoint.connect_lazy()
        };
        Self { runtime, client: SnapshotsClient::new(channel).max_decoding_message_size(16 << 20) }
    }

    pub fn prepare(&mut self, key: &str, parent: &str) -> Result<Mount, Status> {
        self.prepare_with(key, parent, BTreeMap::new())
    }

    pub fn prepare_with(&mut self, key: &str, parent: &str, labels: BTreeMap<String, String>) -> Result<Mount, Status> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let mut request = Request::new(PrepareSnapshotRequest { snapshotter: "plywood".into(), key, parent, labels });
        request.metadata_mut().insert("containerd-namespace", "default".parse().expect("a value"));
        let answer = self.runtime.block_on(self.client.prepare(request))?;
        Ok(only(answer.into_inner().mounts))
    }

    pub fn view(&mut self, key: &str, parent: &str) -> Result<Mount, Status> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = ViewSnapshotRequest { snapshotter: String::new(), key, parent, labels: BTreeMap::new() };
        Ok(only(self.runtime.block_on(self.client.view(request))?.into_inner().mounts))
    }

    pub fn mounts(&mut self, key: &str) -> Result<Mount, Status> {
        let request = MountsRequest { snapshotter: String::new(), key: key.into() };
        Ok(only(self.runtime.block_on(self.client.mounts(request))?.into_inner().mounts))
    }

    pub fn commit(&mut self, name: &str, key: &str, labels: BTreeMap<String, String>) -> Result<(), Status> {
        self.commit_on(name, key, "", labels)
    }

    pub fn commit_on(
        &mut self,
        name: &str,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Status> {
        let (name, key, parent) = (name.to_owned(), key.to_owned(), parent.to_owned());
        let request = CommitSnapshotRequest { snapshotter: String::new(), name, key, labels, parent };
        self.runtime.block_on(self.client.commit(request)).map(drop)
    }

    pub fn remove(&mut self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { snapshotter: String::new(), key: key.into() };
        self.runtime.block_on(self.client.remove(request)).map(drop)
    }

    pub fn stat(&mut self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.runtime.block_on(self.client.stat(request))?.into_inner().info.expect("a snapshot"))
    }

    pub fn update(&mut self, name: &str, labels: BTreeMap<String, String>, paths: &[&str]) -> Result<Info, Status> {
        let info = Info { name: name.into(), labels, parent: "is not looked at".into(), ..Info::default() };
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = (!paths.is_empty()).then_some(FieldMask { paths });
        let request = UpdateSnapshotRequest { snapshotter: String::new(), info: Some(info), update_mask };
        Ok(self.runtime.block_on(self.client.update(request))?.into_inner().info.expect("a snapshot"))
    }

    pub fn list(&mut self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListSnapshotsRequest { snapshotter: String::new(), filters };
        self.runtime.block_on(async {
            let mut stream = self.client.list(request).await?.into_inner();
            let mut found = Vec::new();
            while let Some(batch) = stream.message().await? {
                found.extend(batch.info);
            }
            Ok(found)
        })
    }

    /// Keys of all that match.
    #[track_caller]
    pub fn keys(&mut self, filters: &[&str]) -> Vec<String> {
        self.list(filters).expect("a list").into_iter().map(|info| info.name).collect()
    }

    pub fn usage(&mut self, key: &str) -> Result<i64, Status> {
        let request = UsageRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.runtime.block_on(self.client.usage(request))?.into_inner().size)
    }

    pub fn cleanup(&mut self) -> Result<(), Status> {
        let request = CleanupRequest { snapshotter: String::new() };
        self.runtime.block_on(self.client.cleanup(request)).map(drop)
    }
}

fn only(mut mounts: Vec<Mount>) -> Mount {
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    mounts.remove(0)
}

/// That a call was refused, and how.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, word: &str) {
    let status = outcome.expect_err("it was to be refused");
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(word), "{status:?} does not say {word:?}");
}

/// Mounts as containerd's client does.
#[track_caller]
pub fn mount(mount: &Mount, point: &Path) {
    let options = mount.options.join(",");
    run("mount", ["-t", &mount.r#type, "-o", &options, &mount.source, &point.to_string_lossy()]).expect();
}

/// Unmounts. A program that another thread is starting at this moment has our open files until it runs.
#[track_caller]
pub fn unmount(point: &Path) {
    let began = Instant::now();
    loop {
        let outcome = run("umount", [point]);
        if outcome.succeeded() || !outcome.stderr.contains("busy") || began.elapsed() > Duration::from_secs(5) {
            outcome.expect();
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the pool has no volume but the empty file systems, and nothing is attached.
#[track_caller]
pub fn nothing_is_left(pool: &TestPool) {
    wait_until("nothing but the empty file systems", Duration::from_secs(60), || {
        pool.names().iter().all(|name| name.starts_with("containerd-base-"))
    });
    let attached = pool.json("volume list --all", "volumes");
    let attached = attached.as_array().expect("a list").iter().filter(|volume| !volume["device"].is_null()).count();
    assert_eq!(attached, 0, "something is attached still");
}
