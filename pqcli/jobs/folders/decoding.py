"""`decode` of a compressed folder: the folder that it was made from, with the names and shards that its weights had."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from pqcli.atomic import atomic_folder
from pqcli.checkpoint import formats
from pqcli.checkpoint.folder import is_weights_name
from pqcli.checkpoint.writing import write_into
from pqcli.claim import check_space, claimed
from pqcli.container.folder import CompressedFolder, Containers, compressed_folder, stem_of
from pqcli.container.reader import Container
from pqcli.errors import OutputError, UsageError
from pqcli.jobs.course import at_the_end, parts
from pqcli.jobs.decode import converted, default_file_suffix, dense_reader
from pqcli.jobs.events import Hook, Stage, ignore
from pqcli.jobs.folders.copying import copy_files, make_folders
from pqcli.jobs.folders.outputs import ENDING, check_folder_output
from pqcli.limits import Limits


def lone_container(folder: Path, output: Path | None) -> Path | None:
    """The container of a compressed folder, where `output` asks for a file; None where it asks for a folder.

    Raises UsageError where there are several.
    """
    if output is None or formats.by_suffix(output) == formats.FOLDER:
        return None
    found = compressed_folder(folder).containers
    if len(found) > 1:
        raise UsageError(
            f"{output}: '{folder}' holds {len(found)} containers, which no single file can hold; leave out -o, or name "
            f"one of them, such as '{folder / next(iter(found.values()))}'"
        )
    return folder / next(iter(found.values()))


def decode_folder(
    source: Path,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
    base: str | Path | Sequence[str | Path] = (),
    hook: Hook | None = None,
    limits: Limits | None = None,
) -> Path:
    """Rebuild the folder, by default as `NAME.decoded` beside `NAME.pq`; returns its path. It appears whole."""
    folder = compressed_folder(source)
    target = output or _default_output(source)
    check_folder_output(target, source, force=force)
    with Containers(folder, limits, base) as opened, claimed(target):
        dense = sum(converted(info, dtype).n_bytes for info in opened.infos if info.alias_of is None)
        check_space(target, folder.side_bytes + dense)
        with atomic_folder(target, force=force, may_go=is_weights_name) as temporary:
            make_folders(temporary, folder.folders, folder.links)
            sizes = {label: container.n_weights for label, container in opened.containers.items()}
            hooks = parts(hook or ignore, sizes)
            for label, container in opened.containers.items():
                place = temporary / folder.place(label)
                _write(container, folder, label, place, dtype, hooks[label], verify=verify, limits=limits)
            _check_free(folder, temporary)
            copy_files(folder.path, temporary, folder.side, at_the_end(hook or ignore), verify=verify)
    return target


def _write(
    container: Container,
    folder: CompressedFolder,
    label: str,
    place: Path,
    dtype: str | None,
    hook: Hook,
    *,
    verify: bool,
    limits: Limits | None,
) -> None:
    source = container.manifest.source
    path = folder.containers[label]
    name = posixpath.basename(stem_of(path)) + default_file_suffix(container.path, source)
    done = Stage(hook, "decoding", container.n_weights)
    write_into(
        place,
        name,
        [converted(info, dtype) for info in container.infos],
        dense_reader(container, dtype, done),
        source.skeleton,
        format=source.format,
        verify=verify,
        limits=limits,
    )


def _check_free(folder: CompressedFolder, temporary: Path) -> None:
    """Raise OutputError where a container gives a file that lies in the folder as well."""
    twice = [path for path in folder.side if os.path.lexists(temporary / path)]
    if twice:
        raise OutputError(
            f"'{folder.path}' holds {twice[0]} beside a container that decodes to a file of this name; move it away"
        )


def _default_output(source: Path) -> Path:
    source = source.resolve() if source.name in {"", ".", ".."} else source
    return source.with_name(source.name.removesuffix(ENDING) + ".decoded")
