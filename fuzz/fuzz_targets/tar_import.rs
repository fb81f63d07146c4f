//! A layer, unpacked onto a directory as `image import` does it: names, links, whiteouts, devices, attributes.
//!
//! * Unpacking never panics and always ends.
//! * Nothing is made or changed outside of the directory, through whatever links.
//! * Memory: the bound on extension headers (4 MiB), the buffer, and a small multiple of the input.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use plywood::cli::image::apply_archive;
use plywood_fuzz::imports::{Ground, sample_archive};
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::seeds;

const BOUND: Bound = Bound { fixed_bytes: 5 << 20, multiple: 64 };

thread_local! {
    static GROUND: OnceCell<Ground> = const { OnceCell::new() };
}

fuzz_target!(
    init: seeds::offer(|| {
        let archive = sample_archive();
        let entries = archive.chunks(1024).map(<[u8]>::to_vec);
        entries.chain([archive.clone()]).collect()
    }),
    |input: &[u8]| GROUND.with(|ground| {
        let ground = ground.get_or_init(Ground::new);
        let root = ground.root();
        let unpacked = bounded(BOUND, input.len(), || apply_archive(root, input));
        if let Ok((summary, _)) = unpacked {
            assert!(summary.content_bytes <= input.len() as u64);
            assert!(summary.entries + summary.whiteouts <= input.len() as u64 / 512);
        }
        ground.assert_untouched(&["root"]);
    })
);
