"""How a name or a number reads to a person: the one vocabulary of the terminal, of pages and of notebooks.

Names of tensors and files come from strangers, so `visible` leaves nothing in them that could move a cursor, reverse
the reading direction or hide. Sizes are decimal (1 MB is 10^6 bytes); the exact numbers are in the JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "-"


def visible(text: str) -> str:
    r"""`text` with every character that would not show as itself written as its escape, such as `\x1b` or `\u202e`.

    Those are control, format (bidirectional, zero width), surrogate, private and unassigned characters, and every
    space but the plain one. Invariant: the result is printable, and printable text comes back as it was.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def elide(text: str, width: int, ellipsis: str = "…") -> str:
    """At most `width` terminal cells of `text`, the middle left out: tensors differ in both ends of their names.

    The tail gets the larger share, because that is where a layer says what it is.
    """
    if len(text) <= width and cells(text) <= width:
        return text
    room = width - len(ellipsis)
    if room < 2:  # one character at each end, or no ellipsis at all
        return _head(text, max(0, width))
    head = _head(text, max(1, 2 * room // 5))
    tail = _head(text[::-1], room - cells(head))[::-1]
    return head + ellipsis + tail


def cells(text: str) -> int:
    """How many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # rich is a terminal's business: whoever shows plain names needs none of it

    return cell_len(text)


def _head(text: str, width: int) -> str:
    """The longest start of `text` that fits into `width` cells."""
    start = text[: width + 1]
    while cells(start) > width:
        start = start[:-1]
    return start


def size(n_bytes: float) -> str:
    """`512 B`, `1.54 kB`, `90.9 MB`: three digits, decimal units."""
    return _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(n: float) -> str:
    """`384`, `590 k`, `22.7 M`: three digits."""
    return _scaled(n, ("", "k", "M", "G", "T", "P")).strip()


def _scaled(value: float, units: Sequence[str]) -> str:
    sign, value = ("-" if value < 0 else ""), abs(value)
    if value < 1000:  # the step of decimal units
        return f"{sign}{value:.0f} {units[0]}"
    power = 0
    while value >= 999.5 and power < len(units) - 1:  # would round to 1000
        value /= 1000
        power += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0  # three significant digits
    return f"{sign}{value:.{digits}f} {units[power]}"


def error(value: float | None) -> str:
    """An error or a small ratio with three significant digits: `0.328`, `0.0113`, `4.1e-05`; 0 only for exactly 0."""
    if value is None or not math.isfinite(value):
        return _special(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")  # three leading zeros


def fixed(value: float | None, digits: int) -> str:
    """A number with `digits` decimals."""
    return _special(value) if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _special(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def shape(sizes: Sequence[int]) -> str:
    """`1536x384`; `scalar` for a tensor without dimensions."""
    return "x".join(map(str, sizes)) or "scalar"


def times(ratio: float) -> str:
    """`29.0x`, `1.004x`: a ratio with enough digits to tell it from 1."""
    return f"{ratio:.3f}x" if ratio < 2 else f"{ratio:.1f}x"  # below, the third digit matters


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3:05`, `2:03:05`."""
    if seconds < 10:  # tenths stop to matter
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def about(seconds: float) -> str:
    """`a second`, `12 s`, `3:50`: a time as it is foretold, with two digits that count."""
    if seconds < 1.5:
        return "a second"
    step = 10 ** max(math.floor(math.log10(seconds)) - 1, 0)
    rounded = round(seconds / step) * step
    return duration(rounded) if rounded >= 10 else f"{rounded} s"


def plural(n: int, noun: str, several: str = "") -> str:
    """`1 tensor`, `2 tensors`; `several` is the plural of a noun that takes more than an s."""
    return f"{n:,} {noun if n == 1 else several or noun + 's'}"
