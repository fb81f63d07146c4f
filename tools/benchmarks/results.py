"""What was measured: rows of samples, with targets to hold them against. It goes to JSON and comes back whole."""

import dataclasses
import statistics
from dataclasses import dataclass, field

VERSION = 1
OURS = "plywood"


@dataclass
class Target:
    """What a row of design section 9 asks for.

    With `against`: ours over theirs (theirs over ours where less is better) is at least `bound`. Without: ours is at most
    `bound`, in the row's unit, or at least, where more is better.
    """

    bound: float
    against: str = None
    of: str = OURS
    text: str = ""


@dataclass
class Row:
    """One question, asked of several."""

    key: str
    group: str
    title: str
    unit: str
    better: str = "more"
    reference: str = None
    samples: dict = field(default_factory=dict)
    not_run: dict = field(default_factory=dict)
    targets: list = field(default_factory=list)
    note: str = ""
    # Quick or noisy figures are told from those that count.
    quick: bool = False
    table: str = ""
    # When, and on which build.
    measured: str = ""

    def add(self, label, value):
        """Another sample of one side."""
        self.samples.setdefault(label, []).append(value)

    def refuse(self, label, reason):
        """That one side was not run, and why. The first reason stays."""
        self.not_run.setdefault(label, str(reason))

    def labels(self):
        """All sides, in the order in which they came."""
        return list(dict.fromkeys([*self.samples, *self.not_run]))

    def median(self, label):
        """The middle of a side's samples, or None."""
        values = self.samples.get(label)
        return statistics.median(values) if values else None

    def spread(self, label):
        """The least and the most."""
        values = self.samples[label]
        return min(values), max(values)

    def ratio(self, of, against):
        """How many times as good `of` is as `against`, by medians: above 1 is better, whatever the unit."""
        ours, theirs = self.median(of), self.median(against)
        if ours is None or theirs is None:
            return None
        over, under = (ours, theirs) if self.better == "more" else (theirs, ours)
        return over / under if under else float("inf")

    def ratio_spread(self, of, against):
        """The least and the most of the rounds' ratios, where both sides have as many rounds."""
        ours, theirs = self.samples.get(of, []), self.samples.get(against, [])
        if len(ours) != len(theirs) or not ours:
            return None
        pairs = zip(ours, theirs) if self.better == "more" else zip(theirs, ours)
        ratios = [over / under for over, under in pairs if under]
        return (min(ratios), max(ratios)) if ratios else None

    def reached(self, target):
        """What a target is compared with: a ratio or a median. None when it was not measured."""
        return self.ratio(target.of, target.against) if target.against else self.median(target.of)

    def is_met(self, target):
        """Whether a target is met; None when nothing was measured."""
        reached = self.reached(target)
        if reached is None:
            return None
        if target.against or self.better == "more":
            return reached >= target.bound
        return reached <= target.bound


def to_document(rows, about):
    """Everything as one JSON value."""
    return {"version": VERSION, "about": about, "rows": [dataclasses.asdict(row) for row in rows]}


def from_document(document):
    """The rows, and what is said about them."""
    if document.get("version") != VERSION:
        raise ValueError(f"results of version {document.get('version')}, not {VERSION}")
    rows = []
    for value in document["rows"]:
        row = Row(**value)
        row.targets = [Target(**target) for target in value["targets"]]
        rows.append(row)
    return rows, document["about"]


def merged(former, latest):
    """The rows of a former run, those replaced that were measured again, in the former order."""
    new = {row.key: row for row in latest}
    rows = [new.pop(row.key, row) for row in former]
    return rows + list(new.values())
