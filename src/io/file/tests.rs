//! Pool files on a real host file system: the folder for temporary files (set TMPDIR to try another one).

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_executor::LocalExecutor;

use super::{FileStorage, OpenOptions, PoolClaim, PoolFile};
use crate::engine::{Memory, Storage};
use crate::error::{Error, Result};
use crate::io::{IoMemory, Reactor, ReactorOptions, block_on};

const SIZE: u64 = 64 << 20;

/// A folder whose host does direct I/O: the usual one, or the build's.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let usual = Self(tempfile::tempdir().unwrap());
        match PoolFile::create(&usual.path("probe"), 4096, false) {
            Ok(_) => usual,
            Err(error) => {
                println!("using the build's folder: {error}");
                Self(tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap())
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pool(&self) -> PathBuf {
        self.path("pool")
    }
}

fn reactor() -> Reactor {
    Reactor::new(ReactorOptions::default()).unwrap()
}

fn run<T>(reactor: &Reactor, future: impl Future<Output = T>) -> T {
    block_on(&LocalExecutor::new(), reactor, &(), future).unwrap()
}

fn open(path: &std::path::Path) -> Result<PoolFile> {
    PoolFile::open(path, OpenOptions::default())
}

#[test]
fn written_bytes_are_found_after_reopening() {
    let folder = Folder::new();
    let reactor = reactor();
    let data = IoMemory::from_bytes(&[7; 12288]);
    {
        let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
        assert_eq!(storage.size_bytes(), SIZE);
        run(&reactor, async {
            storage.write(4096, &data.slice(0..8192)).await.unwrap();
            storage.flush().await.unwrap();
            storage.write_durable(SIZE - 4096, &data.slice(8192..12288)).await.unwrap();
        });
    }
    let storage = FileStorage::open(&reactor, &folder.pool(), OpenOptions::default()).unwrap();
    assert_eq!(storage.size_bytes(), SIZE);
    let seen = storage.allocate(16384);
    run(&reactor, storage.read(0, &seen)).unwrap();
    assert_eq!(seen.to_vec(), [vec![0; 4096], vec![7; 8192], vec![0; 4096]].concat());
    run(&reactor, storage.read(SIZE - 16384, &seen)).unwrap();
    assert_eq!(seen.to_vec(), [vec![0; 12288], vec![7; 4096]].concat());
}

#[test]
fn new_pool_is_sparse_and_private() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), 1 << 40, false).unwrap();
    assert!(storage.allocated_bytes().unwrap() < 1 << 20);
    let metadata = std::fs::metadata(folder.pool()).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (1 << 40, 0o600));
}

#[test]
fn file_that_holds_something_is_refused_and_left_as_it_was() {
    let folder = Folder::new();
    std::fs::write(folder.pool(), b"precious").unwrap();
    let error = PoolFile::create(&folder.pool(), SIZE, false).unwrap_err();
    assert!(matches!(&error, Error::AlreadyExists(message) if message.contains("holds data")), "{error}");
    assert_eq!(std::fs::read(folder.pool()).unwrap(), b"precious");
    let forced = PoolFile::create(&folder.pool(), SIZE, true).unwrap();
    assert_eq!(forced.size_bytes(), SIZE);
    assert!(std::fs::read(folder.pool()).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn empty_file_is_taken() {
    let folder = Folder::new();
    File::create(folder.pool()).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(PoolFile::create(&folder.pool(), SIZE, false).unwrap().size_bytes(), SIZE);
}

#[test]
fn bad_size_or_place_is_refused_and_leaves_no_file() {
    let folder = Folder::new();
    for size_bytes in [0, 4095, 4097, !4095] {
        let error = PoolFile::create(&folder.pool(), size_bytes, false).unwrap_err();
        assert!(matches!(error, Error::InvalidInput(_)), "{error}");
    }
    // More than ext4 holds in a file; other hosts take it.
    match PoolFile::create(&folder.pool(), (i64::MAX & !4095) as u64, false) {
        Ok(_) => std::fs::remove_file(folder.pool()).unwrap(),
        Err(Error::InvalidInput(message)) => assert!(message.contains("larger than"), "{message}"),
        Err(error) => panic!("{error}"),
    }
    let error = PoolFile::create(&folder.path("no/such/pool"), SIZE, false).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
    let error = PoolFile::create(folder.0.path(), SIZE, true).unwrap_err();
    assert!(matches!(error, Error::InvalidInput(_)), "{error}");
    assert!(!folder.pool().exists());
}

#[test]
fn missing_pool_folder_and_fifo_are_refused() {
    let folder = Folder::new();
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::NotFound(_)));
    assert!(matches!(open(folder.0.path()).unwrap_err(), Error::InvalidInput(_)));
    let fifo = folder.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(open(&fifo).unwrap_err(), Error::InvalidInput(_)));
    assert!(matches!(PoolFile::create(&fifo, SIZE, true).unwrap_err(), Error::InvalidInput(_)));
}

#[test]
fn pool_in_use_is_busy_to_everybody_else() {
    let folder = Folder::new();
    let held = PoolFile::create(&folder.pool(), SIZE, false).unwrap();
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::Busy(_)));
    assert!(matches!(PoolFile::create(&folder.pool(), SIZE, true).unwrap_err(), Error::Busy(_)));
    assert!(matches!(PoolClaim::acquire(&folder.pool(), Duration::ZERO).unwrap_err(), Error::Busy(_)));
    drop(held);
    open(&folder.pool()).unwrap();
}

#[test]
fn successor_waits_until_its_predecessor_has_gone() {
    let folder = Folder::new();
    let held = PoolFile::create(&folder.pool(), SIZE, false).unwrap();
    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        drop(held);
    });
    let options = OpenOptions { wait: Duration::from_secs(20), ..OpenOptions::default() };
    PoolFile::open(&folder.pool(), options).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(30));
    thread.join().unwrap();
}

#[test]
fn front_s_claim_admits_its_own_engine_only_and_one_at_a_time() {
    let folder = Folder::new();
    drop(PoolFile::create(&folder.pool(), SIZE, false).unwrap());
    let claim = PoolClaim::acquire(&folder.pool(), Duration::ZERO).unwrap();
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::Busy(_)));
    let own = OpenOptions { claimed_by_front: true, ..OpenOptions::default() };
    let engine = PoolFile::open(&folder.pool(), own).unwrap();
    assert!(matches!(PoolFile::open(&folder.pool(), own).unwrap_err(), Error::Busy(_)));
    drop(claim);
    // The engine outlives its front: others stay out until its last I/O has ended.
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::Busy(_)));
    drop(engine);
    open(&folder.pool()).unwrap();
}

#[test]
fn locks_last_until_the_last_operation_has_ended() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    let write = storage.write(0, &IoMemory::from_bytes(&[1; 1 << 20]));
    drop(storage);
    drop(write);
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::Busy(_)));
    while reactor.in_flight() > 0 {
        reactor.submit_and_wait(None).unwrap();
        reactor.reap();
    }
    open(&folder.pool()).unwrap();
}

#[test]
fn extended_range_is_written_and_punched_range_is_given_back() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    // Not a multiple of what is written at a time.
    let range = 4096..(5 << 20) + 8192;
    run(&reactor, storage.extend(range.clone())).unwrap();
    run(&reactor, storage.flush()).unwrap();
    let len = range.end - range.start;
    let allocated = storage.allocated_bytes().unwrap();
    assert!((len..len + (1 << 20)).contains(&allocated), "{allocated} bytes are allocated");
    let file = File::open(folder.pool()).unwrap();
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap(), range.start);
    let data = IoMemory::from_bytes(&[9; 4096]);
    run(&reactor, storage.write(1 << 20, &data)).unwrap();
    run(&reactor, storage.punch(range)).unwrap();
    let allocated = storage.allocated_bytes().unwrap();
    assert!(allocated < 1 << 20, "{allocated} bytes are still allocated");
    let seen = IoMemory::from_bytes(&[1; 4096]);
    run(&reactor, storage.read(1 << 20, &seen)).unwrap();
    assert_eq!(seen.to_vec(), [0; 4096]);
    assert_eq!(storage.size_bytes(), std::fs::metadata(folder.pool()).unwrap().len());
    run(&reactor, storage.extend(0..0)).unwrap();
    run(&reactor, storage.punch(0..0)).unwrap();
}

#[test]
fn extension_goes_on_after_its_future_is_dropped() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    drop(storage.extend(0..8 << 20));
    drop(storage);
    drop(reactor);
    assert!(std::fs::metadata(folder.pool()).unwrap().blocks() * 512 >= 8 << 20);
}

#[test]
fn unaligned_or_outside_is_refused() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    let alignment = storage.alignment();
    assert!(alignment == 512 || alignment == 4096, "alignment {alignment}");
    let memory = storage.allocate(8192);
    let errno = |offset, memory: &IoMemory| run(&reactor, storage.write(offset, memory)).unwrap_err().raw_os_error();
    assert_eq!(errno(100, &memory), Some(libc::EINVAL));
    assert_eq!(errno(0, &memory.slice(0..100)), Some(libc::EINVAL));
    assert_eq!(errno(0, &memory.slice(8..8 + 4096)), Some(libc::EINVAL));
    run(&reactor, storage.write(alignment as u64, &memory.slice(alignment..2 * alignment))).unwrap();
    let outside = |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    outside(run(&reactor, storage.write(SIZE - 4096, &memory)));
    outside(run(&reactor, storage.read(SIZE, &memory)));
    outside(run(&reactor, storage.extend(SIZE - 4096..SIZE + 4096)));
    outside(run(&reactor, storage.punch(u64::MAX - 8191..u64::MAX)));
    assert_eq!(std::fs::metadata(folder.pool()).unwrap().len(), SIZE);
}

#[test]
fn grown_pool_takes_writes_at_its_new_end() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    storage.grow(2 * SIZE).unwrap();
    assert_eq!(storage.size_bytes(), 2 * SIZE);
    run(&reactor, storage.write(2 * SIZE - 4096, &IoMemory::from_bytes(&[3; 4096]))).unwrap();
    assert!(matches!(storage.grow(SIZE).unwrap_err(), Error::InvalidInput(_)));
    assert_eq!(std::fs::metadata(folder.pool()).unwrap().len(), 2 * SIZE);
}

#[test]
fn data_does_not_enter_the_page_cache() {
    let folder = Folder::new();
    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &folder.pool(), SIZE, false).unwrap();
    let data = IoMemory::from_bytes(&[3; 1 << 20]);
    run(&reactor, storage.write(0, &data)).unwrap();
    run(&reactor, storage.read(0, &data)).unwrap();
    let file = File::open(folder.pool()).unwrap();
    // SAFETY: nobody cuts this temporary file short while it is mapped.
    let map = unsafe { memmap2::MmapOptions::new().len(1 << 20).map(&file) }.unwrap();
    let mut resident = vec![0_u8; (1 << 20) / 4096];
    // SAFETY: the kernel writes one byte a page of the mapping, for which there is room.
    let result = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), resident.as_mut_ptr()) };
    assert_eq!(result, 0);
    assert!(resident.iter().all(|&flags| flags & 1 == 0), "pages are cached");
}

#[test]
fn descriptor_from_elsewhere_is_used_without_locks() {
    let folder = Folder::new();
    let reactor = reactor();
    let held = PoolFile::create(&folder.pool(), SIZE, false).unwrap();
    let file = File::options().read(true).write(true).open(folder.pool()).unwrap();
    let storage = FileStorage::new(&reactor, PoolFile::from_fd(file.into(), &folder.pool()).unwrap());
    run(&reactor, storage.write(0, &IoMemory::from_bytes(&[3; 4096]))).unwrap();
    drop(storage);
    assert!(matches!(open(&folder.pool()).unwrap_err(), Error::Busy(_)));
    drop(held);
    let mut seen = [0; 4096];
    File::open(folder.pool()).unwrap().read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [3; 4096]);
}

#[test]
fn memory_file_system_works_or_is_refused_by_name() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        println!("there is no /dev/shm here");
        return;
    };
    // tmpfs does direct I/O since Linux 6.6.
    match PoolFile::create(&folder.path().join("pool"), SIZE, false) {
        Ok(file) => assert_eq!(file.host_name(), "tmpfs"),
        Err(error) => {
            assert!(matches!(&error, Error::InvalidInput(message) if message.contains("tmpfs")), "{error}");
            assert!(!folder.path().join("pool").exists());
        }
    }
}

#[test]
fn reflinked_copy_is_refused_unless_forced() {
    let folder = Folder::new();
    let original = PoolFile::create(&folder.pool(), SIZE, false).unwrap();
    assert!(!original.is_shared().unwrap());
    let reactor = reactor();
    let host = original.host_name().to_owned();
    let storage = FileStorage::new(&reactor, original);
    run(&reactor, storage.write(0, &IoMemory::from_bytes(&[3; 1 << 20]))).unwrap();
    run(&reactor, storage.flush()).unwrap();
    let copy = folder.path("copy");
    let copy_file = File::create(&copy).unwrap();
    if host == "btrfs" {
        // A NOCOW file shares extents with NOCOW files only.
        rustix::fs::ioctl_setflags(&copy_file, rustix::fs::IFlags::NOCOW).unwrap();
    }
    if let Err(error) = rustix::fs::ioctl_ficlone(&copy_file, File::open(folder.pool()).unwrap()) {
        println!("{host} makes no reflinks here: {error}");
        return;
    }
    copy_file.sync_all().unwrap();
    let error = open(&copy).unwrap_err();
    assert!(matches!(&error, Error::InvalidInput(message) if message.contains("shared")), "{error}");
    let forced = PoolFile::open(&copy, OpenOptions { force: true, ..OpenOptions::default() }).unwrap();
    assert!(forced.is_shared().unwrap());
}

#[test]
fn btrfs_file_with_copy_on_write_is_refused_unless_forced() {
    let folder = Folder::new();
    let created = PoolFile::create(&folder.pool(), SIZE, false).unwrap();
    if created.host_name() != "btrfs" {
        println!("not on btrfs but {}", created.host_name());
        return;
    }
    drop(created);
    open(&folder.pool()).unwrap();
    let plain = folder.path("plain");
    File::create(&plain).unwrap().set_len(SIZE).unwrap();
    let error = open(&plain).unwrap_err();
    assert!(matches!(&error, Error::InvalidInput(message) if message.contains("NOCOW")), "{error}");
    PoolFile::open(&plain, OpenOptions { force: true, ..OpenOptions::default() }).unwrap();
}

/// The device that `PLYWOOD_TEST_DEVICE` names: at least 16 MiB, and free to be overwritten.
#[test]
#[ignore = "overwrites the block device named by PLYWOOD_TEST_DEVICE"]
fn block_device_is_a_pool_s_place_like_a_file() {
    let device = PathBuf::from(std::env::var_os("PLYWOOD_TEST_DEVICE").expect("PLYWOOD_TEST_DEVICE names a device"));
    File::options().write(true).open(&device).unwrap().write_all_at(b"content", 0).unwrap();
    let size_bytes = 16 << 20;
    let error = PoolFile::create(&device, size_bytes, false).unwrap_err();
    assert!(matches!(&error, Error::AlreadyExists(message) if message.contains("data")), "{error}");
    let error = PoolFile::create(&device, 1 << 60, true).unwrap_err();
    assert!(matches!(&error, Error::InvalidInput(message) if message.contains("larger")), "{error}");

    let reactor = reactor();
    let storage = FileStorage::create(&reactor, &device, size_bytes, true).unwrap();
    assert!(storage.size_bytes() >= size_bytes);
    // Held for us alone, against mounting too: the same O_EXCL.
    assert!(matches!(open(&device).unwrap_err(), Error::Busy(_)));
    let seen = storage.allocate(8192);
    run(&reactor, async {
        storage.extend(0..3 << 20).await.unwrap();
        storage.read(0, &seen).await.unwrap();
        assert_eq!(seen.to_vec(), [0; 8192]);
        storage.write_durable(4096, &IoMemory::from_bytes(&[6; 4096])).await.unwrap();
        storage.flush().await.unwrap();
        storage.punch(0..4096).await.unwrap();
        storage.read(0, &seen).await.unwrap();
    });
    assert_eq!(seen.to_vec()[4096..], [6; 4096]);
    assert!(matches!(storage.grow(1 << 60).unwrap_err(), Error::InvalidInput(_)));
    drop(storage);
    let file = open(&device).unwrap();
    assert_eq!((file.host_name(), file.is_block_device()), ("block device", true));
}
