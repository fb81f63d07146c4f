//! Every released version of the format opens: pools that were made when it was released, kept in `tests/fixtures`.

use std::fs;
use std::path::PathBuf;

use plywood::engine::Memory;
use plywood::format::FORMAT_VERSION;
use plywood::io::IoMemory;

use crate::golden::{self, Golden};

fn fixture(version: u32) -> (Vec<u8>, Golden) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let file = fs::read(folder.join(format!("pool-v{version}.zst"))).expect("each version has a golden pool");
    let text = fs::read_to_string(folder.join(format!("pool-v{version}.json"))).expect("and a description of it");
    (file, serde_json::from_str(&text).expect("of this form"))
}

#[test]
fn pool_of_every_version_opens_with_all_that_it_held() {
    for version in 1..=FORMAT_VERSION {
        let (file, expected) = fixture(version);
        let storage = golden::unpack(&file, expected.size_bytes).expect("as it was packed");
        golden::with_pool(&storage, 7, async |pool| {
            let found = golden::describe(pool, expected.size_bytes).await.expect("all of it can be read");
            assert_eq!(found, expected, "version {version}");
            for info in pool.volumes().iter().filter(|info| info.sealed) {
                pool.verify_sealed(info.id).await.expect("every block is what was sealed");
            }
            assert!(pool.check().await.expect("a check").is_clean(), "version {version}");
        });
    }
}

#[test]
fn pool_of_every_version_is_used_and_opens_again() {
    for version in 1..=FORMAT_VERSION {
        let (file, expected) = fixture(version);
        let storage = golden::unpack(&file, expected.size_bytes).expect("as it was packed");
        let memory = IoMemory::zeroed(8192);
        memory.write(0, &[0xa5; 8192]);
        golden::with_pool(&storage, 7, async |pool| {
            for info in pool.volumes().iter().filter(|info| !info.read_only) {
                let handle = pool.open_volume(info.id, false).expect("not in use");
                drop(handle.write(0, &memory, true).await.expect("there is room"));
            }
            pool.close().await.expect("closing");
        });
        golden::with_pool(&storage, 8, async |pool| {
            for info in pool.volumes() {
                let handle = pool.open_volume(info.id, true).expect("not in use");
                let read = IoMemory::zeroed(8192);
                handle.read(0, &read).await.expect("sound");
                assert_eq!(read.to_vec() == memory.to_vec(), !info.read_only, "version {version}: {}", info.name);
            }
            assert!(pool.check().await.expect("a check").is_clean(), "version {version}");
        });
    }
}

#[test]
fn fixtures_are_small() {
    for version in 1..=FORMAT_VERSION {
        assert!(fixture(version).0.len() <= 200 << 10);
    }
}
