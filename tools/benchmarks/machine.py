"""What the figures were measured on."""

import datetime
import os
import re
import subprocess

from .peers import NOT_COMPARED

PACKAGES = ["fio", "xfsprogs", "btrfs-progs", "qemu-utils", "fuse-overlayfs", "runc", "containerd", "sqlite3", "postgresql", "e2fsprogs", "util-linux"]


def said(*words):
    """What a command printed, or nothing."""
    try:
        return subprocess.run(words, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    except FileNotFoundError:
        return ""


def text_of(path):
    """A file's text, or nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def now():
    """The time, as the page shows it."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def about(root, program, directory, rounds, quick):
    """Everything that a reader needs to know of the machine and the versions."""
    cpus = re.findall(r"^model name\s*:\s*(.*)$", text_of("/proc/cpuinfo"), re.M)
    memory = re.search(r"MemTotal:\s*(\d+)", text_of("/proc/meminfo"))
    source, kind, options = (said("findmnt", "-n", "-o", "SOURCE,FSTYPE,OPTIONS", "-T", directory).split(None, 2) + ["", "", ""])[:3]
    disk = os.path.basename(os.path.realpath(source))
    release = re.search(r'^PRETTY_NAME="(.*)"', text_of("/etc/os-release"), re.M)
    commit = said("git", "-C", root, "rev-parse", "--short", "HEAD")
    # Of what the program is made of.
    dirty = said("git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", "src", "Cargo.toml", "Cargo.lock")
    return {
        "when": now(),
        "processors": len(cpus),
        "processor": cpus[0] if cpus else "?",
        "memory_gib": round(int(memory.group(1)) / (1 << 20), 1) if memory else None,
        "kernel": os.uname().release,
        "system": release.group(1) if release else "",
        "host": {"file_system": kind, "options": options, "device": source,
                 "scheduler": text_of(f"/sys/block/{disk}/queue/scheduler"), "model": text_of(f"/sys/block/{disk}/device/model")},
        "governor": text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_before": os.getloadavg()[0],
        "plywood": said(program, "--version") + (f", commit {commit}" if commit else "") + (" and changes" if dirty else ""),
        "versions": {name: version for name in PACKAGES if (version := said("dpkg-query", "-W", "-f", "${Version}", name))},
        "rounds": rounds,
        "quick": quick,
        "not_compared": NOT_COMPARED,
    }
