"""How a report shows itself in a Python session: its result in a line, and in a notebook its first tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pqcli.notebook import MOST_ROWS, page
from pqcli.readable import count, error, fixed, plural, shape, size, times, visible

if TYPE_CHECKING:
    from pqcli.reports.figures import Report, TensorReport


def headline(report: Report) -> str:
    """The result in a line: sizes, ratio, bits per weight, error."""
    parts = [f"{size(report.original_bytes)} -> {size(report.compressed_bytes)}", times(report.ratio)]
    if report.bits_per_weight is not None:
        parts.append(f"{report.bits_per_weight:.2f} bits/weight")
    if report.relative_mse is not None:
        parts.append(f"relative MSE {error(report.relative_mse)}")
    return "  ".join(parts)


def report_line(report: Report) -> str:
    """What stands for a report where Python prints one."""
    quantized = f"{plural(len(report.tensors), 'tensor')}, {len(report.quantized)} quantized"
    return f"<Report of {visible(report.output)}: {headline(report)}; {quantized}>"


def tensor_line(tensor: TensorReport) -> str:
    """What stands for a tensor's report."""
    parts = [f"{visible(tensor.name)!r} {shape(tensor.shape)}", visible(tensor.scheme or tensor.action)]
    if tensor.has_error:
        parts.append(f"relative MSE {error(tensor.relative_mse)}")
    return f"<TensorReport {', '.join([*parts, size(tensor.bytes)])}>"


def report_page(report: Report) -> str:
    """The report as a notebook shows it, quantized tensors first."""
    ordered = sorted(report.tensors, key=lambda tensor: not tensor.quantized)
    rows = (
        (
            tensor.name, shape(tensor.shape), tensor.scheme or tensor.action,
            error(tensor.relative_mse) if tensor.has_error else "", _bits(tensor), size(tensor.bytes),
        )
        for tensor in ordered[:MOST_ROWS]
    )  # fmt: skip
    tensors, quantized = plural(len(report.tensors), "tensor"), len(report.quantized)
    facts = [headline(report), f"{count(report.n_weights)} weights in {tensors}, {quantized} of them quantized"]
    facts += [f"warning: {warning}" for warning in report.warnings]
    if report.dropped:
        facts.append(f"not in the compressed file: {plural(len(report.dropped), 'entry', 'entries')}")
    columns = ("tensor", "shape", "scheme", "rel. MSE", "bits/weight", "size")
    return page(report.output, facts, columns, rows, len(ordered))


def _bits(tensor: TensorReport) -> str:
    return "" if tensor.bits_per_weight is None else fixed(tensor.bits_per_weight, 3)
