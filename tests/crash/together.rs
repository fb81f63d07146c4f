//! Snapshots of several volumes at one instant, taken at any moment: each is held against its own volume, after a crash there
//! may be some of them. That they are of one instant is for `stories`.

use std::rc::Rc;

use crate::model::{Control, Volume};
use crate::operations::{adopt, new_snapshot, refused};
use crate::world::World;

impl World {
    pub fn start_snapshots(&mut self) -> bool {
        let mut origins: Vec<Volume> = Vec::new();
        for _ in 0..3 {
            let is_wanted =
                |volume: &Volume| !volume.read_only && origins.iter().all(|origin| origin.uuid != volume.uuid);
            origins.extend(self.pick(false, is_wanted));
        }
        if origins.len() < 2 || self.is_crowded() {
            return false;
        }
        let (mut wanted, mut taken) = (Vec::new(), Vec::new());
        for origin in &origins {
            let snapshot = origin.share(self.uuid(), self.name(), true);
            wanted.push((origin.id, new_snapshot(&snapshot)));
            let mut model = self.shared.model.borrow_mut();
            let observer = model.number();
            model.observe(observer, origin.uuid);
            model.controls.insert(observer, Control::Snapshot { observer, volume: snapshot.clone() });
            taken.push((observer, snapshot));
        }
        let (pool, shared) = (self.pool(), Rc::clone(&self.shared));
        let uuids = origins.iter().map(|origin| origin.uuid).collect();
        self.spawn(uuids, false, async move {
            let outcome = pool.create_snapshots(wanted).await;
            for (index, (observer, snapshot)) in taken.into_iter().enumerate() {
                let blocks = shared.model.borrow().observed(observer);
                shared.model.borrow_mut().observation_ended(observer, outcome.is_ok());
                shared.model.borrow_mut().controls.remove(&observer);
                if let Ok(infos) = &outcome {
                    adopt(&shared, Volume { id: infos[index].id, blocks, ..snapshot });
                    shared.met.borrow_mut().snapshots_together += 1;
                }
            }
            if let Err(error) = outcome {
                refused(&shared, "snapshots", &error);
            }
        });
        true
    }
}
