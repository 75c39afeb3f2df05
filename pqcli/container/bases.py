"""Finding the base of a container: what its tensors are differences to. It may be a container with a base itself.

What the user gave is tried first, then the place that the file's hint leads to, which lies beside the file or is not
looked at (`naming.hinted`). A candidate serves if it has all tensors that are needed, in their shapes, and if the
smallest tensors of each kind come out with their hashes; every other is checked against its own when it is decoded. If
several candidates serve so far, the hash of all that is needed decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pqcli import checkpoint as checkpoints
from pqcli.codecs.difference import may_be_difference, may_be_exact
from pqcli.container.naming import BaseName, BaseTensor, hash_of, hinted
from pqcli.container.peek import is_container
from pqcli.core.digests import tensor_hash
from pqcli.core.dtypes import Array
from pqcli.errors import BaseError, CheckpointError, ContainerError
from pqcli.limits import Limits
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Record, Same

if TYPE_CHECKING:
    from pqcli.container.reader import Container

LONGEST_CHAIN: Final = 64
"""Containers that are each other's bases."""
Given = Sequence[str | Path]


@dataclass(frozen=True)
class Base:
    """An open base: its tensors by name, and reading one. `dense` is its checkpoint, where it is no container."""

    path: Path
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Array]
    close: Callable[[], None]
    dense: checkpoints.Checkpoint | None = None


@dataclass(frozen=True)
class Search:
    """Where to look for bases: what the user gave, and the containers that led here, the first one asked for first."""

    given: tuple[Path, ...] = ()
    chain: tuple[Path, ...] = ()
    limits: Limits | None = None

    @staticmethod
    def among(given: str | Path | Given, limits: Limits | None = None) -> Search:
        """A search among one path, or several; what is found may claim what `limits` allow."""
        paths = [given] if isinstance(given, str | Path) else given
        return Search(tuple(map(Path, paths)), limits=limits)

    def from_(self, file: Path) -> Search:
        """The search for the base of that file, which is not its own. Raises BaseError for a chain without end."""
        chain = (*self.chain, file)
        if len(chain) > LONGEST_CHAIN:
            raise BaseError(f"{chain[0]}: more than {LONGEST_CHAIN} containers are each other's bases")
        return replace(self, chain=chain)


def open_base(path: Path, search: Search) -> Base:
    """The checkpoint or container at `path` as a base. A container's own base is looked for by the same search.

    Raises CheckpointError, ContainerError, or BaseError where a container would be its own base.
    """
    if not is_container(path, search.limits):
        checkpoint = checkpoints.open(path, limits=search.limits)
        infos = {info.name: info for info in checkpoint.tensors}
        return Base(path, infos, checkpoint.numpy, checkpoint.close, checkpoint)
    for file in search.chain:
        if file.exists() and path.samefile(file):
            way = " -> ".join(str(one) for one in (*search.chain, path))
            raise BaseError(f"{path}: would be its own base ({way})")
    from pqcli.container.reader import Container  # which finds its base here

    container = Container(path, search.limits, search)
    return Base(path, {info.name: info for info in container.infos}, container.numpy, container.close)


def find_base(container: Container, search: Search) -> Base:
    """The base that a container needs. Raises BaseError where none of the candidates is it."""
    wanted = container.manifest.base
    if wanted is None:
        raise BaseError(f"{container.path}: needs no base")
    inner = search.from_(container.path)
    refused: list[str] = []
    serving: list[Base] = []
    try:
        for path, is_given in _candidates(container.path, wanted, search):
            problem = _tried(container, path, inner, serving, must_open=is_given)
            if problem:
                refused.append(problem)
        if len(serving) > 1:
            serving.sort(key=lambda base: content_hash(container.records, base) != wanted.hash)
        if serving:
            return serving.pop(0)
    finally:
        for base in serving:
            base.close()
    raise BaseError(message(container.path, wanted, refused))


def message(file: Path, wanted: BaseName, refused: Sequence[str]) -> str:
    """What is said where a base is missing, or another one."""
    needs = f"{file}: holds differences to a base with the hash {wanted.described()}"
    if not refused:
        return f"{needs}, which does not lie beside it; give it with --base"
    return f"{needs}, and {'; '.join(refused)}; give the right one with --base"


def content_hash(records: Sequence[Record], base: Base) -> str:
    """The hash of what these records use of a base; reads all of it."""
    return hash_of(
        (
            record.name,
            BaseTensor(
                base.infos[record.name].dtype, base.infos[record.name].shape, tensor_hash(base.read(record.name))
            ),
        )
        for record in records
        if record.needs_base
    )


def misfit(records: Sequence[Record], base: Base) -> str:
    """Why a base cannot be the one that these records need, judged by names, shapes and dtypes; nothing if it can."""
    for record in records:
        if not record.needs_base:
            continue
        info, found = record.info, base.infos.get(record.name)
        if found is None:
            return f"'{base.path}' has no tensor {record.name!r:.200}"
        if found.shape != info.shape:
            shapes = f"the shape {list(found.shape)} in '{base.path}', not {list(info.shape)}"
            return f"tensor {record.name!r:.200} has {shapes}"
        may_be = may_be_difference if record.quantized else may_be_exact
        if isinstance(record.coding, Same):
            may_be = _may_be_same
        if not may_be(info.dtype, found.dtype):
            return f"tensor {record.name!r:.200} is {found.dtype} in '{base.path}', which {info.dtype} is not made of"
    return ""


def _may_be_same(dtype: str, base_dtype: str) -> bool:
    return dtype == base_dtype or may_be_difference(dtype, base_dtype)


def _candidates(file: Path, wanted: BaseName, search: Search) -> Iterator[tuple[Path, bool]]:
    """Places to look at, and whether the user gave them."""
    for path in search.given:
        if not any(one.exists() and path.exists() and path.samefile(one) for one in (*search.chain, file)):
            yield path, True
    beside = hinted(file, wanted.path)
    if beside is not None and not any(path.exists() and path.samefile(beside) for path in search.given):
        yield beside, False


def _tried(container: Container, path: Path, search: Search, serving: list[Base], *, must_open: bool) -> str:
    """Add the base at `path` to those that serve; else why it does not."""
    try:
        base = open_base(path, search)
    except (ContainerError, CheckpointError) as error:
        if must_open and not path.exists():
            raise
        return f"'{path}' cannot be it ({error})"
    try:
        problem = misfit(container.records, base) or _missed(container, base)
    except (ContainerError, CheckpointError) as error:
        problem = f"'{path}' cannot be it ({error})"
    except BaseException:
        base.close()
        raise
    if problem:
        base.close()
    else:
        serving.append(base)
    return problem


def _missed(container: Container, base: Base) -> str:
    """What is wrong with a base, judged by a few tensors; nothing if they come out as they were compressed."""
    used = sorted((record for record in container.records if record.needs_base), key=lambda record: record.info.n_bytes)
    smallest: dict[tuple[type, str], Record] = {}
    for record in used:
        smallest.setdefault((type(record.coding), record.info.dtype), record)
    for record in smallest.values():
        if not container.is_intact(record.name, container.decoded(record, base)):
            return f"'{base.path}' has the hash {content_hash(container.records, base)}"
    return ""
