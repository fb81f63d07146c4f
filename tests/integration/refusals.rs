//! Files that are no pool, or not one that may be opened; names and sizes that are refused. Nothing changes by it.

use std::fs::{self, OpenOptions as FileOptions};
use std::os::unix::fs::FileExt;

use async_executor::LocalExecutor;
use plywood::engine::{self, Pool, PrivateLog};
use plywood::error::{Error, Result};
use plywood::io::{FileStorage, OpenOptions, block_on};

use crate::file_pool::{Ending, FilePool, MIB, file_digest, new_snapshot, new_volume, reactor};

/// Opens the pool in `path`, and nothing more.
fn open(path: &std::path::Path) -> Result<()> {
    let (executor, reactor) = (LocalExecutor::new(), reactor());
    let storage = FileStorage::open(&reactor, path, OpenOptions::default())?;
    let opening = Pool::open(storage, Box::new(PrivateLog::new(1)), engine::OpenOptions::default());
    block_on(&executor, &reactor, &(), opening).expect("the ring").map(drop)
}

#[track_caller]
fn refused(file: &FilePool) -> Error {
    let before = file_digest(&file.path());
    let error = open(&file.path()).expect_err("it must not open");
    assert_eq!(before, file_digest(&file.path()), "refusing it has changed the file");
    error
}

#[test]
fn file_that_is_no_pool_is_refused() {
    let file = FilePool::create(256 * MIB);
    for content in [Vec::new(), vec![0; 4 << 20], crate::bytes_of(1, 4 << 20)] {
        fs::write(file.path(), content).unwrap();
        let error = refused(&file);
        assert!(error.to_string().contains("not a plywood pool"), "{error}");
    }
    assert!(matches!(open(&file.path().with_extension("missing")), Err(Error::NotFound(_) | Error::Io { .. })));
}

#[test]
fn truncated_pool_is_refused() {
    let file = FilePool::create(256 * MIB);
    file.sound();
    let pool = FileOptions::new().write(true).open(file.path()).unwrap();
    pool.set_len(128 * MIB).unwrap();
    refused(&file);
}

#[test]
fn damaged_superblocks_are_refused_and_one_good_copy_is_enough() {
    let copies = [0u64, 256, 128, 384];
    // Each copy alone may be bad.
    for bad in copies {
        let file = FilePool::create(256 * MIB);
        file.step(Ending::Closed, async |pool| {
            pool.create_volume(new_volume("one", MIB)).await.unwrap();
        });
        let pool = FileOptions::new().write(true).open(file.path()).unwrap();
        pool.write_all_at(&[0xff; 4096], bad * 4096).unwrap();
        file.step(Ending::Closed, async |pool| {
            pool.volume("one").unwrap();
        });
    }
    let file = FilePool::create(256 * MIB);
    let pool = FileOptions::new().write(true).open(file.path()).unwrap();
    for bad in copies {
        pool.write_all_at(&[0xff; 4096], bad * 4096).unwrap();
    }
    refused(&file);
}

#[test]
fn pool_in_use_is_refused_to_others() {
    let file = FilePool::create(256 * MIB);
    file.step(Ending::Closed, async |_| {
        let other = reactor();
        let second = FileStorage::open(&other, &file.path(), OpenOptions::default());
        assert!(matches!(second, Err(Error::Busy(_))), "{:?}", second.err());
    });
    file.sound();
}

#[test]
fn names_and_sizes_are_bounded() {
    let file = FilePool::create(256 * MIB);
    file.step(Ending::Dropped, async |pool| {
        pool.create_volume(new_volume("taken", MIB)).await.unwrap();
        let long = "x".repeat(256);
        for name in ["", "a\nb", "a\0b", "a/b", ".", "..", &long] {
            let outcome = pool.create_volume(new_volume(name, MIB)).await;
            assert!(matches!(outcome, Err(Error::InvalidInput(_))), "{name:?}: {outcome:?}");
        }
        let outcome = pool.create_volume(new_volume("taken", MIB)).await;
        assert!(matches!(outcome, Err(Error::AlreadyExists(_))), "{outcome:?}");
        for size_bytes in [0, 1, 511, 4096 + 1, u64::MAX, 1 << 60] {
            let outcome = pool.create_volume(new_volume("sized", size_bytes)).await;
            assert!(matches!(outcome, Err(Error::InvalidInput(_))), "{size_bytes}: {outcome:?}");
        }
        let mut odd = new_volume("odd", MIB);
        odd.sector_size = 1024;
        assert!(matches!(pool.create_volume(odd).await, Err(Error::InvalidInput(_))));
        assert_eq!(pool.volumes().len(), 1);
    });
    file.sound();
}

#[test]
fn volume_in_use_or_protected_is_kept() {
    let file = FilePool::create(256 * MIB);
    file.step(Ending::Dropped, async |pool| {
        let one = pool.create_volume(new_volume("one", MIB)).await.unwrap();
        let snapshot = pool.create_snapshot(one.id, new_snapshot("then")).await.unwrap();
        let handle = pool.open_volume(one.id, false).unwrap();
        assert!(matches!(pool.delete_volume(one.id).await, Err(Error::Busy(_))));
        assert!(matches!(pool.roll_back(one.id, snapshot.id, None).await, Err(Error::Busy(_))));
        drop(handle);
        pool.protect_volume(snapshot.id, true).await.unwrap();
        assert!(matches!(pool.delete_volume(snapshot.id).await, Err(Error::ReadOnly(_))));
        assert!(matches!(pool.open_volume(snapshot.id, false), Err(Error::ReadOnly(_))));
        pool.delete_volume(one.id).await.unwrap();
        assert!(matches!(pool.delete_volume(one.id).await, Err(Error::NotFound(_))));
        assert_eq!(pool.volumes().len(), 1);
    });
    file.sound();
}
