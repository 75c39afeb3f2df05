"""`Journal`: what a run's tasks have found, kept until the output is in its place.

A run that takes no longer than `AFTER_SECONDS` writes nothing: what is found by then is held in memory (what is more
than `HELD_BYTES` is not, and would be done again). From then on every result goes into the file as it comes, and is in
it even if the process is killed the moment after; every `SYNC_SECONDS` the disk is asked to have it.

A journal never makes a run fail: where the disk does not take it, it is given up, and the run says so.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pqcli.atomic import final_path
from pqcli.codecs.base import Piece, Task, TensorTask
from pqcli.errors import JournalError, OutputError, PQError
from pqcli.jobs.events import Event, Hook
from pqcli.jobs.journal.file import Frame, JournalFile, StrangeError, advice, journal_path
from pqcli.jobs.journal.fingerprints import Fingerprints
from pqcli.jobs.journal.identity import Identity, differences
from pqcli.jobs.journal.live import LEFT, LIVE
from pqcli.jobs.journal.values import Buffer, decoded, encoded

AFTER_SECONDS = 30.0
"""How long a run is too short for a journal."""
SYNC_SECONDS = 10.0
HELD_BYTES = 32 << 20


@dataclass(frozen=True)
class Progress:
    """What of a round of tasks is in the journal; `round` tells it from others."""

    round: bytes
    stage: str
    done: int
    total: int
    unit: str

    def __str__(self) -> str:
        return f"{self.stage}, {self.done:,} of {self.total:,} {self.unit}"


@dataclass
class Journal:
    """The journal of one run, at `path`; see `journaled`."""

    path: Path
    identity: Identity
    warnings: tuple[str, ...] = ()
    resumed: str = ""
    _file: JournalFile | None = None
    _known: dict[bytes, Frame] = field(default_factory=dict)
    _held: list[tuple[list[Buffer], list[Buffer]]] = field(default_factory=list)
    _held_bytes: int = 0
    _progress: Progress | None = None
    _is_given_up: bool = False
    _started: float = field(default_factory=time.monotonic)
    _synced: float = 0.0

    def round(self, tasks: Sequence[Task[Any]], stage: str, scope: str, weights: object) -> Round:
        """A round of tasks, some of which may be done already; `scope` is what they belong to of several things."""
        self._write_held()
        fingerprints = Fingerprints(scope)
        keys = [fingerprints.key(stage, task) for task in tasks]
        unit = "tensors" if all(isinstance(task, TensorTask) for task in tasks) else "parts"
        found = {place: self._known[key] for place, key in enumerate(keys) if key is not None and key in self._known}
        name = f"{scope}: {stage}" if scope else stage
        progress = Progress(b"".join(key[:1] for key in keys if key)[:16], name, len(found), len(tasks), unit)
        if tasks:
            self._progress = progress
        return Round(self, keys, found, progress, weights)

    def add(self, key: bytes, progress: Progress, result: object) -> None:
        """One more result; it is in the file when this returns, if the run is long enough for one."""
        if self._is_given_up or _is_as_large_as_its_source(result):
            return
        try:
            body = encoded(result)
        except TypeError:
            return
        head = encoded((key, progress.round, progress.stage, progress.total, progress.unit))
        now = time.monotonic()
        try:
            if self._file is None and now - self._started < AFTER_SECONDS:
                self._hold(head, body)
                return
            file = self._file or self._begun()
            file.append(head, body)
            if now - self._synced > SYNC_SECONDS:
                file.sync()
                self._synced = now
        except OSError as error:
            self._give_up(advice(error))
        except StrangeError as error:
            self._give_up(str(error))
        before = self._progress or progress
        self._progress = Progress(before.round, before.stage, before.done + 1, before.total, before.unit)

    def result(self, frame: Frame, weights: object) -> Any:
        """A result that was found. Raises ValueError or OSError where it is there no longer."""
        if self._file is None:
            raise ValueError("the journal was given up")
        return decoded(self._file.read(frame), weights)

    def left(self) -> str:
        """What is in the file, in words; nothing where there is no file yet."""
        return "" if self._file is None or self._progress is None else str(self._progress)

    def make_room(self) -> bool:
        """Give the disk what the journal takes of it; False where that is nothing."""
        if self._file is None:
            return False
        self._give_up("the disk is full")
        return True

    def take_up(self, target: Path, hook: Hook) -> None:
        """Go on from what another run has left, or where it has left nothing, begin.

        Raises JournalError where it was a run of another identity.
        """
        try:
            found = JournalFile.found(self.path)
        except StrangeError as error:
            self._give_up(f"'{self.path}' is in the way and was left alone ({error})")
            return
        if found is None:
            return
        file, frames = found
        then = _identity_in(frames)
        if then is None:  # killed while it made the file
            file.remove()
            return
        different = differences(then, self.identity)
        if different:
            file.close()
            raise JournalError(
                f"'{target}': a run that was killed left its journal, '{self.path.name}', and this run is another one: "
                f"{'; '.join(different)}; give the same command as then to go on, or --fresh to start anew"
            )
        self._file = file
        for frame in frames[1:]:
            self._take(frame)
        if self._progress is not None:
            self.resumed = f"{self._progress} were done"
            hook(Event("resuming", self._progress.done, self._progress.total, self.resumed, share=0.0))

    def close(self, *, leave: bool) -> None:
        """Leave the file to the next run, or remove it."""
        left = self.left()
        file, self._file = self._file, None
        if file is not None and leave:
            LEFT[:] = [left]
            file.close()
        elif file is not None:
            file.remove()

    def _take(self, frame: Frame) -> None:
        try:
            head = decoded(frame.head, None)
        except ValueError:
            head = None
        if not isinstance(head, tuple) or tuple(map(type, head)) != (bytes, bytes, str, int, str):
            return  # nothing that this version writes
        key, round_, stage, total, unit = head
        last = self._progress
        done = last.done + 1 if last is not None and last.round == round_ else 1
        self._known[key] = frame
        self._progress = Progress(round_, stage, done, total, unit)

    def _write_held(self) -> None:
        """Begin the file if it is time: between two rounds there may be long work that is no task's."""
        if not self._held or self._file is not None or time.monotonic() - self._started < AFTER_SECONDS:
            return
        try:
            self._begun()
        except OSError as error:
            self._give_up(advice(error))
        except StrangeError as error:
            self._give_up(str(error))

    def _hold(self, head: list[Buffer], body: list[Buffer]) -> None:
        n_bytes = sum(map(len, (*head, *body)))
        if self._held_bytes + n_bytes <= HELD_BYTES:
            self._held.append((head, body))
            self._held_bytes += n_bytes

    def _begun(self) -> JournalFile:
        """The file, with what was held until now."""
        self._file = JournalFile.made(self.path, json.dumps(self.identity).encode())
        held, self._held, self._held_bytes = self._held, [], 0
        for head, body in held:
            self._file.append(head, body)
        return self._file

    def _give_up(self, why: str) -> None:
        self._is_given_up, self._known, self._held = True, {}, []
        self.close(leave=False)
        self.warnings = (f"no journal was kept: {why}; had the run been killed, it would have started anew",)


@dataclass(frozen=True)
class Round:
    """Tasks that were given to the executor together: `found` has the places of those that are done already."""

    journal: Journal
    keys: Sequence[bytes | None]
    found: dict[int, Frame]
    progress: Progress
    weights: object

    def result(self, place: int) -> Any:
        """The result of a task that is done. Raises ValueError or OSError where it is there no longer."""
        return self.journal.result(self.found[place], self.weights)

    def add(self, place: int, result: object) -> None:
        """The result of a task that was done now."""
        key = self.keys[place]
        if key is not None:
            self.journal.add(key, self.progress, result)


@contextlib.contextmanager
def journaled(target: Path, identity: Identity, hook: Hook, *, fresh: bool = False) -> Iterator[Journal]:
    """The journal of a run that makes `target`, which must be claimed; with `fresh` what another run left is removed.

    It is gone after the block, unless what ended the block came from outside: an interrupt, or a disk. Raises
    JournalError where another run, of another identity, has left one.
    """
    path = journal_path(final_path(target))
    LEFT.clear()
    if fresh:
        with contextlib.suppress(OSError):
            path.unlink()
    journal = Journal(path, json.loads(json.dumps(identity)))
    journal.take_up(target, hook)
    LIVE[str(path)] = journal
    try:
        yield journal
    except BaseException as error:
        is_own = isinstance(error, PQError) and not isinstance(error, OutputError)
        journal.close(leave=not is_own)
        raise
    else:
        journal.close(leave=False)
    finally:
        LIVE.pop(str(path), None)


def _identity_in(frames: Sequence[Frame]) -> Identity | None:
    try:
        found = json.loads(frames[0].head) if frames else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_as_large_as_its_source(result: object) -> bool:
    """Whether reading the tensor again costs no more than reading the result would."""
    if not isinstance(result, Piece):
        return False
    n_bytes = sum(len(data) for _, data in result.entries) + (0 if result.bundled is None else len(result.bundled))
    return n_bytes >= result.record.info.n_bytes
