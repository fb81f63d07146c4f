//! What a bug report needs, in one file: what the doctor found, and of each pool its figures, its events, the end of its
//! daemon's log and its superblocks. Nothing of what volumes hold.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::pools::Patient;
use super::{Finding, text};
use crate::daemon::log_path;
use crate::daemon::protocol::{Command, Reply};
use crate::format::{SUPERBLOCK_COPIES, Superblock};
use crate::units::BLOCK_SIZE;

/// Most of a log that is taken: its end.
const LOG_BYTES: u64 = 4 << 20;
/// How hard to compress.
const LEVEL: i32 = 9;

/// Writes the bundle to a new file that only its owner reads.
pub(super) fn write(path: &Path, findings: &[Finding], pools: &[Patient]) -> Result<()> {
    let shown = || path.display().to_string();
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(shown)?;
    let packed = zstd::Encoder::new(&file, LEVEL).map_err(anyhow::Error::from).and_then(|encoder| {
        let mut archive = tar::Builder::new(encoder);
        fill(&mut archive, findings, pools)?;
        archive.into_inner()?.finish()?;
        Ok(file.sync_all()?)
    });
    if packed.is_err() {
        // Half a bundle is none.
        let _ = fs::remove_file(path);
    }
    packed.with_context(shown)
}

fn fill<W: Write>(archive: &mut tar::Builder<W>, findings: &[Finding], pools: &[Patient]) -> Result<()> {
    append(archive, "doctor.txt", text(findings).as_bytes())?;
    append(archive, "doctor.json", &serde_json::to_vec_pretty(findings)?)?;
    append(archive, "kernel.txt", &fs::read("/proc/version").unwrap_or_default())?;
    append(archive, "plywood.txt", env!("CARGO_PKG_VERSION").as_bytes())?;
    for (number, Patient { found, client }) in pools.iter().enumerate() {
        // By number: a pool's name is no file's.
        let folder = format!("pool-{number}");
        let asked = |command| client.as_ref().map(|client| told(client.call(command)));
        let about = json!({ "name": found.name, "uuid": found.uuid, "path": found.path, "in_use": client.is_some() });
        append(archive, &format!("{folder}/pool.json"), &serde_json::to_vec_pretty(&about)?)?;
        let questions = [
            ("info", Command::PoolInfo),
            ("figures", Command::Figures),
            ("events", Command::Events { after: 0, wait_ms: 0 }),
        ];
        for (name, command) in questions {
            if let Some(answer) = asked(command) {
                append(archive, &format!("{folder}/{name}.json"), &serde_json::to_vec_pretty(&answer)?)?;
            }
        }
        if let Ok(log) = end_of(&log_path(&found.name, found.uuid)) {
            append(archive, &format!("{folder}/daemon.log"), &log)?;
        }
        append(archive, &format!("{folder}/superblocks.txt"), superblocks(&found.path).as_bytes())?;
    }
    Ok(())
}

fn told(answer: Result<Reply, crate::daemon::protocol::Failure>) -> Value {
    match answer {
        Ok(reply) => serde_json::to_value(reply).unwrap_or_default(),
        Err(failure) => json!({ "failed": failure.message }),
    }
}

fn append<W: Write>(archive: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o600);
    Ok(archive.append_data(&mut header, Path::new("plywood-doctor").join(name), bytes)?)
}

fn end_of(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The four superblocks: what they say, and their bytes.
fn superblocks(path: &Path) -> String {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return format!("{error}\n"),
    };
    let mut text = String::new();
    for address in SUPERBLOCK_COPIES.into_iter().flatten() {
        let mut block = vec![0; BLOCK_SIZE];
        let said = match file.read_exact_at(&mut block, address.offset_bytes()) {
            Ok(()) => match Superblock::decode(&block) {
                Ok(superblock) => format!("{superblock:#?}"),
                Err(check) => format!("damaged: {check:?}"),
            },
            Err(error) => format!("unreadable: {error}"),
        };
        // What is behind the last byte that is set says nothing.
        let end = block.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        text.push_str(&format!("block {address}: {said}\n"));
        for (row, bytes) in block[..end].chunks(32).enumerate() {
            text.push_str(&format!("{:04x}  {}\n", row * 32, hex::encode(bytes)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_is_a_new_private_archive_with_the_findings() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.tar.zst");
        write(&path, &[Finding::ok("kernel", "6.18")], &[]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut archive = tar::Archive::new(zstd::Decoder::new(File::open(&path).unwrap()).unwrap());
        let names: Vec<_> =
            archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect();
        assert!(names.contains(&"plywood-doctor/doctor.json".to_owned()), "{names:?}");
        assert!(write(&path, &[], &[]).is_err(), "what is there is not written over");
    }

    #[test]
    fn end_of_a_long_log_is_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LOG_BYTES * 2).unwrap();
        file.as_file().write_all_at(b"end", LOG_BYTES * 2 - 3).unwrap();
        let end = end_of(file.path()).unwrap();
        assert!(end.len() as u64 == LOG_BYTES && end.ends_with(b"end"));
    }
}
