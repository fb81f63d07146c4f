//! Reservations: made and taken away at any moment, and written when others want every block.

use std::rc::Rc;

use plywood::io::IoMemory;

use crate::content::{SECTOR, SECTORS, fill};
use crate::model::{Control, Kind};
use crate::operations::refused;
use crate::world::{Shared, World};

const BLOCK: u64 = SECTOR * SECTORS;

impl World {
    pub fn start_reserve(&mut self) -> bool {
        let Some(volume) = self.pick(true, |volume| !volume.read_only) else { return false };
        let most = (volume.size_bytes / BLOCK).min(64);
        let wanted = if self.random.u32(..3) == 0 { 0 } else { self.random.u64(1..=most) };
        let (pool, reservation_bytes) = (self.pool(), wanted * BLOCK);
        let control = Control::Reserve { volume: volume.uuid, reservation_bytes };
        self.control_alone(volume.uuid, control, async move |shared: &Shared| {
            match pool.set_reservation(volume.id, reservation_bytes).await {
                Ok(()) => {
                    if let Some(volume) = shared.model.borrow_mut().volumes.get_mut(&volume.uuid) {
                        volume.reservation_bytes = reservation_bytes;
                    }
                }
                Err(error) => refused(shared, "reservation", &error),
            }
        });
        true
    }

    /// Writes as many blocks of a volume as are reserved for it and not its own yet, whatever others are doing: none may be
    /// refused.
    pub fn start_claim(&mut self) -> bool {
        let Some(volume) = self.pick(true, |volume| volume.reservation_bytes > 0) else { return false };
        let is_unanswered = self.shared.unanswered.borrow().values().any(|request| request.volume == volume.uuid);
        if is_unanswered {
            return false;
        }
        let (pool, handle, shared) = (self.pool(), self.handle(volume.uuid), Rc::clone(&self.shared));
        let mut random = fastrand::Rng::with_seed(self.random.u64(..));
        self.spawn(vec![volume.uuid], true, async move {
            let Ok(info) = pool.volume_by_id(volume.id) else { return };
            for _ in 0..info.reservation_left_bytes / BLOCK {
                let block = random.u64(..volume.size_bytes / BLOCK);
                let sectors = block * SECTORS..(block + 1) * SECTORS;
                let number = shared.model.borrow_mut().number();
                shared.model.borrow_mut().sent_again(volume.uuid, sectors.clone());
                shared.model.borrow_mut().begin(number, volume.uuid, sectors.clone(), number, Kind::Write);
                let memory = IoMemory::from_bytes(&fill(number, sectors.start, SECTORS));
                match handle.write(block * BLOCK, &memory, false).await {
                    Ok(held) => {
                        shared.model.borrow_mut().acknowledge(number, false);
                        shared.met.borrow_mut().claimed += 1;
                        drop(held);
                    }
                    Err(error) => panic!("{} has {info:?}, and is refused: {error}; {:?}", volume.name, pool.info()),
                }
            }
        });
        true
    }
}
