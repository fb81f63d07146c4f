"""Inside the engine: the figures of benches/, as criterion leaves them in target/criterion."""

import json
import os

from .bench import case
from .results import Target
from .shell import run

# What criterion calls it, in words, and what the design asks for.
QUESTIONS = [
    ("lookup", "find/block, 1 TiB", "lookup: the map alone, cached, tree of 1 TiB", 100),
    ("lookup", "mapped at random/1 TiB", "read of a block without I/O, cached, tree of 1 TiB", None),
    ("map", "exclusive leaf", "map in a leaf already exclusive", 500),
    ("map", "shared leaf", "map in a shared leaf", None),
    ("write", "in place", "write in place", None),
    ("write", "redirect, leaf already exclusive", "redirect, leaf already exclusive", None),
    ("snapshot", "snapshot/1 M scattered blocks of 100 GiB", "snapshot of 1 M scattered blocks, without the flush", None),
]


@case("engine", "criterion", "The engine alone: storage completes at once", 10)
def criterion(bench):
    """Runs the benches that the targets are about. `cargo bench` runs all of them."""
    benches = list(dict.fromkeys(name for name, *_ in QUESTIONS))
    rows = [bench.row(f"{name}-{index}", title, "ns", better="less", targets=[Target(bound)] if bound else [])
            for index, (name, _, title, bound) in enumerate(QUESTIONS)]
    words = ["cargo", "bench", "--locked", "--quiet", *(word for name in benches for word in ("--bench", name)), "--"]
    if bench.quick:
        words += ["--measurement-time", "1", "--warm-up-time", "0.5", "--sample-size", "10"]
    run(*words, cwd=bench.root, timeout_seconds=7200)
    found = estimates(os.path.join(bench.root, "target/criterion"))
    for row, (group, name, _, _) in zip(rows, QUESTIONS):
        value = found.get(f"{group}/{name}") or found.get(name)
        if value is None:
            row.refuse("plywood", f"criterion left no figure of {group}/{name}")
            continue
        for sample in value:
            row.add("plywood", sample)
    for row in rows:
        row.note = "median, and the bounds of its 95 % confidence interval, by criterion"


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
