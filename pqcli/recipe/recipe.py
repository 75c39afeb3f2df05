r"""`Recipe`: what the user wishes to be done to a checkpoint, before any checkpoint is looked at.

A recipe is a handful of settings for every tensor, patterns that choose tensors, and ordered rules for those that want
something else; the first rule that applies to a tensor wins. `pqcli.plan` turns it into a decision per tensor.

    recipe = loading.load("kill-the-bits-small")    # a preset from configs/, or the path of a YAML file
    recipe = flags.override(recipe, n_centroids=512)    # the flags of the command line

A recipe that exists is valid: every field is checked when one is made, whether from YAML, flags, a manifest or Python.
The YAML vocabulary is the fields of the two dataclasses; `configs/default.yaml` shows it.

Each field says in its `setting` all that is known of it: default, check, help, and whether it is an option of the
command line. Options, checks and the reference in the docs are made from that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pqcli.codecs import registry
from pqcli.defaults import BASE_MEMORY_BYTES, IN_FLIGHT_BYTES, STATES_BELOW
from pqcli.errors import RecipeError
from pqcli.readable import size as size_of
from pqcli.recipe import notebook
from pqcli.recipe.checks import (
    EFFORTS,
    between,
    boolean,
    kinds,
    objective,
    pattern,
    patterns,
    positive,
    show,
    states,
    text,
    whole,
)
from pqcli.recipe.settings import (
    BUDGET,
    CODED,
    KNOWN,
    MAIN,
    PLAIN,
    TENSORS,
    check_fields,
    setting,
    settings_of,
    size,
)

QUALITIES = ("tiny", "small", "balanced", "high", "near-lossless")
STATES = ("keep", "drop", "8bit")
MAX_CENTROIDS = 65_536
"""Assignments are at most 16 bits wide."""

_PRECISION = "weights are coded as float32, whose own rounding is an error of about 150 dB"
_BLOCK_SIZE = whole(1, None, "auto")
_CENTROIDS = whole(1, MAX_CENTROIDS)


def codec_names() -> tuple[str, ...]:
    """The codecs that a recipe may name: the one place that checks, help and completion ask."""
    return registry.choosable()


def _states_told() -> str:
    """`2048 for fewer than 4 M weights, ..., else 256`."""
    below = ", ".join(f"{states} for fewer than {n / 1e6:.0f} million weights" for n, states in STATES_BELOW[:-1])
    return f"{below}, else {STATES_BELOW[-1][1]}"


def _codebook_dtypes() -> tuple[str, ...]:
    return ("fp16", "fp32")


def _rules(value: object) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Rule) for item in value):
        raise RecipeError(f"must be a tuple of Rule; got {show(value)}")
    return tuple(value)


@dataclass(frozen=True)
class Rule:
    """Settings for some of the tensors; a setting left at None comes from the recipe.

    All conditions must hold: `match` and `kind` (several may be given, separated by commas), the number of `columns`,
    and for the checkpoint as a whole that it has, or lacks, a tensor matching `if_present`, `if_absent`
    (`*conv3.weight` tells ResNet-50 from ResNet-18). `why` is shown as the reason. A rule that applies to no tensor is
    an error unless it is `optional`.
    """

    match: str = setting("*", check=pattern, metavar="PAT", help="Tensors whose name, or module's name, matches.")
    kind: str | None = setting(None, check=kinds, metavar="KIND,...", help="Tensors of one of these kinds.")
    columns: int | None = setting(None, check=whole(1), metavar="N", help="Tensors of so many columns.")
    if_present: str | None = setting(
        None, check=pattern, metavar="PAT", help="Only where the checkpoint has a tensor that matches."
    )
    if_absent: str | None = setting(
        None, check=pattern, metavar="PAT", help="Only where the checkpoint has no tensor that matches."
    )
    action: Literal["pq", "keep"] | None = setting(
        None,
        choices=lambda: ("pq", "keep"),
        metavar="pq|keep",
        help="Quantize these tensors, or keep them.",
    )
    block_size: int | Literal["auto"] | None = setting(
        None, check=_BLOCK_SIZE, metavar="N|auto", help="In place of the recipe's."
    )
    n_centroids: int | None = setting(None, check=_CENTROIDS, metavar="K", help="In place of the recipe's.")
    n_iter: int | None = setting(None, check=whole(1), metavar="I", help="In place of the recipe's.")
    codebook_dtype: Literal["fp16", "fp32"] | None = setting(
        None, choices=_codebook_dtypes, metavar="fp16|fp32", help="In place of the recipe's."
    )
    optional: bool = setting(False, check=boolean, metavar="true|false", help="May apply to no tensor at all.")
    why: str | None = setting(None, check=text, metavar="TEXT", help="The reason, shown in plans and reports.")

    def __repr__(self) -> str:
        return notebook.call_of(self)

    def __post_init__(self) -> None:
        check_fields(self)
        names = rule_settings()
        given = [name for name in names if getattr(self, name) is not None]
        if self.action is None and not given:
            raise RecipeError(f"it sets nothing; give it one of {', '.join(names)}, or an action (pq, keep)")
        if self.action == "keep" and given:
            raise RecipeError(f"{given[0]}: means nothing beside 'action: keep'")


@dataclass(frozen=True)
class Recipe:
    """The settings for a whole checkpoint; `pqcli.recipe.reference` lists them with their meaning.

    `clamp` bounds `n_centroids` by a tensor's size: "dense" keeps codebook plus assignments below the dense tensor,
    "quarter" moreover takes at most the largest power of two strictly below a quarter of the number of vectors, as the
    kill-the-bits papers do. At most one of `rate_weight`, `quality`, the three targets and the two bounds sets how much
    to spend (`spending`); without one, and with codec "pq", every tensor is quantized by itself as `block_size` and
    `n_centroids` say. `objective` 0 gives all weights one absolute error, 1 gives all tensors one relative error;
    `effort` is the number of states of the trellis. `sample` is the number of vectors EM trains on,
    `restarts` the number of starts that the best is taken of; `eps` is relative to the data.
    `include` and `exclude` choose tensors; with no `include` every tensor fit for it is quantized. `training_state`
    says what becomes of optimizer moments and the like (`state` is what that means), `model_only` is short for dropping
    it; `from_module` reads pickled modules as state dicts.
    """

    block_size: int | Literal["auto"] = setting(
        "auto", check=_BLOCK_SIZE, metavar="N|auto", panel=MAIN, place=1,
        help="Weights per block: a number, or auto (by the kind of layer).",
    )  # fmt: skip
    n_centroids: int = setting(
        256, check=_CENTROIDS, metavar="K", panel=PLAIN, help="Centroids per codebook, 1 to 65536."
    )
    n_iter: int = setting(20, check=whole(1), metavar="I", panel=PLAIN, help="Most EM iterations.")
    seed: int = setting(
        0, check=whole(0, 2**63 - 1), metavar="N", panel=PLAIN, place=1,
        help="Decides, with a tensor's name, its initial centroids; with shared codebooks, its random samples.",
    )  # fmt: skip
    codebook_dtype: Literal["fp16", "fp32"] = setting(
        "fp16", choices=_codebook_dtypes, metavar="fp16|fp32", panel=PLAIN,
        help="Dtype codebooks are stored in.",
    )  # fmt: skip
    clamp: Literal["dense", "quarter"] = setting(
        "dense", choices=lambda: ("dense", "quarter"), metavar="dense|quarter",
        help="Bound on the centroids of a small tensor: it must get smaller, or as in the kill-the-bits papers.",
    )  # fmt: skip
    codec: str = setting(
        registry.PLAIN, choices=codec_names, metavar="NAME", panel=MAIN,
        help="pq: codebooks, random access. trellis: the smallest file. auto: by tensor.",
    )  # fmt: skip
    objective: float = setting(
        0.25, check=objective, metavar="X", panel=CODED,
        help="Which error counts, from 0 (or mse: one error for all weights) to 1 (or relative: one for all tensors).",
    )  # fmt: skip
    effort: int | None = setting(
        None, check=states, metavar="N", panel=CODED,
        help=f"States of the trellis, a power of two from {EFFORTS[0]} to {EFFORTS[-1]}: more find less error. "
        f"Without it, {_states_told()}.",
    )  # fmt: skip
    stats: str | None = setting(
        None, check=text, parse=str, metavar="FILE", panel=KNOWN,
        help="Statistics of the layers' inputs: bits are spent where the network's output feels them.",
    )  # fmt: skip
    rate_weight: float | None = setting(
        None, check=positive, metavar="L", panel=BUDGET, place=1, spends=True,
        help="Price of a bit, in squares of the typical weight: 0.03 is about 2 bits.",
    )  # fmt: skip
    quality: str | None = setting(
        None, choices=lambda: QUALITIES, metavar="NAME", panel=MAIN, spends=True,
        help=f"A named point on the curve of size against error: {', '.join(QUALITIES)}.",
    )  # fmt: skip
    target_bytes: int | None = setting(
        None, check=whole(1), parse=size, metavar="SIZE", flag="--target-size", panel=MAIN, spends=True,
        help="Largest file, such as 6MB.",
    )  # fmt: skip
    target_ratio: float | None = setting(
        None, check=positive, metavar="R", panel=BUDGET, spends=True, help="Least ratio of original to file."
    )
    target_bits: float | None = setting(
        None, check=positive, metavar="B", panel=BUDGET, spends=True, help="Most bits per quantized weight."
    )
    max_relative_mse: float | None = setting(
        None,
        check=between(1e-15, math.inf, _PRECISION),
        metavar="X",
        panel=BUDGET,
        spends=True,
        help="Largest relative MSE of all weights.",
    )
    min_sqnr: float | None = setting(
        None,
        check=between(0, 150, _PRECISION),
        metavar="DB",
        panel=BUDGET,
        spends=True,
        help="Least signal to noise ratio in dB.",
    )
    sample: int | Literal["auto", "all"] = setting(
        "auto", check=whole(1, None, "auto", "all"), metavar="N|auto|all", panel=PLAIN,
        help="Blocks per tensor that EM trains on.",
    )  # fmt: skip
    restarts: int = setting(
        1, check=whole(1), metavar="N", panel=PLAIN, help="Starts of EM per tensor; the best one is kept."
    )
    max_memory: int | None = setting(
        None, check=whole(1), parse=size, metavar="SIZE", panel=PLAIN, place=1,
        help="Memory to stay within where a single tensor allows it: 4GB lets more tensors run side by side. "
        f"Without it, the largest tensor and about {size_of(BASE_MEMORY_BYTES + IN_FLIGHT_BYTES)}.",
    )  # fmt: skip
    training_state: Literal["keep", "drop", "8bit"] | None = setting(
        None, choices=lambda: STATES, metavar="keep|drop|8bit", panel=TENSORS,
        help="Optimizer moments and the like: keep them bit for bit (as without this), leave them out, or hold moments "
        "in eight bits a value.",
    )  # fmt: skip
    model_only: bool = setting(
        False, check=boolean, panel=TENSORS, metavar="true|false",
        help="Leave training state out of the result: short for --training-state drop.",
    )  # fmt: skip
    from_module: bool = setting(
        False, check=boolean, panel=TENSORS, metavar="true|false",
        help="Read a whole pickled model (nn.Module) as its state dict: as data, nothing is run.",
    )  # fmt: skip
    on_nonfinite: Literal["keep", "error"] = setting(
        "keep", choices=lambda: ("keep", "error"), metavar="keep|error", panel=TENSORS,
        help="Weights that hold NaN or infinity: keep them bit for bit, or stop.",
    )  # fmt: skip
    eps: float = setting(1e-6, check=positive, metavar="X", help="Noise that splits a centroid, relative to the data.")
    max_tentatives: int = setting(30, check=whole(1), metavar="N", help="Most passes at filling empty clusters.")
    include: tuple[str, ...] = setting(
        (), check=patterns, metavar="PAT", panel=TENSORS,
        help="Quantize only tensors that match (glob, or re:REGEX); repeatable.",
    )  # fmt: skip
    exclude: tuple[str, ...] = setting(
        (), check=patterns, metavar="PAT", panel=TENSORS, help="Keep tensors that match exactly; repeatable."
    )
    rules: tuple[Rule, ...] = setting((), check=_rules, metavar="LIST", help="Rules; the first that applies wins.")
    name: str = setting("flags", check=text, metavar="TEXT", help="What plans call the recipe; a file's name, if any.")
    description: str = setting("", check=text, metavar="TEXT", compare=False, help="What it is for, in a sentence.")

    def __repr__(self) -> str:
        return notebook.call_of(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.recipe_page(self)

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.spending) > 1:
            raise RecipeError(f"{' and '.join(self.spending)} exclude each other; give one")
        if self.model_only and self.training_state not in (None, "drop"):
            raise RecipeError(
                f"model_only means training_state drop, and training_state is {self.training_state}; give one of them"
            )

    @property
    def state(self) -> Literal["keep", "drop", "8bit"]:
        """What becomes of training state."""
        return "drop" if self.model_only else self.training_state or "keep"

    @property
    def whole_codec(self) -> str | None:
        """What files call the codec that takes all tensors together; None for plain PQ, which takes each by itself."""
        action = registry.chosen(self.codec, has_budget=bool(self.spending)).action
        return None if action == registry.PLAIN else action

    @property
    def spending(self) -> tuple[str, ...]:
        """Names of the settings given that say how much to spend; there is at most one."""
        return tuple(
            name for name, made in settings_of(type(self)).items() if made.spends and getattr(self, name) is not None
        )


def rule_settings() -> tuple[str, ...]:
    """The fields of a rule that stand in for a recipe's field of the same name."""
    return tuple(name for name in settings_of(Rule) if name in settings_of(Recipe))
