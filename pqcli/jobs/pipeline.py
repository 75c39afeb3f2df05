"""The verbs: plan, compress, decode, report, verify. Each joins a checkpoint, a plan and a container.

Progress goes to an optional hook `progress(weights, name)`, called as tensors get done.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pqcli import checkpoint as checkpoints
from pqcli import container as containers
from pqcli.atomic import atomic_writer, check_target
from pqcli.checkpoint import Checkpoint
from pqcli.codecs.coders import n_threads
from pqcli.codecs.rate import choosing, coding
from pqcli.container import Container, Record, Writer
from pqcli.core import metrics, rtn
from pqcli.core.pq import em, pq
from pqcli.errors import CheckpointError, ContainerError, OutputError, PQError, UsageError
from pqcli.jobs import executors
from pqcli.plan import plan as plans
from pqcli.plan.paper import paper_bytes
from pqcli.plan.plan import Plan, PlanEntry
from pqcli.recipe import documents
from pqcli.recipe.recipe import Recipe
from pqcli.reports.figures import INT4_GROUP, Report, TensorReport
from pqcli.tensors.info import TensorInfo

Progress = Callable[[int, str], None]
Jsonable = Any

REPORTED_WITHIN = 1e-4
SMALLEST_REPORTED = torch.finfo(torch.float32).tiny
"""Errors are stored in float32: `verify` accepts this relative and this absolute difference."""
WORKING_COPIES = 2
"""Memory that encoding a tensor takes, in copies of the tensor: the weights, and what they decode to."""
BASE_MEMORY_BYTES = 400 << 20
"""Memory of a process that has torch loaded and kernels compiled."""
WORKERS_PER_GPU = 2
"""One reads, measures and hashes on the CPU while the card learns the other's codebook."""
NOT_FINITE = "holds NaN, infinite or out of float32 range values: kept bit-exact"


@dataclass(frozen=True)
class Preview:
    """What `compress` would do: the plan, and the size that the file would have.

    The size is exact unless the weights hold a surprise that headers do not show (NaN, fewer distinct blocks than
    centroids, weights that float16 cannot hold).
    """

    source: Path
    output: Path
    original_bytes: int
    predicted_bytes: int
    plan: Plan
    dropped: tuple[str, ...]


# --- compress --------------------------------------------------------------------------------------------------------


def preview(source: str | Path, output: str | Path | None = None, recipe: Recipe | None = None) -> Preview:
    """What `compress` with the same arguments would do.

    Plain PQ needs the headers alone. What the other codecs will do depends on the weights: they are rehearsed, in a
    temporary folder, which takes as long as compressing.
    """
    recipe = recipe or Recipe()
    with _opened(source, recipe) as checkpoint:
        seen = _preview(checkpoint, output, recipe)
        return seen if recipe.whole_codec is None else _rehearsed(checkpoint, seen, recipe)


def _opened(source: str | Path, recipe: Recipe) -> Checkpoint:
    """The checkpoint, or as much of it as the recipe asks for."""
    checkpoint = checkpoints.open(source)
    if not recipe.model_only:
        return checkpoint
    try:
        return checkpoint.model_only()
    except CheckpointError:
        checkpoint.close()
        raise


def _rehearsed(checkpoint: Checkpoint, seen: Preview, recipe: Recipe) -> Preview:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"rehearsal{containers.SUFFIX}"
        report = _compress(checkpoint, target, recipe, torch.device("cpu"), False, None)
    entries = tuple(
        replace(entry, action=found.action, reason=found.reason, predicted_bytes=found.bytes)  # type: ignore[arg-type]
        for entry, found in zip(seen.plan.entries, report.tensors, strict=True)
    )
    return replace(seen, plan=replace(seen.plan, entries=entries), predicted_bytes=report.compressed_bytes)


def check_possible(seen: Preview, device: str, *, force: bool = False) -> None:
    """Raise what `compress` would raise before it does any work: no such device, or an output that may not be."""
    resolve_device(device)
    _check_output(seen.output, force, seen.source)


def compress(
    source: str | Path,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress the checkpoint at `source` into one container, by default `STEM.pq.safetensors` beside it.

    Reads, encodes and writes tensor by tensor: peak memory is about the largest tensor. The file appears whole or not
    at all. Raises CheckpointError, RecipeError, OutputError, EmptyClusterResolveError or UsageError.
    """
    recipe = recipe or Recipe()
    with _opened(source, recipe) as checkpoint:
        return _compress(checkpoint, output, recipe, resolve_device(device), force, progress)


def save(
    state_dict: Mapping[str, Any],
    file: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    force: bool = False,
) -> Report:
    """Compress a state dict (or a whole nested checkpoint dict) that is in memory, as from inside a training script.

    Goes through a temporary `torch.save` beside `file`, so that what comes back is what `torch.load` would give.
    """
    check_target(Path(file), force=force)
    with tempfile.NamedTemporaryFile(dir=Path(file).parent, suffix=".pt") as dense:
        torch.save(state_dict, dense)
        dense.flush()
        return replace(compress(dense.name, file, recipe, device=device, force=force), source="")


def default_output(source: Path) -> Path:
    """`STEM.pq.safetensors` beside a checkpoint file or folder."""
    source = source.resolve() if source.name in {"", ".", ".."} else source
    stem = source.name if source.is_dir() else source.stem
    return source.with_name(stem + containers.SUFFIX)


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "cuda:1" or "mps" means here. Raises UsageError where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device!r}: use auto, cpu, cuda, cuda:0 or mps") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Metal device; use --device cpu")
    if found.type not in {"cpu", "cuda", "mps"}:
        raise UsageError(f"--device {device!r}: use auto, cpu, cuda, cuda:0 or mps")
    return found


@dataclass(frozen=True)
class _Use:
    """How a tensor's assignments are spread: centroids that occur, entropy in bits per assignment and in all."""

    centroids: int | None
    entropy: float | None
    entropy_bits: float


@dataclass(frozen=True)
class _Encoded:
    """What a job hands to the writer: the record, and either a `PQTensor` or the tensor itself."""

    record: Record
    kept: torch.Tensor | None = None
    tensor: pq.PQTensor | None = None
    error: metrics.Error | None = None
    decoded_hash: bytes = b""
    used: _Use | None = None


def _compress(
    checkpoint: Checkpoint,
    output: str | Path | None,
    recipe: Recipe,
    device: torch.device,
    force: bool,
    progress: Progress | None,
) -> Report:
    started = time.perf_counter()
    target = Path(output) if output else default_output(checkpoint.path)
    plan = plans.make(recipe, checkpoint.tensors)
    _check_output(target, force, checkpoint.path)
    compress_all = _compress_each if recipe.whole_codec is None else _compress_whole
    with Writer(target, force, compact=recipe.whole_codec is not None) as writer:
        tensors, size = compress_all(checkpoint, plan, recipe, device, writer, progress or _no_progress)
    return Report(
        source=str(checkpoint.path),
        output=str(target),
        original_bytes=checkpoint.n_bytes,
        compressed_bytes=size,
        seconds=time.perf_counter() - started,
        tensors=tensors,
        dropped=_dropped(checkpoint),
        recipe=documents.to_json(recipe),
        paper_bytes=_paper_bytes(writer.records([info.name for info in checkpoint.tensors])),
    )


def _compress_each(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, device: torch.device, writer: Writer, progress: Progress
) -> tuple[tuple[TensorReport, ...], int]:
    """Every tensor by itself, with plain PQ."""

    def run(entry: PlanEntry, device: torch.device) -> _Encoded:
        with _stream(device):
            return _encode(checkpoint, entry, recipe, device)

    reports = {}
    results = executors.largest_first(
        plan.entries, run, lambda entry: WORKING_COPIES * entry.info.n_bytes, _devices(device), _in_flight(recipe)
    )
    for done in results:
        _write(writer, done)
        error = containers.StoredError.of(done.error) if done.error else None
        reports[done.record.name] = _tensor_report(done.record, error, done.used)
        progress(done.record.info.numel if done.record.alias_of is None else 0, done.record.name)
    order = [entry.info.name for entry in plan.entries]
    size = writer.finish(order, _source(checkpoint), documents.to_json(recipe))
    return tuple(reports[name] for name in order), size


def _devices(device: torch.device) -> list[torch.device]:
    """A device per worker: the cores of the CPU; all CUDA cards where none was named, or the one that was, twice."""
    if device.type == "cpu":
        return [device] * n_threads()
    if device.type != "cuda":
        return [device]
    cards = (
        [device] if device.index is not None else [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    )
    return WORKERS_PER_GPU * cards


@contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    """On a GPU, this thread works there, in a stream of its own: copies and EM of two workers overlap."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def _in_flight(recipe: Recipe) -> int:
    if recipe.max_memory is None:
        return executors.IN_FLIGHT_BYTES
    return max(recipe.max_memory - BASE_MEMORY_BYTES, 0)


def _compress_whole(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, device: torch.device, writer: Writer, progress: Progress
) -> tuple[tuple[TensorReport, ...], int]:
    """All tensors together, with the codec that the recipe names."""
    del device  # these codecs run on the CPU
    order = [entry.info.name for entry in plan.entries]
    survey, frame = _survey(checkpoint, plan, recipe, writer)
    codec = recipe.whole_codec or ""
    used: dict[str, _Use | None] = {}
    errors: dict[str, containers.StoredError] = {}
    if recipe.codec == "auto":
        exact, survey, frame = _take_exact(checkpoint, survey, frame, recipe, writer)
        errors = {done.record.name: containers.StoredError.of(done.error) for done in exact if done.error}
        used = {done.record.name: done.used for done in exact}
    if not survey.records:
        size = writer.finish(order, frame.source, frame.recipe)
        return _written(writer, order, errors, used), size
    outcome = coding.encode(codec, survey, checkpoint.read, recipe, frame, checkpoint.n_bytes)
    for found in coding.measure(codec, outcome, checkpoint.read):
        writer.add_coded(found.record, found.digest, found.error, found.entropy_bits)
        errors[found.record.name] = containers.StoredError.of(found.error)
        progress(found.record.info.numel, found.record.name)
    size = writer.finish(order, frame.source, frame.recipe, codec, outcome.coded)
    return _written(writer, order, errors, used), size


def _written(
    writer: Writer,
    order: Sequence[str],
    errors: Mapping[str, containers.StoredError],
    used: Mapping[str, _Use | None],
) -> tuple[TensorReport, ...]:
    """What became of every tensor of a finished file."""
    records = containers.with_kept_shares(writer.records(order), writer.kept_bytes)
    return tuple(_tensor_report(record, errors.get(record.name), used.get(record.name)) for record in records)


def _take_exact(
    checkpoint: Checkpoint, survey: coding.Survey, frame: coding.Frame, recipe: Recipe, writer: Writer
) -> tuple[list[_Encoded], coding.Survey, coding.Frame]:
    """Write the tensors that cost least when held exactly or kept; the survey and the frame of the rest."""
    level = coding.first_level(survey, recipe, frame, checkpoint.n_bytes)
    taken = []
    by_name = {record.name: record for record in survey.records}
    for choice in choosing.choose(survey, checkpoint.read, level, recipe.objective):
        record, winner = by_name[choice.name], choice.winner
        if winner.way == "trellis":
            continue
        weight = checkpoint.read(record.name)
        if winner.way == "keep":
            done = _kept(record, weight, f"keeping it costs no more than coding it ({winner.bits_per_weight:.1f} bits)")
        else:
            exact = choosing.exact_record(record, winner)
            options = em.Options(n_centroids=exact.n_centroids or 1, seed=tensor_seed(recipe.seed, record.name))
            done = _quantized(exact, weight, options)
        _write(writer, done)
        taken.append(done)
    written = {done.record.name: done.record for done in taken}
    records = tuple(record for record in survey.records if record.name not in written)
    order = [record.name for record in frame.records]
    everything = [written.get(record.name, record) for record in frame.records]
    rest = coding.Survey(records, {record.name: survey.rms[record.name] for record in records})
    return taken, rest, replace(frame, records=everything, kept_bytes=len(writer.bundle(order)))


def explain(source: str | Path, recipe: Recipe | None = None) -> list[choosing.Choice]:
    """How `--codec auto` decides: for every tensor the candidates with their measured bits, error and cost."""
    recipe = replace(recipe or Recipe(), codec="auto")
    with _opened(source, recipe) as checkpoint:
        plan = plans.make(recipe, checkpoint.tensors)
        with tempfile.TemporaryDirectory() as folder, Writer(Path(folder) / "none", compact=True) as writer:
            survey, frame = _survey(checkpoint, plan, recipe, writer)
            level = coding.first_level(survey, recipe, frame, checkpoint.n_bytes)
            return choosing.choose(survey, checkpoint.read, level, recipe.objective)


def _survey(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, writer: Writer) -> tuple[coding.Survey, coding.Frame]:
    """Read every tensor once: write what is kept, and find out about the rest."""
    records, rms = [], {}
    for entry in plan.entries:
        record = _record(entry)
        if record.alias_of is not None:
            writer.add_alias(record)
            continue
        weight = checkpoint.read(record.name)
        if record.quantized and not pq.is_finite(weight):
            record = _kept_record(record, NOT_FINITE)
        spread = coding.spread(weight) if record.quantized else 0.0
        if record.quantized and pq.largest(weight) > coding.LOUDEST * spread:
            record = _kept_record(record, "holds values a million times larger than the rest: kept bit-exact")
        if record.quantized:
            records.append(record)
            rms[record.name] = spread
        else:
            writer.add_kept(record, weight)
    order = [entry.info.name for entry in plan.entries]
    coded = {record.name: record for record in records}
    written = {record.name: record for record in writer.records(order)}
    everything = [coded.get(name) or written[name] for name in order]
    frame = coding.Frame(_source(checkpoint), documents.to_json(recipe), everything, len(writer.bundle(order)))
    return coding.Survey(tuple(records), rms), frame


def _no_progress(_weights: int, _name: str) -> None:
    pass


def _dropped(checkpoint: Checkpoint) -> tuple[str, ...]:
    return tuple(f"{path} ({reason})" for path, reason in _left_out(checkpoint))


def _left_out(checkpoint: Checkpoint) -> list[list[str]]:
    """What the container does not hold: entries that JSON cannot carry, and files of a folder that are no weights."""
    entries = [[item.path, item.reason] for item in checkpoint.dropped]
    return entries + [[name, "a file beside the weights; copy it yourself"] for name in checkpoint.side_files]


def _preview(checkpoint: Checkpoint, output: str | Path | None, recipe: Recipe) -> Preview:
    plan = plans.make(recipe, checkpoint.tensors)
    records = [_record(entry) for entry in plan.entries]
    manifest = containers.make_manifest(_source(checkpoint), documents.to_json(recipe), records)
    return Preview(
        source=checkpoint.path,
        output=Path(output) if output else default_output(checkpoint.path),
        original_bytes=checkpoint.n_bytes,
        predicted_bytes=containers.predict(manifest),
        plan=plan,
        dropped=_dropped(checkpoint),
    )


def _source(checkpoint: Checkpoint) -> dict[str, Jsonable]:
    return {
        "format": checkpoint.format,
        "n_bytes": checkpoint.n_bytes,
        "skeleton": checkpoint.skeleton,
        "dropped": _left_out(checkpoint),
    }


def _record(entry: PlanEntry) -> Record:
    info, scheme = entry.info, entry.scheme
    record = Record(
        name=info.name, shape=info.shape, dtype=info.dtype, action=entry.action, reason=entry.reason, kind=entry.kind,
        role=info.role, alias_of=info.alias_of,
    )  # fmt: skip
    if not record.quantized:
        return record
    rows = None if entry.rows == info.shape[0] else entry.rows
    if scheme is None:
        return replace(record, rows=rows, kernel=coding.kernel_of(info.shape, entry.rows))
    return replace(
        record,
        rows=rows,
        block_size=scheme.block_size,
        n_centroids=scheme.n_centroids,
        codebook_dtype=scheme.codebook_dtype,
    )


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor: it depends on the run's seed and the tensor's name, not on order or on other tensors."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _encode(checkpoint: Checkpoint, entry: PlanEntry, recipe: Recipe, device: torch.device) -> _Encoded:
    """Read one tensor and encode it as planned, or keep it where its values rule that out."""
    record = _record(entry)
    if record.alias_of is not None:
        return _Encoded(record)
    weight = checkpoint.read(record.name)
    if entry.scheme is None:
        return _Encoded(record, kept=weight)
    if not pq.is_finite(weight):
        return _kept(record, weight, NOT_FINITE)
    scheme = entry.scheme
    options = em.Options(
        n_centroids=scheme.n_centroids,
        n_iter=scheme.n_iter,
        eps=recipe.eps,
        max_tentatives=recipe.max_tentatives,
        seed=tensor_seed(recipe.seed, record.name),
        sample=scheme.sample,
        stages=scheme.stages,
        relaxation=em.RELAXATION,
        restarts=recipe.restarts,
    )
    return _quantized(record, weight, options, device)


def _quantized(
    record: Record, weight: torch.Tensor, options: em.Options, device: torch.device | str = "cpu"
) -> _Encoded:
    """A tensor as plain PQ, as its record says; kept where that turns out not to be smaller."""
    dtype = getattr(torch, record.codebook_dtype)
    try:
        encoded = pq.encode(weight, record.matrix_shape, record.block_size or 1, options, dtype, device)
    except PQError as error:
        raise type(error)(f"tensor {record.name!r}: {error}") from None
    tensor = encoded.tensor
    record = replace(
        record, n_centroids=tensor.n_centroids, codebook_dtype=str(tensor.codebook.dtype).removeprefix("torch.")
    )
    if record.payload_bytes >= record.info.n_bytes:
        return _kept(
            record, weight, f"would not get smaller: {record.payload_bytes} B as PQ, {record.info.n_bytes} B dense"
        )
    return _Encoded(
        record,
        tensor=tensor,
        error=encoded.error,
        decoded_hash=containers.tensor_hash(encoded.decoded),
        used=_use(tensor),
    )


def _kept(record: Record, weight: torch.Tensor, reason: str) -> _Encoded:
    return _Encoded(_kept_record(record, reason), kept=weight)


def _kept_record(record: Record, reason: str) -> Record:
    return Record(record.name, record.shape, record.dtype, "keep", reason, record.kind, record.role)


def _use(tensor: pq.PQTensor) -> _Use:
    counts = torch.bincount(tensor.assignments, minlength=tensor.n_centroids)
    entropy = metrics.entropy(counts)
    return _Use(int((counts > 0).sum()), entropy, entropy * tensor.assignments.numel())


def _write(writer: Writer, done: _Encoded) -> None:
    if done.tensor is not None and done.error is not None:
        writer.add_pq(done.record, done.tensor, done.decoded_hash, done.error)
    elif done.kept is not None:
        writer.add_kept(done.record, done.kept)
    else:
        writer.add_alias(done.record)


def _check_output(output: Path, force: bool, source: Path) -> None:
    """Refuse what cannot be written before any work is done."""
    if output.exists() and source.exists() and output.samefile(source):
        raise OutputError(f"'{output}' is the input itself; use -o to write elsewhere")
    check_target(output, force=force)


# --- decode ----------------------------------------------------------------------------------------------------------


def decode(
    file: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Rebuild the dense checkpoint: same keys, order, shapes and dtypes, kept tensors bit-identical.

    `output` says the format by its suffix (.safetensors, .pt and its kin, none for a folder); by default it is
    `STEM.decoded` with the source's suffix. `dtype` converts all floating tensors. Returns the path written.
    """
    if dtype is not None and dtype not in plans.QUANTIZABLE_DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of {', '.join(sorted(plans.QUANTIZABLE_DTYPES))}")
    with containers.open_container(file) as container:
        source = container.manifest.source
        target = Path(output) if output else _default_decoded(Path(file), source)
        format_ = _format_of(target) if output else source["format"]
        infos = [_converted(info, dtype) for info in container.infos]

        def read(name: str) -> torch.Tensor:
            tensor = container.decode(name)
            if dtype and tensor.is_floating_point():
                tensor = tensor.to(getattr(torch, dtype))
            if progress:
                progress(tensor.numel(), name)
            return tensor

        checkpoints.write(target, infos, read, source["skeleton"], format=format_, force=force)
        return target


def load(file: str | Path) -> dict[str, torch.Tensor]:
    """The dense tensors of a container by name; tied tensors share their memory."""
    with containers.open_container(file) as container:
        tensors: dict[str, torch.Tensor] = {}
        for record in container.records:
            tensors[record.name] = (
                tensors[record.alias_of] if record.alias_of in tensors else container.decode(record.name)
            )
        return tensors


def _default_decoded(file: Path, source: Mapping[str, Jsonable]) -> Path:
    name = file.name.removesuffix(containers.SUFFIX) if file.name.endswith(containers.SUFFIX) else file.stem
    return file.with_name(f"{name}.decoded{checkpoints.default_suffix(source['format'], source['skeleton'])}")


def _format_of(target: Path) -> str:
    suffix = target.suffix.lower()
    if target.is_dir() or not suffix:
        return "folder"
    if suffix == ".safetensors":
        return "safetensors"
    if suffix in {".pt", ".pth", ".th", ".bin", ".ckpt"}:
        return "pt"
    raise UsageError(
        f"{target}: unknown suffix {suffix!r}; use .safetensors, .pt, .pth, .th, .bin, .ckpt, or none for a folder"
    )


def _converted(info: TensorInfo, dtype: str | None) -> TensorInfo:
    floating = "float" in info.dtype
    return replace(info, dtype=dtype) if dtype and floating else info


# --- report, verify --------------------------------------------------------------------------------------------------


def report(file: str | Path, against: str | Path | None = None, *, progress: Progress | None = None) -> Report:
    """Size and error of every tensor of a container, as compression measured them; the entropy of its assignments.

    With `against`, the original checkpoint, every error is measured again from the two files, and that of int4.
    """
    with containers.open_container(file) as container:
        if against is None:
            tensors = tuple(_stored_report(container, record) for record in _shared_out(container))
        else:
            with checkpoints.open(against) as original:
                tensors = tuple(_measured_reports(container, original, progress))
        source = container.manifest.source
        return Report(
            source=str(against or ""),
            output=str(file),
            original_bytes=source["n_bytes"],
            compressed_bytes=Path(file).stat().st_size,
            tensors=tensors,
            dropped=tuple(f"{path} ({reason})" for path, reason in source["dropped"]),
            recipe=container.manifest.recipe,
            paper_bytes=_paper_bytes(container.records),
        )


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` found wrong: with which tensor, and what."""

    name: str
    problem: str


def verify(file: str | Path, against: str | Path | None = None, *, progress: Progress | None = None) -> list[Finding]:
    """What is wrong with a container; an empty list if nothing is.

    Checks its structure (raising ContainerError where it cannot even be opened) and the hash of every decoded tensor.
    With `against`, also that kept tensors are identical to the original's and that errors are as reported; training
    state that was left out on request is not missed (see `left_out`).
    """
    with containers.open_container(file) as container:
        if against is None:
            return [finding for record in container.records for finding in _check_hash(container, record, progress)]
        with checkpoints.open(against) as original:
            return list(_differences(container, original, progress))


def _check_hash(container: Container, record: Record, progress: Progress | None) -> Iterator[Finding]:
    if record.alias_of is None:
        try:
            tensor = container.decode(record.name, check=False)
        except ContainerError as error:
            yield Finding(record.name, str(error))
            return
        if not container.is_intact(record.name, tensor):
            yield Finding(record.name, "decodes to other bytes than were compressed")
        if progress:
            progress(tensor.numel(), record.name)


def _differences(container: Container, original: Checkpoint, progress: Progress | None) -> Iterator[Finding]:
    is_asked_for = container.manifest.recipe.get("model_only") is True
    known = {info.name: info for info in original.tensors if info.role == "model" or not is_asked_for}
    held = {record.name for record in container.records}
    for name in known:
        if name not in held:
            yield Finding(name, f"is in {original.path} but not in the container")
    for record in container.records:
        info = known.get(record.name)
        if info is None or (info.shape, info.dtype) != (record.shape, record.dtype):
            has = f"has {_describe(info)} there" if info else "is missing there"
            yield Finding(record.name, f"is {_describe(record.info)} in the container, and {has} ({original.path})")
            continue
        yield from _check_hash(container, record, progress)
        yield from _check_values(container, record, original)


def _check_values(container: Container, record: Record, original: Checkpoint) -> Iterator[Finding]:
    if record.alias_of is not None:
        return
    weight, decoded = original.read(record.name), container.decode(record.name, check=False)
    stored = container.error(record.name)
    if stored is None:
        if containers.tensor_hash(weight) != containers.tensor_hash(decoded):
            yield Finding(record.name, f"is kept, but differs from {original.path}")
        return
    measured = containers.StoredError.of(metrics.compare(weight, decoded))
    for key, value in asdict(stored).items():
        actual = getattr(measured, key)
        if abs(actual - value) > REPORTED_WITHIN * max(abs(actual), abs(value)) + SMALLEST_REPORTED:
            yield Finding(record.name, f"{key} is {actual:.6g} against {original.path}, and {value:.6g} as reported")


def left_out(file: str | Path) -> tuple[str, ...]:
    """The training state that compression was asked to leave out, entry by entry."""
    with containers.open_container(file) as container:
        if container.manifest.recipe.get("model_only") is not True:
            return ()
        dropped = container.manifest.source["dropped"]
        return tuple(f"{path} ({reason})" for path, reason in dropped if reason.startswith(checkpoints.LEFT_OUT))


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype} {'x'.join(map(str, info.shape)) or 'scalar'}"


def _shared_out(container: Container) -> list[Record]:
    return containers.with_kept_shares(container.records, container.kept_bytes)


def _stored_report(container: Container, record: Record) -> TensorReport:
    used = None
    if record.action == "pq":
        used = _use(container.pq_tensor(record.name))
    elif record.quantized:
        used = _Use(None, None, container.entropy(record.name))
    return _tensor_report(record, container.error(record.name), used)


def _measured_reports(container: Container, original: Checkpoint, progress: Progress | None) -> Iterator[TensorReport]:
    known = {info.name: info for info in original.tensors}
    for record in _shared_out(container):
        info = known.get(record.name)
        if info is None or info.shape != record.shape:
            raise CheckpointError(
                f"{original.path}: tensor {record.name!r} is {_describe(info) if info else 'missing'}, the container "
                f"has {_describe(record.info)}; give the checkpoint that was compressed"
            )
        if record.alias_of is not None or record.action == "keep":
            yield _stored_report(container, record)
        else:
            weight = original.read(record.name)
            error = metrics.compare(weight, container.decode(record.name))
            yield replace(
                _stored_report(container, record),
                int4_relative_mse=rtn.error(weight, INT4_GROUP).relative_mse,
                **_error_fields(containers.StoredError.of(error), record),
            )
        if progress:
            progress(record.info.numel, record.name)


def _tensor_report(record: Record, error: containers.StoredError | None, used: _Use | None) -> TensorReport:
    info = record.info
    payload = record.payload_bytes
    schemes = {
        "pq": f"PQ {record.block_size}x{record.n_centroids}",
        "ecpq": "PQ, coded",
        "trellis": "trellis",
        "keep": "kept",
        "alias": f"alias of {record.alias_of}",
    }
    return TensorReport(
        name=record.name,
        shape=record.shape,
        dtype=record.dtype,
        action="pq" if record.action == "ecpq" else record.action,
        reason=record.reason,
        scheme=schemes[record.action],
        block_size=record.block_size,
        n_centroids=record.n_centroids,
        n_weights=info.numel,
        original_bytes=0 if record.alias_of else info.n_bytes,
        bytes=payload,
        bits_per_weight=8 * payload / info.numel if info.numel and record.action != "alias" else None,
        centroids_used=used.centroids if used else None,
        assignment_entropy=used.entropy if used else None,
        assignment_bytes=record.assignment_bytes if used else None,
        entropy_bytes=math.ceil(used.entropy_bits / 8) if used else None,
        alias_of=record.alias_of,
        kind=record.kind,
        **(_error_fields(error, record) if error else {}),
    )


def _error_fields(error: containers.StoredError, record: Record) -> dict[str, Any]:
    return {
        "relative_mse": error.relative_mse,
        "cosine": error.cosine,
        "max_abs_error": error.max_abs_error,
        "energy": error.rms**2 * record.info.numel,
    }


def _paper_bytes(records: Sequence[Record]) -> int | None:
    """The papers' size; None where something is coded in a way that they do not count."""
    if any(record.quantized and record.action != "pq" for record in records):
        return None
    return paper_bytes(
        (
            record.name,
            record.info.numel,
            (record.n_vectors, record.n_centroids or 1, record.block_size or 1) if record.action == "pq" else None,
        )
        for record in records
        if record.action != "alias" and record.role == "model"
    )


def inspect(file: str | Path, names: Sequence[str] | None = None) -> dict[str, Jsonable]:
    """What a container says of itself: version, features, source, recipe, and the records of `names` or of all."""
    with containers.open_container(file) as container:
        records = [container.record(name) for name in names] if names else container.records
        source = container.manifest.source
        return {
            "file": str(file),
            "file_bytes": Path(file).stat().st_size,
            "version": container.manifest.version,
            "features": list(container.manifest.features),
            "source": {key: source[key] for key in ("format", "n_bytes", "dropped")},
            "recipe": container.manifest.recipe,
            "tensors": [{**asdict(record), "bytes": record.payload_bytes} for record in records],
        }


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Write a text file whole or not at all."""
    with atomic_writer(path, force=force) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def weights_to_compress(source: str | Path, recipe: Recipe | None = None) -> int:
    """Weights that compressing `source` has to read: the unit of work of `compress`."""
    with _opened(source, recipe or Recipe()) as checkpoint:
        return sum(info.numel for info in checkpoint.tensors if info.alias_of is None)


def n_weights(file: str | Path) -> int:
    """Weights that decoding `file` has to rebuild: the unit of work of `decode`, `report --against` and `verify`."""
    with containers.open_container(file) as container:
        return sum(record.info.numel for record in container.records if record.alias_of is None)


__all__ = ["Finding", "Preview", "compress", "decode", "load", "preview", "report", "save", "verify"]
