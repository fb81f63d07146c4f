//! Which blocks are in use, how often, and which may be handed out.

mod allocator;
mod bitmap;
mod deltas;
mod window;

pub(super) use allocator::{Allocator, GroupSpace, PREPARED_BLOCKS, Run, Unprepared};
pub(super) use deltas::{Deltas, PageKey};
pub(super) use window::Window;
