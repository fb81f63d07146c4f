//! The ten calls as they come over gRPC: messages in, messages out. What they mean is [`Store`]'s business.
//!
//! Answers come from threads that may wait; the one thread that talks to the callers never does.

use std::pin::Pin;
use std::sync::Arc;

use prost_types::Timestamp;
use tokio_stream::{Stream, iter};
use tonic::{Request, Response, Status};

use super::api::snapshots as wire;
use super::api::snapshots::snapshots_server::Snapshots;
use super::api::types;
use super::error::{Error, Result};
use super::record::{Kind, Record};
use super::store::{Change, Mount, Store};

/// Snapshots in a message of `List`.
const LIST_BATCH: usize = 100;

/// See the module.
#[derive(Clone, Debug)]
pub struct Service(Arc<Store>);

impl Service {
    /// The service on a pool's snapshots.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(store))
    }

    /// Does a call on a thread that may wait.
    async fn answer<T: Send + 'static>(
        &self,
        what: &'static str,
        call: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let store = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || call(&store)).await;
        match done {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::info!("{what}: {error}");
                Err(error.into())
            }
            Err(error) => {
                tracing::error!("{what}: {error}");
                Err(Status::internal(format!("{what}: {error}")))
            }
        }
    }
}

type Answer<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(&self, request: Request<wire::PrepareSnapshotRequest>) -> Answer<wire::PrepareSnapshotResponse> {
        let wire::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.answer("prepare", move |store| store.prepare(&key, &parent, Kind::Active, labels)).await?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: mounts_told(mounts) }))
    }

    async fn view(&self, request: Request<wire::ViewSnapshotRequest>) -> Answer<wire::ViewSnapshotResponse> {
        let wire::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.answer("view", move |store| store.prepare(&key, &parent, Kind::View, labels)).await?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts: mounts_told(mounts) }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let key = request.into_inner().key;
        let mounts = self.answer("mounts", move |store| store.mounts(&key)).await?;
        Ok(Response::new(wire::MountsResponse { mounts: mounts_told(mounts) }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Answer<()> {
        let wire::CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        self.answer("commit", move |store| store.commit(&name, &key, &parent, labels)).await.map(Response::new)
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<()> {
        let key = request.into_inner().key;
        self.answer("remove", move |store| store.remove(&key)).await.map(Response::new)
    }

    async fn stat(&self, request: Request<wire::StatSnapshotRequest>) -> Answer<wire::StatSnapshotResponse> {
        let key = request.into_inner().key;
        let record = self.answer("stat", move |store| store.stat(&key)).await?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(told(record)) }))
    }

    async fn update(&self, request: Request<wire::UpdateSnapshotRequest>) -> Answer<wire::UpdateSnapshotResponse> {
        let wire::UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.ok_or_else(|| Status::invalid_argument("update without a snapshot"))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let record = self.answer("update", move |store| store.update(&info.name, change(info.labels, &paths)?)).await?;
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(told(record)) }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = std::result::Result<wire::ListSnapshotsResponse, Status>> + Send>>;

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = request.into_inner().filters;
        let records = self.answer("list", move |store| store.list(&filters)).await?;
        let batches: Vec<_> = records
            .chunks(LIST_BATCH)
            .map(|batch| Ok(wire::ListSnapshotsResponse { info: batch.iter().cloned().map(told).collect() }))
            .collect();
        Ok(Response::new(Box::pin(iter(batches))))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let key = request.into_inner().key;
        let bytes = self.answer("usage", move |store| store.usage(&key)).await?;
        // Inodes are the file system's own, and are not counted from outside.
        Ok(Response::new(wire::UsageResponse { size: i64::try_from(bytes).unwrap_or(i64::MAX), inodes: 0 }))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Answer<()> {
        let done = self.answer("cleanup", |store| {
            store.clean_up();
            Ok(())
        });
        done.await.map(Response::new)
    }
}

/// What a field mask asks to be changed of the labels.
fn change(labels: super::record::Labels, paths: &[String]) -> Result<Change> {
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        if let Some(path) = paths.iter().find(|path| *path != "labels" && !path.starts_with("labels.")) {
            return Err(immutable(path));
        }
        return Ok(Change::All(labels));
    }
    let mut changes = Vec::with_capacity(paths.len());
    for path in paths {
        let key = path.strip_prefix("labels.").ok_or_else(|| immutable(path))?;
        // An empty value deletes, as with containerd's own snapshotters.
        let value = labels.get(key).filter(|value| !value.is_empty()).cloned();
        changes.push((key.to_owned(), value));
    }
    Ok(Change::Some(changes))
}

fn immutable(path: &str) -> Error {
    Error::Invalid(format!("{path:?} of a snapshot cannot be changed; its labels can"))
}

fn told(record: Record) -> wire::Info {
    let kind = match record.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: record.key,
        parent: record.parent,
        kind: kind.into(),
        created_at: Some(timestamp(record.created_ns)),
        updated_at: Some(timestamp(record.updated_ns)),
        labels: record.labels,
    }
}

fn timestamp(ns: u64) -> Timestamp {
    const SECOND_NS: u64 = 1_000_000_000;
    // Both fit: 2^64 ns are fewer than 2^35 seconds.
    Timestamp { seconds: (ns / SECOND_NS) as i64, nanos: (ns % SECOND_NS) as i32 }
}

fn mounts_told(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let told = |Mount { filesystem, device, options }| types::Mount {
        r#type: filesystem,
        source: device,
        target: String::new(),
        options,
    };
    mounts.into_iter().map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::super::record::Labels;
    use super::*;

    #[test]
    fn masks_say_which_labels_change() {
        let labels =
            || Labels::from([("a".into(), "1".into()), ("b.c".into(), "2".into()), ("e".into(), String::new())]);
        let change = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            change(labels(), &paths)
        };
        assert_eq!(change(&[]), Ok(Change::All(labels())));
        assert_eq!(change(&["labels.a", "labels"]), Ok(Change::All(labels())));
        let expected = [("b.c", Some("2")), ("d", None), ("e", None)];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.map(str::to_owned)));
        assert_eq!(change(&["labels.b.c", "labels.d", "labels.e"]), Ok(Change::Some(expected.into())));
        for path in ["name", "parent", "kind", "created_at", "label", ""] {
            assert!(matches!(change(&[path]), Err(Error::Invalid(_))), "{path}");
            assert!(matches!(change(&["labels", path]), Err(Error::Invalid(_))), "{path}");
        }
    }

    #[test]
    fn times_keep_their_nanoseconds() {
        assert_eq!(timestamp(1_700_000_000_123_456_789), Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 });
    }
}
