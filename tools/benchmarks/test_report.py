"""Tests of the tool itself: what becomes of samples, and of sides that cannot run. tools/check runs them; they need nothing.

    python3 -m unittest discover -s tools -t tools -p 'test_*.py'
"""

import json
import os
import tempfile
import unittest
from unittest import mock
from xml.etree import ElementTree

from benchmarks import bench, containerd_engine, figures, peers, plots, report
from benchmarks.results import Row, Target, from_document, merged, to_document
from benchmarks.shell import NotRun

ABOUT = {
    "when": "2026-01-02 03:04 UTC", "rounds": 5, "quick": False, "load_before": 0.1, "plywood": "plywood 0.1.0", "processors": 2,
    "processor": "some", "memory_gib": 8, "system": "Debian", "kernel": "6.18", "governor": "", "versions": {"fio": "3.33"},
    "host": {"file_system": "ext4", "options": "rw", "device": "/dev/vda", "scheduler": "none", "model": ""},
    "settings": {"qcow2": "with a cache"}, "not_compared": {"ZFS": "no module"},
}


def rates():
    """Ours at nine tenths of theirs, and a third side that was not run."""
    row = Row("block.a.x", "block", "random read", "IOPS", reference="loop", table="Some case",
              targets=[Target(0.85, "loop"), Target(0.95, "loop"), Target(2, "gone")])
    for ours, theirs in ((90, 100), (80, 100), (99, 110), (70, 60), (95, 100)):
        row.add("plywood", ours)
        row.add("loop", theirs)
    row.refuse("gone", "it is not installed")
    return row


def times():
    """A time that is better when it is less."""
    row = Row("life.b", "life", "start", "ms", "less", table="Start", targets=[Target(15), Target(2000, "overlayfs")])
    for ours, theirs in ((10, 30000), (20, 10000), (12, 36000)):
        row.add("plywood", ours)
        row.add("overlayfs", theirs)
    return row


class Results(unittest.TestCase):
    """Medians, ratios, verdicts."""

    def test_ratio_of_medians_is_held_against_the_bound(self):
        row = rates()
        self.assertEqual((row.median("plywood"), row.median("loop")), (90, 100))
        self.assertAlmostEqual(row.ratio("plywood", "loop"), 0.9)
        self.assertEqual([row.is_met(target) for target in row.targets], [True, False, None])

    def test_shorter_time_is_the_better_ratio(self):
        row = times()
        self.assertAlmostEqual(row.ratio("plywood", "overlayfs"), 2500)
        low, high = row.ratio_spread("plywood", "overlayfs")
        self.assertAlmostEqual(low, 500)
        self.assertAlmostEqual(high, 3000)
        self.assertEqual([row.is_met(target) for target in row.targets], [True, True])

    def test_results_come_back_from_json_as_they_were(self):
        text = json.dumps(to_document([rates(), times()], ABOUT))
        rows, about = from_document(json.loads(text))
        self.assertEqual(rows, [rates(), times()])
        self.assertEqual(about, ABOUT)
        with self.assertRaises(ValueError):
            from_document({"version": 2, "rows": [], "about": {}})

    def test_row_measured_again_takes_its_former_place(self):
        again = times()
        again.title = "again"
        new = Row("space.c", "space", "new", "bytes")
        self.assertEqual([row.title for row in merged([times(), rates()], [new, again])], ["again", "random read", "new"])


class Page(unittest.TestCase):
    """README.md and the plots."""

    def setUp(self):
        self.place = tempfile.TemporaryDirectory()
        self.addCleanup(self.place.cleanup)
        report.write(self.place.name, [rates(), times()], ABOUT, {"block": "Block level", "life": "Life cycle"})
        with open(os.path.join(self.place.name, "README.md"), encoding="utf-8") as file:
            self.text = file.read()

    def test_page_tells_what_is_met_and_what_is_missed(self):
        self.assertIn("3 met, 1 missed, 1 not run", self.text)
        lines = [line for line in self.text.splitlines() if line.startswith("| Some case: random read")]
        self.assertEqual(["met", "**missed**", "not run"], [line.split("|")[-2].strip() for line in lines])
        self.assertIn("0.90 x (0.80 - 1.17)", lines[0])

    def test_side_that_was_not_run_is_there_with_its_reason(self):
        self.assertIn("Not run: gone (all of these): it is not installed", self.text)

    def test_columns_are_aligned_in_the_source(self):
        block = []
        for line in [*self.text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(len(line))
            elif block:
                self.assertEqual(len(set(block)), 1, self.text)
                block = []

    def test_quick_figures_are_told_from_results(self):
        self.assertNotIn("quick run", self.text)
        quick = rates()
        quick.quick = True
        self.assertIn("quick run", report.page([quick], ABOUT, {"block": "Block level"}, {}))

    def test_plots_are_svg_with_a_bar_for_each_side_that_ran(self):
        tree = ElementTree.parse(os.path.join(self.place.name, "block.a.svg"))
        bars = [rect for rect in tree.iter("{http://www.w3.org/2000/svg}rect") if rect.get("rx")]
        self.assertEqual(len(bars), 2)
        self.assertAlmostEqual(float(bars[0].get("width")) / float(bars[1].get("width")), 0.9, places=2)
        self.assertIn("![Some case](block.a.svg)", self.text)

    def test_sides_far_apart_get_a_logarithmic_scale(self):
        drawing = plots.draw("Start", [times()])
        self.assertIn("logarithmic", drawing)
        self.assertIsNone(plots.draw("Nothing", [Row("a", "block", "none", "ms")]))

    def test_figures_have_three_digits_that_count(self):
        shown = [figures.shown(value, unit) for value, unit in
                 ((0.0712, "ms"), (1759, "ms"), (123456, "IOPS"), (52345, "IOPS"), (1.0837, "x"), (134217728, "bytes"))]
        self.assertEqual(shown, ["71.2 us", "1.76 s", "123 k", "52.3 k", "1.08", "128 MiB"])


class Broken(peers.Peer):
    """A peer that makes something and then fails."""

    name = "broken"
    undone = 0

    def make_base(self):
        self.stack.callback(self.undo)
        raise NotRun("no such module")

    @classmethod
    def undo(cls):
        """Counts."""
        cls.undone += 1


class Fine(peers.Peer):
    """A peer that works."""

    name = "plywood"

    def make_base(self):
        return "/dev/null"

    def prepare(self, fill=None):
        self.base = self.make_base()


class Running(unittest.TestCase):
    """Cases and their sides."""

    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.bench = bench.Bench("/", "plywood", place.name, 3, True)
        self.addCleanup(self.bench.stack.close)
        for name in ("say", "progress"):
            patch = mock.patch.object(self.bench, name)
            patch.start()
            self.addCleanup(patch.stop)

    def run_case(self, function):
        """Runs a case; answers its rows."""
        self.bench.run([bench.Case("block", "tried", "Tried", function, 1)])
        return self.bench.rows

    def test_side_that_cannot_be_prepared_is_refused_and_taken_down(self):
        Broken.undone = 0

        def tried(bench_):
            row = bench_.row("", "some", "IOPS")
            with bench_.prepared([Broken, Fine], 4096, [row]) as ready:
                for _ in bench_.each_round():
                    for peer in ready:
                        bench_.measure(row, peer.name, lambda: 7)

        (row,) = self.run_case(tried)
        self.assertEqual(row.not_run, {"broken": "no such module"})
        self.assertEqual(row.samples, {"plywood": [7, 7, 7]})
        self.assertEqual(Broken.undone, 1)

    def test_case_that_breaks_off_is_in_the_table(self):
        def tried(bench_):
            row = bench_.row("", "some", "IOPS")
            row.add("loop", 1)
            raise OSError("the disk is gone")

        (row,) = self.run_case(tried)
        self.assertEqual(row.not_run, {"plywood": "the disk is gone"})

    def test_side_that_failed_is_not_tried_again(self):
        calls = []

        def fails():
            calls.append(1)
            raise NotRun("no")

        def tried(bench_):
            row = bench_.row("", "some", "IOPS")
            for _ in bench_.each_round():
                bench_.measure(row, "plywood", fails)

        self.run_case(tried)
        self.assertEqual(len(calls), 1)

    def test_rounds_are_interleaved(self):
        order = []

        def tried(bench_):
            row = bench_.row("", "some", "IOPS")
            for _ in bench_.each_round():
                for side in "ab":
                    bench_.measure(row, side, lambda side=side: order.append(side) or 1)

        self.run_case(tried)
        self.assertEqual("".join(order), "ababab")


class Wire(unittest.TestCase):
    """What is said to containerd."""

    def test_messages_are_as_protobuf_has_them(self):
        # The example of protobuf's own description of the encoding, and text.
        self.assertEqual(containerd_engine.encoded({1: 150, 2: "testing"}), b"\x08\x96\x01\x12\x07testing")

    def test_messages_come_back(self):
        message = containerd_engine.encoded({1: "key", 2: 300, 4: {"a": "1", "b": "2"}})
        fields = containerd_engine.decoded(message)
        self.assertEqual((fields[1], fields[2]), ([b"key"], [300]))
        self.assertEqual([containerd_engine.decoded(entry) for entry in fields[4]], [{1: [b"a"], 2: [b"1"]}, {1: [b"b"], 2: [b"2"]}])

    def test_mount_of_an_answer_is_read(self):
        mount = containerd_engine.encoded({1: "ext4", 2: "/dev/loop7"}) + containerd_engine.encoded({4: "discard"}) \
            + containerd_engine.encoded({4: "noatime"})
        answer = containerd_engine.decoded(containerd_engine.encoded({1: mount}))
        self.assertEqual(containerd_engine.Mount.only(answer), containerd_engine.Mount("ext4", "/dev/loop7", ["discard", "noatime"]))


if __name__ == "__main__":
    unittest.main()
