"""The side information of a set of streams: the step of every source, the rotations, and which streams are mixed.

`Side` is what the encoder of a stream and its decoder agree on beforehand; it can be pickled. FORMAT.md has every byte.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy.rangecoder import RATES, RangeCoder
from pqcli.core.trellis import slots
from pqcli.core.trellis.feedback import RowSteps, column_exponents, kind_of
from pqcli.core.trellis.loops import code_levels
from pqcli.core.trellis.params import LARGEST_STEP, N_STATES, WEIGHTS_PER_BYTE, TrellisParams, next_states
from pqcli.core.trellis.rotation import Rotation, Rotations
from pqcli.core.trellis.rows import OCTAVE_STEPS, RowKind, code_exponents, step_of
from pqcli.core.trellis.slots import SideSlots
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.streams import Segment, period, stream_layout, width

_HEADER = struct.Struct("<fBB")
"""Step, log2 of the number of states, log2 of the weights per stream."""
_MIXES = 1 << 7
"""In the header's second byte: some streams are coded by mixing."""
_HAS_ROWS = 1 << 6
"""Likewise: rows of some sources have steps of their own."""
_LEAST_EXPONENT, _LARGEST_EXPONENT = -2048, 2047
_MAX_RANK = 256
_MAX_PRECISION = 30
_MAX_LOG_STREAM_WEIGHTS = 40
_SPARE_ENTRIES = 1 << 24
"""Entries that all rotations may have together beyond one for every weight; those that pay have far fewer."""


@dataclass(frozen=True)
class Side:
    """What the sources of a set of streams are coded with.

    `exponents` gives the step of each source: step * 2^(exponent / 8). `mixed` holds the numbers of the streams whose
    levels are coded by mixing, which the encoder knows only when all are coded. `row_kinds` tells of every source what
    its rows have of their own; empty where none has any. `column_exponents` has, by key, those of columns, of the
    sources whose rows are crossed by them, in order.
    """

    step: float
    n_states: int
    stream_weights: int
    exponents: tuple[int, ...]
    rotations: Rotations
    mixed: frozenset[int] = frozenset()
    row_kinds: tuple[RowKind, ...] = ()
    column_exponents: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def step_of(self, index: int) -> np.float32:
        """The step of source number `index`, in defined arithmetic."""
        return step_of(self.step, self.exponents[index])

    def row_kind(self, index: int) -> RowKind:
        """What the rows of source number `index` have of their own."""
        return self.row_kinds[index] if self.row_kinds else RowKind.PLAIN


def make_side(
    sources: Sequence[Source],
    params: TrellisParams,
    rotations: Rotations,
    steps: Mapping[str, float] | None = None,
    rows: Mapping[str, RowSteps] | None = None,
) -> Side:
    """The side information for sources with steps of their own (None: `params.step`), rounded to eighths of octaves.

    `rows` tells, by key, what rows of some sources have of their own.
    """
    given = rows or {}
    exponents = tuple(_exponent(params.step, (steps or {}).get(source.key, params.step)) for source in sources)
    kinds = tuple(kind_of(given.get(source.key)) for source in sources)
    return Side(
        params.step, params.n_states, params.stream_weights, exponents, rotations,
        row_kinds=kinds if any(kinds) else (),
        column_exponents={
            source.key: column_exponents(given[source.key])
            for source, kind in zip(sources, kinds, strict=True)
            if kind == RowKind.CROSSED
        },
    )  # fmt: skip


def _exponent(step: float, own: float) -> int:
    return int(np.clip(round(OCTAVE_STEPS * float(np.log2(own / step))), _LEAST_EXPONENT, _LARGEST_EXPONENT))


def write_side(side: Side, sources: Sequence[Source], n_streams: int) -> bytes:
    """The side information as bytes."""
    entries = sum(item.basis.size for item in side.rotations.items)
    coder = slots.writer(entries + 64 * len(sources) + n_streams + 64)
    _code_fields(coder, side, sources)
    if side.mixed:
        _code_mixed(coder, side.mixed, n_streams)
    if side.row_kinds:
        _code_row_kinds(coder, side.row_kinds, len(sources))
        for key in side.column_exponents:
            code_exponents(coder, side.column_exponents[key])
    flags = (_MIXES if side.mixed else 0) | (_HAS_ROWS if side.row_kinds else 0)
    log_states = side.n_states.bit_length() - 1 | flags
    return _HEADER.pack(side.step, log_states, side.stream_weights.bit_length() - 1) + coder.finish()


def parse_side(data: bytes, sources: Sequence[Source], n_streams: int) -> tuple[Side, list[tuple[Segment, ...]]]:
    """The side information that `write_side` wrote, and the layout of the streams.

    Raises ValueError for other bytes, and where the sources make another number of streams.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"side information of {len(data)} bytes")
    step, log_states, log_weights = _HEADER.unpack_from(data)
    log_states &= ~(_MIXES | _HAS_ROWS)
    if not 0.0 < step <= LARGEST_STEP:
        raise ValueError(f"step {step}")
    if 1 << min(log_states, 30) not in N_STATES:
        raise ValueError(f"a trellis of 2^{log_states} states")
    if log_weights > _MAX_LOG_STREAM_WEIGHTS:
        raise ValueError(f"streams of 2^{log_weights} weights")
    coder = slots.reader(data[_HEADER.size :])
    side = _code_fields(coder, Side(step, 1 << log_states, 1 << log_weights, (), Rotations()), sources)
    layout = stream_layout(sources, side.rotations.transposed, side.stream_weights, most=n_streams)
    if len(layout) != n_streams:
        raise ValueError(f"{n_streams} streams where the shapes make {len(layout)}")
    if mixes(data):
        side = replace(side, mixed=_code_mixed(coder, frozenset(), n_streams))
    if has_rows(data):
        side = replace(side, row_kinds=_code_row_kinds(coder, (), len(sources)))
        side = replace(side, column_exponents=_columns_read(coder, side, sources))
    coder.finish()
    return side, layout


def _columns_read(coder: RangeCoder, side: Side, sources: Sequence[Source]) -> dict[str, NDArray[np.int64]]:
    """The exponents of columns, of the sources whose rows are crossed by them."""
    found: dict[str, NDArray[np.int64]] = {}
    for source, kind in zip(sources, side.row_kinds, strict=True):
        if kind == RowKind.CROSSED:
            n_columns = width(source, side.rotations.transposed)
            if n_columns > (len(coder.buffer) + 8) * WEIGHTS_PER_BYTE:
                raise ValueError(f"{len(coder.buffer)} bytes cannot hold the steps of {n_columns} columns")
            found[source.key] = np.zeros(n_columns, np.int64)
            code_exponents(coder, found[source.key])
    return found


def mixes(data: bytes) -> bool:
    """Whether the header of side information says that streams are coded by mixing."""
    return len(data) >= _HEADER.size and data[4] & _MIXES != 0


def has_rows(data: bytes) -> bool:
    """Whether the header of side information says that rows have steps of their own."""
    return len(data) >= _HEADER.size and data[4] & _HAS_ROWS != 0


def _code_row_kinds(coder: RangeCoder, kinds: Sequence[RowKind], n_sources: int) -> tuple[RowKind, ...]:
    """What the rows of every source have of their own."""
    found = []
    for i in range(n_sources):
        kind = coder.integer(SideSlots.ROW_KIND, int(kinds[i]) if coder.encoding else 0)
        if kind > max(RowKind):
            raise ValueError(f"rows of kind {kind}")
        found.append(RowKind(kind))
    return tuple(found)


def _code_mixed(coder: RangeCoder, mixed: frozenset[int], n_streams: int) -> frozenset[int]:
    """Which streams are coded by mixing."""
    return frozenset(i for i in range(n_streams) if coder.bit(SideSlots.IS_MIXED, int(i in mixed)))


def _code_fields(coder: RangeCoder, side: Side, sources: Sequence[Source]) -> Side:
    """Write `side`'s fields, or read them: the side that a reader then has."""
    rotations = side.rotations
    exponents: list[int] = []
    use: dict[str, int] = {}
    transposed: set[str] = set()
    last = 0
    for index, source in enumerate(sources):
        known = coder.encoding
        exponents.append(last + coder.signed(SideSlots.EXPONENT, side.exponents[index] - last if known else 0))
        last = exponents[-1]
        if not _LEAST_EXPONENT <= last <= _LARGEST_EXPONENT:
            raise ValueError(f"step exponent {last}")
        item = coder.integer(SideSlots.ROTATION, rotations.use.get(source.key, -1) + 1 if known else 0)
        if item:
            use[source.key] = item - 1
        if coder.bit(SideSlots.IS_TRANSPOSED, int(source.key in rotations.transposed) if known else 0):
            transposed.add(source.key)
    users: dict[int, list[Source]] = {}
    for source in sources:
        if source.key in use:
            users.setdefault(use[source.key], []).append(source)
    if sorted(users) != list(range(len(users))):
        raise ValueError("a rotation without a user")
    items: list[Rotation] = []
    left = _SPARE_ENTRIES + sum(source.n_weights for source in sources)
    for i in range(len(users)):
        items.append(_code_rotation(coder, users[i], transposed, rotations.items[i] if coder.encoding else None, left))
        left -= items[-1].basis.size
    flipped = frozenset(transposed)
    return Side(side.step, side.n_states, side.stream_weights, tuple(exponents), Rotations(tuple(items), use, flipped))


def _code_rotation(
    coder: RangeCoder, users: Sequence[Source], transposed: Collection[str], rotation: Rotation | None, most: int
) -> Rotation:
    """A rotation over the kernel positions of its users, or else over all columns of the coded matrix.

    Raises ValueError where one that is read has more than `most` entries.
    """
    size = _rotated_size(users, transposed)
    k = coder.integer(SideSlots.ROTATION, len(rotation.basis) if rotation else 0)
    if not 1 <= k <= min(size, _MAX_RANK):
        raise ValueError(f"{k} basis vectors of size {size}")
    if not coder.encoding and k * size > (len(coder.buffer) + 8) * WEIGHTS_PER_BYTE:
        raise ValueError(f"{len(coder.buffer)} bytes cannot hold {k} basis vectors of size {size}")
    if not coder.encoding and k * size > most:
        raise ValueError(f"{k} basis vectors of size {size}, more than the {most} entries that are left for them")
    precisions: list[int] = []
    last = 0
    for i in range(k):
        last += coder.signed(SideSlots.ROTATION, rotation.precisions[i] - last if rotation else 0)
        if not 0 <= last <= _MAX_PRECISION:
            raise ValueError(f"a basis vector of precision {last}")
        precisions.append(last)
    levels = 2 * rotation.basis if rotation else np.zeros((k, size), np.int32)
    labels = np.ones(size, np.uint8)
    no_labels, one_state = np.zeros(k, np.uint8), next_states(1)
    if not code_levels(
        coder.encoding,
        levels,
        labels,
        no_labels,
        k,
        1,
        1 << 14,
        one_state,
        coder.models,
        RATES,
        coder.window,
        coder.buffer,
    ):
        raise ValueError("a basis entry is beyond all bounds")
    return Rotation(levels >> 1, tuple(precisions))


def _rotated_size(users: Sequence[Source], transposed: Collection[str]) -> int:
    """Length of the vectors that the users of one rotation have rotated."""
    sizes = {width(source, transposed) if period(source, transposed) == 1 else source.kernel for source in users}
    if len(sizes) != 1:
        raise ValueError(f"one rotation for vectors of {len(sizes)} sizes")
    return sizes.pop()
