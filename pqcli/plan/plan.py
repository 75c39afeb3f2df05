"""`Plan`: what a recipe means for one checkpoint, as data, before any weight is read.

`make` gives every tensor an action, a reason that a person understands, and its size in the compressed file:

- `pq`: cut into blocks and quantized, with a `Scheme`;
- `keep`: stored bit-exact;
- `alias`: shares its memory with an earlier tensor, and costs nothing. The earlier one answers to both names: excluding
  either keeps it.

A tensor is quantized when it is a float64, float32, float16 or bfloat16 weight of two to five dimensions that belongs
to the model, is wished for, and gets smaller. `n_centroids` is clamped per tensor: to its number of vectors (every
vector its own centroid), and so that codebook plus assignments stay below the dense size.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pqcli.errors import RecipeError
from pqcli.recipe.recipe import Recipe, Rule, matches
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.kinds import auto_block_size, belongs, kind_of, rows_and_columns

QUANTIZABLE_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
LEAST_CODED = 64
"""Tensors of fewer weights gain nothing from a codec for whole checkpoints."""
MANY_PER_CENTROID = 1024
"""A tensor with more blocks per centroid than this starts on a smaller share of them."""
FEWEST_PER_CENTROID = 32
"""Blocks per centroid in the smallest sample: on fewer, centroids fit the sample and not the tensor."""
LEAST_SAMPLED_BLOCK = 4
"""Shorter blocks are never sampled: at block size 2 rare large weights make most of the error (4.5 % more of it)."""
_FEW = ((1 / 8, 5), (1 / 4, 5), (1 / 2, 5))
_MANY = ((1 / 32, 6), (1 / 8, 6), (1 / 4, 5))
_OF_ITERATIONS = 20
"""Shares of the blocks, and how many of 20 iterations run on them; the rest runs on all blocks. Measured: the relative
MSE of MiniLM is within 0.2 % of training on all blocks all the time (256 centroids, block sizes 4 and 8)."""
BOOKKEEPING_BYTES = 200
"""About what a quantized tensor costs beside its payload: headers and its record in the manifest."""

_CODEBOOK_DTYPES = {"fp16": "float16", "fp32": "float32"}
_CODEBOOK_ITEM_BYTES = {"float16": 2, "float32": 4}
_UNCOUNTED_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized; `codebook_dtype` is torch's name ("float16", "float32").

    `sample` is the number of blocks that EM trains on, None for all of them. `stages` are (blocks, iterations) that EM
    begins with, on ever larger samples.
    """

    block_size: int
    n_centroids: int
    n_iter: int
    codebook_dtype: str
    sample: int | None = None
    stages: tuple[tuple[int, int], ...] = ()

    def payload_bytes(self, n_vectors: int) -> int:
        """Bytes of the codebook plus the bit-packed assignments of `n_vectors` vectors."""
        codebook = self.n_centroids * self.block_size * _CODEBOOK_ITEM_BYTES[self.codebook_dtype]
        return codebook + -(-n_vectors * (self.n_centroids - 1).bit_length() // 8)


@dataclass(frozen=True)
class PlanEntry:
    """One tensor's fate: `action` is "keep", "alias", or what files call the codec that takes it.

    `rows` and `columns` are its layout; `predicted_bytes` counts its payload alone.
    """

    info: TensorInfo
    kind: str
    action: str
    reason: str
    scheme: Scheme | None
    rows: int
    columns: int
    predicted_bytes: int

    @property
    def n_vectors(self) -> int:
        """Number of blocks the tensor is cut into; 0 unless it is quantized."""
        return 0 if self.scheme is None else self.rows * -(-self.columns // self.scheme.block_size)


@dataclass(frozen=True)
class Plan:
    """An entry per tensor, in the checkpoint's order."""

    entries: tuple[PlanEntry, ...]
    recipe: Recipe

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries whose action is `pq`."""
        return tuple(entry for entry in self.entries if entry.action == "pq")

    @property
    def predicted_bytes(self) -> int:
        """Payload of the whole file: codebooks, packed assignments, kept tensors."""
        return sum(entry.predicted_bytes for entry in self.entries)


def make(recipe: Recipe, tensors: Sequence[TensorInfo]) -> Plan:
    """The plan of a recipe for these tensors; it may well keep everything.

    Raises `RecipeError` where a pattern, or a rule that is not optional, applies to no tensor.
    """
    names = [info.name for info in tensors]
    rules = tuple((number, rule) for number, rule in enumerate(recipe.rules, start=1) if _holds(rule, names))
    _refuse_idle_patterns(recipe, names)
    _refuse_idle_rules(recipe, rules, tensors)
    tied: dict[str, list[str]] = {}
    for info in tensors:
        tied.setdefault(info.alias_of or info.name, []).append(info.name)
    return Plan(tuple(_entry(info, tied.get(info.name, []), recipe, rules) for info in tensors), recipe)


def paper_bytes(tensors: Iterable[tuple[str, int, tuple[int, int, int] | None]]) -> int:
    """The size that the kill-the-bits papers would state, in bytes (they divide by 2^20).

    Each tensor is (name, number of elements, (n_vectors, n_centroids, block_size) or None where it is kept). log2(k)
    bits per block and fp16 codebooks; everything else counts as fp32, except that running statistics of batch norm do
    not count at all. Tied tensors should be given once.
    """
    bits = 0
    for name, numel, coded in tensors:
        if coded is not None:
            n_vectors, n_centroids, block_size = coded
            bits += n_vectors * (n_centroids - 1).bit_length() + n_centroids * block_size * 16
        elif not name.endswith(_UNCOUNTED_BUFFERS):
            bits += numel * 32
    return -(-bits // 8)


def paper_items(plan: Plan) -> list[tuple[str, int, tuple[int, int, int] | None]]:
    """The model's tensors of a plan, as `paper_bytes` takes them."""
    return [
        (
            entry.info.name,
            entry.info.numel,
            None if entry.scheme is None else (entry.n_vectors, entry.scheme.n_centroids, entry.scheme.block_size),
        )
        for entry in plan.entries
        if entry.action != "alias" and entry.info.role == "model"
    ]


# ------------------------------------------------------------------------------------------------- one tensor

_NumberedRules = tuple[tuple[int, Rule], ...]


def _entry(info: TensorInfo, names: Sequence[str], recipe: Recipe, rules: _NumberedRules) -> PlanEntry:
    """The entry of one tensor, which answers to all the `names` that share its memory."""
    kind = kind_of(info)
    rows, columns = rows_and_columns(info)

    def entry(action: str, reason: str, scheme: Scheme | None, n_bytes: int) -> PlanEntry:
        return PlanEntry(info, kind, action, reason, scheme, rows, columns, n_bytes)

    if info.alias_of is not None:
        return entry("alias", f"shares its memory with {info.alias_of!r}", None, 0)
    number, rule = next(((number, rule) for number, rule in rules if _applies(rule, info, names)), (0, None))
    unfit = _why_unfit(info) or _why_unwanted(info, names, recipe, rule)
    because = f" ({rule.why})" if rule is not None and rule.why else ""
    if unfit is None and rule is not None and rule.action == "keep":
        unfit = f"rule {number} of {recipe.name}: keep{because}"
    if unfit is not None:
        return entry("keep", unfit, None, info.n_bytes)
    if recipe.whole_codec is not None:
        if info.numel < LEAST_CODED:
            return entry("keep", f"only {info.numel} weights: kept exactly", None, info.n_bytes)
        return entry(recipe.whole_codec, kind, None, info.n_bytes)
    scheme, notes = _scheme(info, recipe, rule)
    n_vectors = rows * -(-columns // scheme.block_size)
    predicted_bytes = scheme.payload_bytes(n_vectors)
    needed_bytes = predicted_bytes + BOOKKEEPING_BYTES
    if needed_bytes >= info.n_bytes:
        reason = f"would not get smaller: {needed_bytes:,} B as PQ with its bookkeeping, {info.n_bytes:,} B dense"
        return entry("keep", reason, None, info.n_bytes)
    origin = kind if rule is None else f"{kind}, rule {number} of {recipe.name}{because}"
    return entry("pq", "; ".join([origin, *notes]), scheme, predicted_bytes)


def _why_unfit(info: TensorInfo) -> str | None:
    """Why PQ cannot take this tensor, whatever the recipe says; None where it can."""
    if info.dtype not in QUANTIZABLE_DTYPES:
        return f"{info.dtype} is kept bit-exact"
    if info.numel == 0:
        return "empty: nothing to quantize"
    if not info.shape:
        return "a single number is kept exactly"
    if len(info.shape) == 1:
        return "1-D: norms and biases are kept exactly"
    kind = kind_of(info)
    if kind == "vector":
        return "a single vector: kept exactly, like norms and biases"
    return "more than 5 dimensions: PQ does not know their meaning" if kind == "other" else None


def _why_unwanted(info: TensorInfo, names: Sequence[str], recipe: Recipe, rule: Rule | None) -> str | None:
    """Why the recipe's patterns leave this tensor alone; None where they do not."""
    for pattern in recipe.exclude:
        for name in names:
            if matches(pattern, name):
                return f"excluded by {pattern!r}" + (f", as {name!r}" if name != info.name else "")
    included = [pattern for pattern in recipe.include if any(matches(pattern, name) for name in names)]
    if recipe.include and not included:
        return "not included"
    asked_by_name = any(pattern != "*" for pattern in included) or (
        rule is not None and rule.action == "pq" and rule.match != "*"
    )
    if info.role != "model" and not asked_by_name:
        return "belongs to the training run (optimizer state and the like), not to the model"
    return None


def _scheme(info: TensorInfo, recipe: Recipe, rule: Rule | None) -> tuple[Scheme, list[str]]:
    """The scheme for one tensor, and notes on what was fitted to its size."""
    rule = rule or Rule(action="pq")
    rows, columns = rows_and_columns(info)
    wanted = rule.block_size or recipe.block_size
    notes = []
    if wanted == "auto":
        block_size = auto_block_size(info)
        notes.append("automatic block_size")
    else:
        block_size = min(wanted, columns)
        if block_size < wanted:
            notes.append(f"block_size {wanted:,} -> {block_size:,}: a row has no more columns")
    if columns % block_size:
        notes.append(f"{columns:,} columns: the last block of each row is padded by {-columns % block_size:,}")
    scheme = Scheme(
        block_size,
        rule.n_centroids or recipe.n_centroids,
        rule.n_iter or recipe.n_iter,
        _CODEBOOK_DTYPES[rule.codebook_dtype or recipe.codebook_dtype],
    )
    n_vectors = rows * -(-columns // block_size)
    scheme = _clamped(scheme, n_vectors, info.n_bytes, recipe.clamp, notes)
    sample = _sample(recipe.sample, scheme.n_centroids, n_vectors)
    if sample is not None:
        notes.append(f"EM trained on {sample:,} of {n_vectors:,} blocks")
    stages = _stages(scheme, n_vectors) if recipe.sample == "auto" else ()
    if stages:
        notes.append(f"EM started on {stages[0][0]:,} of {n_vectors:,} blocks")
    return replace(scheme, sample=sample, stages=stages), notes


def _sample(wanted: int | Literal["auto", "all"], n_centroids: int, n_vectors: int) -> int | None:
    """Blocks to train on; None for all of them."""
    if wanted in {"all", "auto"}:
        return None
    n = max(int(wanted), n_centroids)
    return n if n < n_vectors else None


def _stages(scheme: Scheme, n_vectors: int) -> tuple[tuple[int, int], ...]:
    """What EM does on samples, as (blocks, iterations), before it takes all blocks."""
    if scheme.block_size < LEAST_SAMPLED_BLOCK:
        return ()
    shares = _MANY if n_vectors > MANY_PER_CENTROID * scheme.n_centroids else _FEW
    fewest = FEWEST_PER_CENTROID * scheme.n_centroids
    stages = [(max(int(share * n_vectors), fewest), n * scheme.n_iter // _OF_ITERATIONS) for share, n in shares]
    return tuple((n, n_iter) for n, n_iter in stages if n <= n_vectors // 2 and n_iter)


def _clamped(scheme: Scheme, n_vectors: int, dense_bytes: int, clamp: str, notes: list[str]) -> Scheme:
    """The scheme with `n_centroids` fitted to the tensor; adds the reason to `notes`."""

    def with_centroids(n_centroids: int) -> Scheme:
        return replace(scheme, n_centroids=n_centroids)

    limits: list[tuple[int, str]] = []
    if clamp == "quarter":
        limits.append(
            (_power_below(n_vectors / 4), f"the power of two strictly below a quarter of {n_vectors:,} vectors")
        )
    limits.append((n_vectors, f"there are only {n_vectors:,} vectors"))
    limit, why = min(limits, key=lambda item: item[0])
    n_centroids = min(scheme.n_centroids, limit)
    while n_centroids > 1 and with_centroids(n_centroids).payload_bytes(n_vectors) >= dense_bytes:
        n_centroids = _power_below(n_centroids)
        why = f"codebook plus assignments must stay below the dense {dense_bytes:,} B"
    if n_centroids < scheme.n_centroids:
        notes.append(f"n_centroids {scheme.n_centroids:,} -> {n_centroids:,}: {why}")
    return with_centroids(n_centroids)


def _power_below(bound: float) -> int:
    """The largest power of two strictly below `bound`; 1 where there is none."""
    power = 1
    while power * 2 < bound:
        power *= 2
    return power


# ------------------------------------------------------------------------------------------------- rules and patterns


def _holds(rule: Rule, names: Sequence[str]) -> bool:
    """Whether what the rule asks of the checkpoint as a whole is so."""
    if rule.if_present is not None and not any(matches(rule.if_present, name) for name in names):
        return False
    return rule.if_absent is None or not any(matches(rule.if_absent, name) for name in names)


def _applies(rule: Rule, info: TensorInfo, names: Sequence[str]) -> bool:
    if rule.kind is not None and not any(belongs(kind_of(info), wanted) for wanted in rule.kind.split(",")):
        return False
    if rule.columns is not None and rule.columns != rows_and_columns(info)[1]:
        return False
    return any(matches(rule.match, name) for name in names)


def _refuse_idle_patterns(recipe: Recipe, names: Sequence[str]) -> None:
    for flag, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise RecipeError(f"{flag} {_idle(pattern, names)}")


def _refuse_idle_rules(recipe: Recipe, rules: _NumberedRules, tensors: Sequence[TensorInfo]) -> None:
    names = [info.name for info in tensors]
    for number, rule in rules:
        if rule.optional or any(_applies(rule, info, [info.name]) for info in tensors):
            continue
        place = f"rule {number} of {recipe.name}: match"
        if not any(matches(rule.match, name) for name in names):
            raise RecipeError(f"{place} {_idle(rule.match, names)}")
        wanted = [f"kind {rule.kind}"] if rule.kind else []
        wanted += [f"{rule.columns:,} columns"] if rule.columns else []
        found = Counter(kind_of(info) for info in tensors if matches(rule.match, info.name))
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common(6))
        raise RecipeError(
            f"{place} {rule.match!r} finds no tensor of {' with '.join(wanted)} (it finds {kinds}); "
            "correct the rule, or add 'optional: true'"
        )


def _idle(pattern: str, names: Sequence[str]) -> str:
    """What to say about a pattern that matches nothing."""
    close = _names_like(pattern, names)
    hint = f"; close names: {', '.join(map(repr, close))}" if close else ""
    return f"{pattern!r} matches none of the {len(names):,} tensors{hint}; `pqcli plan SRC` lists all names"


def _names_like(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names with a stretch of dotted parts that resembles the pattern's longest literal piece."""
    pieces = re.split(r"[^\w.-]+", pattern.removeprefix("re:").replace("\\d+", "0").replace("\\", ""))
    literal = max(pieces, key=len).strip(".").lower()
    length = literal.count(".") + 1
    owners: dict[str, str] = {}
    for name in names:
        parts = name.lower().split(".")
        for start in range(max(len(parts) - length, 0) + 1):
            owners.setdefault(".".join(parts[start : start + length]), name)
    found = difflib.get_close_matches(literal, list(owners), n=3, cutoff=0.5)
    return list(dict.fromkeys(owners[stretch] for stretch in found))
