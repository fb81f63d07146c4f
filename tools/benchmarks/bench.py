"""One run: cases in turn, what they share, and how far it is."""

import os
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .devices import loop_numbers, remove_loops
from .results import Row
from .shell import NotRun

MIB = 1 << 20
GIB = 1 << 30


@dataclass
class Case:
    """A named function of a Bench that fills rows."""

    group: str
    name: str
    title: str
    run: object
    # What it takes with 5 rounds and without --quick on two processors, about: for the time that is left.
    minutes: float
    # Space it takes at most below the scratch directory.
    space_bytes: int = 6 * GIB

    @property
    def key(self):
        """group.name"""
        return f"{self.group}.{self.name}"


CASES = []


def case(group, name, title, minutes, space_bytes=6 * GIB):
    """Registers a function as a case."""

    def register(function):
        CASES.append(Case(group, name, title, function, minutes, space_bytes))
        return function

    return register


class Bench:
    """What cases are given: options, a scratch directory, and rows to fill."""

    def __init__(self, root, program, directory, rounds, quick):
        self.root, self.program, self.rounds, self.quick = root, program, rounds, quick
        self.stack = ExitStack()
        self.scratch = tempfile.mkdtemp(prefix="plywood-bench-", dir=directory)
        self.stack.callback(self.remove_scratch)
        self.loops = loop_numbers()
        self.stack.callback(lambda: remove_loops(loop_numbers() - self.loops))
        self.rows, self.settings, self.steps = [], {}, 0
        self.case, self.position, self.began, self.planned, self.done = None, "", time.monotonic(), 0.0, 0.0

    def remove_scratch(self):
        """Removes the scratch directory, unless something is still mounted in it."""
        import shutil
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            left = [line.split()[4] for line in file if self.scratch in line]
        if left:
            print(f"bench: still mounted, so {self.scratch} stays: {left}", flush=True)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def number(self):
        """A number that nobody had."""
        self.steps += 1
        return self.steps

    @property
    def seconds(self):
        """How long one fio job runs."""
        return 1 if self.quick else 2

    def size(self, full, quick):
        """A size in bytes: the full one, or with --quick another."""
        return quick if self.quick else full

    def row(self, name, title, unit, **more):
        """A new row of the running case."""
        row = Row(key=f"{self.case.key}.{name}" if name else self.case.key, group=self.case.group, title=title, unit=unit,
                  quick=self.quick or self.rounds < 5, table=self.case.title, **more)
        self.rows.append(row)
        return row

    def measure(self, rows, label, function):
        """Calls a measurement of one side in one round and takes what it answers into its row or rows.

        A side that failed once is not tried again: the reason is in its row.
        """
        rows = [rows] if isinstance(rows, Row) else rows
        if any(label in row.not_run for row in rows):
            return
        try:
            values = function()
        except (NotRun, OSError) as error:
            for row in rows:
                row.refuse(label, error)
            self.say(f"{label} not run: {error}")
            return
        for row, value in zip(rows, values if isinstance(values, (tuple, list)) else [values]):
            row.add(label, value)

    def each_round(self):
        """The rounds, with a line of progress each."""
        for number in range(self.rounds):
            self.progress(f"round {number + 1} of {self.rounds}", (number + 0.3) / self.rounds)
            yield number

    @contextmanager
    def prepared(self, kinds, size_bytes, rows, fill=None, seal=False, **options):
        """Peers of these kinds, ready; those that cannot be are refused in the rows. All are torn down at the end."""
        with ExitStack() as stack:
            peers = []
            for kind in kinds:
                self.progress(f"preparing {kind.name}", 0)
                peer = kind(self, size_bytes, **options.get(kind.name, {}))
                stack.callback(peer.tear_down)
                try:
                    peer.prepare(fill)
                    if seal:
                        peer.seal()
                except (NotRun, OSError) as error:
                    self.say(f"{kind.name} not run: {error}")
                    for row in rows:
                        row.refuse(kind.name, error)
                    continue
                # As a root of containers a peer is set up otherwise than as a device.
                self.settings[peer.name + (", as a root" if self.case.key.startswith("files.") else "")] = peer.settings
                peers.append(peer)
            yield peers

    def say(self, text):
        """A line that stays."""
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        print(f"  {text}", flush=True)

    def progress(self, text, part):
        """What runs now, and how long it will go on."""
        line = f"{self.position} {self.case.key}: {text}; {self.left(part)}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="", flush=True)
        else:
            print(line, flush=True)

    def left(self, part):
        """The time that is left, from the cases' estimates and how right they were so far."""
        done = self.done + self.case.minutes * part
        elapsed = (time.monotonic() - self.began) / 60
        pace = elapsed / done if done > 1 else (0.25 if self.quick else 1.0) * (0.4 + 0.12 * self.rounds)
        minutes = max(0.0, self.planned - done) * pace
        return "less than a minute left" if minutes < 1 else f"about {minutes:.0f} min left"

    def run(self, cases, keep=lambda: None):
        """Runs cases one after the other, and calls `keep` after each. One that fails is in the table with its reason."""
        self.planned = sum(one.minutes for one in cases)
        for index, one in enumerate(cases):
            self.case, self.position = one, f"[{index + 1}/{len(cases)}]"
            self.progress("begins", 0)
            before, began = len(self.rows), time.monotonic()
            try:
                free = os.statvfs(self.scratch)
                if not self.quick and free.f_bavail * free.f_frsize < one.space_bytes:
                    raise NotRun(f"wants {one.space_bytes >> 30} GiB free in {os.path.dirname(self.scratch)}")
                one.run(self)
            except (NotRun, OSError) as error:
                self.failed(one, before, str(error))
            except Exception as error:  # pylint: disable=broad-except
                # A bug of a case must not cost the figures of the others; it is told, in the table as well.
                traceback.print_exc()
                self.failed(one, before, f"{type(error).__name__}: {error}")
            # Devices that many volumes wanted would be found used before by the next case, and there for ever.
            remove_loops(loop_numbers() - self.loops)
            self.done += one.minutes
            keep()
            self.say(f"{one.key} took {time.monotonic() - began:.0f} s")

    def failed(self, one, before, reason):
        """A case ended early: its rows that have no figure of ours get the reason."""
        self.say(f"{one.key} not run: {reason}")
        rows = self.rows[before:] or [self.row("", one.title, "")]
        for row in rows:
            if "plywood" not in row.samples:
                row.refuse("plywood", reason)
