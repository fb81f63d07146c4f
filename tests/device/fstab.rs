//! What mount(8) and umount(8) do with volumes, as from a line of /etc/fstab.

use std::fs;

use crate::support::command::{binary, run};
use crate::support::pool::{TestPool, Transport};

/// `mount -t plywood` attaches and mounts with the options that it is given; plain `umount` detaches again. `mount -a`
/// twice mounts once.
pub fn mounts_and_unmounts() {
    let pool = TestPool::create("1G", Transport::Auto);
    pool.done("volume create files --size 128M");
    run("mkfs.ext4", ["-q", &pool.attach("files")]).expect();
    pool.done("detach files");
    pool.done("snapshot create files then");
    let point = pool.mount_point("fstab");
    let [upper, work] = ["upper", "work"].map(|name| pool.mount_point(name).display().to_string());
    let table = pool.folder().join("fstab");
    let (program, point) = (binary().display().to_string(), point.display().to_string());
    let source = format!("{}/files", pool.info()["name"].as_str().expect("a name"));
    fs::write(&table, format!("{source} {point} plywood nosuid,x-systemd.requires=plywood@main.service 0 0\n"))
        .expect("the table");
    let table = table.display();

    // In a mount namespace where the helpers stand in /sbin, the only place where mount(8) looks.
    let script = format!(
        "set -eux
        mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir={upper},workdir={work} /usr/sbin
        ln -s {program} /usr/sbin/mount.plywood
        ln -s {program} /usr/sbin/umount.plywood
        mkdir -p /run/mount
        mount -t tmpfs utab /run/mount
        mount -T {table} {point}
        findmnt -n -o FSTYPE,OPTIONS {point} | grep '^ext4 .*nosuid.*discard'
        echo kept >{point}/file
        mount -a -T {table}
        test $(findmnt -n {point} | wc -l) = 1
        mount -T {table} -o remount,ro {point}
        findmnt -n -o OPTIONS {point} | grep '^ro'
        mount -T {table} -o remount,rw {point}
        echo more >>{point}/file
        umount {point}
        {program} --pool {pool} volume info files | grep '^in use: *no$'
        mount -t plywood {pool}/files {point} -o ro
        findmnt -n -o OPTIONS {point} | grep '^ro'
        grep kept {point}/file
        umount {point}
        mount -t plywood {pool}/then {point}
        mount -t plywood {pool}/then {point}
        test $(findmnt -n {point} | wc -l) = 1
        umount {point}
        mount -t plywood {pool}/missing {point} && exit 1 || test $? = 32
        mount -t plywood missing {point} && exit 1 || test $? = 32",
        pool = pool.file().display(),
    );
    run("unshare", ["--mount", "sh", "-c", &script]).expect();
    assert!(pool.volume("files")["device"].is_null(), "umount detaches what mount had attached");
    pool.stop();
    pool.check();
}
