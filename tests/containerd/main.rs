//! `plywood containerd` on a real pool: spoken to over gRPC as containerd does it, and by a real containerd. Wants root.
//!
//! A test that cannot run says why and is counted as ignored; with `PLYWOOD_REQUIRE_DEVICE` set that is a failure, unless
//! it is the kernel that lacks what is needed. Tests run one after the other: they share the machine's loop devices.

mod calls;
mod deaths;
mod engine;
mod exported;
mod image;
mod pulled;
mod real;
mod registry;
mod snapshotter;
#[path = "../support/mod.rs"]
mod support;

use libtest_mimic::Arguments;
use support::machine::Need;
use support::trial::trial;

const CALLS: &[Need] = &[Need::FileSystem("ext4"), Need::Program("mkfs.ext4")];
const XFS: &[Need] = &[Need::FileSystem("xfs"), Need::Program("mkfs.xfs")];
const BTRFS: &[Need] = &[Need::FileSystem("btrfs"), Need::Program("mkfs.btrfs"), Need::Linux(6, 7)];
const REAL: &[Need] = &[
    Need::FileSystem("ext4"),
    Need::Program("mkfs.ext4"),
    Need::Program("containerd"),
    Need::Program("ctr"),
    Need::Program("runc"),
    Need::Program("umoci"),
];
const REGISTRY: &[Need] = &[
    Need::FileSystem("ext4"),
    Need::Program("mkfs.ext4"),
    Need::Program("containerd"),
    Need::Program("ctr"),
    Need::Program("docker-registry"),
    Need::Program("runc"),
    Need::Program("skopeo"),
    Need::Program("umoci"),
];
const OVERLAY: &[Need] = &[
    Need::FileSystem("ext4"),
    Need::FileSystem("overlay"),
    Need::Program("mkfs.ext4"),
    Need::Program("containerd"),
    Need::Program("ctr"),
    Need::Program("umoci"),
];

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests = vec![
        trial("snapshots_go_through_their_life", CALLS, calls::life),
        trial("calls_that_make_no_sense_are_refused", CALLS, calls::refusals),
        trial("labels_are_changed_and_found", CALLS, calls::labels_found),
        trial("layer_of_another_namespace_is_adopted", CALLS, calls::adoption),
        trial("layers_of_images_are_containerds_and_the_other_way_round", REAL, calls::imported_and_unpacked),
        trial("max_size_limits_what_is_written", CALLS, calls::max_size),
        trial("chain_of_128_is_mounted", CALLS, calls::chain),
        trial("hundred_are_prepared_at_once", CALLS, calls::hundred),
        trial("xfs_clones_are_mounted_side_by_side", XFS, || calls::side_by_side("xfs", "nouuid")),
        trial("btrfs_clones_are_mounted_side_by_side", BTRFS, || calls::side_by_side("btrfs", "discard=async")),
        trial("twenty_engines_work_side_by_side", CALLS, calls::twenty_engines),
        trial("every_step_outlives_every_death", CALLS, deaths::every_step),
        trial("deaths_at_random_moments_lose_nothing_acknowledged", CALLS, deaths::random_moments),
        trial("real_containerd_runs_containers", REAL, real::runs_containers),
        trial("real_containerd_runs_a_commit_of_what_runs", REAL, real::runs_a_commit_of_what_runs),
        trial("containerd_dies_between_prepare_and_commit", REAL, real::containerd_dies_between_prepare_and_commit),
        trial("full_pool_during_unpack", REAL, real::full_pool_during_unpack),
        trial("layers_of_the_pool_are_not_fetched", REGISTRY, pulled::layers_of_the_pool_are_not_fetched),
        trial("real_containerd_runs_an_exported_image", REAL, exported::runs),
        trial("exported_image_has_the_same_tree", OVERLAY, exported::has_the_same_tree),
    ];
    libtest_mimic::run(&arguments, tests).exit();
}
