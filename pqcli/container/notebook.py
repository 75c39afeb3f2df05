"""How an open container shows itself in a Python session: in a line, and in a notebook with its first tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pqcli.notebook import MOST_ROWS, page
from pqcli.readable import plural, shape, size, visible

if TYPE_CHECKING:
    from pqcli.container.folder import Containers
    from pqcli.container.reader import Container
    from pqcli.tensors.records import Record

_COLUMNS = ("tensor", "shape", "dtype", "action", "reason")


def container_line(container: Container) -> str:
    """What stands for a container where Python prints one."""
    return f"<Container {visible(str(container.path))}: {size(container.n_bytes)}, {_tensors(container.records)}>"


def container_page(container: Container) -> str:
    """The container as a notebook shows it."""
    named = [(record.name, record) for record in container.records]
    facts = [f"{size(container.n_bytes)}, {_tensors(container.records)}"]
    return page(str(container.path), facts, _COLUMNS, _rows(named), len(named))


def folder_line(folder: Containers) -> str:
    """What stands for the containers of a folder."""
    records = [record for container in folder.containers.values() for record in container.records]
    what = plural(len(folder.containers), "container")
    return f"<Containers {visible(str(folder.path))}: {what}, {_tensors(records)}>"


def folder_page(folder: Containers) -> str:
    """The containers of a folder as a notebook shows them."""
    named = [
        (f"{label}/{record.name}" if label else record.name, record)
        for label, container in folder.containers.items()
        for record in container.records
    ]
    n_bytes = sum(container.n_bytes for container in folder.containers.values())
    facts = [
        f"{plural(len(folder.containers), 'container')}, {size(n_bytes)}, {_tensors([record for _, record in named])}"
    ]
    return page(str(folder.path), facts, _COLUMNS, _rows(named), len(named))


def _tensors(records: Sequence[Record]) -> str:
    """`97 tensors (20 pq, 77 keep)`."""
    actions = Counter(record.action for record in records)
    told = ", ".join(f"{n:,} {action}" for action, n in actions.most_common())
    return plural(len(records), "tensor") + (f" ({told})" if told else "")


def _rows(named: Sequence[tuple[str, Record]]) -> Iterator[Sequence[str]]:
    ordered = sorted(named, key=lambda item: item[1].action in ("keep", "alias"))
    for name, record in ordered[:MOST_ROWS]:
        yield name, shape(record.info.shape), record.info.dtype, record.action, record.reason
