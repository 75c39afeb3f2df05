"""A report as one self-contained HTML page: no script, no request, readable on a phone and in the dark.

This module turns a `Report` into what is drawn: positions in the units of an SVG picture 400 wide. The template
`report.html.j2` only writes it down, and escapes every text. The page's content security policy forbids scripts and
requests, so that even a name that got through could do nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from pqcli.cli import readable
from pqcli.cli.readable import elide, visible
from pqcli.reports.figures import DB_PER_BIT, Report, TensorReport
from pqcli.version import __version__

WIDTH, HEIGHT = 400.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 392.0, 10.0, 218.0
"""The picture and, inside it, the area between the axes."""
N_LARGEST = 7
"""Tensors that the size plot names; the others share a bar."""
ROW = 32.0
"""Height of a row of the size plot: a name and its bar below."""
N_WORST = 3
"""Layers with the largest error, named below the plot: a phone shows no tooltips."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A rectangle that stands for one tensor, or a group of them. `label` and `text` say which and how much."""

    x: float
    y: float
    width: float
    height: float
    label: str
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Point:
    """A circle that stands for one tensor; its area grows with the number of weights."""

    x: float
    y: float
    radius: float
    label: str


@dataclass(frozen=True)
class ErrorPlot:
    """Relative MSE of each quantized tensor, in the report's order."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    total: float | None
    worst: tuple[str, ...]


@dataclass(frozen=True)
class SizePlot:
    """Bytes on disk: the largest tensors, then all others, so that the bars add up to the file."""

    bars: tuple[Bar, ...]
    height: float


@dataclass(frozen=True)
class RatePlot:
    """SQNR against bits per weight, and the line that a Gaussian source cannot exceed."""

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bound: tuple[float, float, float, float]


def render(report: Report) -> str:
    """The page as text."""
    source = resources.files("pqcli").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(visible=visible, size=readable.size, error=readable.error, shape=readable.shape)
    environment.filters.update(
        fixed=readable.fixed, times=readable.times, count=readable.count, duration=readable.duration
    )
    return environment.from_string(source).render(
        report=report,
        error_plot=error_plot(report),
        size_plot=size_plot(report),
        rate_plot=rate_plot(report),
        kept=readable.kept_reasons(report, most=20),
        compared=[
            line
            for line in (
                readable.trained_line(report),
                readable.state_line(report),
                readable.base_line(report),
                readable.entropy_line(report),
                readable.int4_line(report),
            )
            if line is not None
        ],
        felt=readable.felt_line(report),
        predicted=[one for one in ("output_mse", "damage") if any(getattr(t, one) is not None for t in report.tensors)],
        recipe=json.dumps(report.to_json()["recipe"], indent=2),
        version=__version__,
        elide=lambda name: elide(visible(name), 56),
    )


def error_plot(report: Report) -> ErrorPlot | None:
    """How the error is spread over the layers; None where no error is known."""
    known = [(tensor, tensor.relative_mse) for tensor in report.quantized]
    shown = [(tensor, mse) for tensor, mse in known if mse is not None and math.isfinite(mse)]
    if not shown:
        return None
    top = max(mse for _, mse in shown) or 1.0
    marks = round_numbers(0.0, top)
    top = max(top, marks[-1])
    step = (RIGHT - LEFT) / len(shown)
    bars = []
    for index, (tensor, mse) in enumerate(shown):
        height = (BOTTOM - TOP) * mse / top
        label, text = visible(tensor.name), readable.error(mse)
        bars.append(Bar(LEFT + step * (index + 0.1), BOTTOM - height, 0.8 * step, height, label, text))
    ticks = tuple(Tick(BOTTOM - (BOTTOM - TOP) * mark / top, f"{mark:g}") for mark in marks)
    total = report.relative_mse
    return ErrorPlot(
        bars=tuple(bars),
        ticks=ticks,
        total=None if total is None or not total <= top else BOTTOM - (BOTTOM - TOP) * total / top,
        worst=tuple(
            f"{elide(visible(tensor.name), 48)} {readable.error(mse)}"
            for tensor, mse in sorted(shown, key=lambda pair: -pair[1])[:N_WORST]
        ),
    )


def size_plot(report: Report) -> SizePlot:
    """Where the bytes of the file are."""
    by_size = sorted(report.tensors, key=lambda tensor: -tensor.bytes)
    largest, rest = by_size[:N_LARGEST], [tensor for tensor in by_size[N_LARGEST:] if tensor.bytes]
    rows = [(elide(visible(tensor.name), 52), tensor.bytes, not tensor.quantized) for tensor in largest if tensor.bytes]
    for word, quantized in (("quantized", True), ("kept", False)):
        group = [tensor for tensor in rest if tensor.quantized is quantized]
        if group:
            label = f"{readable.plural(len(group), f'other {word} tensor')}"
            rows.append((label, sum(tensor.bytes for tensor in group), not quantized))
    rows.append(("header and manifest", max(0, report.overhead_bytes), True))
    if report.n_carried:
        rows.append((f"{readable.plural(report.n_carried, 'file')} beside the weights", report.carried_bytes, True))
    most = max(n_bytes for _, n_bytes, _ in rows) or 1
    bars = tuple(
        Bar(0.0, ROW * index + 16, max(1.0, WIDTH * n_bytes / most), 10.0, label, _of(n_bytes, report), muted)
        for index, (label, n_bytes, muted) in enumerate(rows)
    )
    return SizePlot(bars, ROW * len(rows))


def _of(n_bytes: int, report: Report) -> str:
    percent = 100 * n_bytes / report.compressed_bytes if report.compressed_bytes else 0.0
    return f"{readable.size(n_bytes)} · {percent:.1f} %"


def rate_plot(report: Report) -> RatePlot | None:
    """What each tensor gets for its bits; None where no tensor has both a rate and a finite error."""
    shown = [(tensor, *rate) for tensor in report.quantized if (rate := _rate(tensor)) is not None]
    if not shown:
        return None
    x_low, x_high = _padded([bits for _, bits, _ in shown], least=0.2)
    y_low, y_high = _padded([sqnr for _, _, sqnr in shown] + [DB_PER_BIT * (x_low + x_high) / 2], least=1.0)
    most = max(tensor.n_weights for tensor, _, _ in shown) or 1

    def x(bits: float) -> float:
        return LEFT + (RIGHT - LEFT) * (bits - x_low) / (x_high - x_low)

    def y(sqnr: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (sqnr - y_low) / (y_high - y_low)

    points = []
    for tensor, bits, sqnr in sorted(shown, key=lambda item: -item[0].n_weights):
        label = f"{visible(tensor.name)}: {bits:.3f} bits/weight, {sqnr:.2f} dB"
        points.append(Point(x(bits), y(sqnr), 3 + 7 * math.sqrt(tensor.n_weights / most), label))
    return RatePlot(
        points=tuple(points),
        x_ticks=tuple(Tick(x(mark), f"{mark:g}") for mark in round_numbers(x_low, x_high)),
        y_ticks=tuple(Tick(y(mark), f"{mark:g}") for mark in round_numbers(y_low, y_high)),
        bound=(x(x_low), y(DB_PER_BIT * x_low), x(x_high), y(DB_PER_BIT * x_high)),
    )


def _rate(tensor: TensorReport) -> tuple[float, float] | None:
    bits, sqnr = tensor.bits_per_weight, tensor.sqnr_db
    return (bits, sqnr) if bits is not None and sqnr is not None and math.isfinite(bits + sqnr) else None


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """A range that holds the values with a margin, at least `least` long."""
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` multiples of 1, 2 or 5 times a power of ten, in low..high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
