"""Whether a run keeps a journal, and whose run it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pqcli.jobs.events import Hook
from pqcli.jobs.journal.identity import identity_of
from pqcli.jobs.journal.journal import Journal, journaled
from pqcli.reports.figures import Report

if TYPE_CHECKING:
    from pqcli.checkpoint import Checkpoint
    from pqcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Keeping:
    """A run on `device` that keeps a journal, or does not; with `fresh` it does not go on from one that is there."""

    device: torch.device
    is_wanted: bool = True
    fresh: bool = False

    @contextlib.contextmanager
    def journal(
        self,
        target: Path,
        hook: Hook,
        checkpoints: Sequence[Checkpoint],
        recipe: Recipe,
        *,
        bases: Sequence[Path] = (),
        files: Mapping[str, bytes] | None = None,
        shard_bytes: int | None = None,
        with_copies: bool = False,
        root: Path | None = None,
    ) -> Iterator[Journal | None]:
        """The journal of the run that makes `target`, which must be claimed, of checkpoints that lie in `root`.

        Raises JournalError where another run, of another identity, has left one.
        """
        if not self.is_wanted:
            yield None
            return
        identity = identity_of(
            checkpoints,
            root or checkpoints[0].path,
            recipe,
            self.device,
            bases=bases,
            files=files,
            shard_bytes=shard_bytes,
            with_copies=with_copies,
        )
        with journaled(target, identity, hook, fresh=self.fresh) as journal:
            yield journal


def told(report: Report, journal: Journal | None) -> Report:
    """The report with what is to be said of the journal."""
    if journal is None:
        return report
    return replace(report, warnings=(*report.warnings, *journal.warnings), resumed=journal.resumed)
