//! The tools for a pool that nobody uses, on an arbitrary file: check, dump, restore of the dump, whole or changed, and
//! repair. The input is as that of `pool_open`; what the patches leave of it says which tool, and how a dump is changed.
//!
//! * Nothing panics, and every tool ends.
//! * A pool that no patch changed has no faults, and its dump restored is dumped as the same again.
//! * What was damaged and has been repaired, or restored from its own dump, is clean, opens, and is clean in use; repaired once
//!   more, nothing is done. (Of a pool or a dump that lies with right checksums only that no tool panics.)
//! * What a repair saved, put back, is the file as it was. What is refused as no dump has changed nothing.
//! * Memory: bounded by the pool.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::rc::Rc;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use plywood::engine::{SavedBlock, check_metadata, dump_metadata, repair_metadata, restore_metadata};
use plywood::error::{Error, Result};
use plywood_fuzz::fields::Fields;
use plywood_fuzz::image::Image;
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::samples::{POOL_BYTES, Sample};
use plywood_fuzz::session::{Session, SharedLog};
use plywood_fuzz::storage::FuzzStorage;
use plywood_fuzz::{patches, seeds};

/// The pool and a copy of it, its metadata decoded, and the text of a dump.
const BOUND: Bound = Bound { fixed_bytes: 4 * POOL_BYTES as usize, multiple: 0 };
/// Most numbers of a dump that are changed.
const CHANGES_MAX: u8 = 8;

/// Runs one tool to its end.
fn run<T: 'static>(storage: &FuzzStorage, tool: impl Future<Output = T> + 'static) -> T {
    Session::new(storage).run(tool).expect("the storage answers")
}

fn fault_count(image: &Image) -> Result<u64> {
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let checked = storage.clone();
    run(&storage, async move { check_metadata(&checked, &mut |_| ()).await }).map(|report| report.fault_count)
}

fn assert_sound(image: &Image, what: &str) {
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let checked = storage.clone();
    let report = run(&storage, async move { check_metadata(&checked, &mut |_| ()).await });
    let report = report.unwrap_or_else(|error| panic!("{what} cannot be checked: {error}"));
    assert!(report.is_clean(), "{what} is not clean: {report:#?}");
    let mut session = Session::new(&storage);
    let pool = session.open(&SharedLog::new(11), true).expect("the storage answers");
    let pool = pool.unwrap_or_else(|error| panic!("{what} does not open: {error}"));
    let report = session.run(async move { pool.check().await }).expect("the storage answers");
    let report = report.unwrap_or_else(|error| panic!("{what} cannot be checked in use: {error}"));
    assert!(report.is_clean(), "{what} is not clean in use: {report:#?}");
}

/// Whatever it is, it is looked at and opened.
fn use_anyway(image: &Image) {
    let _ = fault_count(image);
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let mut session = Session::new(&storage);
    if let Ok(pool) = session.open(&SharedLog::new(11), true).expect("the storage answers") {
        let _ = session.run(async move { pool.check().await }).expect("the storage answers");
    }
}

fn assert_same(image: &Image, other: &Image, what: &str) {
    for block in image.written().into_iter().chain(other.written()) {
        assert!(image.block(block) == other.block(block), "{what}: block {block}");
    }
}

fn dump(image: &Image) -> Option<Vec<u8>> {
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let (dumped, text) = (storage.clone(), Rc::new(RefCell::new(Vec::new())));
    let into = Rc::clone(&text);
    let outcome = run(&storage, async move {
        let mut lines = Vec::new();
        let report = dump_metadata(&dumped, &mut lines, &mut |_| ()).await;
        into.replace(lines);
        report
    });
    assert_same(image, &storage.image(), "a dump changes nothing");
    outcome.ok().map(|_| text.take())
}

fn restore(image: &Image, text: Vec<u8>) -> Option<Image> {
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let target = storage.clone();
    let outcome = run(&storage, async move { restore_metadata(&target, || Ok(Cursor::new(text.clone()))).await });
    if let Err(Error::InvalidInput(reason)) = &outcome {
        assert_same(image, &storage.image(), reason);
    }
    outcome.ok().map(|_| storage.image())
}

fn repair(image: &Image) -> Option<Image> {
    let storage = FuzzStorage::new(image.clone(), u64::MAX);
    let (target, saved) = (storage.clone(), Rc::new(RefCell::new(BTreeMap::new())));
    let into = Rc::clone(&saved);
    let outcome = run(&storage, async move {
        let mut save = |blocks: &[SavedBlock]| {
            for (block, bytes) in blocks {
                into.borrow_mut().entry(block.0).or_insert_with(|| bytes.clone());
            }
            Ok(())
        };
        repair_metadata(&target, Some(&mut save), &mut |_| ()).await
    });
    let mut undone = storage.image();
    for (block, bytes) in saved.take() {
        undone.change(block, |content| content.copy_from_slice(&bytes));
    }
    assert_same(image, &undone, "what was written over was saved");
    let report = outcome.ok()?;
    assert!(report.fault_count > 0 || report.blocks_written == 0, "{report:?}");
    Some(storage.image())
}

/// Puts other numbers into a dump.
fn change(text: &[u8], fields: &mut Fields<'_>) -> Vec<u8> {
    let mut text = String::from_utf8(text.to_vec()).expect("a dump is text");
    for _ in 0..fields.byte() % CHANGES_MAX {
        let bytes = text.as_bytes();
        let begins = |at: usize| bytes[at].is_ascii_digit() && (at == 0 || !bytes[at - 1].is_ascii_alphanumeric());
        let numbers: Vec<usize> = (0..bytes.len()).filter(|at| begins(*at)).collect();
        let at = |index: u16| {
            let start = numbers[usize::from(index) % numbers.len()];
            let len = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            start..start + len
        };
        let place = at(fields.u16());
        let number = match fields.byte() % 6 {
            0 => text[at(fields.u16())].to_owned(),
            1 => (u64::MAX - u64::from(fields.byte())).to_string(),
            2 => (1_u64 << (fields.byte() % 64)).to_string(),
            3 => fields.u64().to_string(),
            4 => "-1".to_owned(),
            _ => fields.byte().to_string(),
        };
        text.replace_range(place, &number);
    }
    text.into_bytes()
}

fuzz_target!(
    init: seeds::offer(|| {
        let mut all = Vec::new();
        for sample in Sample::ALL {
            for tool in 0..4 {
                all.push(patches::encode(sample, tool % 2 == 0, &[], &[tool, 2, 9, 0, 1, 3, 30, 0, 2, 20]));
            }
            for (number, _) in patches::structures(sample) {
                for repaired in [false, true] {
                    all.push(patches::encode(sample, repaired, &[(number, 140, &[0xff, 0xff])], &[number as u8]));
                }
            }
        }
        all
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || {
        let mut patched = patches::apply(input);
        let (image, rest) = (&patched.image, &mut patched.rest);
        let faults = fault_count(image);
        let is_whole = input.get(1) == Some(&0);
        assert!(!is_whole || matches!(faults, Ok(0)), "a pool that nothing happened to is clean: {faults:?}");
        if rest.byte() % 2 == 0 {
            if let Some(repaired) = repair(image) {
                if patched.repaired {
                    use_anyway(&repaired);
                    return;
                }
                assert_sound(&repaired, "what was repaired");
                let again = repair(&repaired).expect("it is sound");
                assert_same(&repaired, &again, "a second repair has nothing to do");
            }
            return;
        }
        let Some(text) = dump(image) else { return };
        let changed = change(&text, rest);
        if let Some(restored) = restore(image, changed.clone()) {
            if patched.repaired || changed != text {
                use_anyway(&restored);
                return;
            }
            assert_sound(&restored, "what was restored");
            if is_whole {
                assert_eq!(dump(&restored), Some(text), "the round trip is exact");
            }
        }
    })
);

// Half of the inputs are libFuzzer's own mutations, the others fields changed to what hurts.
fuzz_mutator!(|input: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2) {
        return fuzzer_mutate(input, size, max_size);
    }
    let invented = patches::invent(seed.into());
    let len = invented.len().min(max_size);
    input[..len].copy_from_slice(&invented[..len]);
    len
});
