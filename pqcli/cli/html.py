"""A report as one self-contained HTML page: no request, readable on a phone, in the dark, on paper, without scripts.

This module turns a `Report` into what is drawn: positions in the units of an SVG picture 400 wide. The template
`report.html.j2` only writes it down, and escapes every text. The page's content security policy forbids requests, and
all scripts but one, `report.js`, by its hash: even a name that got through could do nothing.

One value that is far from all others does not crush a picture: it is drawn at the edge, marked, and labelled with what
it is. Where values are spread over powers of ten, the scale is logarithmic.
"""

from __future__ import annotations

import base64
import hashlib
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
FAR = 3.0
"""A value so many times the next, or so many times as far from the middle, would crush a picture."""
CRUSHING = 4.0
"""And a size that is so many times the next one."""
LOG_ABOVE = 15.0
"""Where the largest error is so many times the median, the axis is logarithmic."""
MOST_DECADES = 8
"""Powers of ten on that axis."""
N_LABELS = 4
"""Outliers that are labelled."""
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
    is_clipped: bool = False


@dataclass(frozen=True)
class Point:
    """A circle that stands for one tensor; its area grows with the number of weights."""

    x: float
    y: float
    radius: float
    label: str


@dataclass(frozen=True)
class Outlier:
    """What is written above a bar that is longer than drawn; `x` is the bar's middle."""

    x: float
    text_x: float
    anchor: str
    label: str


@dataclass(frozen=True)
class Outside:
    """A triangle at the edge of the picture for a tensor that lies beyond it, turned towards it by degrees."""

    x: float
    y: float
    turn: int
    text_x: float
    text_y: float
    anchor: str
    text: str
    label: str


@dataclass(frozen=True)
class ErrorPlot:
    """Relative MSE of each quantized tensor, in the report's order; bars of `outliers` end where the axis does."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    total: float | None
    worst: tuple[str, ...]
    outliers: tuple[Outlier, ...] = ()
    is_log: bool = False


@dataclass(frozen=True)
class SizePlot:
    """Bytes on disk: the largest tensors, then all others, so that the bars add up to the file."""

    bars: tuple[Bar, ...]
    height: float
    is_clipped: bool = False


@dataclass(frozen=True)
class RatePlot:
    """SQNR against bits per weight, and the line that a Gaussian source cannot exceed."""

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bound: tuple[float, float, float, float]
    outside: tuple[Outside, ...] = ()


def render(report: Report) -> str:
    """The page as text."""
    source, script = (
        resources.files("pqcli").joinpath(name).read_text(encoding="utf-8") for name in ("report.html.j2", "report.js")
    )
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
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        elide=lambda name: elide(visible(name), 56),
    )


def error_plot(report: Report) -> ErrorPlot | None:
    """How the error is spread over the layers; None where no error is known."""
    known = [(tensor, tensor.relative_mse) for tensor in report.quantized]
    shown = [(tensor, mse) for tensor, mse in known if mse is not None and math.isfinite(mse)]
    if not shown:
        return None
    scale = _scale([mse for _, mse in shown])
    step = (RIGHT - LEFT) / len(shown)
    bars: list[Bar] = []
    outliers: list[Outlier] = []
    for index, (tensor, mse) in enumerate(shown):
        height, left = scale.height(mse), LEFT + step * (index + 0.1)
        label, text = visible(tensor.name), readable.error(mse)
        bars.append(Bar(left, BOTTOM - height, 0.8 * step, height, label, text, is_clipped=mse > scale.top))
        if mse > scale.top and len(outliers) < N_LABELS:
            middle = left + 0.4 * step
            place = min(max(middle, LEFT + 20), RIGHT - 20)
            outliers.append(Outlier(middle, place, "middle", text))
    total = report.relative_mse
    return ErrorPlot(
        bars=tuple(bars),
        ticks=tuple(Tick(BOTTOM - scale.height(mark), f"{mark:g}") for mark in scale.marks),
        total=None if total is None or not scale.low <= total <= scale.top else BOTTOM - scale.height(total),
        worst=tuple(
            f"{elide(visible(tensor.name), 48)} {readable.error(mse)}"
            for tensor, mse in sorted(shown, key=lambda pair: -pair[1])[:N_WORST]
        ),
        outliers=tuple(outliers),
        is_log=scale.is_log,
    )


@dataclass(frozen=True)
class _Scale:
    """An axis of errors from `low` (0, or with `is_log` a power of ten) to `top`; what is above is drawn as high."""

    low: float
    top: float
    marks: tuple[float, ...]
    is_log: bool

    def height(self, value: float) -> float:
        """How high a bar of this value is."""
        if self.is_log:
            value = max(value, self.low)
            share = (math.log(value) - math.log(self.low)) / (math.log(self.top) - math.log(self.low))
        else:
            share = value / self.top
        return (BOTTOM - TOP) * min(max(share, 0.0), 1.0)


def _scale(values: Sequence[float]) -> _Scale:
    """The axis on which most of these errors can be told apart."""
    above = sorted((value for value in values if value > 0), reverse=True)
    if not above:
        return _Scale(0.0, 1.0, (0.0, 0.5, 1.0), is_log=False)
    inside = above[n_outliers(above) :]
    if inside[0] > LOG_ABOVE * inside[len(inside) // 2]:
        low, top = math.floor(math.log10(above[-1])), math.ceil(math.log10(above[0]))
        low, top = max(low, top - MOST_DECADES), max(top, low + 1)
        every = -(-(top - low) // 6)
        return _Scale(10.0**low, 10.0**top, tuple(10.0**p for p in range(top, low - 1, -every)), is_log=True)
    most = inside[0] if len(inside) == len(above) else 1.15 * inside[0]
    marks = round_numbers(0.0, most)
    return _Scale(0.0, max(most, marks[-1]), tuple(marks), is_log=False)


def n_outliers(falling: Sequence[float]) -> int:
    """How many of the largest of these lie so far above the next that they would crush it: few, or none."""
    most = min(max(1, len(falling) // 20), len(falling) - 1)
    return max((n for n in range(1, most + 1) if falling[n - 1] > FAR * falling[n] > 0), default=0)


def size_plot(report: Report) -> SizePlot:
    """Where the bytes of the file are."""
    by_size = sorted(report.tensors, key=lambda tensor: -tensor.bytes)
    largest, rest = by_size[:N_LARGEST], [tensor for tensor in by_size[N_LARGEST:] if tensor.bytes]
    rows = [(elide(visible(tensor.name), 42), tensor.bytes, not tensor.quantized) for tensor in largest if tensor.bytes]
    for word, quantized in (("quantized", True), ("kept", False)):
        group = [tensor for tensor in rest if tensor.quantized is quantized]
        if group:
            label = f"{readable.plural(len(group), f'other {word} tensor')}"
            rows.append((label, sum(tensor.bytes for tensor in group), not quantized))
    rows.append(("header and manifest", max(0, report.overhead_bytes), True))
    if report.n_carried:
        rows.append((f"{readable.plural(report.n_carried, 'file')} beside the weights", report.carried_bytes, True))
    sizes = sorted((n_bytes for _, n_bytes, _ in rows), reverse=True)
    is_clipped = len(sizes) > 1 and sizes[0] > CRUSHING * sizes[1] > 0
    most = (1.25 * sizes[1] if is_clipped else sizes[0]) or 1
    bars = tuple(
        Bar(
            0.0, ROW * index + 16, min(WIDTH, max(1.0, WIDTH * n_bytes / most)), 10.0, label, _of(n_bytes, report),
            muted, is_clipped=n_bytes > most,
        )
        for index, (label, n_bytes, muted) in enumerate(rows)
    )  # fmt: skip
    return SizePlot(bars, ROW * len(rows), is_clipped)


def _of(n_bytes: int, report: Report) -> str:
    percent = 100 * n_bytes / report.compressed_bytes if report.compressed_bytes else 0.0
    return f"{readable.size(n_bytes)} · {percent:.1f} %"


def rate_plot(report: Report) -> RatePlot | None:
    """What each tensor gets for its bits; None where no tensor has both a rate and a finite error."""
    shown = [(tensor, *rate) for tensor in report.quantized if (rate := _rate(tensor)) is not None]
    if not shown:
        return None
    x_low, x_high = _padded(_near([bits for _, bits, _ in shown]), least=0.2)
    y_low, y_high = _padded([*_near([sqnr for *_, sqnr in shown]), DB_PER_BIT * (x_low + x_high) / 2], least=1.0)
    most = max(tensor.n_weights for tensor, _, _ in shown) or 1

    def x(bits: float) -> float:
        return LEFT + (RIGHT - LEFT) * (bits - x_low) / (x_high - x_low)

    def y(sqnr: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (sqnr - y_low) / (y_high - y_low)

    points, outside = [], []
    for tensor, bits, sqnr in sorted(shown, key=lambda item: -item[0].n_weights):
        label = f"{visible(tensor.name)}: {bits:.3f} bits/weight, {sqnr:.2f} dB"
        if x_low <= bits <= x_high and y_low <= sqnr <= y_high:
            points.append(Point(x(bits), y(sqnr), 3 + 7 * math.sqrt(tensor.n_weights / most), label))
        else:
            outside.append(_outside(x(bits), y(sqnr), label, f"{bits:.3g} bits, {sqnr:.3g} dB"))
    return RatePlot(
        points=tuple(points),
        x_ticks=tuple(Tick(x(mark), f"{mark:g}") for mark in round_numbers(x_low, x_high)),
        y_ticks=tuple(Tick(y(mark), f"{mark:g}") for mark in round_numbers(y_low, y_high)),
        bound=(x(x_low), y(DB_PER_BIT * x_low), x(x_high), y(DB_PER_BIT * x_high)),
        outside=tuple(outside),
    )


def _near(values: Sequence[float]) -> list[float]:
    """The values without those few that lie so far off that the others could not be told apart."""
    kept, most = sorted(values), max(1, len(values) // 20)
    for _ in range(most if len(kept) > 3 else 0):
        middle = kept[len(kept) // 2]
        far = kept[0] if middle - kept[0] > kept[-1] - middle else kept[-1]
        others = [value for value in kept if value != far]
        if not others or abs(far - middle) <= FAR * max(others[-1] - middle, middle - others[0], 0.1 * abs(middle)):
            break
        kept = others
    return kept


def _outside(x: float, y: float, label: str, text: str) -> Outside:
    """The mark of a point beyond the picture: at its edge, where the line to it leaves."""
    at_x, at_y = min(max(x, LEFT + 7), RIGHT - 7), min(max(y, TOP + 7), BOTTOM - 7)
    turn = 90 if x > RIGHT else 270 if x < LEFT else 0 if y < TOP else 180
    is_right = at_x > (LEFT + RIGHT) / 2
    beside = (at_x - 11, "end") if is_right else (at_x + 11, "start")
    return Outside(at_x, at_y, turn, beside[0], at_y + 4, beside[1], text, label)


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
