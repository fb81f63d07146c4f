//! The messages and the service, made from the `.proto` files beside this file.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// `containerd.types`.
pub mod types {
    tonic::include_proto!("containerd.types");
}

/// `containerd.services.snapshots.v1`.
pub mod services {
    pub mod snapshots {
        pub mod v1 {
            tonic::include_proto!("containerd.services.snapshots.v1");
        }
    }
}

pub use services::snapshots::v1 as snapshots;
