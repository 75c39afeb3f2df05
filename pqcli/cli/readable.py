"""How a report reads to a person: the lines that the terminal and the HTML page share.

Names and numbers read as `pqcli.readable` has it, whose words are offered here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pqcli.readable import UNKNOWN, about, count, duration, elide, error, fixed, plural, shape, size, times, visible
from pqcli.reports.figures import INT4_GROUP, Report
from pqcli.reports.notebook import headline

__all__ = [
    "COMES_BACK", "UNKNOWN", "about", "base_line", "count", "duration", "elide", "entropy_line", "error", "felt_line",
    "fixed", "grouped", "headline", "int4_line", "joined", "kept_reasons", "part_lines", "plural", "reasons", "shape",
    "side_line", "size", "state_line", "times", "visible",
]  # fmt: skip

_BYTES = re.compile(r"\b(\d[\d,]*) B\b")


def part_lines(report: Report) -> list[str]:
    """Of a folder: how many files beside the weights there are; and with several containers a line for each."""
    files = plural(report.n_carried, "file")
    lines = [f"beside the weights: {files}, {size(report.carried_bytes)}, copied as they are"]
    if len(report.parts) > 1:
        start = report.output.rstrip("/") + "/"
        lines += [f"{visible(part.output.removeprefix(start))}: {headline(part)}" for part in report.parts]
    return lines


COMES_BACK = "comes back as"
"""What the reason says of an entry that is carried, but not as the class that it was of."""


def side_line(report: Report) -> str:
    """What the files that stay beside the output do to the ratio."""
    return (
        f"files beside the weights: {size(report.side_bytes)}, in neither size; with them the ratio is "
        f"{times(report.ratio_with_side)}"
    )


def entropy_line(report: Report) -> str | None:
    """What the assignments take against their entropy; None where that is unknown."""
    taken, ideal = report.assignment_bytes, report.entropy_bytes
    if taken is None or ideal is None:
        return None
    if not ideal:
        return f"assignments take {size(taken)}; their order-0 entropy, tensor by tensor, is 0"
    word = "more" if taken >= ideal else "less"
    percent = f"{100 * abs(taken - ideal) / ideal:.1f} % {word}"
    return f"assignments take {size(taken)}: {percent} than their order-0 entropy, tensor by tensor ({size(ideal)})"


def base_line(report: Report) -> str | None:
    """What the base spares; None for a file without one."""
    base = report.base
    if base is None:
        return None
    parts = []
    if base.n_same:
        parts.append(f"{plural(base.n_same, 'tensor')} of {size(base.same_original_bytes)} as in it, for nothing")
    if base.n_differences:
        taken, dense = size(base.differences_bytes), size(base.differences_original_bytes)
        parts.append(f"{plural(base.n_differences, 'tensor')} of {dense} as differences, in {taken}")
    name = f"{base.path} " if base.path else ""
    return f"{visible(elide(name, 60))}({base.hash}): {'; '.join(parts)}"


def felt_line(report: Report) -> str | None:
    """That the relative MSE is not what counts where statistics were used, and what is; None without."""
    if not report.has_statistics:
        return None
    worst = max(
        (tensor for tensor in report.quantized if tensor.output_mse is not None),
        key=lambda tensor: tensor.output_mse or 0.0,
        default=None,
    )
    said = (
        "bits went where the output feels them, so relative MSE says little; `report --model --text` runs the network"
    )
    if worst is None or worst.output_mse is None:
        return said
    middle = sorted(tensor.output_mse for tensor in report.quantized if tensor.output_mse is not None)
    return (
        f"{said}; predicted error of a layer's output: median {error(middle[len(middle) // 2])}, at most "
        f"{error(worst.output_mse)} ({elide(visible(worst.name), 48)})"
    )


def trained_line(report: Report) -> str | None:
    """How much was trained after it had been compressed, and what that means for errors; None where nothing was."""
    n_quantized = sum(tensor.trained for tensor in report.quantized)
    n_kept = sum(tensor.trained and not tensor.quantized for tensor in report.tensors)
    if not n_quantized + n_kept:
        return None
    said = f"{plural(n_quantized, 'quantized tensor')} and {plural(n_kept, 'kept one')} since they were compressed"
    if report.source:
        return f"{said}; errors are what they differ by now from {visible(elide(report.source, 60))}"
    return f"{said}; how far they are from the original by now, `report --against ORIGINAL` measures"


def state_line(report: Report) -> str | None:
    """What training state takes, and how it is held; None where there is none."""
    state = report.state
    if state is None:
        return None
    parts = []
    if state.n_moments:
        parts.append(f"{state.n_moments:,} in eight bits a value (relative MSE {error(state.relative_mse)})")
    if state.n_kept:
        parts.append(f"{state.n_kept:,} bit for bit")
    others = state.n_tensors - state.n_moments - state.n_kept
    if others:
        parts.append(f"{others:,} otherwise")
    sizes = f"{size(state.original_bytes)} -> {size(state.bytes)}"
    return f"{plural(state.n_tensors, 'tensor')}, {sizes}: {', '.join(parts)}"


def int4_line(report: Report) -> str | None:
    """What the quantized tensors would cost as int4 in groups; None where nothing is quantized."""
    n_bytes, weights = report.int4_bytes, report.n_quantized_weights
    if n_bytes is None or not weights:
        return None
    mse = report.int4_relative_mse
    measured = "" if mse is None else f", relative MSE {error(mse)}"
    return (
        f"{size(n_bytes)} for the quantized tensors as int4 in groups of {INT4_GROUP} "
        f"({8 * n_bytes / weights:.3f} bits/weight{measured})"
    )


def kept_reasons(report: Report, most: int) -> list[str]:
    """Why tensors of a report were kept; see `reasons`."""
    return reasons(
        [(tensor.name, tensor.reason, tensor.bytes) for tensor in report.tensors if tensor.action == "keep"], most
    )


def reasons(tensors: Sequence[tuple[str, str, int]], most: int) -> list[str]:
    """Tensors (name, reason, bytes) grouped by reason, a line a reason, most bytes first; at most `most` reasons."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, reason, n_bytes in tensors:
        groups.setdefault(reason, []).append((name, n_bytes))
    ordered = sorted(groups.items(), key=lambda group: -sum(n_bytes for _, n_bytes in group[1]))
    lines = [f"{_group(members)}: {visible(reason)}" for reason, members in ordered[:most]]
    rest = [member for _, members in ordered[most:] for member in members]
    return [*lines, f"{_group(rest)}: other reasons"] if rest else lines


def _group(members: Sequence[tuple[str, int]]) -> str:
    """`62 tensors, 143 kB`, or the name where it is one tensor."""
    total = size(sum(n_bytes for _, n_bytes in members))
    if len(members) == 1:
        return f"{elide(visible(members[0][0]), 60)}, {total}"
    return f"{plural(len(members), 'tensor')}, {total}"


def grouped(items: Iterable[str], most: int) -> list[str]:
    """Items such as `config.json (its reason)`: where several have one reason, the first of them and a count.

    A size in the reason (`612 B`) becomes that of all of them.
    """
    groups: dict[str, list[str]] = {}
    totals: dict[str, int] = {}
    for item in items:
        name, _, reason = item.partition(" (")
        found = _BYTES.search(reason)
        reason = _BYTES.sub("# B", reason, count=1)
        totals[reason] = totals.get(reason, 0) + (int(found[1].replace(",", "")) if found else 0)
        groups.setdefault(reason, []).append(name if reason else item)
    return [
        joined(names, most) + (f" ({visible(reason.replace('# B', f'{totals[reason]:,} B'))}" if reason else "")
        for reason, names in groups.items()
    ]


def joined(items: Iterable[str], most: int) -> str:
    """The first `most` items, comma separated, and how many more there are."""
    names = [visible(item) for item in items]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
