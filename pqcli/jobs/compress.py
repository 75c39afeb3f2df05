"""`compress`: one loop for every codec.

    survey -> keep what is kept -> set apart -> fit -> find the level (its jobs run each time) -> measure -> write

A codec fills in the verbs (`pqcli.codecs.base`); what it does not need (plain PQ has no level, and measures in its
jobs) comes to nothing, but nowhere does the loop ask which codec it drives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pqcli.atomic import check_target, final_path, output_errors, temporary_beside
from pqcli.checkpoint import Checkpoint
from pqcli.checkpoint.hub import located
from pqcli.claim import check_space, claimed
from pqcli.codecs import registry
from pqcli.codecs.base import (
    Codec,
    Job,
    Piece,
    Run,
    StreamCodec,
    StreamPiece,
    Streams,
    Survey,
    Weights,
    load,
    record_of,
)
from pqcli.codecs.kept import KeptJob, reference_piece
from pqcli.codecs.kept import cost as kept_cost
from pqcli.codecs.moments import MomentsJob
from pqcli.codecs.rate.budget import Goal, error_bound, trials
from pqcli.codecs.rate.level import Frame, first_level, reach
from pqcli.codecs.rate.measuring import measured_pieces, relative_mse
from pqcli.codecs.rate.protection import Watch
from pqcli.codecs.rate.survey import NOT_FINITE
from pqcli.codecs.statistics import Reading, warning_of
from pqcli.codecs.statistics import opened as statistics_of
from pqcli.container.bases import Base
from pqcli.container.layout import lay_out
from pqcli.container.naming import BaseName
from pqcli.container.reader import open_container
from pqcli.container.writer import Writer
from pqcli.defaults import SHARD_BYTES
from pqcli.errors import CheckpointError, ContainerError, PQError, UsageError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.base import Compared, compared
from pqcli.jobs.copies import copies_of
from pqcli.jobs.course import Course
from pqcli.jobs.events import Event, Hook, Stage, ignore
from pqcli.jobs.executors import Executor, resuming, running
from pqcli.jobs.folders.embedding import check_embedding, small_files
from pqcli.jobs.folders.outputs import goes_to_folder
from pqcli.jobs.journal.journal import Journal
from pqcli.jobs.journal.keeping import Keeping, told
from pqcli.jobs.opening import (
    NO_FILES,
    NOT_CODED,
    Files,
    about,
    bases_of,
    check_place,
    check_stats,
    default_output,
    dropped,
    has_state,
    left_beside,
    opened,
)
from pqcli.jobs.places import place_of_work
from pqcli.jobs.report import base_report, paper_bytes_of, tensor_report
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.plan.plan import Plan, PlanEntry
from pqcli.recipe import documents
from pqcli.recipe.checks import show
from pqcli.recipe.recipe import Recipe
from pqcli.reports.figures import Report, TensorReport
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import (
    Alias,
    Coded,
    Copy,
    Moments,
    Record,
    Same,
    StoredError,
    with_bundle_shares,
)

COPIES = 2
"""What the disk holds of a file while it is written: the spool, and the file itself."""
SAMPLED = 1 / 16
"""The fraction of the dense bytes that a finished file is decoded for, to check it."""
MATCHING = 3.0
"""About the nanoseconds that comparing a weight with a base's takes."""


@showing
def compress(
    source: str | Path,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    with_copies: bool = False,
    embed_files: bool = False,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    fresh: bool = False,
    journal: bool = True,
    verify: bool = True,
    base: str | Path | Sequence[str | Path] = (),
    ray: str | None = None,
    workers: int | None = None,
    progress: Progress = None,
    limits: Limits | None = None,
) -> Report:
    """Compress the checkpoint at `source` into one container, by default `STEM.pq.safetensors` beside it.

    A folder becomes a folder, by default `FOLDER.pq`: containers in the places of its weights (in several files each
    where they are larger than `shard_bytes`), all else copied, the same model in other formats only `with_copies`. So
    does `org/name`, a model of the Hugging Face Hub. Where `output` ends in `.safetensors` a folder becomes one
    container, of the weights at its top, and with `embed_files` of the small files beside them.

    Tensors are read one at a time. With plain PQ each is written as soon as it is encoded, and peak memory is about the
    largest tensor; codecs with streams hold what they have coded in memory until the file is written. The file appears
    whole or not at all. With `verify`, what was written is read again before it is put in place: its bytes must be
    those that were meant, and a sample must decode to its hashes. With a `base`, a checkpoint or a container, what the
    file holds are differences to it where these take less (`pqcli.jobs.base`); several are the base, its own base, and
    so on. `progress` is True for a bar, in a terminal or a notebook, or is called with every event
    (`pqcli.jobs.events.Event`). `limits` bound what the structure of the
    checkpoint may cost to understand.

    The work is done by threads of this process, or by that many `workers`, processes of this machine, or by a `ray`
    cluster: the one at this address, "auto" for the one that this machine belongs to, "local" for one of its own. None
    of this changes a byte, if all of it is done on the same kind of processor.

    A run that takes long keeps a `journal` beside the output (`pqcli.jobs.journal`): where it is killed, the same call
    goes on from there and gives the same bytes. With `fresh` it does not, and starts anew.

    Raises CheckpointError, RecipeError, OutputError, EmptyClusterResolveError or UsageError; JournalError where the
    output is that of a killed run with other input or settings; WorkerError where workers are lost again and again.
    """
    recipe = recipe or Recipe()
    with place_of_work(device, recipe.max_memory, ray=ray, workers=workers) as place:
        return _compressed(
            source,
            output,
            recipe,
            place.executor,
            Keeping(place.device, is_wanted=journal, fresh=fresh),
            with_copies=with_copies,
            embed_files=embed_files,
            shard_bytes=shard_bytes,
            force=force,
            verify=verify,
            base=base,
            hook=hook_of(progress),
            limits=limits,
        )


def _compressed(
    source: str | Path,
    output: str | Path | None,
    recipe: Recipe,
    executor: Executor,
    keeping: Keeping,
    *,
    with_copies: bool,
    embed_files: bool,
    shard_bytes: int,
    force: bool,
    verify: bool,
    base: str | Path | Sequence[str | Path],
    hook: Hook,
    limits: Limits | None,
) -> Report:
    """What `compress` does, wherever the work is done."""
    place = located(source)
    source, output = place.path, output or place.output()
    if embed_files:
        check_embedding(source, output)
    if goes_to_folder(source, output):
        from pqcli.jobs.folders import compressing as folders  # which needs this module

        return folders.compress_folder(
            source,
            Path(output) if output else None,
            recipe,
            executor,
            with_copies=with_copies,
            shard_bytes=shard_bytes,
            base=base,
            force=force,
            verify=verify,
            keeping=keeping,
            hook=hook,
            limits=limits,
        )
    files = small_files(source, limits) if embed_files else NO_FILES
    bases = bases_of(base)
    with opened(source, recipe, limits) as checkpoint:
        target = Path(output) if output else default_output(checkpoint.path)
        check_stats(recipe)
        check_place(target, checkpoint.path, force=force)
        with (
            claimed(target),
            keeping.journal(target, hook, [checkpoint], recipe, bases=bases, files=files) as kept,
        ):
            report = compress_opened(
                checkpoint,
                target,
                recipe,
                executor,
                files=files,
                force=force,
                verify=verify,
                bases=bases,
                journal=kept,
                hook=hook,
                limits=limits,
            )
        return told(report, kept)


def save(
    state_dict: Mapping[str, Any],
    file: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    base: str | Path | Sequence[str | Path] = (),
) -> Report:
    """Compress a state dict (or a whole nested checkpoint dict) that is in memory, as from inside a training script.

    Goes through a temporary `torch.save` beside `file`, so that what comes back is what `torch.load` would give. Where
    the process is killed meanwhile, the next one that writes `file` removes what is left of it.
    """
    _check_state_dict(state_dict)
    target = Path(file)
    check_target(target, force=force)
    with temporary_beside(final_path(target), suffix=".pt") as (dense, descriptor):
        with output_errors(target), os.fdopen(os.dup(descriptor), "wb") as saved:
            _torch_save(state_dict, saved)
        # no journal: what it would go on from, the dense file, goes with the process
        try:
            found = compress(dense, file, recipe, device=device, force=force, journal=False, base=base)
        except PQError as error:  # which names a file that nobody but this process knows
            raise type(error)(str(error).replace(f"'{dense}'", "what was given")) from None
        return replace(found, source="")


def _check_state_dict(given: object) -> None:
    """Raise UsageError for what is no state dict, but often taken for one."""
    kind = type(given).__name__
    if isinstance(given, torch.nn.Module):
        raise UsageError(f"what was given is a whole model ({kind}); give its weights: save(model.state_dict(), ...)")
    if not isinstance(given, Mapping):
        raise UsageError(
            f"what was given is no state dict but {show(given)} ({kind}); give save(model.state_dict(), ...)"
        )


def _torch_save(state_dict: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state_dict, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the disk's error, after which torch fails at ending its archive
            raise error.__context__ from None
        raise


# --- the loop ---------------------------------------------------------------------------------------------------------


def compress_opened(
    checkpoint: Checkpoint,
    output: str | Path | None,
    recipe: Recipe,
    executor: Executor,
    *,
    others: Sequence[TensorInfo] = (),
    files: Files = NO_FILES,
    shard_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    bases: Sequence[Path] = (),
    journal: Journal | None = None,
    scope: str = "",
    hook: Hook | None = None,
    limits: Limits | None = None,
) -> Report:
    """Compress an open checkpoint, and put `files` into the container. Nobody else may write `output` meanwhile.

    The recipe's patterns may mean `others`, tensors that are compressed elsewhere. More than `shard_bytes` become
    several files with an index, which do not appear together. `scope` is what the `journal` calls this checkpoint.
    """
    started = time.perf_counter()
    check_stats(recipe)
    target = Path(output) if output else default_output(checkpoint.path)
    plan = plans.make(recipe, checkpoint.tensors, others)
    check_place(target, checkpoint.path, force=force)
    with compression(
        checkpoint,
        plan,
        recipe,
        executor,
        target,
        files=files,
        shard_bytes=shard_bytes,
        force=force,
        bases=bases,
        journal=journal,
        scope=scope,
        hook=hook,
        limits=limits,
    ) as work:
        check_space(target, COPIES * work.expected_bytes())
        written, size = work.finish(work.coded(work.prepared()), verify=verify, limits=limits)
        records, tensors, warnings = work.writer.records, work.tensor_reports(), work.all_warnings()
        base = base_report(work.base_name(), work.records)
    return Report(
        source=str(checkpoint.path),
        output=str(written),
        original_bytes=checkpoint.n_bytes,
        compressed_bytes=size,
        seconds=time.perf_counter() - started,
        tensors=tensors,
        dropped=dropped(checkpoint, files),
        recipe=documents.to_json(recipe),
        paper_bytes=paper_bytes_of(records),
        warnings=warnings,
        side_bytes=sum(left_beside(checkpoint, files).values()),
        base=base,
    )


@contextmanager
def compression(
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    executor: Executor,
    target: Path,
    *,
    files: Files = NO_FILES,
    shard_bytes: int | None = None,
    force: bool = False,
    bases: Sequence[Path] = (),
    rehearsed: Path | None = None,
    journal: Journal | None = None,
    scope: str = "",
    hook: Hook | None = None,
    limits: Limits | None = None,
) -> Iterator[Compression]:
    """The work of compressing `checkpoint` into `target`; what is not finished leaves nothing behind.

    In a rehearsal, `rehearsed` is the output that is meant: the file would say where its base lies from there.
    """
    row = registry.chosen(recipe.codec, has_budget=bool(recipe.spending))
    codec, weights, beside = load(row.name), Weights(checkpoint), None
    hook = Course(hook or ignore, costs(plan, recipe, codec, has_base=bool(bases)), {"encoding": trials(recipe)})
    with ExitStack() as stack:
        if bases:
            beside = stack.enter_context(compared(checkpoint, plan, bases, target, rehearsed or target, hook, limits))
            codec, plan, weights = codec.compacted(), beside.plan, beside.weights
        quick_state = not codec.is_compact and has_state(plan)
        codec = codec.compacted() if quick_state else codec
        said = about(checkpoint, recipe, beside.naming if beside else None, files)
        writer = stack.enter_context(Writer(target, said, force, compact=codec.is_compact, shard_bytes=shard_bytes))
        run = running(executor, hook)
        if journal is not None:
            writer.make_room = journal.make_room
            run = resuming(executor, hook, journal, scope, weights)
        yield Compression(
            plan, recipe, codec, row.action, weights, checkpoint.n_bytes, writer, run, hook, beside, quick_state
        )


@dataclass
class Compression:
    """The steps of the loop, over what they all need. `run` is the executor's.

    With `quick_state`, training state is coded without loss where else nothing would be, and so with little effort.
    """

    plan: Plan
    recipe: Recipe
    codec: Codec
    codec_name: str
    weights: Weights
    original_bytes: int
    writer: Writer
    run: Run
    hook: Hook
    beside: Compared | None = None
    quick_state: bool = False
    warnings: tuple[str, ...] = ()

    def prepared(self) -> Survey:
        """Read what the codec wants to know, write what is kept; the survey of what is to be coded."""
        copies = copies_of(self.plan.entries, self.weights)
        own = [entry for entry in self.plan.entries if entry.info.name not in copies]
        entries = [entry for entry in own if entry.action not in NOT_CODED]
        records = [record_of(entry) for entry in own if entry.action in NOT_CODED]
        records += [
            _copy_of(entry, copies[entry.info.name]) for entry in self.plan.entries if entry.info.name in copies
        ]
        for record in records:
            if record.action == "base" and self.beside:
                self.writer.add(Piece(record, self.beside.digests[record.name]))
            elif record.action not in ("keep", Moments.action):
                self.writer.add(reference_piece(record))
        is_compact = self.codec.is_compact
        survey = self.codec.survey(entries, self.weights, self.run)
        kept = [record for record in [*records, *survey.rejected] if record.action == "keep"]
        keeping = [
            KeptJob(record, self.weights, is_compact, quick=self.quick_state and record.info.role != "model")
            for record in kept
        ]
        held = [MomentsJob(record, self.weights, is_compact) for record in records if record.action == Moments.action]
        self._write([*keeping, *held, *survey.exact], "keeping")
        return survey if Goal.of(self.recipe, self.original_bytes) else survey.fine_for_differences()

    def coded(self, survey: Survey) -> Streams | None:
        """Code what was surveyed: tensors set apart, then the rest at the level, or to the budget, asked for."""
        reading = self._reading(survey)
        if reading is not None:
            unused = warning_of(reading, survey.records)
            self.warnings = () if unused is None else (unused,)
        choosing = partial(self._stage, "choosing", survey.records)
        level = self.first_level(survey)
        apart, survey = self.codec.set_apart(survey, self.weights, self.recipe, level, choosing)
        self._write(apart, "encoding")
        if not survey.entries:
            return None
        learning = self._stage("learning", survey.records)
        session = self.codec.fit(survey, self.weights, self.recipe, self.first_level(survey), learning)

        def encode(level: float) -> Streams | None:
            return session.finish(level, self._write(session.jobs(level), "encoding"))

        streams = reach(session, self.recipe, self._frame(), encode, self._measure(survey), self._drafted)
        if streams is not None and isinstance(self.codec, StreamCodec):
            measuring = self._stage("measuring", survey.records)
            bound = error_bound(self.recipe)
            watch = None if bound is None else Watch(bound)
            predict = None if reading is None else reading.damage
            for piece in measured_pieces(self.codec, streams, survey, self.weights, measuring, watch, predict):
                self.writer.add(piece)
            self.warnings += () if watch is None else watch.warnings()
        return streams

    def _reading(self, survey: Survey) -> Reading | None:
        """What statistics tell of the tensors; None without."""
        if self.recipe.stats is None or not survey.entries:
            return None
        return statistics_of(self.recipe.stats, survey.records, in_blocks=self.codec.takes_blocks)

    def expected_bytes(self) -> int:
        """The size of the file, as far as it is known before a weight is read.

        Plain PQ: from the headers, or no more than they say. A budget of bytes is spent. Else 0: nothing is known of
        what streams will take.
        """
        goal = Goal.of(self.recipe, self.original_bytes)
        if goal is not None and goal.quantity == "bytes":
            return int(goal.value)
        if self.codec.is_compact and not self.quick_state:
            return 0
        records = [record_of(entry) for entry in self.plan.entries]
        return lay_out(self.writer.about.manifest(records)).n_bytes

    def file_bytes(self, streams: Streams | None) -> int:
        """The size of the file if it were finished with these streams."""
        return self.writer.layout(self.codec_name, streams).n_bytes

    def bytes_with(self, planned: Sequence[Record]) -> int:
        """The size of the file if these tensors, which need no streams, became what is planned."""
        return self.writer.layout(self.codec_name, None, planned).n_bytes

    def finish(self, streams: Streams | None, *, verify: bool = True, limits: Limits | None = None) -> tuple[Path, int]:
        """Write the file; what to open, and its size in bytes. With `verify`, read it again first."""
        base = replace(self.beside.base, close=lambda: None) if self.beside else None
        check = partial(check_written, streams, base=base, limits=limits) if verify else None
        return self.writer.finish(self.codec_name, streams, check)

    def base_name(self) -> BaseName | None:
        """What the file says of its base; None where it needs none."""
        return self.beside.naming.name_for(self.writer.records) if self.beside else None

    def all_warnings(self) -> tuple[str, ...]:
        """What to say, of a base that has served nothing too."""
        if self.beside is None or self.base_name() is not None:
            return self.warnings
        return (*self.warnings, f"'{self.beside.base.path}' spares nothing: {_useless(self.beside)}")

    @property
    def records(self) -> list[Record]:
        """The records of the finished file, those of small kept tensors with their shares of what they lie in."""
        return with_bundle_shares(self.writer.records, len(self.writer.bundle))

    def tensor_reports(self) -> tuple[TensorReport, ...]:
        """What became of every tensor of the finished file."""
        pieces, records = self.writer.pieces, self.records
        errors = {piece.record.name: StoredError.of(piece.error) for piece in pieces if piece.error}
        damages = {piece.record.name: piece.damage for piece in pieces}
        return tuple(
            tensor_report(record, errors.get(record.held_by), piece.use, damages.get(record.held_by))
            for record, piece in zip(records, pieces, strict=True)
        )

    def first_level(self, survey: Survey) -> float:
        """The level that is tried first."""
        return first_level(survey, self.recipe, self._frame())

    def _frame(self) -> Frame:
        """The file around the tensors that are still to be coded."""

        def file_bytes(streams: Streams, records: Sequence[Record]) -> int:
            return self.writer.layout(self.codec_name, streams, records).n_bytes

        kept = [record for record in self.records if record.action in ("keep", Moments.action)]
        return Frame(self.original_bytes, len(self.writer.bundle), kept, file_bytes)

    def _drafted(self, n: int, most: int) -> None:
        self.hook(Event("searching", n, most))

    def _measure(self, survey: Survey) -> Callable[[Streams], float]:
        def measure(streams: Streams) -> float:
            if not isinstance(self.codec, StreamCodec):
                raise TypeError(f"{self.codec_name} has no streams to measure")
            return relative_mse(self.codec, streams, survey, self.weights, self._stage("checking", survey.records))

        return measure

    def _write(self, jobs: Sequence[Job], stage: str) -> list[StreamPiece]:
        """Run jobs, and write the tensors that are finished by them; the streams are handed back."""
        streams: list[StreamPiece] = []
        if not jobs:
            return streams
        for _, piece in self.run(jobs, stage):
            if isinstance(piece, StreamPiece):
                streams.append(piece)
            elif isinstance(piece, list):
                streams += piece
            else:
                self._check_finite(piece.record)
                self.writer.add(piece)
        return streams

    def _check_finite(self, record: Record) -> None:
        """Raise CheckpointError for a tensor that is kept because it is not finite, where the recipe wants that."""
        if self.recipe.on_nonfinite == "error" and record.reason == NOT_FINITE:
            raise CheckpointError(
                f"tensor {record.name!r} {record.reason.partition(':')[0]}; --on-nonfinite keep stores it bit for bit"
            )

    def _stage(self, stage: str, records: Sequence[Record]) -> Stage:
        return Stage(self.hook, stage, sum(record.info.numel for record in records))


def costs(plan: Plan, recipe: Recipe, codec: Codec, *, has_base: bool = False) -> dict[str, float]:
    """The stages of compressing what is planned, with about the time that each takes, in nanoseconds of one core."""
    kept = sum(entry.info.n_bytes for entry in plan.entries if entry.action in ("keep", Moments.action))
    n_weights = sum(entry.info.numel for entry in plan.entries if entry.action not in NOT_CODED)
    found = {"matching": MATCHING * n_weights} if has_base else {}
    found |= {stage: cost * n_weights for stage, cost in codec.costs(n_weights, recipe).items()}
    quick = has_state(plan)
    return found | {"keeping": kept_cost(kept, is_compact=codec.is_compact or quick, quick=quick)}


def _copy_of(entry: PlanEntry, name: str) -> Record:
    """The record of a tensor that has the same bytes as the tensor `name`."""
    return Record(entry.info, Copy(name), f"has the same bytes as {name!r}", entry.kind)


def _useless(beside: Compared) -> str:
    if not beside.naming.tensors:
        return "it has no tensor of the same name and shape; the file needs no base"
    n = len(beside.naming.tensors)
    return f"coding the {n:,} tensors that it has too takes less than coding differences; the file needs no base"


def check_written(
    streams: Streams | None, path: Path, *, base: Base | None = None, limits: Limits | None = None
) -> None:
    """Raise ContainerError unless the container at `path` opens, a sample has its hashes, and its streams are these.

    The sample is of tensors held by themselves, the smallest first: as many as can be for `SAMPLED` of the time, since
    what would be wrong is where entries lie. Streams were decoded from memory when their errors were measured.
    """
    with open_container(path, limits=limits) as container:
        if base is not None:
            container.bind(base)
        own = [record for record in container.records if not isinstance(record.coding, Alias | Copy | Coded | Same)]
        left = SAMPLED * sum(record.info.n_bytes for record in own)
        for i, record in enumerate(sorted(own, key=lambda record: record.info.n_bytes)):
            left -= record.info.n_bytes
            if left < 0 and i:
                break
            container.decode(record.name)
        start = 0
        for meant in () if streams is None else (streams.shared, *streams.streams):
            if container.coded(start, start + len(meant)) != meant:
                raise ContainerError(f"{path}: the streams on the disk are not those that were coded")
            start += len(meant)
