//! What is mounted, as /proc/self/mountinfo tells it.

use std::fs;
use std::path::{Path, PathBuf};

/// Mount points below `folder`, the innermost first.
pub fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(folder))
        .collect();
    found.reverse();
    found
}

/// The device mounted at `point`.
pub fn device_at(point: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line = table.lines().rev().find(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == point))?;
    line.split(" - ").nth(1)?.split(' ').nth(1).map(str::to_owned)
}
