"""Files of statistics: what one holds, and several added up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli import stats
from pqcli.atomic import check_target
from pqcli.claim import check_space, claimed
from pqcli.errors import UsageError
from pqcli.stats.files import n_bytes_of, save, site_bytes, weight_bytes
from pqcli.stats.moments import gradient_of

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Seen:
    """What a file knows of one weight.

    form        "full", "blocks" or "diagonal": how much of the second moments of its inputs is kept; "rows" for a plain
                embedding, of which only the frequency of rows is known
    width       number of inputs; None for a plain embedding
    n_samples   inputs that were seen, or lookups
    gradient    mean squared gradient of the network's output at the layer's output; None if not collected
    bytes       size in the file, the shared part counted for the first weight that has it
    shares      the weight whose moments these are; None for the first
    aliases     other names of the weight (tied)
    """

    name: str
    form: str
    width: int | None
    n_samples: float
    n_lookups: float
    gradient: float | None
    bytes: int
    shares: str | None
    aliases: tuple[str, ...] = ()


def show(file: str | Path) -> tuple[Seen, ...]:
    """What a file of statistics knows, weight by weight; matrices are not read."""
    found = stats.open(file)
    owners: dict[int, str] = {}
    rows = []
    for name, weight in found.weights.items():
        lookups = 0.0 if weight.lookups is None else float(weight.lookups.sum())
        about = None if weight.site is None else found.outline(weight.site)
        owner = None if weight.site is None else owners.setdefault(weight.site, name)
        shares = None if owner == name else owner
        own_bytes = 0 if about is None or shares else site_bytes(about)
        rows.append(
            Seen(
                name=name,
                form="rows" if about is None else about.form,
                width=None if about is None else about.columns,
                n_samples=lookups if about is None else sum(about.counts),
                n_lookups=lookups,
                gradient=gradient_of(weight),
                bytes=own_bytes + weight_bytes(weight),
                shares=shares,
                aliases=tuple(alias for alias, of in found.aliases.items() if of == name),
            )
        )
    return tuple(rows)


def merge(files: Sequence[str | Path], output: str | Path, *, force: bool = False) -> int:
    """Add up files of statistics of one model, and write the sum; the number of weights in it.

    What was added up while they were collected is added up here, so that the sum is what one run over all samples would
    have given, up to the precision of the stored correlations. One matrix of each file is in memory at a time.
    """
    if len(files) < 2:
        raise UsageError("there is nothing to add up; name two files or more")
    target = Path(output)
    check_target(target, force=force)
    with claimed(target):
        found = stats.merge([stats.open(file) for file in files], [str(file) for file in files])
        check_space(target, n_bytes_of(found))
        save(found, target, force=force)
    return len(found)
