//! Running programs: with a time limit, and with everything they said in the panic when one fails.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest that a command may take unless it says otherwise, in seconds.
const LIMIT_SECONDS: u64 = 600;

/// The binary under test: `PLYWOOD_BINARY` where it was built elsewhere than it runs.
pub fn binary() -> PathBuf {
    std::env::var_os("PLYWOOD_BINARY").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_plywood")), PathBuf::from)
}

/// Whether the machine is so slow (an emulator) that sizes and repetitions are cut down.
pub fn is_slow() -> bool {
    std::env::var_os("PLYWOOD_TEST_SLOW").is_some()
}

/// What a program did.
#[derive(Debug)]
pub struct Outcome {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn succeeded(&self) -> bool {
        self.status.success()
    }

    /// Its standard output without the last line's end.
    ///
    /// # Panics
    /// When it did not end with 0.
    #[track_caller]
    pub fn expect(self) -> String {
        assert!(
            self.succeeded(),
            "`{}` ended with {}\nstdout: {}\nstderr: {}",
            self.command,
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout.trim_end().to_owned()
    }

    /// Its one line on standard error: exit status 1, and a message that names all of `named`.
    ///
    /// # Panics
    /// When it did anything else.
    #[track_caller]
    pub fn expect_refusal(self, named: &[&str]) -> String {
        assert_eq!(self.status.code(), Some(1), "`{}`: {}{}", self.command, self.stdout, self.stderr);
        let message = self.stderr.trim_end().to_owned();
        assert_eq!(message.lines().count(), 1, "`{}` says more than one line: {message}", self.command);
        for word in named {
            assert!(
                message.to_lowercase().contains(&word.to_lowercase()),
                "`{}` does not name {word:?}: {message}",
                self.command
            );
        }
        message
    }
}

/// Runs `program` to its end.
///
/// # Panics
/// When it cannot be started, or takes longer than ten minutes.
#[track_caller]
pub fn run<A: Into<OsString>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Outcome {
    run_command(prepare(program, arguments))
}

/// A command with nothing on its standard input, killed after ten minutes.
pub fn prepare<A: Into<OsString>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=20", &LIMIT_SECONDS.to_string(), program]);
    command.args(arguments.into_iter().map(Into::into)).stdin(Stdio::null());
    command
}

/// Runs what [`prepare`] made.
#[track_caller]
pub fn run_command(mut command: Command) -> Outcome {
    let words: Vec<_> = command.get_args().skip(2).map(|word| word.to_string_lossy().into_owned()).collect();
    let words = words.join(" ");
    let output = command.output().unwrap_or_else(|error| panic!("`{words}` does not start: {error}"));
    Outcome {
        command: words,
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a line of shell.
#[track_caller]
pub fn shell(line: &str) -> Outcome {
    run("sh", ["-c", line])
}

/// A program in the background. It is killed when this is dropped.
pub struct Background {
    child: Option<Child>,
    name: String,
}

impl Background {
    /// Starts it; what it says is kept for the message when it fails.
    #[track_caller]
    pub fn start<A: Into<OsString>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        let child = Command::new(program)
            .args(arguments.into_iter().map(Into::into))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("`{program}` does not start: {error}"));
        Self { child: Some(child), name: program.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.as_mut().expect("running").try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Outcome {
        let output = self.child.take().expect("running").wait_with_output().expect("wait");
        Outcome {
            command: self.name.clone(),
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks `condition` again and again until it holds.
///
/// # Panics
/// When it does not within `limit`.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
