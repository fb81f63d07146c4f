"""Loop devices, file systems on them, what fio does to them, and what a disk below them counts."""

import fcntl
import json
import mmap
import os
import subprocess
from random import Random

from .shell import NotRun, attempt, make_directory, run, unmount

MIB = 1 << 20
GIB = 1 << 30
# linux/loop.h
LOOP_CTL_REMOVE = 0x4C81


def attach_loop(path, stack, direct=True):
    """A loop device on a file; detached when the stack is unwound."""
    device = run("losetup", "-f", "--show", f"--direct-io={'on' if direct else 'off'}", path)
    stack.callback(attempt, "losetup", "-d", device)
    return device


def loop_numbers():
    """The loop devices that there are, used or not."""
    return {int(name[4:]) for name in os.listdir("/sys/block") if name.startswith("loop")}


def remove_loops(numbers):
    """Has the kernel forget loop devices. One that is used, by whomever, stays."""
    if not numbers:
        return
    with open("/dev/loop-control", "rb") as control:
        for number in sorted(numbers, reverse=True):
            try:
                fcntl.ioctl(control, LOOP_CTL_REMOVE, number)
            except OSError:
                pass


def sparse_file(path, size_bytes, stack=None):
    """An empty file of a size, removed when the stack is unwound."""
    with open(path, "wb") as file:
        file.truncate(size_bytes)
    if stack is not None:
        stack.callback(remove_file, path)
    return path


def remove_file(path):
    """Removes a file that may be gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def overwrite(path, size_bytes, seed=1):
    """Writes a device or file from end to end with what does not compress: every block provisioned."""
    run("fio", "--name=fill", f"--filename={path}", "--rw=write", "--bs=1M", "--iodepth=8", "--ioengine=io_uring",
        "--direct=1", f"--size={size_bytes}", "--end_fsync=1", f"--randseed={seed}", "--refill_buffers=1")


def make_ext4(device):
    """An ext4 without its background work, which would show up in somebody's figures, and with blocks that any device takes."""
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", device)


def mount(device, directory, stack, options="noatime"):
    """Mounts; unmounted when the stack is unwound."""
    make_directory(directory)
    run("mount", "-o", options, device, directory)
    stack.callback(unmount, directory)
    return directory


class Disk:
    """A host's disk for those that need another file system than ours, and for counting what reaches it.

    A loop device with direct I/O on a sparse file of the host's file system.
    """

    def __init__(self, path, size_bytes, stack):
        self.path = sparse_file(path, size_bytes, stack)
        self.device = attach_loop(self.path, stack)

    def counts(self):
        """Bytes written, writes, and flushes since it was attached (Documentation/block/stat.rst)."""
        with open(f"/sys/block/{os.path.basename(self.device)}/stat", encoding="ascii") as file:
            numbers = [int(number) for number in file.read().split()]
        return {"bytes": numbers[6] * 512, "writes": numbers[4], "flushes": numbers[15] if len(numbers) > 15 else 0}


def host_file_system(disk, kind, directory, stack):
    """XFS or btrfs or ext4 on a disk of ours, as its project recommends, mounted."""
    options = "noatime"
    if kind == "xfs":
        run("mkfs.xfs", "-q", "-f", "-m", "reflink=1", disk.device)
    elif kind == "btrfs":
        run("mkfs.btrfs", "-q", "-f", disk.device)
    elif kind == "ext4":
        make_ext4(disk.device)
    else:
        raise NotRun(f"no {kind} here")
    return mount(disk.device, directory, stack, options)


def fio(path, rw, block_size, depth, size_bytes, seconds=None, **more):
    """One fio job with direct I/O and io_uring; answers the job's part of fio's JSON."""
    words = ["fio", "--name=bench", f"--filename={path}", "--direct=1", f"--rw={rw}", f"--bs={block_size}",
             f"--iodepth={depth}", "--ioengine=io_uring", f"--size={size_bytes}", "--output-format=json"]
    if seconds:
        words += [f"--runtime={seconds}"]
    for name, value in more.items():
        words.append(f"--{name}={value}" if value is not True else f"--{name}")
    out = run(*words)
    jobs = json.loads(out[out.index("{"):])["jobs"]
    if any(job["error"] for job in jobs):
        raise NotRun(f"fio: error {jobs[0]['error']}")
    return jobs[0]


def operations_a_second(job, rw):
    """The rate of the side that was measured."""
    return job["read" if rw.endswith("read") else "write"]["iops"]


class Load:
    """fio in the background, as a neighbour."""

    def __init__(self, path, rw, block_size, depth, size_bytes, **more):
        words = ["fio", "--name=load", f"--filename={path}", "--direct=1", f"--rw={rw}", f"--bs={block_size}",
                 f"--iodepth={depth}", "--ioengine=io_uring", f"--size={size_bytes}", "--time_based", "--runtime=3600"]
        words += [f"--{name}={value}" for name, value in more.items()]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def write_scattered(device, size_bytes, count, seed):
    """Single blocks at random places, with direct I/O: without fio's half a second of beginning."""
    random = Random(seed)
    buffer = mmap.mmap(-1, 4096)
    buffer.write(random.randbytes(4096))
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        for _ in range(count):
            os.pwrite(descriptor, buffer, random.randrange(size_bytes // 4096) * 4096)
    finally:
        os.close(descriptor)
