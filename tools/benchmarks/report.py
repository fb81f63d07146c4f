"""The page: what was measured, against what, and whether it is what the design asks for."""

import os

from . import figures, plots


def table(head, lines):
    """A Markdown table whose columns are aligned in the source too. The first column is text, the others are figures."""
    lines = [head, *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * max(widths[0], 3)] + ["-" * max(width - 1, 2) + ":" for width in widths[1:]]

    def line_of(cells):
        aligned = [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| " + " | ".join(aligned) + " |"

    widths = [max(width, len(dashes)) for width, dashes in zip(widths, rule)]
    return "\n".join([line_of(head), "|" + "|".join(f" {dashes} " for dashes in rule) + "|", *map(line_of, lines[1:])])


def cell(row, label):
    """A side's median and spread."""
    median = row.median(label)
    if median is None:
        return "not run" if label in row.not_run else ""
    least, most = row.spread(label)
    if len(row.samples[label]) == 1:
        return figures.shown(median, row.unit)
    return f"{figures.shown(median, row.unit)} ({figures.shown(least, row.unit)} - {figures.shown(most, row.unit)})"


def verdict(row, target):
    """met, missed, or not run."""
    met = row.is_met(target)
    return "not run" if met is None else "met" if met else "**missed**"


def asked(row, target):
    """A target in words, and what was reached."""
    if not target.against:
        sign = "at least" if row.better == "more" else "at most"
        reached = row.median(target.of)
        return f"{sign} {figures.shown(target.bound, row.unit)}", "" if reached is None else cell(row, target.of)
    wanted = f"{figures.ratio(target.bound)} x" if target.bound != 1 else "better than"
    against = target.text or target.against
    reached, spread = row.ratio(target.of, target.against), row.ratio_spread(target.of, target.against)
    if reached is None:
        return f"{wanted} {against}", ""
    between = f" ({figures.ratio(spread[0])} - {figures.ratio(spread[1])})" if spread else ""
    return f"{wanted} {against}", f"{figures.ratio(reached)} x{between}"


def targets_table(rows):
    """Every target with what was reached."""
    lines = []
    for row in rows:
        for target in row.targets:
            wanted, reached = asked(row, target)
            lines.append([f"{row.table}: {row.title}" if row.table != row.title else row.title, wanted, reached, verdict(row, target)])
    return table(["what", "asked", "reached", "verdict"], lines) if lines else "None of these has a target."


def score(rows):
    """How many targets are met."""
    verdicts = [row.is_met(target) for row in rows for target in row.targets]
    return verdicts.count(True), verdicts.count(False), verdicts.count(None)


def case_table(rows):
    """The figures of a case: a line a question, a column a side; and what was not run."""
    labels = list(dict.fromkeys(label for row in rows for label in row.labels()))
    lines = []
    for row in rows:
        unit = figures.heading(row.unit)
        line = [row.title + (f", {unit}" if unit else "")]
        for label in labels:
            text = cell(row, label)
            if label != row.reference and row.reference and row.median(label) is not None and row.median(row.reference):
                text += f" [{figures.ratio(row.ratio(label, row.reference))}]"
            line.append(text)
        lines.append(line)
    parts = [table(["", *labels], lines)]
    references = {row.reference for row in rows if row.reference}
    if references:
        parts.append(f"In brackets: how many times as good as {', '.join(sorted(references))}.")
    for reason, titles in not_run(rows).items():
        parts.append(f"Not run: {reason[0]} ({', '.join(titles) if len(titles) < len(rows) else 'all of these'}): {reason[1]}")
    measured = dict.fromkeys(row.measured for row in rows if row.measured)
    if measured:
        parts.append(f"Measured {'; '.join(measured)}.")
    for note in dict.fromkeys(row.note for row in rows if row.note):
        parts.append(note[0].upper() + note[1:] + ".")
    return "\n\n".join(parts)


def not_run(rows):
    """Titles by (side, reason)."""
    found = {}
    for row in rows:
        for label, reason in row.not_run.items():
            found.setdefault((label, reason), []).append(row.title)
    return found


def machine_lines(about):
    """The machine and the versions."""
    host = about["host"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join([
        f"* last case: {about['when']}; {about['rounds']} rounds; load before: {about['load_before']:.2f}; each case says when it was "
        "measured, and on which build",
        f"* {about['processors']} x {about['processor']}, {about['memory_gib']} GiB; {about['system']}, Linux {about['kernel']}"
        + (f", governor {about['governor']}" if about["governor"] else ""),
        f"* host file system: {host['file_system']} ({host['options']}) on {host['device']}"
        + (f", {host['model']}" if host["model"] else "") + (f", scheduler {host['scheduler']}" if host["scheduler"] else ""),
        f"* {versions}",
    ])


def page(rows, about, groups, plotted):
    """README.md."""
    met, missed, unknown = score(rows)
    parts = ["# Benchmarks",
             "Made by `tools/bench`; [how.md](how.md) says what is measured and how, `results.json` has every sample. Figures are medians, "
             "with the least and the most of all rounds; what is compared ran in turn, in one run, on one host file system. Ratios say how "
             "many times as good ours is: above 1 is better, for rates and for times."]
    if about.get("quick") or any(row.quick for row in rows):
        parts.append("**Some of these figures are of a quick run, with small sizes or fewer than 5 rounds: they show that the cases run, and "
                     "no results.**")
    parts += ["## Machine", machine_lines(about), "## Targets",
              f"Those of the design: {met} met, {missed} missed" + (f", {unknown} not run" if unknown else "") + ".", targets_table(rows)]
    for group, name in groups.items():
        of_group = [row for row in rows if row.group == group]
        if not of_group:
            continue
        parts.append(f"## {name}")
        for title in dict.fromkeys(row.table for row in of_group):
            of_case = [row for row in of_group if row.table == title]
            parts.append(f"### {title}")
            if title in plotted:
                parts.append(f"![{title}]({plotted[title]})")
            parts.append(case_table(of_case))
    parts.append("## Settings of each side")
    parts.append("\n".join(f"* **{name}**: {settings}" for name, settings in about.get("settings", {}).items()))
    if about.get("not_compared"):
        parts.append("Not compared: " + "; ".join(f"**{name}**: {reason}" for name, reason in about["not_compared"].items()) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def write(out, rows, about, groups):
    """Writes page and plots into a directory."""
    os.makedirs(out, exist_ok=True)
    plotted = {}
    for title in dict.fromkeys(row.table for row in rows):
        of_case = [row for row in rows if row.table == title]
        drawing = plots.draw(title, of_case)
        if drawing:
            name = ".".join(of_case[0].key.split(".")[:2]) + ".svg"
            with open(os.path.join(out, name), "w", encoding="utf-8") as file:
                file.write(drawing)
            plotted[title] = name
    with open(os.path.join(out, "README.md"), "w", encoding="utf-8") as file:
        file.write(page(rows, about, groups, plotted))


