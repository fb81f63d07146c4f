//! Images: reading them in all their forms, unpacking them onto thin volumes, listing them.

mod apply;
mod archive;
mod directory;
mod disk;
mod docker;
mod filesystem;
mod layout;
mod source;
mod stream;
mod tree;

pub use source::Source;
