//! A bound on what a target may allocate: libFuzzer's own (`-malloc_limit_mb`) needs a sanitizer, which these builds do
//! without. Only Rust's allocations are counted; `-rss_limit_mb` is for all others.

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Most memory that some work may hold at a time, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Whatever the input.
    pub fixed_bytes: usize,
    /// For each byte of input.
    pub multiple: usize,
}

/// The bound of the decoders of one block: what they answer, and the blocks that a target makes to compare.
pub const DECODER: Bound = Bound { fixed_bytes: 128 << 10, multiple: 8 };

/// Does `work` on an input of `input_bytes`.
///
/// # Panics
/// When it held more memory at a time than `bound` allows.
pub fn bounded<T>(bound: Bound, input_bytes: usize, work: impl FnOnce() -> T) -> T {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let outcome = work();
    let held = ALLOCATOR.peak_usage().saturating_sub(before);
    let most = bound.fixed_bytes + bound.multiple * input_bytes;
    assert!(held <= most, "an input of {input_bytes} bytes made it hold {held} bytes of memory; {most} are allowed");
    outcome
}
