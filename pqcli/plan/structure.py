"""What a network reads as structure and not as weights: told by names and by siblings, before a value is read.

An error in a weight is one among many, and they average out. An error in a group's scale is one in every weight of the
group; a mask that is not quite zero lets through what it should hide; a table of positions is a formula's result. They
are small beside the weights, so they are kept. Siblings are the tensors of one module:

    scales     beside integer or fp8 codes: GPTQ, AWQ, MLX, compressed-tensors, bitsandbytes, HQQ, torchao, quanto,
               fp8 with scales; also codebooks and zero points, and whatever else such a module holds in floats
    biases     by name, or as the `b` beside a `w` of one more dimension: (E, n) for E experts
    norms      by the module's name: (L, n) where layers or experts are stacked
    masks      by name
    tables     of positions, frequencies, anchors, filters: by name
    views      of memory that other tensors share in part: coded apart, they would disagree afterwards
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from pqcli.recipe.patterns import matches
from pqcli.tensors.info import TensorInfo

CODE_DTYPES: Final = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32"})
"""Dtypes that codes of weights are packed into; int64 is for indices and counters."""
LEAST_CODES: Final = 64
"""Fewer integers than this are no weights: a version, a shape, a set of flags."""

_NO_CODES = re.compile(r"(^|[._])(ids?|idxs?|index|indexes|position|positions|step|steps|shape|offsets?|mask|perm)$")
"""Last parts of integer tensors that are no codes."""
_SCALE = re.compile(
    r"(^|[._])(w|weight|input|output|act|k|v|q)?_?"
    r"(scales?|scale_inv|scales_inv|scaling_factor|absmax|quant_map|qzeros?|zeros|zero_points?|scale_and_zero|"
    r"scales_and_zeros|codebooks?|amax)(_?\d+)?$",
    re.IGNORECASE,
)
"""Last parts that mean scales and zero points wherever they stand."""
_BIAS = re.compile(r"(^|[._])bias(es)?(_?\d+)?$|(^|_)bias_[a-z]{1,2}(_l\d+(_reverse)?)?$|_bias_[uv]$", re.IGNORECASE)
_SHORT_BIAS = re.compile(r"(^|_)(b|bias)(?=_|\d|$)", re.IGNORECASE)
"""The `b` of `b1`, `fc1_b`, `b_in`, `bias_hh`; beside it stands the same with `w` or `weight`."""
_MASK = re.compile(
    r"(^|[._])((causal|attn|attention|future|padding|weight|src|tgt|triu|tril)_?)*"
    r"(masks?|mask_cache|masked_bias|tril|triu|causal)$",
    re.IGNORECASE,
)
_TABLE = re.compile(
    r"(^|[._])(inv_freq\w*|freqs?|freqs_(cis|cos|sin)|(cos|sin)(_?(cached?|table))?|cos_sin_cache|"
    r"relative_position_index|relative_coords(_table)?|position_ids|token_type_ids|pe|anchors?|anchor_(grid|points)|"
    r"strides?|mel_(basis|filters|fb)|fbank|fb|running_(mean|var)|"
    r"alphas_cumprod|betas|sigmas)$",
    re.IGNORECASE,
)
_NORM_WORD = re.compile(r"(^|_)(ln|bn|gn)(_?\d+|_[a-z])?$|norms?(_?\d+|_[a-z])?$", re.IGNORECASE)
"""The name of a module that normalises: its last word says so."""
_NORM_LEAF = re.compile(r"(^|_)(weight|scale|gamma|beta|gain|g|w)$", re.IGNORECASE)
_GAIN = re.compile(r"(^|[._])(gamma|beta|layer_?scale(_?\d+)?|ls\d+)$", re.IGNORECASE)
_LOW_RANK = re.compile(r"(^|_)lora(_|$)", re.IGNORECASE)


def structure_of(tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """Why a tensor is structure, by name, for those that are.

    Asked of floats of two and more dimensions: the rest is kept anyway.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors:
        module, leaf = _split(info.name)
        modules.setdefault(module, {})[leaf] = info
    by_name = {info.name: info for info in tensors}
    found = {info.name: _why(info, modules, by_name) for info in tensors if len(info.shape) > 1}
    return {name: reason for name, reason in found.items() if reason}


def patterns_for(patterns: Iterable[str], tensors: Sequence[TensorInfo], structure: Collection[str]) -> list[str]:
    """Those of the patterns that mean structure: they find no other tensor that could be quantized.

    `*.attn.bias` asks for masks; `*.attn.*` finds weights too, and means them.
    """
    weights = [info.name for info in tensors if len(info.shape) > 1 and info.name not in structure]
    return [pattern for pattern in patterns if not any(matches(pattern, name) for name in weights)]


def _why(info: TensorInfo, modules: Mapping[str, Mapping[str, TensorInfo]], by_name: Mapping[str, TensorInfo]) -> str:
    """Why the tensor is structure; nothing where it is not."""
    if info.overlaps is not None:
        return f"shares some of its memory with {_other(info, by_name)!r}: kept exactly, so that they still agree"
    module, leaf = _split(info.name)
    siblings = modules[module]
    codes = _codes_beside(info, module, siblings, by_name)
    if codes is not None:
        return f"belongs to the quantized weight {codes.name!r} ({codes.dtype} codes): kept exactly, like the codes"
    return _why_by_name(info, module, leaf, siblings)


def _why_by_name(info: TensorInfo, module: str, leaf: str, siblings: Mapping[str, TensorInfo]) -> str:
    if _SCALE.search(leaf):
        return "scales or zero points, by its name: kept exactly"
    if _MASK.search(leaf):
        return "a mask, by its name: kept exactly"
    if _BIAS.search(leaf) or _is_short_bias(info, leaf, siblings):
        return "a bias, by its name: kept exactly"
    if _TABLE.search(leaf):
        return "a table that is computed, not learned, by its name: kept exactly"
    if _is_norm(module, leaf):
        return "a norm, by its name: kept exactly"
    return ""


def _split(name: str) -> tuple[str, str]:
    """The module, and what the tensor is called in it."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _other(info: TensorInfo, by_name: Mapping[str, TensorInfo]) -> str:
    """Another tensor of the group that shares memory."""
    others = (other.name for other in by_name.values() if other.overlaps == info.overlaps and other.name != info.name)
    return next(others, str(info.overlaps))


def _codes_beside(
    info: TensorInfo, module: str, siblings: Mapping[str, TensorInfo], by_name: Mapping[str, TensorInfo]
) -> TensorInfo | None:
    """The integer or fp8 codes in the tensor's module, or in whose place the module stands (`fc.weight.absmax`)."""
    if _LOW_RANK.search(_split(info.name)[1]):
        return None
    owner = by_name.get(module)
    if owner is not None and _are_codes(owner):
        return owner
    codes = [other for other in siblings.values() if other.name != info.name and _are_codes(other)]
    beside = [other for other in codes if module or _names_agree(info.name, other.name)]
    smaller = [other for other in beside if info.numel <= other.numel]
    return max(smaller, key=lambda other: other.numel, default=None)


def _are_codes(info: TensorInfo) -> bool:
    if info.dtype not in CODE_DTYPES and not info.dtype.startswith("float8"):
        return False
    return len(info.shape) > 1 and info.numel >= LEAST_CODES and not _NO_CODES.search(info.name)


def _names_agree(name: str, other: str) -> bool:
    """Whether two names without modules begin alike, or one says that it is scales."""
    return bool(_SCALE.search(name)) or name.startswith(other) or name.split("_")[0] == other.split("_")[0]


def _is_short_bias(info: TensorInfo, leaf: str, siblings: Mapping[str, TensorInfo]) -> bool:
    """Whether the tensor is called like a bias, beside a weight of one more dimension for as many experts."""
    for found in _SHORT_BIAS.finditer(leaf):
        word = found[2]
        for wanted in ("weight", "w", "W", "kernel"):
            if word.isupper() and wanted == "w":
                continue
            weight = siblings.get(leaf[: found.start(2)] + wanted + leaf[found.end(2) :])
            if weight is not None and len(weight.shape) == len(info.shape) + 1 and weight.shape[0] == info.shape[0]:
                return True
    return False


def _is_norm(module: str, leaf: str) -> bool:
    if _GAIN.search(leaf):
        return True
    if not _NORM_LEAF.search(leaf):
        return False
    words = leaf.rpartition("_")[0]
    return bool(_NORM_WORD.search(words or _split(module)[1]))
