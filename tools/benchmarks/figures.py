"""Numbers as people read them, the same in tables and plots."""

TIMES = {"ms": 1e-3, "us": 1e-6, "s": 1.0, "ns": 1e-9}


def plain(value):
    """Three digits that count."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10000:
        return f"{value / 1000:.0f} k" if size >= 100000 else f"{value / 1000:.1f} k"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}"


def time(seconds):
    """In the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if abs(seconds) >= size or unit == "ns":
            return f"{plain(seconds / size)} {unit}"
    return "0"


def size(count):
    """In IEC units."""
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= step:
            return f"{plain(count / step)} {unit}"
    return f"{count:.0f} B"


def shown(value, unit):
    """A value of a row, with its unit where the unit may change with the value."""
    if unit in TIMES:
        return time(value * TIMES[unit])
    if unit == "bytes":
        return size(value)
    return plain(value)


def heading(unit):
    """What the unit is called above a column: nothing where each value tells its own."""
    return "" if unit in TIMES or unit == "bytes" else unit


def ratio(value):
    """How many times."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else plain(value)
