r"""`Recipe`: what the user wishes to be done to a checkpoint, before any checkpoint is looked at.

A recipe is a handful of settings for every tensor, patterns that choose tensors, and ordered rules for those that want
something else; the first rule that applies to a tensor wins. `pqcli.plan` turns it into a decision per tensor.

    recipe = load("kill-the-bits-small")            # a preset from configs/, or the path of a YAML file
    recipe = override(recipe, n_centroids=512)      # the flags of the command line

A recipe that exists is valid: every field is checked when one is made, whether from YAML, flags, a manifest or Python.
The YAML vocabulary is the fields of the two dataclasses; `configs/default.yaml` shows it.

Patterns are globs over the whole tensor name (`*` also crosses dots, case counts), or regular expressions that must
match all of it (`re:decoder\.fc[12]\.weight`). Either may name the module instead: `fc` finds `fc.weight`.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pqcli.codecs import registry
from pqcli.errors import RecipeError, UsageError
from pqcli.tensors.kinds import KINDS, is_kind

SPENDING = ("rate_weight", "quality", "target_bytes", "target_ratio", "target_bits", "max_relative_mse", "min_sqnr")
"""Settings that say how much to spend; a recipe has at most one of them."""
QUALITIES = ("tiny", "small", "balanced", "high", "near-lossless")
EFFORTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MAX_CENTROIDS = 65_536
"""Assignments are at most 16 bits wide."""


@dataclass(frozen=True)
class Rule:
    """Settings for some of the tensors; a setting left at None comes from the recipe.

    All conditions must hold: `match` and `kind` (several may be given, separated by commas), the number of `columns`,
    and for the checkpoint as a whole that it has, or lacks, a tensor matching `if_present`, `if_absent`
    (`*conv3.weight` tells ResNet-50 from ResNet-18). `why` is shown as the reason. A rule that applies to no tensor is
    an error unless it is `optional`.
    """

    match: str = "*"
    kind: str | None = None
    columns: int | None = None
    if_present: str | None = None
    if_absent: str | None = None
    action: Literal["pq", "keep"] | None = None
    block_size: int | Literal["auto"] | None = None
    n_centroids: int | None = None
    n_iter: int | None = None
    codebook_dtype: Literal["fp16", "fp32"] | None = None
    optional: bool = False
    why: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self, _RULE_CHECKS)
        settings = [name for name in _RULE_SETTINGS if getattr(self, name) is not None]
        if self.action is None and not settings:
            raise RecipeError(f"it sets nothing; give it one of {', '.join(_RULE_SETTINGS)}, or an action (pq, keep)")
        if self.action == "keep" and settings:
            raise RecipeError(f"{settings[0]}: means nothing beside 'action: keep'")


@dataclass(frozen=True)
class Recipe:
    """The settings for a whole checkpoint.

    `clamp` bounds `n_centroids` by a tensor's size: "dense" keeps codebook plus assignments below the dense tensor,
    "quarter" moreover takes at most the largest power of two strictly below a quarter of the number of vectors, as the
    kill-the-bits papers do. At most one of `rate_weight`, `quality`, the three targets and the two bounds sets how much
    to spend (`spending`); without one, and with codec "pq", every tensor is quantized by itself as `block_size` and
    `n_centroids` say. `objective` 0 gives all weights one absolute error, 1 gives all tensors one relative error;
    `effort` is the number of states of the trellis. `sample` is the number of vectors EM trains on,
    `restarts` the number of starts that the best is taken of; `eps` is relative to the data.
    `include` and `exclude` choose tensors; with no `include` every tensor fit for it is quantized. `model_only` leaves
    training state (optimizer moments and the like) out of the result.
    """

    block_size: int | Literal["auto"] = "auto"
    n_centroids: int = 256
    n_iter: int = 20
    seed: int = 0
    codebook_dtype: Literal["fp16", "fp32"] = "fp16"
    clamp: Literal["dense", "quarter"] = "dense"
    codec: str = registry.PLAIN
    objective: float = 0.25
    effort: int | None = None
    rate_weight: float | None = None
    quality: str | None = None
    target_bytes: int | None = None
    target_ratio: float | None = None
    target_bits: float | None = None
    max_relative_mse: float | None = None
    min_sqnr: float | None = None
    sample: int | Literal["auto", "all"] = "auto"
    restarts: int = 1
    max_memory: int | None = None
    model_only: bool = False
    eps: float = 1e-6
    max_tentatives: int = 30
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    name: str = "flags"
    description: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_fields(self, _RECIPE_CHECKS)
        if len(self.spending) > 1:
            raise RecipeError(f"{' and '.join(self.spending)} exclude each other; give one")

    @property
    def whole_codec(self) -> str | None:
        """What files call the codec that takes all tensors together; None for plain PQ, which takes each by itself."""
        action = registry.chosen(self.codec, has_budget=bool(self.spending)).action
        return None if action == registry.PLAIN else action

    @property
    def spending(self) -> tuple[str, ...]:
        """Names of the settings given that say how much to spend."""
        return tuple(name for name in SPENDING if getattr(self, name) is not None)


def load(source: str) -> Recipe:
    """The recipe of a preset's name, or of a YAML file's path (pqcli's own vocabulary, or fairseq's).

    A preset's name wins over a file of the same name; write `./default` to mean the file. Raises `RecipeError` that
    names the file and the key.
    """
    if source in preset_names():
        return _from_yaml(configs_folder() / f"{source}.yaml", source)
    path = Path(source)
    try:
        if path.is_file():
            return _from_yaml(path, path.name)
    except OSError as error:
        raise RecipeError(f"recipe {source!r}: {error.strerror or error}") from error
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise RecipeError(f"recipe {source!r}: {'is a folder' if path.is_dir() else 'no such file'}")
    raise RecipeError(
        f"no preset is called {source!r}, and no file either{close_names(source, preset_names())}; "
        f"presets: {', '.join(preset_names())}"
    )


def preset_names() -> tuple[str, ...]:
    """The presets that `load` knows by name, sorted."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.yaml")))


def configs_folder() -> Path:
    """The folder of the presets: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def override(recipe: Recipe, **flags: Any) -> Recipe:
    """The recipe with some fields replaced; a flag that is None, or an empty list of patterns, changes nothing.

    A flag is the last word: it also replaces what the recipe's rules say about its field. `include` and `exclude` add
    to the recipe's own patterns. Where a field takes a number or a word, the number may come as text. Raises
    `UsageError` that names the flag and the value.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name not in _RECIPE_CHECKS:
            raise UsageError(f"{flag}: a recipe has no such field{close_names(name, _RECIPE_CHECKS)}")
        try:
            changes[name] = _RECIPE_CHECKS[name](_from_text(value) if name in _NUMBER_OR_WORD else value)
        except RecipeError as error:
            raise UsageError(f"{flag}: {error}") from error
    for name in ("include", "exclude"):
        changes[name] = tuple(dict.fromkeys((*getattr(recipe, name), *changes.get(name, ()))))
    settings = {name: changes[name] for name in _RULE_SETTINGS if name in changes}
    rules = tuple(_with_settings(rule, settings) for rule in changes.pop("rules", recipe.rules))
    return replace(recipe, **changes, rules=rules)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """What differs from the default recipe, as plain data (no description); `from_json` gives the recipe back."""
    data = _differences(recipe)
    data.pop("description", None)
    data.pop("max_memory", None)  # where it ran is not what was done
    if recipe.rules:
        data["rules"] = [_differences(rule) for rule in recipe.rules]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def from_json(data: object) -> Recipe:
    """The recipe that `to_json` described; raises `RecipeError` that names the key."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of settings, not {_show(data)}")
    known = [item.name for item in fields(Recipe)]
    _refuse_unknown(data, known)
    settings = dict(data)
    if "rules" in settings:
        settings["rules"] = _rules_from(settings["rules"])
    return Recipe(**settings)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (glob or `re:`) means the tensor of this name, by its own name or by its module's."""
    expression = _compiled(pattern)
    return bool(expression.fullmatch(name) or expression.fullmatch(name.removesuffix(".weight")))


def close_names(name: str, options: Iterable[str]) -> str:
    """A question to append to an error message, such as ` (did you mean 'n_iter'?)`, or nothing."""
    found = difflib.get_close_matches(name.lower(), list(options), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


# ------------------------------------------------------------------------------------------------- from YAML


def _from_yaml(path: Path, name: str) -> Recipe:
    from pqcli.recipe import fairseq, strictyaml

    try:
        data = strictyaml.read(path)
        recipe = from_json(fairseq.translate(data) if fairseq.is_fairseq(data) else data)
    except RecipeError as error:
        raise RecipeError(f"recipe {str(path)!r}: {error}") from error
    return recipe if isinstance(data, dict) and "name" in data else replace(recipe, name=name)


def _rules_from(items: object) -> tuple[Rule, ...]:
    if not isinstance(items, list | tuple):
        raise RecipeError(f"rules: must be a list, each entry starting with a dash; got {_show(items)}")
    return tuple(_rule_from(number, item) for number, item in enumerate(items, start=1))


def _rule_from(number: int, item: object) -> Rule:
    if not isinstance(item, Mapping):
        raise RecipeError(
            f"rule {number}: must be a mapping, such as {{match: 'fc*', block_size: 4}}; got {_show(item)}"
        )
    try:
        _refuse_unknown(item, list(_RULE_CHECKS))
        return Rule(**item)
    except RecipeError as error:
        raise RecipeError(f"rule {number}: {error}") from error


def _refuse_unknown(data: Mapping[Any, Any], known: list[str]) -> None:
    for key in data:
        if not isinstance(key, str) or key not in known:
            raise RecipeError(f"{key}: no such key{close_names(str(key), known)}; known: {', '.join(known)}")


def _differences(item: Rule | Recipe) -> dict[str, Any]:
    pairs = ((entry.name, entry.default, getattr(item, entry.name)) for entry in fields(item))
    return {name: value for name, default, value in pairs if default is MISSING or value != default}


# ------------------------------------------------------------------------------------------------- from flags


_NUMBER_OR_WORD = ("block_size", "sample")


def _from_text(value: object) -> object:
    """A flag's text as the number it spells, where it spells one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,40}", value.strip()):
        return int(value)
    return value


def _with_settings(rule: Rule, settings: Mapping[str, Any]) -> Rule:
    """The rule with those settings replaced that it has an opinion on."""
    return replace(rule, **{name: value for name, value in settings.items() if getattr(rule, name) is not None})


# ------------------------------------------------------------------------------------------------- patterns


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile(fnmatch.translate(pattern))


# ------------------------------------------------------------------------------------------------- checks
# A check returns the value in the form the field keeps, or raises RecipeError with the bare fact.

_Check = Callable[[object], object]


def _check_fields(item: Rule | Recipe, checks: Mapping[str, _Check]) -> None:
    for entry in fields(item):
        value = getattr(item, entry.name)
        if value == entry.default and type(value) is type(entry.default):
            continue
        try:
            object.__setattr__(item, entry.name, checks[entry.name](value))
        except RecipeError as error:
            raise RecipeError(f"{entry.name}: {error}") from error


def _whole(low: int, high: int | None = None, *words: str) -> _Check:
    """A check for a whole number in a range, or one of some words instead."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high:,}"
    wanted = f"must be a whole number {bounds}" + "".join(f" or {word!r}" for word in words)

    def check(value: object) -> object:
        if value in words and isinstance(value, str):
            return value
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise RecipeError(f"{wanted}; got {_show(value)}")
        return value

    return check


def _positive(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise RecipeError(f"must be a number above 0, such as 1e-6; got {_show(value)}")
    return float(value)


def _objective(value: object) -> object:
    named = {"mse": 0.0, "relative": 1.0}
    found = named.get(value, value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        raise RecipeError(f"must be 'mse', 'relative', or a number from 0 (mse) to 1 (relative); got {_show(value)}")
    return float(found)


def _states(value: object) -> object:
    if isinstance(value, bool) or value not in EFFORTS:
        raise RecipeError(f"must be one of {', '.join(map(str, EFFORTS))} trellis states; got {_show(value)}")
    return value


def _choice(*options: str) -> _Check:
    def check(value: object) -> object:
        if not isinstance(value, str) or value not in options:
            close = close_names(value, options) if isinstance(value, str) else ""
            raise RecipeError(f"must be {' or '.join(map(repr, options))}; got {_show(value)}{close}")
        return value

    return check


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise RecipeError(f"must be text; got {_show(value)} (put quotes around it)")
    return value


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise RecipeError(f"must be true or false; got {_show(value)}")
    return value


def _pattern(value: object) -> object:
    _text(value)
    if not value:
        raise RecipeError("a pattern may not be empty; '*' matches every tensor")
    try:
        _compiled(str(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(f"{value!r} is no regular expression: {error}") from error
    return value


def _patterns(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RecipeError(f"must be a list of patterns; got {_show(value)}")
    return tuple(_pattern(item) for item in value)


def _kinds(value: object) -> object:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise RecipeError(f"must be a kind of tensor, such as linear, or a list of kinds; got {_show(value)}")
    names = [str(_text(item)).strip() for item in items]
    for name in names:
        if not is_kind(name):
            close = close_names(name, KINDS)
            raise RecipeError(f"there is no kind {name!r}{close}; kinds: {', '.join(KINDS)}, and other kernel sizes")
    return ",".join(names)


def _rules(value: object) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Rule) for item in value):
        raise RecipeError(f"must be a tuple of Rule; got {_show(value)}")
    return tuple(value)


def _show(value: object) -> str:
    """A value as the user wrote it, with its type where that is the point."""
    names = {bool: "the boolean", str: "the text", dict: "the mapping", list: "the list", type(None): "nothing"}
    if value is None:
        return "nothing"
    text = json.dumps(value, default=repr) if isinstance(value, bool | dict | list) else repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{names[type(value)]} {text}" if type(value) in names else text


_RULE_SETTINGS = ("block_size", "n_centroids", "n_iter", "codebook_dtype")
"""The fields of a rule that stand in for a recipe's field of the same name."""

_SETTING_CHECKS: dict[str, _Check] = {
    "block_size": _whole(1, None, "auto"),
    "n_centroids": _whole(1, MAX_CENTROIDS),
    "n_iter": _whole(1),
    "codebook_dtype": _choice("fp16", "fp32"),
}
_RULE_CHECKS: dict[str, _Check] = {
    "match": _pattern,
    "kind": _kinds,
    "columns": _whole(1),
    "if_present": _pattern,
    "if_absent": _pattern,
    "action": _choice("pq", "keep"),
    **_SETTING_CHECKS,
    "optional": _boolean,
    "why": _text,
}
_RECIPE_CHECKS: dict[str, _Check] = {
    **_SETTING_CHECKS,
    "seed": _whole(0, 2**63 - 1),
    "codec": lambda value: _choice(*registry.choosable())(value),
    "objective": _objective,
    "effort": _states,
    "rate_weight": _positive,
    "quality": _choice(*QUALITIES),
    "target_bytes": _whole(1),
    "target_ratio": _positive,
    "target_bits": _positive,
    "max_relative_mse": _positive,
    "min_sqnr": _positive,
    "clamp": _choice("dense", "quarter"),
    "sample": _whole(1, None, "auto", "all"),
    "restarts": _whole(1),
    "max_memory": _whole(1),
    "model_only": _boolean,
    "eps": _positive,
    "max_tentatives": _whole(1),
    "include": _patterns,
    "exclude": _patterns,
    "rules": _rules,
    "name": _text,
    "description": _text,
}
