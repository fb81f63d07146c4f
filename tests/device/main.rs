//! Device tests: real block devices, file systems and programs, driven through the `plywood` binary. They want root.
//!
//! A test that cannot run says why and is counted as ignored. With `PLYWOOD_REQUIRE_DEVICE` set that is a failure,
//! unless it is the kernel that lacks what is needed. Tests run one after the other: they share the machine's loop
//! devices and its `fuse.enable_uring`.

mod bad_images;
mod containers;
mod docker;
mod dying;
mod fence;
mod filling;
mod fio;
mod frozen;
mod frugal;
mod fstab;
mod full;
mod growth;
mod hosts;
mod images;
mod in_memory;
mod kill;
mod layers;
mod memory;
mod moments;
mod plugin;
mod power_cut;
mod reclaim;
mod recording;
mod refusals;
mod reserved;
mod sealed;
mod service;
mod space;
mod storm;
mod story;
mod succession;
#[path = "../support/mod.rs"]
mod support;
mod told;
mod transfer;
mod volumes;
mod workload;

use libtest_mimic::Arguments;
use support::command::is_slow;
use support::machine::{Need, missing};
use support::pool::Transport;
use support::trial::trial;

const EXT4: &[Need] = &[Need::FileSystem("ext4"), Need::Program("fio"), Need::Program("e2fsck")];
const EXT4_URING: &[Need] = &[Need::FuseUring, Need::FileSystem("ext4"), Need::Program("fio"), Need::Program("e2fsck")];
const COUNTED: &[Need] = &[Need::FileSystem("ext4"), Need::Program("fio"), Need::Program("cc")];
const COUNTED_URING: &[Need] = &[Need::FuseUring, Need::FileSystem("ext4"), Need::Program("fio"), Need::Program("cc")];
const TRACED: &[Need] = &[Need::FuseUring, Need::Program("fio"), Need::Program("strace")];
const FREEZING: &[Need] = &[Need::FileSystem("ext4"), Need::Program("fsfreeze"), Need::Program("strace")];
const XFS: &[Need] = &[Need::FileSystem("xfs"), Need::Program("fio"), Need::Program("xfs_repair")];
const BTRFS: &[Need] = &[Need::FileSystem("btrfs"), Need::Program("fio"), Need::Program("btrfs")];
const RECORDED: &[Need] = &[
    Need::FileSystem("ext4"),
    Need::FileSystem("xfs"),
    Need::Program("e2fsck"),
    Need::Program("xfs_repair"),
    Need::Program("sqlite3"),
];
const FSTAB: &[Need] = &[Need::FileSystem("ext4"), Need::FileSystem("overlay")];
const TERMINAL: &[Need] = &[Need::FileSystem("ext4"), Need::Program("script"), Need::Program("stty")];
const ON_A_TERMINAL: &[Need] =
    &[Need::FileSystem("ext4"), Need::Program("runc"), Need::Program("script"), Need::Program("stty")];
const CONTAINERS: &[Need] = &[Need::FileSystem("ext4"), Need::Program("runc")];

const IMAGES: &[Need] = &[Need::FileSystem("ext4"), Need::Program("runc"), Need::Program("skopeo")];
const IMAGES_XFS: &[Need] = &[Need::FileSystem("xfs"), Need::Program("runc"), Need::Program("skopeo")];

const IN_MEMORY: &[Need] = &[
    Need::FileSystem("ext4"),
    Need::Program("mkswap"),
    Need::Program("python3"),
    Need::Program("dockerd"),
    Need::Program("busybox"),
    Need::Linux(6, 6),
];
const TRANSFER: &[Need] = &[];
const DISKS: &[Need] = &[Need::Program("qemu-img")];
const PLUGIN: &[Need] = &[Need::FileSystem("ext4"), Need::Program("e2fsck")];
const PLUGIN_FILE_SYSTEMS: &[Need] = &[
    Need::FileSystem("xfs"),
    Need::FileSystem("btrfs"),
    Need::Program("mkfs.xfs"),
    Need::Program("mkfs.btrfs"),
    Need::Program("xfs_repair"),
    Need::Program("btrfs"),
];
const DOCKER: &[Need] = &[Need::FileSystem("ext4"), Need::Program("dockerd"), Need::Program("busybox")];
const PODMAN: &[Need] =
    &[Need::FileSystem("ext4"), Need::Program("podman"), Need::Program("runc"), Need::Program("busybox")];

fn main() {
    use story::{FileSystem, Story};

    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let full = |transport| Story { file_system: FileSystem::Ext4, transport, sector_size: 4096, layers: 20 };
    let few = if is_slow() { 1 } else { 3 };
    let short = move |file_system, transport, sector_size| Story { file_system, transport, sector_size, layers: few };
    let mut tests = vec![
        trial("whole_story_on_ext4_over_io_uring", EXT4_URING, move || full(Transport::Uring).tell()),
        trial("whole_story_on_ext4_on_what_the_kernel_has", EXT4, move || {
            // Where the kernel has io_uring for FUSE, the test above has told all of it.
            let layers = if missing(&[Need::FuseUring]).is_some() && !is_slow() { 20 } else { 2 };
            Story { layers, ..full(Transport::Auto) }.tell();
        }),
        trial("short_story_on_ext4_over_classic_fuse", EXT4, move || {
            short(FileSystem::Ext4, Transport::Classic, 4096).tell();
        }),
        trial("short_story_on_ext4_with_sectors_of_512", EXT4, move || {
            short(FileSystem::Ext4, Transport::Auto, 512).tell();
        }),
        trial("short_story_on_xfs", XFS, move || short(FileSystem::Xfs, Transport::Auto, 4096).tell()),
        trial("short_story_on_btrfs", BTRFS, move || short(FileSystem::Btrfs, Transport::Auto, 4096).tell()),
        trial("fio_verifies_while_snapshots_come_and_go", EXT4, || fio::under_snapshots(Transport::Auto, 4096)),
        trial("fio_verifies_with_sectors_of_512", EXT4, || fio::under_snapshots(Transport::Classic, 512)),
        trial("engine_killed_under_fio_over_io_uring", EXT4_URING, || kill::under_fio(Transport::Uring)),
        trial("engine_killed_under_fio_over_classic_fuse", EXT4, || kill::under_fio(Transport::Classic)),
        trial("engine_killed_under_mounted_ext4", EXT4, || kill::under_ext4(Transport::Auto)),
        trial("engines_killed_at_random_moments", EXT4, storm::kills_at_random_moments),
        trial("successor_waits_for_the_last_io_of_the_dead", EXT4, || {
            fence::successor_waits_for_the_dead(Transport::Auto);
        }),
        trial("failed_writes_stop_the_pool_until_it_is_opened_anew", EXT4, || {
            dying::failed_writes_stop_the_pool_until_it_is_opened_anew();
        }),
        trial("disk_that_goes_away_hangs_nobody", EXT4, dying::disk_that_goes_away_hangs_nobody),
        trial("two_hosts_do_not_share_a_pool", EXT4, hosts::two_hosts_do_not_share_a_pool),
        trial("writer_in_small_memory_hangs_nobody", EXT4, reclaim::writer_in_small_memory_hangs_nobody),
        trial("threads_wait_for_no_writeback_and_stay_in_memory", EXT4, || {
            reclaim::threads_wait_for_no_writeback_and_stay_in_memory();
        }),
        trial("front_allocates_nothing_over_io_uring", COUNTED_URING, || {
            frugal::front_allocates_nothing(Transport::Uring);
        }),
        trial("front_allocates_nothing_over_classic_fuse", COUNTED, || {
            frugal::front_allocates_nothing(Transport::Classic);
        }),
        trial("engine_allocates_nothing_for_requests", COUNTED_URING, frugal::engine_allocates_nothing_for_requests),
        trial("queue_threads_wait_for_their_ring_only", TRACED, frugal::queue_threads_wait_for_their_ring_only),
        trial("daemon_keeps_to_its_budget_over_io_uring", EXT4_URING, || {
            memory::daemon_keeps_to_its_budget(Transport::Uring);
        }),
        trial("daemon_keeps_to_its_budget_over_classic_fuse", EXT4, || {
            memory::daemon_keeps_to_its_budget(Transport::Classic);
        }),
        trial("front_killed_loses_nothing_acknowledged", EXT4, succession::front_killed),
        trial("engine_is_upgraded_under_load", EXT4, succession::upgraded_under_load),
        trial("service_manager_is_told_of_start_and_stop", EXT4, service::manager_is_told),
        trial("memory_outlives_front_and_engine", EXT4, service::memory_outlives_all_processes),
        trial("front_is_replaced_where_nothing_is_attached", EXT4, succession::front_replaced),
        trial("mount_and_umount_know_volumes", FSTAB, fstab::mounts_and_unmounts),
        trial("nobody_opens_the_pool_before_the_successor", EXT4, succession::nobody_slips_in),
        trial("loop_helpers_of_a_dead_engine_are_waited_for", EXT4, succession::helpers_of_the_dead_are_waited_for),
        trial("damage_of_a_sealed_snapshot_is_an_error", EXT4, sealed::damage_is_an_error),
        trial("full_pool_lets_writes_wait_for_space", EXT4, full::writes_wait_for_space),
        trial("full_pool_refuses_writes_and_loses_nothing", EXT4, full::writes_fail_and_nothing_is_lost),
        trial("random_writes_fill_the_pool", EXT4, filling::random_writes_fill_the_pool),
        trial("random_writes_fill_the_host", EXT4, filling::random_writes_fill_the_host),
        trial("full_host_lets_writes_wait_for_space", EXT4, filling::writes_wait_for_the_host),
        trial("reserved_volume_is_written_on_a_full_pool", EXT4, reserved::reserved_volume_is_written_on_a_full_pool),
        trial("options_of_run_mean_what_they_mean_to_docker", CONTAINERS, containers::options_are_dockers),
        trial("bad_images_leave_nothing", CONTAINERS, bad_images::leave_nothing),
        trial("images_are_imported_at_the_same_time", IMAGES, images::imported_at_once),
        trial("images_that_nothing_is_made_from_are_pruned", IMAGES, images::pruned),
        trial("listed_sizes_of_images_add_up", IMAGES, layers::listed_sizes_add_up),
        trial("failed_import_takes_no_layer_from_another", IMAGES, layers::failed_import_takes_no_layer_from_another),
        trial("exported_image_is_found_again", IMAGES, layers::exported_image_is_found_again),
        trial("layers_are_found_for_larger_images", IMAGES, || {
            layers::found_for_larger_images("ext4", FileSystem::Ext4);
        }),
        trial("layers_are_found_for_larger_images_on_xfs", IMAGES_XFS, || {
            layers::found_for_larger_images("xfs", FileSystem::Xfs);
        }),
        trial("layers_are_found_for_larger_images_on_btrfs", BTRFS, || {
            layers::found_for_larger_images("btrfs", FileSystem::Btrfs);
        }),
        trial("pool_in_memory_is_never_in_swap_and_gives_its_memory_back", IN_MEMORY, in_memory::never_in_swap),
        trial("containers_in_the_background_are_listed_heard_and_removed", CONTAINERS, containers::in_the_background),
        trial("sizes_of_containers_add_up", CONTAINERS, containers::sizes_add_up),
        trial("container_that_has_ended_is_started_again", CONTAINERS, containers::started_again),
        trial("volume_of_a_run_is_filled_from_its_image", CONTAINERS, volumes::filled_from_the_image),
        trial("volume_is_made_by_several_runs_at_once", CONTAINERS, volumes::made_by_several_at_once),
        trial("volume_is_made_anew_after_a_death", CONTAINERS, volumes::made_anew_after_a_death),
        trial("volume_goes_from_run_to_run", CONTAINERS, volumes::goes_from_run_to_run),
        trial("container_is_renamed_while_it_runs", CONTAINERS, containers::renamed_while_it_runs),
        trial("container_talks_on_a_terminal_and_leaves_it_as_it_was", ON_A_TERMINAL, containers::on_a_terminal),
        trial("container_and_its_volumes_are_taken_at_one_instant", CONTAINERS, containers::taken_with_their_volumes),
        trial("exported_image_is_the_same_tree", IMAGES, || images::layers_say_what_changed("ext4")),
        trial("exported_image_on_xfs_is_the_same_tree", IMAGES_XFS, || images::layers_say_what_changed("xfs")),
        trial("export_costs_what_changed", EXT4, images::export_costs_what_changed),
        trial("images_share_what_they_have_in_common", IMAGES, images::images_share_what_they_have_in_common),
        trial("deleted_files_give_space_back", EXT4, space::deleted_files_give_space_back),
        trial("fstrim_gives_space_back", EXT4, space::fstrim_gives_space_back),
        trial("deleted_volume_gives_space_back", EXT4, space::deleted_volume_gives_space_back),
        trial("unmapped_zeros_give_space_back", EXT4, space::unmapped_zeros_give_space_back),
        trial("interrupted_imports_give_space_back", EXT4, space::interrupted_imports_give_space_back),
        trial("exclusive_bytes_are_known_at_rest", EXT4, space::exclusive_bytes_are_known_at_rest),
        trial(
            "zeros_are_not_stored_where_they_are_detected",
            EXT4,
            space::zeros_are_not_stored_where_they_are_detected,
        ),
        trial("attached_volume_grows", EXT4, growth::attached_volume_grows),
        trial("untouched_container_owns_next_to_nothing", CONTAINERS, containers::untouched_owns_next_to_nothing),
        trial("container_runs_and_is_dropped", CONTAINERS, containers::runs_and_is_dropped),
        trial("snapshots_move_between_pools", TRANSFER, transfer::snapshots_move_between_pools),
        trial("bad_streams_change_nothing", TRANSFER, transfer::bad_streams_change_nothing),
        trial("interrupted_streams_are_resumed", TRANSFER, transfer::interrupted_streams_are_resumed),
        trial("receive_into_a_full_pool_is_resumed", TRANSFER, transfer::receive_into_a_full_pool_is_resumed),
        trial("stream_without_a_reader_is_an_error", TRANSFER, transfer::stream_without_a_reader_is_an_error),
        trial("killed_receive_has_received_nothing", TRANSFER, transfer::killed_receive_has_received_nothing),
        trial("volumes_become_disk_images", DISKS, transfer::volumes_become_disk_images),
        trial("docker_plugin_keeps_its_word", PLUGIN, docker::plugin_keeps_its_word),
        trial("docker_plugin_makes_file_systems", PLUGIN_FILE_SYSTEMS, plugin::makes_file_systems),
        trial("docker_plugin_begins_volumes_as_images", PLUGIN, plugin::begins_as_an_image),
        trial("docker_plugin_keeps_volumes_to_their_quota", PLUGIN, plugin::keeps_to_its_quota),
        trial("ephemeral_volumes_end_in_time", PLUGIN, docker::ephemeral_volumes_end_in_time),
        trial("volumes_of_a_real_docker", DOCKER, docker::volumes_of_docker),
        trial("volumes_of_a_real_podman", PODMAN, docker::volumes_of_podman),
        trial("detach_of_mounted_volume_names_who_and_where", EXT4, refusals::detach_of_mounted),
        trial("device_that_is_open_stays_attached", EXT4, refusals::detach_of_opened),
        trial("detach_sees_other_mount_namespaces", EXT4, refusals::detach_in_other_namespace),
        trial("attached_volume_is_not_deleted_or_rolled_back", EXT4, refusals::attached_is_kept),
        trial("shrinking_below_the_file_system_is_refused", EXT4, refusals::shrink_below_file_system),
        trial("ordinary_user_is_refused", EXT4, refusals::not_root),
        trial("missing_fuse_and_loop_are_named", EXT4, refusals::without_devices),
        trial("host_without_direct_io_is_refused", EXT4, refusals::without_direct_io),
        trial("pool_in_use_is_not_created_over", EXT4, refusals::pool_in_use),
        trial("full_host_leaves_no_half_image", EXT4, refusals::full_host_while_importing),
        trial("sigterm_says_what_is_still_mounted", EXT4, refusals::sigterm_while_mounted),
        trial("thresholds_are_told_and_run_a_command", EXT4, told::thresholds),
        trial("events_are_followed_over_a_succession", EXT4, told::events),
        trial("metrics_count_what_volumes_do", EXT4, told::metrics),
        trial("top_shows_the_busiest_first", EXT4, told::top),
        trial("top_leaves_the_terminal_as_it_was", TERMINAL, told::top_on_a_terminal),
        trial("long_work_shows_how_far_it_is", TERMINAL, told::progress_on_a_terminal),
        trial("doctor_sees_what_the_dead_left", EXT4, told::doctor),
        trial("frozen_file_systems_go_on_when_who_froze_them_dies", FREEZING, frozen::goes_on_when_who_froze_it_dies),
        trial("attach_all_brings_back_what_was_attached", EXT4, growth::attach_all_remembers),
    ];
    if !is_slow() {
        // An emulator has neither the time nor the recorder.
        tests.push(trial("programs_survive_power_cuts", RECORDED, power_cut::programs_survive));
        // Nor to read 3 GiB three times.
        tests.push(trial("larger_image_shares_lower_layers", IMAGES, layers::larger_image_shares_lower_layers));
    }
    libtest_mimic::run(&arguments, tests).exit();
}
