//! What the kernel says about loop devices while a test runs.

use super::command::shell;

/// The kernel's log from one moment on: older tests, and others on this machine, are in it, too.
pub struct KernelLog {
    /// Seconds since boot.
    from: f64,
}

impl KernelLog {
    pub fn from_now() -> Self {
        Self { from: lines().iter().filter_map(|line| seconds(line)).fold(0.0, f64::max) }
    }

    /// # Panics
    /// When the kernel has complained about I/O on `device` since.
    pub fn assert_no_io_error(&self, device: &str) {
        let name = format!("dev {},", device.trim_start_matches("/dev/"));
        let lines = lines();
        let is_complaint = |line: &&String| {
            seconds(line).is_none_or(|at| at > self.from)
                && line.split_once("I/O error").is_some_and(|(_, rest)| rest.contains(&name))
        };
        let complaints: Vec<&String> = lines.iter().filter(is_complaint).collect();
        assert!(complaints.is_empty(), "the kernel saw I/O errors: {complaints:?}");
    }

    /// # Panics
    /// When the kernel has told of a task that hung since, and is none of a compiler's beside the tests.
    pub fn assert_nobody_hung(&self) {
        let lines = lines();
        let is_compiler = |task: &str| {
            let name =
                task.rsplit_once(" blocked").and_then(|(task, _)| task.rsplit_once(':')).map_or("", |(name, _)| name);
            ["rustc", "cargo", "ld", "cc", "clang"].contains(&name) || name.starts_with("opt cgu")
        };
        let hung = |line: &&String| {
            let task = line.split_once("task ").map_or("", |(_, task)| task);
            seconds(line).is_none_or(|at| at > self.from)
                && line.contains("blocked for more than")
                && !is_compiler(task)
        };
        let hung: Vec<&String> = lines.iter().filter(hung).collect();
        assert!(hung.is_empty(), "tasks hung: {hung:?}");
    }
}

fn lines() -> Vec<String> {
    shell("dmesg").stdout.lines().map(str::to_owned).collect()
}

/// The time at the head of a line.
fn seconds(line: &str) -> Option<f64> {
    line.strip_prefix('[')?.split_once(']')?.0.trim().parse().ok()
}
