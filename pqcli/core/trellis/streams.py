"""How tensors are cut into streams that are coded each by itself. It follows from the shapes alone.

The *coded matrix* of a source is its matrix (rows, columns), or the transpose of that, as its rotation has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pqcli.core.trellis.sources import Source


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of the coded matrix of source number `source`."""

    source: int
    start: int
    stop: int


def stream_layout(
    sources: Sequence[Source], transposed: Iterable[str], stream_weights: int, most: int | None = None
) -> list[tuple[Segment, ...]]:
    """Which rows each stream holds. Tensors of more than `stream_weights` weights are split evenly into streams.

    Raises ValueError where that would be more than `most` streams, before they are made.
    """
    flipped = frozenset(transposed)
    streams: list[tuple[Segment, ...]] = []
    gathered: list[Segment] = []
    weights = 0
    for index, source in enumerate(sources):
        if source.n_weights == 0:
            continue
        n_rows = height(source, flipped)
        if gathered and weights + source.n_weights > stream_weights:
            streams.append(tuple(gathered))
            gathered, weights = [], 0
        if source.n_weights <= stream_weights:
            gathered.append(Segment(index, 0, n_rows))
            weights += source.n_weights
            continue
        n_parts = min(n_rows, -(-source.n_weights // stream_weights))
        rows_each = -(-n_rows // n_parts)
        if most is not None and len(streams) + -(-n_rows // rows_each) > most:
            raise ValueError(f"more than {most:,} streams in {source.key!r}")
        streams += [(Segment(index, r, min(r + rows_each, n_rows)),) for r in range(0, n_rows, rows_each)]
    return [*streams, tuple(gathered)] if gathered else streams


def height(source: Source, transposed: Collection[str]) -> int:
    """Rows of the coded matrix."""
    return source.columns if source.key in transposed else source.rows


def width(source: Source, transposed: Collection[str]) -> int:
    """Columns of the coded matrix."""
    return source.rows if source.key in transposed else source.columns


def period(source: Source, transposed: Collection[str]) -> int:
    """Columns of the coded matrix after which kernel positions repeat; 1 where there are none along a row."""
    return 1 if source.key in transposed else source.kernel
