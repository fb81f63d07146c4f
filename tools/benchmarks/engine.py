"""Inside the engine: the figures of benches/, as criterion leaves them in target/criterion."""

import json
import os

from .bench import case
from .results import Target
from .shell import run

# The bench, what criterion calls it, what is taken off it, in words, and what the design asks for.
QUESTIONS = [
    ("lookup", "lookup/found/1 TiB", None, "lookup of a block at random, cached, tree of 1 TiB", 100),
    ("lookup", "lookup/found, one leaf/1 TiB", None, "lookup in one leaf, cached, tree of 1 TiB", 100),
    ("lookup", "lookup/found, one leaf/256 MiB", None, "lookup in one leaf, cached, tree of 256 MiB", 100),
    ("lookup", "lookup/found, cold/1 TiB", None, "lookup, nothing cached, tree of 1 TiB", None),
    ("lookup", "lookup/mapped at random/1 TiB", None, "a read's engine part, cached, tree of 1 TiB", None),
    ("write", "write/in place", None, "a write's engine part, in place", None),
    ("write", "write/redirect, leaf already exclusive", "write/in place, 64 leaves", "map in a leaf already exclusive (a redirect less a write in place)", 500),
    ("write", "write/redirect, first touch of a shared leaf", "write/in place", "map in a shared leaf (likewise)", None),
    ("snapshot", "snapshot/snapshot/1 M scattered blocks of 100 GiB", None, "snapshot of 1 M scattered blocks, without the flush", 1e6),
    ("codec", "codec/checksum of a node", None, "checksum of a node", None),
    ("codec", "codec/decode of a leaf", None, "decode of a leaf", None),
    ("durable", "commit/records/256", None, "commit of 256 records, without the flush", None),
    ("durable", "checkpoint/dirty leaves/4096", None, "checkpoint of 4096 dirty leaves, without I/O", None),
    ("durable", "replay/records/65536", None, "open with 65536 records to replay, without I/O", None),
    ("diff", "diff/1000 blocks changed/8 GiB", None, "difference of two volumes of 8 GiB, 1000 blocks changed", None),
]


@case("engine", "criterion", "The engine alone: storage completes at once", 10)
def criterion(bench):
    """Runs the benches that the targets are about. `cargo bench` runs all of them."""
    benches = list(dict.fromkeys(name for name, *_ in QUESTIONS))
    rows = [bench.row(str(index), title, "ns", better="less", targets=[Target(bound)] if bound else [])
            for index, (_, _, _, title, bound) in enumerate(QUESTIONS)]
    words = ["cargo", "bench", "--locked", "--quiet", *(word for name in benches for word in ("--bench", name)), "--", "--noplot"]
    if bench.quick:
        words += ["--measurement-time", "0.5", "--warm-up-time", "0.1", "--sample-size", "10"]
    run(*words, cwd=bench.root, timeout_seconds=7200)
    found = estimates(os.path.join(bench.root, "target/criterion"))
    for row, (_, name, less, _, _) in zip(rows, QUESTIONS):
        if name not in found or (less and less not in found):
            row.refuse("plywood", f"criterion left no figure of {name}")
            continue
        for index, sample in enumerate(found[name]):
            # The lower bound of a difference is from the upper one of what is taken off.
            row.add("plywood", max(0.0, sample - found[less][2 - index]) if less else sample)
    rows[0].note = "medians, and the bounds of their 95 % confidence intervals, by criterion"


def estimates(directory):
    """The lower bound, the median and the upper bound of each benchmark, by name."""
    found = {}
    for place, _, files in os.walk(directory):
        if os.path.basename(place) != "new" or "estimates.json" not in files:
            continue
        with open(os.path.join(place, "benchmark.json"), encoding="utf-8") as file:
            name = json.load(file)["full_id"]
        with open(os.path.join(place, "estimates.json"), encoding="utf-8") as file:
            median = json.load(file)["median"]
        interval = median["confidence_interval"]
        found[name] = [interval["lower_bound"], median["point_estimate"], interval["upper_bound"]]
    return found
