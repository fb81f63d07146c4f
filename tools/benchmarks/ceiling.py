"""The ceiling of the loop path: loop devices on ceiling.c's null FUSE server, in one process and in two."""

import os
import subprocess

from .devices import attach_loop, remove_file
from .shell import NotRun, end_process, run, unmount, wait_until

SWITCH = "/sys/module/fuse/parameters/enable_uring"


def build(root, scratch):
    """Compiles the server. Answers the program."""
    program = os.path.join(scratch, "ceiling")
    if not os.path.exists(program):
        run("cc", "-O2", "-w", "-o", program, os.path.join(root, "tools/ceiling.c"), "-luring", "-lpthread")
    return program


def switch_uring_on(stack):
    """Has the kernel offer FUSE over io_uring, and sets it back at the end."""
    if not os.path.exists(SWITCH):
        raise NotRun("this kernel has no FUSE over io_uring (6.14)")
    with open(SWITCH, encoding="ascii") as file:
        former = file.read().strip()
    if former == "Y":
        return

    def write(value):
        with open(SWITCH, "w", encoding="ascii") as file:
            file.write(value)

    write("Y")
    stack.callback(write, former)


def start(root, scratch, backing, mode, stack):
    """A server of `backing` in a mode of ceiling.c. Answers its loop device."""
    switch_uring_on(stack)
    program = build(root, scratch)
    point = os.path.join(scratch, f"ceiling-{mode}")
    with open(point, "w", encoding="ascii"):
        pass
    stack.callback(remove_file, point)
    process = subprocess.Popen([program, point, backing, mode, "1"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # It ends by itself when it is unmounted; this is for when that fails.
    stack.callback(end_process, process)
    stack.callback(unmount, point)
    wait_until(lambda: os.path.getsize(point) > 0 or process.poll() is not None, "ceiling.c")
    if process.poll() is not None:
        raise NotRun("ceiling.c ended")
    return attach_loop(point, stack)
