//! Snapshots on their way from one pool to another: `plywood send` writes a stream, `plywood receive` applies it; and the
//! content of volumes on its way to and from files of other kinds.
//!
//! [`stream`] is the format (`docs/stream.md`). Who receives sees nothing of a snapshot before its digest has been found to
//! be the sender's.

mod content;
mod disk;
mod file;
mod receive;
mod send;
pub mod stream;

pub use disk::{Target, export, import};
pub use file::NewFile;
pub use receive::{ReceiveArguments, receive};
pub use send::{SendArguments, send};
