"""A report put in order, and held against limits: what `pqcli report --sort` and `--fail-above` ask for.

`sort` puts the costliest or worst tensor first. `check` tells what lies above a limit, such as `relative_mse=0.05`.
Both refuse, with `UsageError`, a key that they do not know; `check_sortable` and `check_condition` do so before there
is a report.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import replace

from pqcli.errors import UsageError
from pqcli.reports.figures import Report, TensorReport

TEXT_KEYS = ("name", "kind", "dtype", "action", "scheme")
NUMBER_KEYS = (
    "n_weights", "original_bytes", "bytes", "block_size", "n_centroids", "bits_per_weight", "relative_mse", "sqnr_db",
    "shannon_gap_db", "cosine", "max_abs_error", "energy", "centroids_used", "assignment_entropy", "assignment_bytes",
    "entropy_bytes", "output_mse", "damage",
)  # fmt: skip
SORT_KEYS = (*TEXT_KEYS, *NUMBER_KEYS)
TITLES = {
    "size": "bytes", "rel.mse": "relative_mse", "mse": "relative_mse", "error": "relative_mse", "sqnr db": "sqnr_db",
    "max error": "max_abs_error", "bits/w": "bits_per_weight", "bits": "bits_per_weight", "gap db": "shannon_gap_db",
    "used": "centroids_used", "entropy": "assignment_entropy", "weights": "n_weights", "tensor": "name",
}  # fmt: skip
"""What columns are called where they are shown, for those who take the title for the key."""
SMALL_IS_BAD = ("sqnr_db", "cosine")


def sort(report: Report, key: str) -> Report:
    """The report with its tensors ordered by `key`: text from a to z, numbers with the costliest or worst first.

    That is the largest first, but the smallest first for `sqnr_db` and `cosine`. An undefined number (nan) counts as
    the worst of all, tensors without the number come last, and equal ones stay in the checkpoint's order.
    """
    check_sortable(key)
    if key in TEXT_KEYS:
        return replace(report, tensors=tuple(sorted(report.tensors, key=lambda tensor: str(getattr(tensor, key)))))
    sign = 1 if key in SMALL_IS_BAD else -1

    def badness(tensor: TensorReport) -> tuple[bool, bool, float]:
        value = getattr(tensor, key)
        if value is None:
            return True, False, 0.0
        return False, not math.isnan(value), 0.0 if math.isnan(value) else sign * value

    return replace(report, tensors=tuple(sorted(report.tensors, key=badness)))


def check_sortable(key: str) -> None:
    """Raise `UsageError` for a key that `sort` does not know."""
    if key not in SORT_KEYS:
        raise UsageError(f"cannot sort by {key!r}{_close(key, SORT_KEYS)}; keys: {', '.join(SORT_KEYS)}")


LAYER_LIMITS = ("relative_mse", "max_abs_error", "bits_per_weight", "shannon_gap_db")
FILE_LIMITS = ("compressed_bytes",)
N_WORST = 5
"""How many layers a failed check names."""


def check(report: Report, condition: str) -> str | None:
    """What is above the limit of `condition`, written KEY=X; None when nothing is.

    It fails when any quantized tensor, or all of them together, is above X (`compressed_bytes` looks at the file
    only). A figure that is unknown or undefined fails too: what could not be measured has not been shown to hold.
    Raises `UsageError` for a condition that cannot be meant.
    """
    key, limit = _parse(condition)
    total: float | None = getattr(report, key)
    if key in FILE_LIMITS:
        return f"{key} {total} is above {limit:g}" if total is None or total > limit else None
    values = {tensor.name: getattr(tensor, key) for tensor in report.quantized}
    if not values:
        return None
    unknown = [name for name, value in values.items() if value is None]
    if unknown:
        return f"{key} is unknown for {len(unknown)} of {len(values)} quantized tensors: {_some(unknown)}"
    worst = sort(replace(report, tensors=report.quantized), key).tensors
    above = [tensor for tensor in worst if not getattr(tensor, key) <= limit]
    if not above and total is not None and total <= limit:
        return None
    layers = _some([f"{tensor.name} ({getattr(tensor, key):.4g})" for tensor in above])
    detail = f"{len(above)} of {len(values)} quantized tensors are: {layers}" if above else "no single tensor is"
    whole = "unknown" if total is None else f"{total:.4g}"
    return f"{key} is above {limit:g} (all quantized weights together: {whole}); {detail}"


def check_condition(condition: str) -> None:
    """Raise `UsageError` for a condition that `check` could not mean anything by."""
    _parse(condition)


def _parse(condition: str) -> tuple[str, float]:
    key, equals, text = condition.partition("=")
    keys = (*LAYER_LIMITS, *FILE_LIMITS)
    if not equals:
        raise UsageError(f"the condition {condition!r} is not of the form KEY=X; keys: {', '.join(keys)}")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) or not math.isfinite(float(text)):
        raise UsageError(f"the limit {text!r} of {key!r} is not a number; write for example relative_mse=0.05")
    limit = float(text)
    if key == "sqnr_db":
        raise UsageError(
            f"sqnr_db is good when it is high; for at least {limit:g} dB use relative_mse={_mse(limit):.4g}"
        )
    if key not in keys:
        raise UsageError(f"cannot check {key!r}{_close(key, keys)}; keys: {', '.join(keys)}")
    if limit < 0 and key != "shannon_gap_db":
        raise UsageError(f"{key} is never negative, so a limit of {limit:g} cannot be meant")
    return key, limit


def _mse(sqnr: float) -> float:
    """The relative MSE of an SQNR in dB, whatever the user wrote."""
    return math.pow(10, min(300.0, max(-300.0, -sqnr / 10)))


def _some(items: list[str]) -> str:
    more = len(items) - N_WORST
    return ", ".join(items[:N_WORST]) + (f" and {more} more" if more > 0 else "")


def _close(key: str, keys: tuple[str, ...]) -> str:
    told = TITLES.get(key.lower())
    close = [told] if told in keys else difflib.get_close_matches(key, keys, n=2)
    close = [name for name in keys if len(key) > 2 and key.lower() in name][:3] or close if told is None else close
    return f" (did you mean {' or '.join(close)}?)" if close else ""
