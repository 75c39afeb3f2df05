"""The table of codecs. A codec is one folder here and one row in this table; nothing else names it.

Imports no codec and no torch: recipes ask what may be chosen, files what may be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PLAIN: Final = "pq"
"""Plain PQ: the codec whose tensors have entries of their own in the file."""


@dataclass(frozen=True)
class Row:
    """One codec: `name` in recipes and files, and the module (`home`) whose `CODEC` it is.

    `is_choosable`: whether `--codec` takes it. `stored_as`: the name in files, where that is another codec's.
    `with_budget`: the codec that takes over where a recipe says how much to spend. `features`: what its files may need
    beside its name. `settings`: those of a recipe that mean something to it, and not to every codec. `label` and
    `reported_as`: what reports call its tensors, if not by its name.
    """

    name: str
    home: str
    is_choosable: bool = True
    stored_as: str = ""
    with_budget: str = ""
    features: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    label: str = ""
    reported_as: str = ""

    @property
    def action(self) -> str:
        """What a plan and a file call tensors that this codec takes."""
        return self.stored_as or self.name


_ROWS: dict[str, Row] = {}


def register(row: Row) -> None:
    """Add a codec to the table."""
    _ROWS[row.name] = row


register(
    Row(
        PLAIN, "pqcli.codecs.plain", with_budget="ecpq",
        settings=(
            "block_size", "n_centroids", "n_iter", "codebook_dtype", "clamp", "sample", "restarts", "eps",
            "max_tentatives", "seed",
        ),
    )
)  # fmt: skip
register(
    Row(
        "trellis",
        "pqcli.codecs.trellis",
        features=("trellis-mixing", "trellis-rows", "trellis-columns"),
        settings=("objective", "effort"),
    )
)
register(Row("auto", "pqcli.codecs.auto", stored_as="trellis", settings=("objective", "effort", "seed")))
register(
    Row(
        "ecpq",
        "pqcli.codecs.ecpq",
        is_choosable=False,
        settings=("objective", "seed"),
        label="PQ, coded",
        reported_as=PLAIN,
    )
)


def choosable() -> tuple[str, ...]:
    """The names that `--codec` takes."""
    return tuple(row.name for row in _ROWS.values() if row.is_choosable)


def chosen(name: str, *, has_budget: bool) -> Row:
    """The codec that a recipe means which names this one."""
    row = _ROWS[name]
    return _ROWS[row.with_budget] if has_budget and row.with_budget else row


def row(name: str) -> Row:
    """The codec that files call so."""
    return _ROWS[name]


def special_settings() -> frozenset[str]:
    """The settings of a recipe that mean something to some codecs only."""
    return frozenset(name for row in _ROWS.values() for name in row.settings)


def with_streams() -> tuple[str, ...]:
    """The codecs whose bytes lie in `pqcli.coded`, by the names that files have for them."""
    return tuple(row.name for row in _ROWS.values() if row.name != PLAIN and not row.stored_as)


def features() -> frozenset[str]:
    """All that a file may need of codecs."""
    return frozenset({PLAIN, *with_streams(), *(feature for row in _ROWS.values() for feature in row.features)})
