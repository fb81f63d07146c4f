//! Images: reading them in all their forms, unpacking them onto thin volumes, listing them.

mod apply;
mod archive;
mod stream;
mod tree;
