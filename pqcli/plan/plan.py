"""`Plan`: what a recipe means for one checkpoint, as data, before any weight is read.

`make` gives every tensor an action, a reason that a person understands, and its size in the compressed file:

- `pq`: cut into blocks and quantized, with a `Scheme`;
- `keep`: stored bit-exact;
- `moments`: an optimizer's moments, in eight bits a value, where the recipe asks for that;
- `alias`: shares its memory with an earlier tensor, and costs nothing. The earlier one answers to both names: excluding
  either keeps it.

A tensor is quantized when it is a float64, float32, float16 or bfloat16 weight of two to five dimensions that belongs
to the model, is wished for, is no structure (`pqcli.plan.structure`: masks, scales, biases) unless it is asked for by
its own name, and gets smaller. `n_centroids` is clamped per tensor: to its number of vectors (every
vector its own centroid), and so that codebook plus assignments stay below the dense size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pqcli.core import moments
from pqcli.plan.matching import NumberedRules, applies, holds, refuse_idle_patterns, refuse_idle_rules
from pqcli.plan.scheme import Scheme, scheme_for
from pqcli.plan.structure import patterns_for, structure_of
from pqcli.readable import plural
from pqcli.recipe.patterns import matches
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.kinds import kind_of, rows_and_columns
from pqcli.tensors.moments import form_of
from pqcli.tensors.records import Moments

QUANTIZABLE_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
LEAST_CODED = 64
"""Tensors of fewer weights gain nothing from a codec for whole checkpoints."""
LEAST_MOMENTS = 1024
"""Fewer moments are kept as they are: to tell of their form would take a good part of what it saves."""
STATE_KEPT = f"training state, but no moments (of a known optimizer, at least {LEAST_MOMENTS:,}): kept exactly"
BOOKKEEPING_BYTES = 200
"""About what a quantized tensor costs beside its payload: headers and its record in the manifest."""


@dataclass(frozen=True)
class PlanEntry:
    """One tensor's fate: `action` is "keep", "moments", "alias", "base", or what files call the codec that takes it.

    `rows` and `columns` are its layout; `predicted_bytes` counts its payload alone. `difference` says that the codec
    takes what the tensor differs by from a base's. That, and "base", only weights tell (`pqcli.jobs.base`).
    """

    info: TensorInfo
    kind: str
    action: str
    reason: str
    scheme: Scheme | None
    rows: int
    columns: int
    predicted_bytes: int
    difference: bool = False

    @property
    def n_vectors(self) -> int:
        """Number of blocks the tensor is cut into; 0 unless it is quantized."""
        return 0 if self.scheme is None else self.rows * -(-self.columns // self.scheme.block_size)


@dataclass(frozen=True)
class Plan:
    """An entry per tensor, in the checkpoint's order."""

    entries: tuple[PlanEntry, ...]
    recipe: Recipe

    def __repr__(self) -> str:
        return f"<Plan: {len(self.quantized)} of {plural(len(self.entries), 'tensor')} to be quantized>"

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries whose action is `pq`."""
        return tuple(entry for entry in self.entries if entry.action == "pq")

    @property
    def predicted_bytes(self) -> int:
        """Payload of the whole file: codebooks, packed assignments, kept tensors."""
        return sum(entry.predicted_bytes for entry in self.entries)


def make(recipe: Recipe, tensors: Sequence[TensorInfo], others: Sequence[TensorInfo] = ()) -> Plan:
    """The plan of a recipe for these tensors; it may well keep everything.

    Raises `RecipeError` where a pattern, or a rule that is not optional, applies to no tensor, of these or of `others`.
    """
    names = [info.name for info in tensors]
    rules = tuple((number, rule) for number, rule in enumerate(recipe.rules, start=1) if holds(rule, names))
    refuse_idle_patterns(recipe, [*names, *(info.name for info in others)])
    refuse_idle_rules(recipe, rules, [*tensors, *others])
    tied: dict[str, list[str]] = {}
    for info in tensors:
        tied.setdefault(info.alias_of or info.name, []).append(info.name)
    structure = structure_of(tensors)
    wished = [*recipe.include, *(rule.match for _, rule in rules if rule.action == "pq")]
    asked_for = patterns_for(wished, tensors, structure)

    def entry(info: TensorInfo) -> PlanEntry:
        names = tied.get(info.name, [])
        is_asked_for = any(matches(pattern, name) for pattern in asked_for for name in names)
        return _entry(info, names, recipe, rules, _Structure(structure.get(info.name, ""), is_asked_for))

    return Plan(tuple(map(entry, tensors)), recipe)


@dataclass(frozen=True)
class _Structure:
    """Why a tensor is structure, if it is, and whether the recipe asks for it all the same."""

    why: str
    is_asked_for: bool

    @property
    def note(self) -> list[str]:
        """What a reason says of structure that is quantized."""
        return [f"asked for by name, although it looks like structure ({self.why})"] if self.why else []


def _entry(
    info: TensorInfo, names: Sequence[str], recipe: Recipe, rules: NumberedRules, structure: _Structure
) -> PlanEntry:
    """The entry of one tensor, which answers to all the `names` that share its memory."""
    kind = kind_of(info)
    rows, columns = rows_and_columns(info)

    def entry(action: str, reason: str, scheme: Scheme | None, n_bytes: int) -> PlanEntry:
        return PlanEntry(info, kind, action, reason, scheme, rows, columns, n_bytes)

    if info.alias_of is not None:
        return entry("alias", f"shares its memory with {info.alias_of!r}", None, 0)
    number, rule = next(((number, rule) for number, rule in rules if applies(rule, info, names)), (0, None))
    if recipe.state == "8bit" and info.role != "model" and not _is_chosen(names, recipe, rule):
        form = form_of(info)
        if form is not None and info.numel >= LEAST_MOMENTS and info.dtype in QUANTIZABLE_DTYPES:
            return entry(
                Moments.action, f"{form} moments of an optimizer, in eight bits", None, moments.n_bytes(info.numel)
            )
        return entry("keep", STATE_KEPT, None, info.n_bytes)
    unfit = _why_unfit(info) or _why_unwanted(info, names, recipe, rule)
    if unfit is None and structure.why and not structure.is_asked_for:
        unfit = structure.why
    because = f" ({rule.why})" if rule is not None and rule.why else ""
    if unfit is None and rule is not None and rule.action == "keep":
        unfit = f"rule {number} of {recipe.name}: keep{because}"
    if unfit is not None:
        return entry("keep", unfit, None, info.n_bytes)
    if recipe.whole_codec is not None:
        if info.numel < LEAST_CODED:
            return entry("keep", f"only {info.numel} weights: kept exactly", None, info.n_bytes)
        return entry(recipe.whole_codec, "; ".join([kind, *structure.note]), None, info.n_bytes)
    scheme, notes = scheme_for(info, recipe, rule)
    n_vectors = rows * -(-columns // scheme.block_size)
    predicted_bytes = scheme.payload_bytes(n_vectors)
    needed_bytes = predicted_bytes + BOOKKEEPING_BYTES
    if needed_bytes >= info.n_bytes:
        reason = f"would not get smaller: {needed_bytes:,} B as PQ with its bookkeeping, {info.n_bytes:,} B dense"
        return entry("keep", reason, None, info.n_bytes)
    origin = kind if rule is None else f"{kind}, rule {number} of {recipe.name}{because}"
    return entry("pq", "; ".join([origin, *structure.note, *notes]), scheme, predicted_bytes)


def _is_chosen(names: Sequence[str], recipe: Recipe, rule: Rule | None) -> bool:
    """Whether the recipe says by name what becomes of a tensor."""
    patterns = [pattern for pattern in (*recipe.include, *recipe.exclude) if pattern != "*"]
    return any(matches(pattern, name) for pattern in patterns for name in names) or (
        rule is not None and rule.match != "*"
    )


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
