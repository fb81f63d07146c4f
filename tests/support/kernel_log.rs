//! What the kernel says about loop devices while a test runs.

use super::command::shell;

/// The kernel's log from one moment on. The machine's other loop devices are in it, too.
pub struct KernelLog {
    lines_before: usize,
}

impl KernelLog {
    pub fn from_now() -> Self {
        Self { lines_before: lines().len() }
    }

    /// # Panics
    /// When the kernel has complained about I/O on `device` since.
    pub fn assert_no_io_error(&self, device: &str) {
        let name = format!("dev {},", device.trim_start_matches("/dev/"));
        let lines = lines();
        // The kernel's buffer is a ring: when old lines have gone, all that is left is looked at.
        let from = if self.lines_before <= lines.len() { self.lines_before } else { 0 };
        let wanted = |line: &&String| line.split_once("I/O error").is_some_and(|(_, rest)| rest.contains(&name));
        let complaints: Vec<&String> = lines[from..].iter().filter(wanted).collect();
        assert!(complaints.is_empty(), "the kernel saw I/O errors: {complaints:?}");
    }
}

fn lines() -> Vec<String> {
    shell("dmesg").stdout.lines().map(str::to_owned).collect()
}
