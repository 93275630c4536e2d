"""Numbers as people read them."""

from __future__ import annotations

import math

TIMES = "\N{MULTIPLICATION SIGN}"


def share_text(part: float | None, *, zero: str = "") -> str:
    """A share of 1 in per cent: ``87.3 %``, ``<0.1 %``; ``?`` when it is not known, ``zero`` for none at all.

    >>> share_text(0.873), share_text(0.0001), share_text(None)
    ('87.3 %', '<0.1 %', '?')
    """
    if part is None:
        return "?"
    if part == 0:
        return zero
    return "<0.1 %" if part < 0.0005 else f"{100 * part:.1f} %"


def bytes_text(size: float | None) -> str:
    """Bytes in powers of 1000, three digits.

    >>> bytes_text(90_856_960), bytes_text(999), bytes_text(24_100)
    ('90.9 MB', '999 B', '24.1 kB')
    """
    if size is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration.

    >>> seconds_text(0.25), seconds_text(12.34), seconds_text(3725)
    ('0.25 s', '12.3 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count_text(count: int, singular: str, plural: str = "") -> str:
    """A number of things.

    >>> count_text(1, "batch", "batches"), count_text(1200, "tensor")
    ('1 batch', '1,200 tensors')
    """
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def shape_text(shape: tuple[int, ...]) -> str:
    """``1536×384``; nothing for no shape."""
    return TIMES.join(map(str, shape))


def number_text(value: float | None, *, signed: bool = False) -> str:
    """A metric: four decimals, fewer for large numbers, a dash for none.

    >>> number_text(0.71234), number_text(21.456), number_text(-0.004, signed=True)
    ('0.7123', '21.46', '-0.0040')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    decimals = 4 if abs(value) < 10 else 2
    if value and abs(value) < 0.00005:
        return f"{value:+.1e}" if signed else f"{value:.1e}"
    return f"{value:{'+' if signed else ''}.{decimals}f}"
