//! Seeds of each target, out of real pools. A target started with `PLYWOOD_FUZZ_SEEDS=DIR` writes its own to DIR and
//! ends (`tools/fuzz-seeds`).

use std::path::Path;

use crate::layout::{Found, Structure};
use crate::patches;
use crate::samples::Sample;

/// Called by each target when it starts.
pub fn offer(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(directory) = std::env::var_os("PLYWOOD_FUZZ_SEEDS") else { return };
    let directory = Path::new(&directory);
    std::fs::create_dir_all(directory).expect("a directory for the seeds");
    for (number, seed) in seeds().iter().enumerate() {
        std::fs::write(directory.join(format!("seed-{number:03}")), seed).expect("room for a seed");
    }
    std::process::exit(0);
}

/// The blocks of one kind in all samples, with what was found, each content once.
pub fn blocks(structure: Structure) -> Vec<(Found, Vec<u8>)> {
    let mut all: Vec<(Found, Vec<u8>)> = Vec::new();
    for sample in Sample::ALL {
        let image = sample.image();
        let some = patches::structures(sample).into_iter().map(|(_, found)| found);
        for found in some.filter(|found| found.structure == structure) {
            let content = image.block(found.block).to_vec();
            if all.iter().all(|(_, known)| *known != content) {
                all.push((found, content));
            }
        }
    }
    all
}
