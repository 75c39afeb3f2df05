"""`report`, `inspect` and `verify` of a compressed folder: of each container, and of what lies beside them."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pqcli.checkpoint.components import Components, components_of, with_optimizers
from pqcli.container.folder import CompressedFolder, compressed_folder, full_name, stem_of
from pqcli.errors import CheckpointError, ContainerError, DamagedError
from pqcli.jobs import report as reporting
from pqcli.jobs import verify as verifying
from pqcli.jobs.course import parts
from pqcli.jobs.events import Hook, ignore
from pqcli.jobs.folders.copying import is_same
from pqcli.jobs.verify import Finding
from pqcli.limits import Limits
from pqcli.reports.figures import Report
from pqcli.reports.folders import folder_report


@dataclass(frozen=True)
class Original:
    """The folder that a compressed folder was made from: which of its files belong to which container."""

    path: Path
    parts: Components

    @staticmethod
    def of(folder: CompressedFolder, path: Path, limits: Limits | None) -> Original:
        """The folder at `path`, of which `folder` was made, everything in it counted. Raises CheckpointError."""
        if path.is_file():
            raise CheckpointError(
                f"'{path}' is a file; a compressed folder is compared with the folder that it was made from, and one "
                "of its containers with a file"
            )
        parts = components_of(path, limits=limits, with_copies=True)
        return Original(path, with_optimizers(path, parts, {stem_of(one) for one in folder.containers.values()}))

    def weights(self, container: str) -> tuple[Path, tuple[str, ...]]:
        """The sub-folder and the files that the container at this path was made from."""
        for one in self.parts.components:
            if posixpath.join(one.place, one.stem) == stem_of(container):
                return self.path / one.place, one.weights
        raise CheckpointError(f"'{self.path}' has no weights of which {container} can have been made")


def report_folder(
    source: Path,
    against: Path | None = None,
    *,
    base: str | Path | Sequence[str | Path] = (),
    stats: str | Path | None = None,
    progress: Hook | None = None,
    limits: Limits | None = None,
) -> Report:
    """What the reports of all containers add up to; see `report`."""
    folder = compressed_folder(source)
    original = None if against is None else Original.of(folder, against, limits)
    found = {}
    hooks = _hooks(folder, progress)
    for label, path in folder.containers.items():
        place, weights = original.weights(path) if original else (None, None)
        found[label] = reporting.report(
            source / path, place, weights=weights, base=base, stats=stats, progress=hooks[label], limits=limits
        )
    recipe = next(iter(found.values())).recipe
    return folder_report(found, source=str(against or ""), output=str(source), side=folder.side, recipe=recipe)


def inspect_folder(source: Path, names: Sequence[str] | None = None, *, limits: Limits | None = None) -> dict[str, Any]:
    """What each container says of itself; of the tensors those called `names`, in the folder or in their container."""
    folder = compressed_folder(source)
    found = {}
    for label, path in folder.containers.items():
        document = reporting.inspect(source / path, limits=limits)
        if names:
            document["tensors"] = [
                record
                for record in document["tensors"]
                if {record["name"], full_name(label, record["name"])} & {*names}
            ]
        found[path] = document
    held = {name for label, path in folder.containers.items() for name in _both(label, found[path])}
    for name in names or ():
        if name not in held:
            raise ContainerError(f"{source}: no tensor {name!r}; `pqcli inspect {source}` lists those there are")
    return {
        "folder": str(source),
        "folder_bytes": folder.side_bytes + sum(document["file_bytes"] for document in found.values()),
        "n_carried": len(folder.side),
        "carried_bytes": folder.side_bytes,
        "containers": list(found.values()),
    }


def verify_folder(
    source: Path,
    against: Path | None = None,
    *,
    base: str | Path | Sequence[str | Path] = (),
    progress: Hook | None = None,
    limits: Limits | None = None,
) -> list[Finding]:
    """What is wrong with the containers; with `against`, the original folder, also with the files beside them."""
    folder = compressed_folder(source)
    original = None if against is None else Original.of(folder, against, limits)
    found = []
    hooks = _hooks(folder, progress)
    for label, path in folder.containers.items():
        place, weights = original.weights(path) if original else (None, None)
        for finding in verifying.verify(
            source / path, place, weights=weights, base=base, progress=hooks[label], limits=limits
        ):
            name = None if finding.name is None else full_name(label, finding.name)
            problem = finding.problem if name else f"{path}: {finding.problem}"
            found.append(replace(finding, name=name, problem=problem))
    return [*found, *(_beside(folder, original, limits) if original else ())]


def left_out_of_folder(source: Path, *, limits: Limits | None = None) -> tuple[str, ...]:
    """The training state that compression was asked to leave out of the folder, entry by entry."""
    folder = compressed_folder(source)
    return tuple(
        what for path in folder.containers.values() for what in verifying.left_out(source / path, limits=limits)
    )


def _hooks(folder: CompressedFolder, hook: Hook | None) -> dict[str, Hook]:
    """A hook for each container, by the bytes of its file."""
    sizes = {label: (folder.path / path).stat().st_size for label, path in folder.containers.items()}
    return parts(hook or ignore, sizes)


def _beside(folder: CompressedFolder, original: Original, limits: Limits | None) -> Iterator[Finding]:
    """What is wrong with the files beside the weights: those that were carried must be there with their bytes."""
    dropped = set()
    for path in folder.containers.values():
        with contextlib.suppress(DamagedError):  # told already
            dropped |= {entry for entry, _ in reporting.dropped_of(folder.path / path, limits)}
    for path in original.parts.side:
        if path in dropped:
            continue
        if path not in folder.side:
            yield Finding(None, f"{path} is in {original.path} but not in {folder.path}")
        elif not is_same(original.path / path, folder.path / path):
            yield Finding(None, f"{path} is not as in {original.path}")


def _both(label: str, document: dict[str, Any]) -> Iterator[str]:
    for record in document["tensors"]:
        yield record["name"]
        yield full_name(label, record["name"])
