"""Plots as SVG, without a library: a panel a question, a bar a side, a whisker from the least to the most.

Times and rates have no common scale, so each panel has its own; where sides differ more than a hundredfold it is logarithmic
and says so. Our bar is the coloured one.
"""

import math
from xml.sax.saxutils import escape

from . import figures
from .results import OURS

WIDTH, LABELS, VALUES = 860, 190, 150
BAR, GAP, PANEL = 15, 5, 26
INK, FAINT, OURS_COLOUR, THEIRS, TARGET = "#24292f", "#6e7781", "#1a7f5a", "#9fb3c8", "#c2410c"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
RATIO_OF_LOGARITHMS = 100


def text(x, y, words, size=12, colour=INK, anchor="start", weight="normal"):
    """A line of text."""
    return (f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' "
            f"font-weight='{weight}'>{escape(str(words))}</text>")


class Scale:
    """From values to places on the axis."""

    def __init__(self, least, most):
        self.logarithmic = least > 0 and most / least > RATIO_OF_LOGARITHMS
        self.low = math.log10(least) - 0.4 if self.logarithmic else 0.0
        self.high = math.log10(most) if self.logarithmic else most
        self.room = WIDTH - LABELS - VALUES

    def place(self, value):
        """Where a value is, from the left of the plot."""
        at = math.log10(max(value, 1e-12)) if self.logarithmic else value
        part = (at - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return LABELS + self.room * min(max(part, 0.0), 1.0)


def required(row):
    """The values that our side would have to reach, where a target says so."""
    places = []
    for target in row.targets:
        if target.of != OURS:
            continue
        theirs = row.median(target.against) if target.against else None
        if target.against and theirs:
            places.append(theirs * target.bound if row.better == "more" else theirs / target.bound)
        elif not target.against:
            places.append(target.bound)
    return places


def panel(row, top):
    """One question. Answers its elements and its height."""
    labels = [label for label in row.labels() if label in row.samples]
    out = [text(0, top + 13, row.title, 13, weight="600")]
    unit = figures.heading(row.unit)
    better = "longer is better" if row.better == "more" else "shorter is better"
    values = [value for label in labels for value in row.samples[label]]
    needed = required(row)
    scale = Scale(min(values, default=0), max(values, default=1) or 1)
    how = ", logarithmic" if scale.logarithmic else ""
    out.append(text(WIDTH, top + 13, f"{unit + ', ' if unit else ''}{better}{how}", 11, FAINT, "end"))
    y = top + PANEL
    first = y
    for label in labels:
        median, (least, most) = row.median(label), row.spread(label)
        right = scale.place(median)
        colour = OURS_COLOUR if label == OURS else THEIRS
        out.append(text(LABELS - 8, y + 12, label, 12, INK if label == OURS else FAINT, "end", "600" if label == OURS else "normal"))
        out.append(f"<rect x='{LABELS}' y='{y}' width='{max(right - LABELS, 1):.1f}' height='{BAR}' rx='2' fill='{colour}'/>")
        middle = y + BAR / 2
        low, high = scale.place(least), scale.place(most)
        out.append(f"<path d='M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8' stroke='{INK}' "
                   "stroke-width='1.2' fill='none'/>")
        out.append(text(max(right, high) + 8, y + 12, figures.shown(median, row.unit), 12, weight="600" if label == OURS else "normal"))
        y += BAR + GAP
    for place in needed:
        if scale.low <= (math.log10(place) if scale.logarithmic and place > 0 else place) <= scale.high:
            x = scale.place(place)
            out.append(f"<path d='M{x:.1f} {first - 3}V{y - GAP + 3}' stroke='{TARGET}' stroke-width='1.4' stroke-dasharray='4 3'>"
                       "<title>target</title></path>")
    return out, y - top + 12


def draw(title, rows):
    """The plot of a case, or None when nothing of it was measured."""
    rows = [row for row in rows if any(row.samples.values())]
    if not rows:
        return None
    out, y = [text(0, 18, title, 16, weight="700")], 34
    for row in rows:
        elements, height = panel(row, y)
        out += elements
        y += height
    out.append(text(0, y + 4, "bars: medians; whiskers: least to most; dashed: what plywood is to reach", 11, FAINT))
    height = y + 14
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='-12 -4 {WIDTH + 24} {height + 8}' width='{WIDTH + 24}' "
            f"height='{height + 8}' {FONT} role='img'>\n<title>{escape(title)}</title>\n"
            f"<rect x='-12' y='-4' width='{WIDTH + 24}' height='{height + 8}' fill='#ffffff'/>\n" + "\n".join(out) + "\n</svg>\n")
