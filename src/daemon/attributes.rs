//! Attributes of volumes that the daemon and the command line keep for themselves.

/// On a volume that is a block device: `rw` or `ro`. It stays when the daemon stops, for `attach --all`.
pub const ATTACHED: &str = "plywood.attached";
/// Its value when writes are not refused. Who makes a volume to attach it at once gives it this with the volume, and attaching
/// has one change less to make durable; a crash in between leaves what attaching would have left.
pub const FOR_WRITING: &str = "rw";
/// On a volume that was attached for something that will detach it again: `mount`, `run`.
pub const ATTACHED_BY: &str = "plywood.attached-by";
/// On a volume that goes away with its use, and says which; what is left of one is deleted when a daemon starts afresh.
pub const EPHEMERAL: &str = "plywood.ephemeral";
/// On a layer of an imported image: digest of the layer and all below it, by the image specification's rule.
pub const CHAIN_ID: &str = "plywood.image.chain-id";
/// On such a layer: the file system that it was unpacked on; none on a disk image.
pub const FILESYSTEM: &str = "plywood.image.filesystem";
/// On a volume that Docker or Podman created: what it was asked for, JSON.
pub const DOCKER_OPTIONS: &str = "plywood.docker.options";
/// On such a volume while it is mounted for containers: the boot, and the id of each mount, JSON.
pub const DOCKER_MOUNTS: &str = "plywood.docker.mounts";
/// On a volume that holds what has arrived of a snapshot so far: which one, and how far, JSON.
pub const RECEIVING: &str = "plywood.receiving";
