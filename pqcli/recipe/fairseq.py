r"""fairseq's quantization YAML, told in pqcli's own vocabulary.

fairseq describes product quantization by layer *type*, with a lookup on one of the layer's features:

    n_centroids:
      Linear: {key: in_features, value: {"*": 256}}
    block_sizes:
      Linear: {key: fuzzy_name, value: {fc: 8, attn: 4}}       # the name contains fc: 8; contains attn: 4
      Conv2d: {key: kernel_size, value: {"(3, 3)": 9, "*": 4}}
    layers_to_quantize:
      - decoder\.layers\.\d+\.fc[12]                       # by module name; everything else is kept

`translate` turns that into the data of an ordinary recipe: for each pattern one rule per case, and a last rule that
keeps everything. A section that is missing takes fairseq's default. Three liberties are taken: patterns must match
the whole module name, so that `fc1` does not select `fc10`; doubled backslashes, which the file fairseq ships has in
plain text where they match nothing, are read as single ones; and the prefixes `model.`, `module.` that saving adds are
skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pqcli.errors import RecipeError

_SECTIONS = ("n_centroids", "block_sizes", "layers_to_quantize")
_KEYS = {
    "Linear": ("in_features", "fuzzy_name"),
    "Embedding": ("embedding_dim", "fuzzy_name"),
    "Conv2d": ("kernel_size", "fuzzy_name"),
}
_DEFAULTS: dict[str, Any] = {
    "n_centroids": {
        "Linear": {"key": "in_features", "value": {"*": 256}},
        "Embedding": {"key": "embedding_dim", "value": {"*": 256}},
    },
    "block_sizes": {
        "Linear": {"key": "fuzzy_name", "value": {"fc": 8, "attn": 4, "emb": 4}},
        "Embedding": {"key": "fuzzy_name", "value": {"emb": 8}},
    },
    "layers_to_quantize": [
        r"decoder\.layers\.\d+\.fc[12]",
        r"decoder\.embed_tokens\.embeddings\.[012]\.[01]",
        r"decoder\.layers\.\d+\.self_attn\.(k_proj|v_proj|q_proj|out_proj)",
    ],
}
_PREFIX = r"(?:(?:model|module|state_dict)\.)*"


@dataclass(frozen=True)
class _Case:
    """One entry of a `value` map: under these conditions, this number."""

    kind: str
    columns: int | None
    fuzzy: str | None
    number: int


def is_fairseq(data: object) -> bool:
    """Whether a YAML document is written in fairseq's vocabulary."""
    if not isinstance(data, Mapping):
        return False
    return "layers_to_quantize" in data or "block_sizes" in data or isinstance(data.get("n_centroids"), Mapping)


def translate(data: object) -> dict[str, Any]:
    """The same wishes as the plain data of a `Recipe`; raises `RecipeError` that names the key."""
    if not isinstance(data, Mapping):
        raise RecipeError("a recipe is a mapping of settings")
    for key in data:
        if key not in _SECTIONS:
            raise RecipeError(f"{key}: no such key in fairseq's vocabulary; known: {', '.join(_SECTIONS)}")
    sections = {name: data.get(name, _DEFAULTS[name]) for name in _SECTIONS}
    blocks = _cases_by_type("block_sizes", sections["block_sizes"])
    centroids = _cases_by_type("n_centroids", sections["n_centroids"])
    patterns = list(_patterns(sections["layers_to_quantize"]))
    if not patterns:
        raise RecipeError("layers_to_quantize: lists no layer")
    rules = [rule for pattern in patterns for rule in _rules_for(pattern, blocks, centroids)]
    rules.append({"action": "keep", "optional": True, "why": "not listed in layers_to_quantize"})
    return {"rules": rules}


def _rules_for(
    pattern: str, blocks: Mapping[str, list[_Case]], centroids: Mapping[str, list[_Case]]
) -> Iterator[dict[str, Any]]:
    """The rules for one of the layers_to_quantize; the last of them is an error where the pattern finds nothing.

    Within a map fairseq takes the first entry that fits, and "*" only when none does. Pairs in lexical order, under
    "first match wins", do the same for both maps at once.
    """
    for layer_type, block_cases in blocks.items():
        for block in block_cases:
            for centroid in centroids.get(layer_type, ()):
                rule = _rule(pattern, block, centroid)
                if rule is not None:
                    yield rule
    why = "in layers_to_quantize, but block_sizes or n_centroids has no entry that fits"
    yield {"match": f"re:{_PREFIX}(?:{pattern})", "action": "keep", "why": why}


def _rule(pattern: str, block: _Case, centroid: _Case) -> dict[str, Any] | None:
    """The rule for two cases that hold at once; None where they exclude each other."""
    kinds = {block.kind, centroid.kind}
    if len(kinds) == 2:
        kinds.discard("conv")  # any convolution and this convolution: this one
    columns = {case.columns for case in (block, centroid)} - {None}
    if len(kinds) != 1 or len(columns) > 1:
        return None
    fuzzy = "".join(f"(?=.*{re.escape(case.fuzzy)})" for case in (block, centroid) if case.fuzzy is not None)
    return {
        "match": f"re:{fuzzy}{_PREFIX}(?:{pattern})",
        "kind": kinds.pop(),
        **({"columns": columns.pop()} if columns else {}),
        "action": "pq",
        "block_size": block.number,
        "n_centroids": centroid.number,
        "optional": True,
        "why": "listed in layers_to_quantize",
    }


def _cases_by_type(section: str, data: object) -> dict[str, list[_Case]]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{section}: must map layer types to {{key: ..., value: ...}}; got {data!r}")
    for layer_type, entry in data.items():
        where = f"{section}.{layer_type}"
        if layer_type not in _KEYS:
            raise RecipeError(f"{where}: no such layer type; known: {', '.join(_KEYS)}")
        if not isinstance(entry, Mapping) or set(entry) != {"key", "value"}:
            raise RecipeError(f"{where}: must have a key and a value, such as {{key: fuzzy_name, value: {{fc: 8}}}}")
        if entry["key"] not in _KEYS[layer_type]:
            raise RecipeError(f"{where}.key: must be one of {', '.join(_KEYS[layer_type])}; got {entry['key']!r}")
        if not isinstance(entry["value"], Mapping) or not entry["value"]:
            raise RecipeError(
                f'{where}.value: must map features to numbers, such as {{"*": 8}}; got {entry["value"]!r}'
            )
    return {
        layer_type: [
            case
            for feature, number in sorted(entry["value"].items(), key=lambda item: item[0] == "*")
            for case in _cases(f"{section}.{layer_type}.value", layer_type, entry["key"], str(feature), number)
        ]
        for layer_type, entry in data.items()
    }


def _cases(where: str, layer_type: str, key: str, feature: str, number: object) -> Iterator[_Case]:
    """The cases for one entry: one, except that a kernel size means depthwise convolutions as well."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise RecipeError(f"{where}[{feature}]: must be a whole number of at least 1; got {number!r}")
    kind = {"Linear": "linear", "Embedding": "embedding", "Conv2d": "conv"}[layer_type]
    if feature == "*":
        yield _Case(kind, None, None, number)
    elif key == "fuzzy_name":
        yield _Case(kind, None, feature, number)
    elif key == "kernel_size":
        sizes = re.fullmatch(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?", feature)
        if sizes is None or "0" in sizes.groups():
            raise RecipeError(f'{where}[{feature}]: must be a kernel size such as "(3, 3)", or "*"')
        kernel = [int(size) for size in sizes.groups()]
        yield _Case("conv" + "x".join(map(str, kernel)), None, None, number)
        yield _Case("depthwise", prod(kernel), None, number)
    elif feature.isdecimal() and int(feature) > 0:
        yield _Case(kind, int(feature), None, number)
    else:
        raise RecipeError(f'{where}[{feature}]: must be a number of features such as 512, or "*"')


def _patterns(data: object) -> Iterator[str]:
    """The regular expressions in a list, or in a list of lists (fairseq's stages), without doubled backslashes."""
    if isinstance(data, str):
        repaired = data.replace("\\\\", "\\")
        try:
            re.compile(repaired)
        except re.error as error:
            raise RecipeError(f"layers_to_quantize: {data!r} is no regular expression: {error}") from error
        yield repaired
    elif isinstance(data, list):
        for item in data:
            yield from _patterns(item)
    else:
        raise RecipeError(f"layers_to_quantize: must be a list of regular expressions; got {data!r}")
