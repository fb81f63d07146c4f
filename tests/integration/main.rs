//! The engine's public API on a pool in a file, opened anew for each step: what one step made, the next finds, whether
//! the pool was closed between them or only committed.

#[path = "../support/damage/mod.rs"]
mod damage;
mod file_pool;
#[path = "../support/golden.rs"]
mod golden;
mod golden_pools;
mod refusals;
mod space;
mod tools;

use file_pool::{Ending, FilePool, MIB, by_name, bytes_of, new_clone, new_snapshot, new_volume, read, write};
use plywood::io::IoMemory;

const ENDINGS: [Ending; 2] = [Ending::Closed, Ending::Dropped];

#[test]
fn written_blocks_are_there_after_reopening() {
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        file.step(ending, async |pool| {
            let volume = pool.create_volume(new_volume("one", 64 * MIB)).await.unwrap();
            let handle = pool.open_volume(volume.id, false).unwrap();
            write(&handle, 0, 4096, 1).await.unwrap();
            write(&handle, 5 * MIB + 512, 512, 2).await.unwrap();
            write(&handle, 63 * MIB, MIB as usize, 3).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            assert_eq!(read(pool, id, 0, 4096).await, bytes_of(1, 4096));
            let sectors = read(pool, id, 5 * MIB, 4096).await;
            assert_eq!(sectors[512..1024], bytes_of(2, 512));
            assert!(
                sectors[..512].iter().chain(&sectors[1024..]).all(|byte| *byte == 0),
                "provisioned whole, with zeros"
            );
            assert_eq!(read(pool, id, 63 * MIB, MIB as usize).await, bytes_of(3, MIB as usize));
            assert_eq!(by_name(pool, "one").mapped_bytes, MIB + 8192);
        });
        file.sound();
    }
}

#[test]
fn snapshot_keeps_what_its_origin_loses() {
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        file.step(ending, async |pool| {
            let volume = pool.create_volume(new_volume("one", 16 * MIB)).await.unwrap();
            let handle = pool.open_volume(volume.id, false).unwrap();
            write(&handle, 0, 8192, 1).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            pool.create_snapshot(id, new_snapshot("kept")).await.unwrap();
            let handle = pool.open_volume(id, false).unwrap();
            write(&handle, 0, 4096, 2).await.unwrap();
            drop(handle.discard(4096, 4096).await.unwrap());
        });
        file.step(ending, async |pool| {
            let (one, kept) = (by_name(pool, "one"), by_name(pool, "kept"));
            assert_eq!(read(pool, kept.id, 0, 8192).await, bytes_of(1, 8192));
            assert_eq!(read(pool, one.id, 0, 4096).await, bytes_of(2, 4096));
            assert_eq!(read(pool, one.id, 4096, 4096).await, vec![0; 4096]);
            assert!(kept.read_only && kept.origin.is_some_and(|origin| origin.id == one.id));
            pool.delete_volume(one.id).await.unwrap();
        });
        file.step(ending, async |pool| {
            let kept = by_name(pool, "kept");
            assert_eq!(read(pool, kept.id, 0, 8192).await, bytes_of(1, 8192), "its origin is gone, it is not");
            pool.delete_volume(kept.id).await.unwrap();
            pool.settle().await.unwrap();
        });
        file.step(Ending::Closed, async |pool| assert!(pool.volumes().is_empty()));
    }
}

#[test]
fn chain_of_clones_keeps_every_layer() {
    const DEPTH: u64 = 12;
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        file.step(ending, async |pool| {
            pool.create_volume(new_volume("work-0", 16 * MIB)).await.unwrap();
        });
        for layer in 0..DEPTH {
            file.step(ending, async |pool| {
                let id = by_name(pool, &format!("work-{layer}")).id;
                let handle = pool.open_volume(id, false).unwrap();
                // Each layer has a block of its own, and overwrites the first.
                write(&handle, 0, 4096, layer).await.unwrap();
                write(&handle, (layer + 1) * MIB, 4096, layer).await.unwrap();
                let snapshot = pool.create_snapshot(id, new_snapshot(&format!("layer-{layer}"))).await.unwrap();
                pool.create_clone(snapshot.id, new_clone(&format!("work-{}", layer + 1))).await.unwrap();
            });
        }
        file.step(ending, async |pool| {
            for layer in 0..DEPTH {
                let id = by_name(pool, &format!("layer-{layer}")).id;
                assert_eq!(read(pool, id, 0, 4096).await, bytes_of(layer, 4096));
                for other in 0..DEPTH {
                    let expected = if other <= layer { bytes_of(other, 4096) } else { vec![0; 4096] };
                    assert_eq!(
                        read(pool, id, (other + 1) * MIB, 4096).await,
                        expected,
                        "layer {layer}, block of {other}"
                    );
                }
            }
            let top = by_name(pool, &format!("work-{DEPTH}"));
            assert_eq!((top.own_bytes, top.mapped_bytes), (0, (DEPTH + 1) * 4096));
        });
        file.sound();
    }
}

#[test]
fn rollback_brings_size_and_content_back() {
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        file.step(ending, async |pool| {
            let volume = pool.create_volume(new_volume("one", 8 * MIB)).await.unwrap();
            let handle = pool.open_volume(volume.id, false).unwrap();
            write(&handle, 0, 4096, 1).await.unwrap();
            pool.create_snapshot(volume.id, new_snapshot("then")).await.unwrap();
            write(&handle, 0, 4096, 2).await.unwrap();
            drop(handle);
            pool.resize_volume(volume.id, 2 << 30).await.unwrap();
        });
        file.step(ending, async |pool| {
            let (one, then) = (by_name(pool, "one"), by_name(pool, "then"));
            assert_eq!(one.size_bytes, 2 << 30);
            let handle = pool.open_volume(one.id, false).unwrap();
            write(&handle, 1 << 30, 4096, 3).await.unwrap();
            drop(handle);
            pool.roll_back(one.id, then.id, Some(new_snapshot("now"))).await.unwrap();
        });
        file.step(ending, async |pool| {
            let (one, now) = (by_name(pool, "one"), by_name(pool, "now"));
            assert_eq!((one.size_bytes, now.size_bytes), (8 * MIB, 2 << 30));
            assert_eq!(read(pool, one.id, 0, 4096).await, bytes_of(1, 4096));
            assert_eq!(read(pool, now.id, 0, 4096).await, bytes_of(2, 4096));
            assert_eq!(read(pool, now.id, 1 << 30, 4096).await, bytes_of(3, 4096));
        });
        file.sound();
    }
}

#[test]
fn shrunk_volume_shows_nothing_when_it_grows_again() {
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        file.step(ending, async |pool| {
            let volume = pool.create_volume(new_volume("one", 300 * MIB)).await.unwrap();
            let handle = pool.open_volume(volume.id, false).unwrap();
            write(&handle, 0, 8192, 1).await.unwrap();
            write(&handle, 299 * MIB, 4096, 2).await.unwrap();
            drop(handle);
            pool.resize_volume(volume.id, 4096).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            pool.resize_volume(id, 300 * MIB).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            assert_eq!(read(pool, id, 0, 4096).await, bytes_of(1, 8192)[..4096]);
            assert_eq!(read(pool, id, 4096, 4096).await, vec![0; 4096]);
            assert_eq!(read(pool, id, 299 * MIB, 4096).await, vec![0; 4096]);
            pool.settle().await.unwrap();
            assert_eq!(by_name(pool, "one").mapped_bytes, 4096);
        });
        file.sound();
    }
}

#[test]
fn changed_ranges_are_those_that_were_changed() {
    let file = FilePool::create(512 * MIB);
    file.step(Ending::Dropped, async |pool| {
        let volume = pool.create_volume(new_volume("one", 1 << 30)).await.unwrap();
        let handle = pool.open_volume(volume.id, false).unwrap();
        for at in 0..64 {
            write(&handle, at * 16 * MIB, 4096, at).await.unwrap();
        }
        let before = pool.create_snapshot(volume.id, new_snapshot("before")).await.unwrap();
        write(&handle, 16 * MIB, 8192, 100).await.unwrap();
        drop(handle.discard(32 * MIB, 4096).await.unwrap());
        let after = pool.create_snapshot(volume.id, new_snapshot("after")).await.unwrap();
        assert!(pool.changed_ranges(before.id, before.id).await.unwrap().is_empty());
        let ranges: Vec<_> = pool
            .changed_ranges(before.id, after.id)
            .await
            .unwrap()
            .into_iter()
            .map(|range| (range.offset_bytes, range.length_bytes, range.mapped))
            .collect();
        assert_eq!(ranges, [(16 * MIB, 8192, true), (32 * MIB, 4096, false)]);
    });
    file.sound();
}

#[test]
fn quota_refuses_and_changes_nothing() {
    let file = FilePool::create(512 * MIB);
    file.step(Ending::Dropped, async |pool| {
        let mut new = new_volume("one", 64 * MIB);
        new.quota_bytes = 16 * 4096;
        let volume = pool.create_volume(new).await.unwrap();
        let handle = pool.open_volume(volume.id, false).unwrap();
        write(&handle, 0, 16 * 4096, 1).await.unwrap();
        let refused = write(&handle, MIB, 4096, 2).await;
        assert!(matches!(refused, Err(plywood::error::Error::NoSpace(_))), "{refused:?}");
        // What is its own may be overwritten, and what is discarded makes room.
        write(&handle, 0, 4096, 3).await.unwrap();
        drop(handle.discard(4096, 4096).await.unwrap());
        write(&handle, MIB, 4096, 4).await.unwrap();
    });
    file.step(Ending::Closed, async |pool| {
        let one = by_name(pool, "one");
        assert_eq!((one.own_bytes, one.quota_bytes), (16 * 4096, 16 * 4096));
        assert_eq!(read(pool, one.id, 0, 4096).await, bytes_of(3, 4096));
        assert_eq!(read(pool, one.id, MIB, 4096).await, bytes_of(4, 4096));
    });
}

#[test]
fn attributes_survive_and_are_deleted() {
    for ending in ENDINGS {
        let file = FilePool::create(512 * MIB);
        let large = bytes_of(1, 100_000);
        file.step(ending, async |pool| {
            let volume = pool.create_volume(new_volume("one", MIB)).await.unwrap();
            let changes = [("large".to_owned(), Some(large.clone())), ("small".to_owned(), Some(vec![1]))];
            pool.set_attributes(volume.id, changes.into()).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            assert_eq!(pool.attributes(id).await.unwrap()["large"], large);
            pool.set_attributes(id, [("large".to_owned(), None)].into()).await.unwrap();
        });
        file.step(ending, async |pool| {
            let id = by_name(pool, "one").id;
            assert_eq!(pool.attributes(id).await.unwrap(), [("small".to_owned(), vec![1])].into());
            let too_much = [("huge".to_owned(), Some(vec![0; 300 << 10]))];
            pool.set_attributes(id, too_much.into()).await.unwrap_err();
        });
        file.sound();
    }
}

/// 64 MiB written and discarded: the host gets them back, less what is kept for reuse.
#[test]
fn discarded_space_goes_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let file = FilePool::create(1 << 30);
    let allocated = || std::fs::metadata(file.path()).unwrap().blocks() * 512;
    file.step(Ending::Closed, async |pool| {
        let volume = pool.create_volume(new_volume("one", 512 * MIB)).await.unwrap();
        let handle = pool.open_volume(volume.id, false).unwrap();
        for at in 0..256 {
            let memory = IoMemory::from_bytes(&bytes_of(at, MIB as usize));
            drop(handle.write(at * MIB, &memory, false).await.unwrap());
        }
    });
    let full = allocated();
    assert!(full >= 256 * MIB);
    file.step(Ending::Closed, async |pool| {
        let handle = pool.open_volume(by_name(pool, "one").id, false).unwrap();
        drop(handle.discard(0, 512 * MIB).await.unwrap());
        drop(handle);
        pool.settle().await.unwrap();
        for _ in 0..20 {
            pool.checkpoint().await.unwrap();
            pool.tick();
        }
    });
    let left = allocated();
    assert!(left + 128 * MIB <= full, "the file took {full} bytes, and {left} after everything was discarded");
}
