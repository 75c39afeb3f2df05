"""The door: all that a file says of itself is checked here, once, before anything is decoded. After it, nobody asks.

In this order, so that nothing is believed too early and no step takes more memory than those before it allow:

    header     entries cover the data exactly                                  (`header`)
    manifest   inflated and parsed within limits, version and features known
    checksum   of header, manifest, hashes and figures
    schema     every field there, of its type, within bounds                   (`manifest`)
    records    every tensor can be what it is said to be, and in all they are not too much for the file
    entries    those that the records call for, of the right dtype and shape
    structure  what is packed in the checkpoint's skeleton stays within limits

Raises ContainerError, which names the tensor or the entry.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pqcli.codecs import difference, registry, zeros
from pqcli.container import checksum, files
from pqcli.container.checksum import CHECKSUM, DAMAGE, ENTROPIES, ERRORS, HASHES
from pqcli.container.entries import Entries
from pqcli.container.header import MANIFEST
from pqcli.container.layout import KEPT, SHARDS_FEATURE, entries_of, known_features, metadata_of
from pqcli.container.limits import DENSE_BYTES_PER_BYTE, TENSOR_BYTES, TEXT_SHARE, Limits, inflate, parse_json
from pqcli.container.manifest import KEPT_CODED, TRAINED, VERSION, Manifest, parse_manifest
from pqcli.core.digests import HASH_BYTES
from pqcli.core.moments import FORMS
from pqcli.core.pq import packing
from pqcli.errors import ContainerError, DamagedError
from pqcli.limits import OverLimitError, hint
from pqcli.stats.damage import Damage
from pqcli.tensors.info import ITEM_BYTES
from pqcli.tensors.records import Alias, Coded, Copy, Kept, Moments, Plain, Record, Same, StoredError

QUANTIZED_DTYPES: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_ROLES: Final = frozenset({"model", "other"})


@dataclass(frozen=True)
class Admitted:
    """What a file says of itself, checked: a hash per record, errors of the quantized; entropies and damage, if any."""

    manifest: Manifest
    index: dict[str, int]
    hashes: list[bytes]
    errors: dict[str, StoredError]
    entropies: dict[str, float]
    damages: dict[str, Damage]


def admit(entries: Entries, limits: Limits) -> Admitted:
    """What the file says of itself. Raises ContainerError where it cannot be so."""
    try:
        manifest = _manifest(entries, limits)
        index = {record.name: i for i, record in enumerate(manifest.tensors)}
        _check_shards(entries, manifest)
        _check_records(manifest, index)
        _check_expansion(manifest, sum(place.n_bytes for place in entries.header.entries.values()), limits)
        _check_entries(entries, manifest)
        _check_structure(manifest.source.skeleton, limits.json_bytes)
        return Admitted(manifest, index, *_figures(entries, manifest))
    except OverLimitError as error:
        raise DamagedError(f"{entries.path}: {error}") from None
    except ValueError as error:
        raise entries.damaged(str(error)) from None


# --- the manifest -----------------------------------------------------------------------------------------------------


def _manifest(entries: Entries, limits: Limits) -> Manifest:
    _check_head_entries(entries)
    extra = TENSOR_BYTES * entries.place(HASHES).shape[0]
    try:
        text = inflate(entries.read(MANIFEST), (limits.json_bytes + extra) // TEXT_SHARE)
        plain = parse_json(text, limits.json_bytes + extra)
        features, version = _needs(plain)
    except OverLimitError as error:
        raise OverLimitError(f"the manifest is {error}") from None
    except ValueError as error:
        raise ValueError(f"the manifest cannot be read ({error})") from None
    unknown = sorted(set(features) - known_features())
    if version != VERSION or unknown:
        what = f"features {', '.join(unknown)}" if unknown else f"format version {version}"
        raise ContainerError(f"{entries.path}: needs {what}, which this pqcli does not know; install a newer pqcli")
    if entries.header.metadata != metadata_of(features):
        raise ValueError("its header and its manifest do not name the same version and features")
    _check_head(entries, has_checksum=checksum.FEATURE in features)
    try:
        return parse_manifest(plain)
    except ValueError as error:
        raise ValueError(f"the manifest makes no sense: {error}") from None


def _check_head_entries(entries: Entries) -> None:
    """The entries that are looked at before the manifest can tell their shapes."""
    manifest, hashes, kept = (entries.place(key) for key in (MANIFEST, HASHES, KEPT))
    if (manifest.dtype, len(manifest.shape)) != ("uint8", 1):
        raise ValueError(f"entry {MANIFEST!r} is no row of bytes")
    if (kept.dtype, len(kept.shape)) != ("uint8", 1):
        raise ValueError(f"entry {KEPT!r} is no row of bytes")
    if hashes.dtype != "uint8" or len(hashes.shape) != 2 or not 1 <= hashes.shape[1] <= HASH_BYTES:
        raise ValueError(f"entry {HASHES!r} holds no hashes")


def _needs(plain: Any) -> tuple[list[str], int]:
    """The features and the version that a manifest names."""
    features, version = (plain.get("features"), plain.get("version")) if isinstance(plain, dict) else (None, None)
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise ValueError("it names no features")
    if type(version) is not int:
        raise ValueError("it names no version")
    return features, version


def _check_head(entries: Entries, *, has_checksum: bool) -> None:
    if not has_checksum:
        return
    if entries.place(CHECKSUM).n_bytes != checksum.N_BYTES:
        raise ValueError(f"entry {CHECKSUM!r} has {entries.place(CHECKSUM).n_bytes} bytes, not {checksum.N_BYTES}")
    if entries.checksum_of_head() != entries.read(CHECKSUM, 0, checksum.PART_BYTES):
        raise ValueError("its header, manifest, hashes or errors are not those that were written (checksum)")


def _check_shards(entries: Entries, manifest: Manifest) -> None:
    """Check that there are as many files as it says, and that the others belong to the first."""
    if (manifest.shards is not None) != (SHARDS_FEATURE in manifest.features):
        raise ValueError("the manifest does not tell of several files as its features do")
    if entries.n_files != (manifest.shards or 1):
        raise ValueError(f"it lies in {manifest.shards or 1} files, and {entries.n_files} are named")
    entries.check_others()


# --- records ----------------------------------------------------------------------------------------------------------


def _check_records(manifest: Manifest, index: dict[str, int]) -> None:
    """Check what can be checked without reading payloads, so that decoding meets no surprise."""
    if len(index) != len(manifest.tensors):
        raise ValueError("the manifest names a tensor twice")
    if len(set(manifest.features)) != len(manifest.features):
        raise ValueError("the manifest names a feature twice")
    for record in manifest.tensors:
        problem = _problem(record, manifest) or _problem_of_reference(record, manifest.tensors, index)
        if problem:
            raise ValueError(f"the record of tensor {record.name!r} makes no sense: {problem}")
    if (manifest.files is not None) != (files.FEATURE in manifest.features):
        raise ValueError("the manifest does not describe the files inside")
    codecs = {record.action for record in manifest.tensors if isinstance(record.coding, Coded)}
    if codecs != ({manifest.coded.codec} if manifest.coded else set()):
        raise ValueError("the manifest does not describe its coded tensors")
    needs_base = any(record.needs_base for record in manifest.tensors)
    if len({manifest.base is not None, needs_base, difference.FEATURE in manifest.features}) > 1:
        raise ValueError("the manifest does not describe the base of its tensors")


def _problem(record: Record, manifest: Manifest) -> str:
    """What is wrong with a record; nothing if it can be true."""
    info, coding = record.info, record.coding
    if info.dtype not in ITEM_BYTES:
        return f"unknown dtype {info.dtype!r:.40}"
    if info.role not in _ROLES:
        return f"unknown role {info.role!r:.40}"
    is_of_weights = isinstance(coding, Plain | Coded)
    if record.zero_bytes is not None and (not is_of_weights or zeros.FEATURE not in manifest.features):
        return "zeros told of what is not quantized, or in a file without that feature"
    if record.difference and isinstance(coding, Alias | Copy | Same | Moments):
        return f"a difference of what is coded as {record.action!r}"
    if record.trained and not (TRAINED in manifest.features and isinstance(coding, Plain | Coded | Kept)):
        return f"trained what is coded as {record.action!r:.40}, or in a file without that feature"
    if record.trained and record.difference:
        return "a difference to a base that was trained since"
    if isinstance(coding, Alias | Same):
        return ""
    if isinstance(coding, Copy):
        return "" if Copy.action in manifest.features else "a copy in a file without that feature"
    if isinstance(coding, Moments):
        return _problem_of_moments(record, coding, manifest)
    if isinstance(coding, Kept):
        if record.difference and KEPT_CODED not in manifest.features:
            return "a kept difference in a file that codes nothing of what it keeps"
        is_coded_apart = KEPT_CODED in manifest.features and not record.is_bundled
        return "" if coding.n_bytes is None or is_coded_apart else "coded bytes of what is not coded by itself"
    return _problem_of_quantized(record, coding) or (
        "" if record.action in manifest.features else f"action {record.action!r:.40} is not among the features"
    )


def _problem_of_moments(record: Record, coding: Moments, manifest: Manifest) -> str:
    if Moments.action not in manifest.features:
        return "moments in a file without that feature"
    if record.info.dtype not in QUANTIZED_DTYPES:
        return f"moments of the dtype {record.info.dtype}"
    return "" if coding.form in FORMS else f"moments of the form {coding.form!r:.40}"


def _problem_of_quantized(record: Record, coding: Plain | Coded) -> str:
    info = record.info
    if info.dtype not in QUANTIZED_DTYPES or not info.shape:
        return f"{info.dtype} of {len(info.shape)} dimensions cannot be quantized"
    rows, columns = record.matrix_shape
    if rows * columns != info.numel:
        return f"{info.numel:,} elements in {rows:,} rows"
    if isinstance(coding, Plain):
        if not (1 <= coding.block_size <= max(columns, 1) and 1 <= coding.n_centroids <= 1 << packing.MAX_BITS):
            return f"{coding.n_centroids:,} centroids of {coding.block_size:,} for rows of {columns:,}"
        return "" if coding.codebook_dtype in {"float16", "float32"} else f"codebook of {coding.codebook_dtype!r:.40}"
    if coding.codec not in registry.with_streams():
        return f"unknown action {coding.codec!r:.40}"
    if coding.kernel < 1 or columns % coding.kernel:
        return f"{coding.kernel:,} kernel positions in rows of {columns:,}"
    return ""


def _problem_of_reference(record: Record, records: tuple[Record, ...], index: dict[str, int]) -> str:
    if not isinstance(record.coding, Alias | Copy):
        return ""
    is_alias = isinstance(record.coding, Alias)
    said = "tied to" if is_alias else "a copy of"
    target = index.get(record.coding.of)
    other = None if target is None else records[target]
    # an alias may be one of a copy; nothing else refers to what refers
    if other is None or isinstance(other.coding, Alias if is_alias else Alias | Copy):
        return f"it is {said} {record.coding.of!r:.80}, which is no tensor of its own"
    is_same = (other.info.shape, other.info.dtype) == (record.info.shape, record.info.dtype)
    return "" if is_same else f"it is {said} {record.coding.of!r:.80}, of another shape or dtype"


def _check_expansion(manifest: Manifest, n_bytes: int, limits: Limits) -> None:
    """No more dense bytes than a file of this size may hold: those of one centroid take no bytes at all.

    What needs a base is not counted: it is decoded only where the user's own has a tensor of that shape.
    """
    dense = sum(size for _, size in manifest.files.files) if manifest.files else 0
    most = limits.decoded_bytes + DENSE_BYTES_PER_BYTE * n_bytes
    for record in manifest.tensors:
        dense += 0 if isinstance(record.coding, Alias) or record.needs_base else record.info.n_bytes
        if dense > most:
            raise OverLimitError(
                f"tensor {record.name!r} brings what it holds to {dense:,} bytes, more than the {most:,} that are "
                f"allowed for {n_bytes:,} bytes of data; {hint('decoded_bytes')}"
            )


# --- entries ----------------------------------------------------------------------------------------------------------


def _check_entries(entries: Entries, manifest: Manifest) -> None:
    """Check that every entry is there with the dtype and shape that the manifest gives it."""
    bundle_bytes = entries.place(KEPT).shape[0] if KEPT_CODED in manifest.features else None
    hash_bytes = entries.place(HASHES).shape[1]
    manifest_bytes = entries.place(MANIFEST).n_bytes
    expected = entries_of(manifest, manifest_bytes, bundle_bytes, hash_bytes, has_entropies=ENTROPIES in entries)
    for entry in expected:
        place = entries.place(entry.key)
        if (place.dtype, place.shape) != (entry.dtype, entry.shape):
            raise ValueError(
                f"entry {entry.key!r} is {place.dtype} {list(place.shape)}, and its record calls for {entry.dtype} "
                f"{list(entry.shape)}"
            )
    foreign = entries.header.entries.keys() - {entry.key for entry in expected}
    if checksum.FEATURE in manifest.features and foreign:
        raise ValueError(f"no record calls for entry {min(foreign)!r}")


def _figures(
    entries: Entries, manifest: Manifest
) -> tuple[list[bytes], dict[str, StoredError], dict[str, float], dict[str, Damage]]:
    """Hashes, errors, entropies and damage."""
    told = entries.read(HASHES)
    width = entries.place(HASHES).shape[1]
    hashes = [bytes(told[i : i + width]) for i in range(0, len(told), width)]
    errors = {}
    quantized = [record.name for record in manifest.tensors if record.quantized]
    trained = {record.name for record in manifest.tensors if record.trained}
    for name, row in zip(quantized, _rows(entries, ERRORS), strict=True):
        if name in trained:
            if not all(math.isnan(value) for value in row):
                raise ValueError(f"the error of tensor {name!r} is stored as {row}, and it was trained since")
            continue
        errors[name] = StoredError(*row)
        if math.isnan(sum(row)) or min(row[0], row[1], row[3]) < 0 or abs(row[2]) > 1.001:
            raise ValueError(f"the error of tensor {name!r} is stored as {row}, which none can be")
    coded = [record.name for record in manifest.tensors if isinstance(record.coding, Coded)]
    entropies = dict(zip(coded, _rows(entries, ENTROPIES), strict=True)) if ENTROPIES in entries else {}
    for name, bits in entropies.items():
        if not (math.isfinite(bits) and bits >= 0):
            raise ValueError(f"tensor {name!r}: an entropy is no number of bits")
    predicted = _rows(entries, DAMAGE) if DAMAGE in entries else []
    damages = {name: _damage(name, *row) for name, row in zip(quantized, predicted, strict=False)}
    if any(damages.get(name) is not None for name in trained):
        raise ValueError("damage is told of a tensor that was trained since")
    return hashes, errors, entropies, {name: damage for name, damage in damages.items() if damage is not None}


def _rows(entries: Entries, key: str) -> Any:
    """The numbers of an entry, as nested lists."""
    return entries.array(key).astype(np.float64).tolist()


def _damage(name: str, output_mse: float, damage: float) -> Damage | None:
    """What was predicted for a tensor; None for nothing."""
    if any(math.isinf(number) or number < 0 for number in (output_mse, damage)):
        raise ValueError(f"the damage of tensor {name!r} is stored as {output_mse}, {damage}, which none can be")
    if math.isnan(output_mse):
        return None
    return Damage(output_mse, None if math.isnan(damage) else damage)


# --- the checkpoint's structure ---------------------------------------------------------------------------------------


def _check_structure(skeleton: dict[str, Any], most: int) -> None:
    """Inflate what is packed in the skeleton, all of it within one limit; it is inflated anew where it is used."""
    left = most
    waiting: list[Any] = [skeleton]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict) and node.get("$") == "packed":
            text = _packed(node.get("v"), left // TEXT_SHARE)
            waiting.append(parse_json(text, left))
            left -= TEXT_SHARE * len(text)
        elif isinstance(node, dict):
            waiting += node.values()


def _packed(found: Any, most: int) -> bytes:
    try:
        return inflate(base64.b64decode(found, validate=True), most)
    except OverLimitError as error:
        raise OverLimitError(f"a packed part of the checkpoint's structure is {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"a packed part of the checkpoint's structure cannot be read ({error})") from None
