//! Operations on a pool beside the model, in several lives: each ends when the input says so, closed, dead or in a power
//! cut, at any operation of the storage.
//!
//! * After a power cut every block holds what the last FLUSH covered or something newer, after a process death the last
//!   that was acknowledged; what was not answered has happened or not, whole blocks at a time.
//! * Volumes that were acknowledged are there, snapshots do not change, nothing is of another volume.
//! * The pool opens at once and `check` is clean, also when the crash came while it was being opened.
//! * On a sound pool no call fails but for want of space, none is stuck, nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use plywood::engine::Pool;
use plywood_fuzz::fields::Fields;
use plywood_fuzz::memory::{Bound, bounded};
use plywood_fuzz::model::{Model, operation};
use plywood_fuzz::samples::{POOL_BYTES, Sample};
use plywood_fuzz::seeds;
use plywood_fuzz::session::{Session, SharedLog, Stopped};
use plywood_fuzz::storage::FuzzStorage;

/// Lives of one input, and operations of one life.
const LIVES_MAX: usize = 6;
const OPERATIONS_MAX: u8 = 48;
const BOUND: Bound = Bound { fixed_bytes: 4 * POOL_BYTES as usize, multiple: 0 };

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Death,
    PowerCut,
}

/// One life: a byte for its end, two for the storage's operations before it, one for the number of operations.
fn live(storage: &FuzzStorage, log: &SharedLog, model: &mut Model, fields: &mut Fields<'_>) -> End {
    let end = [End::Close, End::Death, End::PowerCut][usize::from(fields.byte()) % 3];
    let (crash, operations) = (u64::from(fields.u16() % 4096), fields.byte() % OPERATIONS_MAX);
    let mut session = Session::new(storage);
    // Some crashes come while the pool is being opened.
    storage.stop_after(if end == End::Close { u64::MAX } else { crash + 2 });
    let Ok(opened) = session.open(log, true) else { return end };
    let pool = opened.unwrap_or_else(|error| panic!("a sound pool does not open: {error}"));
    let left = storage.clone();
    let mut life = |model: &mut Model| -> Result<(), Stopped> {
        // Comparing is not what is to be interrupted.
        left.stop_after(u64::MAX);
        model.compare(&session, &pool, storage);
        check(&session, &pool);
        left.stop_after(if end == End::Close { u64::MAX } else { crash + 2 });
        for _ in 0..operations {
            if fields.is_empty() {
                break;
            }
            model.step(&session, &pool, storage, fields)?;
        }
        if end == End::Close {
            let closing = pool.clone();
            session.run(async move { closing.close().await })?.expect("a sound pool closes");
            model.closed();
        }
        Ok(())
    };
    let _ = life(model);
    end
}

fn check(session: &Session, pool: &Pool<FuzzStorage>) {
    let call = pool.clone();
    let report = session.run(async move { call.check().await }).expect("the storage answers").expect("it is idle");
    assert!(report.is_clean(), "{report:?}");
}

/// A generator for what a power cut leaves (xorshift, Marsaglia 2003).
fn chance(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed | 1;
    move |bound| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as usize
    }
}

fn run(input: &[u8]) {
    let mut fields = Fields(input);
    let mut image = Sample::Fresh.image();
    let mut log = SharedLog::new(1);
    let mut model = Model::default();
    for life in 0..LIVES_MAX as u64 {
        if fields.is_empty() && life > 0 {
            break;
        }
        let storage = FuzzStorage::new(image, u64::MAX);
        match live(&storage, &log, &mut model, &mut fields) {
            // After a death the front keeps the pending log, and all that was issued has completed.
            End::Close | End::Death => image = storage.image(),
            End::PowerCut => {
                model.power_cut();
                image = storage.image_after_power_cut(chance(fields.u64()));
                log = SharedLog::new(u128::from(life) + 2);
            }
        }
    }
    let storage = FuzzStorage::new(image, u64::MAX);
    let mut session = Session::new(&storage);
    let pool = session.open(&log, true).expect("the storage answers").expect("a sound pool opens");
    model.compare(&session, &pool, &storage);
    check(&session, &pool);
}

fuzz_target!(
    init: seeds::offer(|| {
        let story = [
            operation(0, 0, 0, 0),
            operation(1, 0, 0, 7),
            operation(1, 0, 5, 3),
            operation(6, 0, 0, 0),
            operation(1, 0, 1, 2),
            operation(7, 1, 0, 0),
            operation(5, 0, 0, 0),
            operation(1, 2, 4, 0x85),
            operation(4, 0, 4, 0x44),
            operation(10, 0, 0, 0),
            operation(9, 0, 1, 0),
            operation(1, 0, 12, 7),
            operation(8, 1, 0, 0),
            operation(11, 0, 0, 7),
        ];
        let story: Vec<u8> = story.concat();
        let mut all = Vec::new();
        for end in 0..3 {
            for crash in [5_u16, 40, 80, 150, 300] {
                let life = [&[end][..], &crash.to_le_bytes(), &[14], &story].concat();
                let gap: &[u8] = if end == 2 { &[7; 8] } else { &[] };
                all.push([&life[..], gap, &life, gap].concat());
            }
        }
        all
    }),
    |input: &[u8]| bounded(BOUND, input.len(), || run(input))
);
