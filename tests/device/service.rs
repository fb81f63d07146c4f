//! A daemon as a service manager runs it: told what to serve by the environment, heard when it serves and when it stops.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::command::{Background, binary, run, wait_until};
use crate::support::pool::{TestPool, Transport, is_alive};

const LONG: Duration = Duration::from_secs(60);
/// Deaths until one must have come before the second in which changes are committed by themselves.
const TRIES: u8 = 5;

/// All that a daemon says to its service manager until it has said `expected`.
#[track_caller]
fn heard_until(manager: &UnixDatagram, expected: &str) -> String {
    let mut heard = String::new();
    loop {
        let mut message = [0; 4096];
        let count = manager.recv(&mut message).unwrap_or_else(|error| panic!("no {expected} in {heard:?}: {error}"));
        heard.push_str(&String::from_utf8_lossy(&message[..count]));
        heard.push('\n');
        if heard.lines().any(|line| line == expected) {
            return heard;
        }
    }
}

/// READY=1 once, when the pool can be used, also though the engine is succeeded; STOPPING=1 at SIGTERM.
pub fn manager_is_told() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create raw --size 64M");
    pool.attach("raw");
    pool.stop();
    let socket = pool.folder().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(60))).expect("a time limit");

    let environment = |name: &str, value: &std::path::Path| format!("{name}={}", value.display());
    let daemon = Background::start(
        "env",
        [
            environment("NOTIFY_SOCKET", &socket),
            environment("PLYWOOD_POOL", pool.file()),
            binary().display().to_string(),
            "serve".to_owned(),
        ],
    );
    let heard = heard_until(&manager, "READY=1");
    assert!(heard.contains("STATUS=serving pool"), "{heard}");
    assert_eq!(pool.process("front_pid"), Some(daemon.id()), "the unit's main process is the front");
    pool.done("attach --all");
    assert!(pool.volume("raw")["device"].is_string(), "what was attached is there again");
    pool.kill_engine();
    pool.done("upgrade");
    pool.done("detach raw");
    // The front is replaced, and says so as at its first start.
    pool.done("upgrade");
    let heard = heard_until(&manager, "READY=1");
    assert!(!heard.contains("STOPPING=1"), "{heard}");
    assert_eq!(pool.process("front_pid"), Some(daemon.id()), "the unit's main process is the front");
    run("kill", ["-TERM".to_owned(), daemon.id().to_string()]).expect();
    let heard = heard_until(&manager, "STOPPING=1");
    assert!(!heard.contains("READY=1"), "a successor is no news: {heard}");
    let outcome = daemon.finish();
    assert!(outcome.succeeded(), "{}", outcome.stderr);
    pool.check();
}

/// A service manager that keeps what a daemon gives it, and starts the next with it.
struct Manager {
    socket: UnixDatagram,
    kept: Vec<OwnedFd>,
}

impl Manager {
    fn new(pool: &TestPool) -> Self {
        let socket = UnixDatagram::bind(pool.folder().join("notify")).expect("a socket");
        socket.set_read_timeout(Some(LONG)).expect("a time limit");
        Self { socket, kept: Vec::new() }
    }

    /// Starts a daemon with what is kept, and waits until it serves.
    fn start(&mut self, pool: &TestPool) -> Child {
        let mut command = Command::new("sh");
        // The number of a process is known to itself first.
        command.args(["-c", "LISTEN_PID=$$ exec \"$0\" serve"]).arg(binary());
        command.env("NOTIFY_SOCKET", pool.folder().join("notify")).env("PLYWOOD_POOL", pool.file());
        command.env("LISTEN_FDS", self.kept.len().to_string());
        command.env("LISTEN_FDNAMES", vec!["plywood-pending"; self.kept.len()].join(":"));
        let given = self.kept.iter().zip(3..).map(|(kept, child_fd)| {
            let parent_fd = kept.try_clone().expect("a duplicate");
            FdMapping { parent_fd, child_fd }
        });
        command.fd_mappings(given.collect()).expect("numbers of their own");
        command.stdin(Stdio::null()).stderr(File::create(pool.folder().join("log")).expect("a log"));
        let daemon = command.spawn().expect("a daemon");
        while !self.hear().contains("READY=1") {}
        daemon
    }

    /// One message; what it says of descriptors is done.
    fn hear(&mut self) -> String {
        let mut text = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let count = message.expect("a message").bytes;
        let text = String::from_utf8_lossy(&text[..count]).into_owned();
        if text.contains("FDSTOREREMOVE=1\nFDNAME=plywood-pending\n") {
            self.kept.clear();
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                assert!(text.contains("FDSTORE=1\nFDNAME=plywood-pending\n"), "{text}");
                self.kept.extend(descriptors);
            }
        }
        text
    }
}

fn kill(process: u32) {
    kill_process(Pid::from_raw(process as i32).expect("a pid"), Signal::KILL).expect("it lives");
}

/// Without a flush, and straight to the device.
fn write_block(device: &str, byte: u8) {
    let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device");
    let bytes = vec![byte; 2 * 4096];
    let start = bytes.as_ptr().align_offset(4096);
    file.write_all_at(&bytes[start..start + 4096], 0).expect("a write");
}

fn read_block(device: &str) -> [u8; 4096] {
    let mut block = [0; 4096];
    File::open(device).expect("the device").read_exact_at(&mut block, 0).expect("a read");
    block
}

fn is_said(log: &Path, words: &str) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains(words))
}

/// Front and engine die in the same moment. What they had acknowledged, flushed or not, is in memory that the service
/// manager keeps, and the next daemon goes on from it; not when somebody else has had the pool in between.
pub fn memory_outlives_all_processes() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create raw --size 64M --sector-size 4096");
    let mut manager = Manager::new(&pool);
    let mut daemon = manager.start(&pool);
    assert_eq!(manager.kept.len(), 1);
    let die = |daemon: &mut Child| {
        let engine = pool.process("engine_pid").expect("an engine");
        (daemon.id(), engine)
    };
    let mut from_memory = 0;
    for byte in 1..=TRIES {
        pool.done("attach --all");
        let device = pool.attach("raw");
        let (front, engine) = die(&mut daemon);
        // Trimmed first, so that the write needs a new mapping.
        run("blkdiscard", [&device]).expect();
        write_block(&device, byte);
        kill(engine);
        kill(front);
        daemon.wait().expect("the end of the front");
        wait_until("the end of the engine", LONG, || !is_alive(engine));
        daemon = manager.start(&pool);
        assert_eq!(manager.kept.len(), 1, "the same memory is kept on");
        pool.done("attach --all");
        let device = pool.volume("raw")["device"].as_str().expect("attached").to_owned();
        assert_eq!(read_block(&device), [byte; 4096], "an acknowledged write is lost");
        from_memory += u32::from(is_said(&pool.folder().join("log"), "they are taken over"));
    }
    println!("{from_memory} of {TRIES} deaths with changes that were in memory only");
    assert!(from_memory > 0, "memory was never needed");

    // Somebody else works on the pool before the next daemon.
    let mut lost = 0;
    for round in 0..TRIES {
        let device = pool.attach("raw");
        let (front, engine) = die(&mut daemon);
        write_block(&device, 0x77);
        run("blkdiscard", [&device]).expect();
        kill(engine);
        kill(front);
        daemon.wait().expect("the end of the front");
        wait_until("the end of the engine", LONG, || !is_alive(engine));
        pool.done(&format!("volume create other-{round} --size 1M"));
        daemon = manager.start(&pool);
        assert!(!is_said(&pool.folder().join("log"), "they are taken over"));
        lost += u32::from(is_said(&pool.folder().join("log"), "somebody else has had the pool since"));
        assert!(pool.names().contains(&format!("other-{round}")));
        if lost > 0 {
            break;
        }
    }
    assert!(lost > 0, "memory of another session was never refused");
    pool.done("detach --all");
    pool.stop();
    daemon.wait().expect("its end");
    pool.check();
}
