//! The reactor against real files, eventfds and timers; the requests' logic against made-up results.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_executor::LocalExecutor;
use futures_lite::future;

use super::operation::{Request, RingFile, Step, Transfer};
use super::punch::{Punch, PunchPace};
use super::{Driver, Operation, Poller, Reactor, ReactorOptions, block_on};
use crate::engine::Memory;
use crate::io::{IoMemory, Mapping, MemoryStorage, PayloadArea};

fn reactor() -> Reactor {
    Reactor::new(ReactorOptions::default()).unwrap()
}

fn file_in(reactor: &Reactor) -> (File, Rc<RingFile>) {
    let file = tempfile::tempfile().unwrap();
    let copy = file.try_clone().unwrap();
    (file, reactor.adopt_file(copy.into(), None))
}

fn transfer(file: &Rc<RingFile>, offset: u64, memory: &IoMemory, write: bool) -> Request {
    let (file, memory) = (Rc::clone(file), memory.clone());
    Request::Transfer(Transfer { file, offset, memory, write, flags: 0, done: 0, alignment: 512 })
}

fn run<T>(reactor: &Reactor, future: impl Future<Output = T>) -> T {
    block_on(&LocalExecutor::new(), reactor, &(), future).unwrap()
}

#[test]
fn written_bytes_are_read_back_through_registered_file_and_payload() {
    let reactor = reactor();
    let (file, ring_file) = file_in(&reactor);
    assert!(ring_file.registered.is_some());
    let area = PayloadArea::new(Mapping::anonymous(1 << 20).unwrap().into(), 4096..1 << 20);
    reactor.register_payload(&area).unwrap();
    let payload = area.memory(8192..16384);
    assert!(payload.registered_index().is_some());
    payload.write(0, &[3; 8192]);
    run(&reactor, reactor.issue(transfer(&ring_file, 4096, &payload, true))).unwrap();
    let owned = IoMemory::zeroed(12288);
    run(&reactor, reactor.issue(transfer(&ring_file, 0, &owned, false))).unwrap();
    assert_eq!(owned.to_vec(), [vec![0; 4096], vec![3; 8192]].concat());
    payload.zero(0..8192);
    file.write_all_at(&[4; 512], 4096).unwrap();
    run(&reactor, reactor.issue(transfer(&ring_file, 4096, &payload, false))).unwrap();
    assert_eq!(payload.to_vec(), [vec![4; 512], vec![3; 8192 - 512]].concat());
    run(&reactor, reactor.issue(Request::Sync(ring_file))).unwrap();
}

#[test]
fn more_operations_than_the_queues_hold_all_complete() {
    let reactor = Reactor::new(ReactorOptions { submissions: 4, completions: 8 }).unwrap();
    let (file, ring_file) = file_in(&reactor);
    let operations: Vec<Operation> = (0..500)
        .map(|block| reactor.issue(transfer(&ring_file, block * 512, &IoMemory::from_bytes(&[block as u8; 512]), true)))
        .collect();
    assert_eq!(reactor.in_flight(), 500);
    run(&reactor, async {
        for operation in operations {
            operation.await.unwrap();
        }
    });
    assert_eq!(reactor.in_flight(), 0);
    let mut bytes = vec![0; 500 * 512];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.chunks(512).enumerate().all(|(block, bytes)| bytes.iter().all(|&byte| byte == block as u8)));
}

#[test]
fn operation_whose_future_is_dropped_still_happens() {
    let reactor = reactor();
    let (file, ring_file) = file_in(&reactor);
    for block in 0..32 {
        drop(reactor.issue(transfer(&ring_file, block * 4096, &IoMemory::from_bytes(&[7; 4096]), true)));
    }
    drop(ring_file);
    // The reactor's end waits for them and closes the file.
    drop(reactor);
    let mut bytes = vec![0; 32 * 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 7));
}

#[test]
fn read_beyond_the_end_is_an_error() {
    let reactor = reactor();
    let (file, ring_file) = file_in(&reactor);
    file.set_len(5000).unwrap();
    let error = run(&reactor, reactor.issue(transfer(&ring_file, 0, &IoMemory::zeroed(8192), false))).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let error = run(&reactor, reactor.issue(transfer(&ring_file, 8192, &IoMemory::zeroed(512), false))).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn error_of_the_host_is_passed_on() {
    let reactor = reactor();
    let read_only = File::open("/proc/self/exe").unwrap();
    let ring_file = reactor.adopt_file(read_only.into(), None);
    let error = run(&reactor, reactor.issue(transfer(&ring_file, 0, &IoMemory::zeroed(512), true))).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn file_is_closed_and_its_place_in_the_ring_reused_when_its_last_handle_goes() {
    let reactor = reactor();
    for _ in 0..100 {
        let (_, ring_file) = file_in(&reactor);
        assert!(ring_file.registered.is_some());
    }
    let many: Vec<_> = (0..20).map(|_| file_in(&reactor).1).collect();
    assert!(many.last().unwrap().registered.is_none());
    let last = many.last().unwrap();
    run(&reactor, reactor.issue(transfer(last, 0, &IoMemory::zeroed(512), true))).unwrap();
}

#[test]
fn sleep_ends_after_its_time_and_not_before() {
    let reactor = reactor();
    let start = Instant::now();
    run(&reactor, reactor.sleep(Duration::from_millis(20))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn dropped_sleep_is_taken_back() {
    let reactor = reactor();
    drop(reactor.sleep(Duration::from_secs(3600)));
    assert!(reactor.in_flight() > 0);
    while reactor.in_flight() > 0 {
        reactor.submit_and_wait(Some(Duration::from_secs(1))).unwrap();
        reactor.reap();
    }
    // Submitted first, dropped later; and the reactor's own end must not wait an hour either.
    let sleep = reactor.sleep(Duration::from_secs(3600));
    reactor.submit().unwrap();
    drop(sleep);
    drop(reactor);
}

#[test]
fn eventfd_written_by_another_thread_ends_the_wait() {
    let reactor = reactor();
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let writer = eventfd.try_clone().unwrap();
    let wakeup = reactor.watch_eventfd(Rc::new(eventfd));
    assert!(!wakeup.take());
    // Each write is told, though nobody reads the eventfd; the next one comes when the last has been seen.
    let (seen, write) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        while write.recv().is_ok() {
            rustix::io::write(&writer, &1_u64.to_ne_bytes()).unwrap();
        }
    });
    for _ in 0..100 {
        seen.send(()).unwrap();
        run(&reactor, wakeup.wait()).unwrap();
    }
    drop(seen);
    thread.join().unwrap();
    // Nothing is left of them, and two at once may be one.
    reactor.submit_and_wait(Some(Duration::from_millis(5))).unwrap();
    reactor.reap();
    assert!(!wakeup.take());
    drop(wakeup);
    while reactor.in_flight() > 0 {
        reactor.submit_and_wait(Some(Duration::from_secs(1))).unwrap();
        reactor.reap();
    }
}

#[test]
fn eventfd_written_before_it_is_watched_is_a_wake() {
    let reactor = reactor();
    let eventfd = rustix::event::eventfd(3, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let wakeup = reactor.watch_eventfd(Rc::new(eventfd));
    run(&reactor, wakeup.wait()).unwrap();
    assert!(!wakeup.take());
}

#[test]
fn readable_completes_when_a_pipe_has_data() {
    let reactor = reactor();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let reader: Rc<OwnedFd> = Rc::new(reader);
    let readable = reactor.readable(&reader);
    reactor.submit().unwrap();
    assert_eq!(reactor.reap(), 0);
    rustix::io::write(&writer, b"x").unwrap();
    run(&reactor, readable).unwrap();
    run(&reactor, reactor.writable(&Rc::new(writer))).unwrap();
}

#[test]
fn tasks_run_side_by_side_with_their_operations() {
    let reactor = reactor();
    let (_, ring_file) = file_in(&reactor);
    let executor = LocalExecutor::new();
    let finished = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..50_u64)
        .map(|task| {
            let (reactor, ring_file, finished) = (reactor.clone(), Rc::clone(&ring_file), Rc::clone(&finished));
            executor.spawn(async move {
                for round in 0..10 {
                    let memory = IoMemory::from_bytes(&[task as u8; 512]);
                    reactor.issue(transfer(&ring_file, (task * 10 + round) * 512, &memory, true)).await.unwrap();
                    let seen = IoMemory::zeroed(512);
                    reactor.issue(transfer(&ring_file, (task * 10 + round) * 512, &seen, false)).await.unwrap();
                    assert_eq!(seen.to_vec(), memory.to_vec());
                }
                finished.set(finished.get() + 1);
            })
        })
        .collect();
    block_on(&executor, &reactor, &(), async {
        for task in tasks {
            task.await;
        }
    })
    .unwrap();
    assert_eq!(finished.get(), 50);
}

#[test]
fn loop_that_waits_for_nothing_is_reported() {
    let executor = LocalExecutor::new();
    assert!(block_on(&executor, &reactor(), &(), future::pending::<()>()).is_err());
    assert!(block_on(&executor, &MemoryStorage::scrambled(4096, 1), &(), future::pending::<()>()).is_err());
}

#[test]
fn busy_task_does_not_hold_up_completions() {
    let reactor = reactor();
    let executor = LocalExecutor::new();
    executor
        .spawn(async {
            loop {
                future::yield_now().await;
            }
        })
        .detach();
    block_on(&executor, &reactor, &(), reactor.sleep(Duration::from_millis(5))).unwrap().unwrap();
}

/// A queue whose work comes, now and then, just when the thread is about to sleep.
#[derive(Default)]
struct LateQueue {
    work: RefCell<Vec<future::Boxed<()>>>,
    looks: Cell<u32>,
    done: Rc<Cell<u32>>,
    asleep: Cell<bool>,
}

impl Poller for LateQueue {
    fn poll(&self) -> bool {
        self.looks.set(self.looks.get() + 1);
        let work = self.work.take();
        let done = work.len() as u32;
        self.done.set(self.done.get() + done);
        done > 0
    }

    fn prepare_sleep(&self) -> bool {
        assert!(!self.asleep.replace(true));
        if self.looks.get().is_multiple_of(3) {
            return true;
        }
        self.work.borrow_mut().push(Box::pin(async {}));
        false
    }

    fn woken(&self) {
        assert!(self.asleep.replace(false));
    }
}

#[test]
fn work_that_comes_before_sleeping_is_taken_without_sleeping() {
    let reactor = reactor();
    let queue = LateQueue::default();
    block_on(&LocalExecutor::new(), &reactor, &queue, reactor.sleep(Duration::from_millis(5))).unwrap().unwrap();
    assert!(queue.done.get() > 0);
    assert!(!queue.asleep.get());
}

#[test]
fn scrambled_memory_drives_tasks_like_a_ring() {
    let storage = MemoryStorage::scrambled(1 << 20, 9);
    let executor = LocalExecutor::new();
    let value = block_on(&executor, &storage, &(), async {
        use crate::engine::Storage;
        storage.write(0, &IoMemory::from_bytes(&[5; 4096])).await.unwrap();
        let seen = storage.allocate(512);
        storage.read(512, &seen).await.unwrap();
        seen.to_vec()[0]
    });
    assert_eq!(value.unwrap(), 5);
    storage.advance(false).unwrap();
    assert!(storage.advance(true).is_err());
}

mod requests {
    use super::*;

    fn complete(request: &mut Request, result: i32) -> Step {
        request.complete(result, &mut 0, &mut Vec::new())
    }

    #[test]
    fn short_transfer_goes_on_where_it_stopped() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let mut request = transfer(&file, 8192, &IoMemory::zeroed(4096), true);
        assert!(matches!(complete(&mut request, 1024), Step::Again));
        assert!(matches!(complete(&mut request, 512), Step::Again));
        assert!(matches!(complete(&mut request, 2560), Step::Finished(Ok(()))));
    }

    #[test]
    fn transfer_that_moves_nothing_is_an_error() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let kind = |write, result| {
            let mut request = transfer(&file, 0, &IoMemory::zeroed(4096), write);
            match complete(&mut request, result) {
                Step::Finished(Err(error)) => error.kind(),
                other => panic!("unexpected {other:?}"),
            }
        };
        assert_eq!(kind(true, 0), io::ErrorKind::WriteZero);
        assert_eq!(kind(false, 0), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(false, 700), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn interrupted_entry_is_tried_again_but_not_for_ever() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let mut request = Request::Sync(file);
        let mut attempts = 0;
        let mut tries = 0;
        let end = loop {
            tries += 1;
            match request.complete(-libc::EAGAIN, &mut attempts, &mut Vec::new()) {
                Step::Again => assert!(tries < 100_000),
                Step::Finished(end) => break end,
            }
        };
        assert!(tries > 100);
        assert_eq!(end.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    }

    #[test]
    fn extension_allocates_then_writes_every_byte() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let zeros = IoMemory::zeroed(4096);
        let mut request = Request::Extend { file, range: 4096..16384, position: 4096, allocate: true, zeros };
        for result in [-libc::EOPNOTSUPP, 4096, 4096, 2048] {
            assert!(matches!(complete(&mut request, result), Step::Again));
        }
        assert!(matches!(complete(&mut request, 2048), Step::Finished(Ok(()))));
    }

    #[test]
    fn extension_that_finds_no_space_writes_nothing() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let zeros = IoMemory::zeroed(4096);
        let mut request = Request::Extend { file, range: 0..4096, position: 0, allocate: true, zeros };
        match complete(&mut request, -libc::ENOSPC) {
            Step::Finished(Err(error)) => assert_eq!(error.raw_os_error(), Some(libc::ENOSPC)),
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn punch_that_the_host_cannot_do_is_told() {
        let reactor = reactor();
        let (_, file) = file_in(&reactor);
        let mut request = Request::Punch(Punch::new(file, 0..4096, PunchPace::new()));
        for errno in [libc::EOPNOTSUPP, libc::EIO] {
            match complete(&mut request, -errno) {
                Step::Finished(Err(error)) => assert_eq!(error.raw_os_error(), Some(errno)),
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}
