"""`NAME.stats.safetensors`: sums in a plain safetensors file, with a manifest in its metadata.

Metadata: `format` = "pqcli-stats", `manifest` = JSON:

    {"version": 1, "sites": [{"columns", "form", "width", "counts"}], "aliases": {tied name: name},
     "weights": [{"name", "site", "axis", "n_gradient", "lookup_gradient", "n_lookup_gradient"}]}

Tensors of site K: `site.K.diagonal` (2, c) float64, sums of x^2 for each half; `site.K.total` (c,) float64, sum of x;
`site.K.watched` (2, s, s) float32; and the matrix S as correlations S_ij / sqrt(S_ii S_jj) in float16 or float32:
`site.K.full`, the strict lower triangle row by row, or `site.K.blocks` (n, w, w). Correlations lie within -1 ... 1, so
half precision costs 2^-12 of each. Of weight I: `weight.I.gradient` (outputs,) and `weight.I.lookups` (rows,), float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors
import torch

from pqcli.atomic import atomic_writer
from pqcli.errors import StatsError
from pqcli.stats.moments import Statistics
from pqcli.stats.sums import N_WATCHED, Outline, SiteSums, WeightSums

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FORMAT = "pqcli-stats"
VERSION = 1
_FORMS = ("full", "blocks", "diagonal")
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_MAX_COLUMNS = 1 << 24
_MAX_FULL = 1 << 15
"""Columns of the largest whole matrix that a file may hold: 4 GiB in memory."""


def save(statistics: Statistics, path: str | Path, *, dtype: str = "float16", force: bool = False) -> None:
    """Write statistics, one matrix in memory at a time; the file appears whole or not at all.

    `dtype` ("float16" or "float32") is that of the correlations. Raises `OutputError` where the file exists and `force`
    is off, and `StatsError` where nothing was seen.
    """
    if dtype not in _DTYPES:
        raise StatsError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if not statistics.weights:
        raise StatsError("nothing was seen: no layer of the model has run inside the block")
    used = sorted({w.site for w in statistics.weights.values() if w.site is not None})
    metadata = {"format": FORMAT, "manifest": json.dumps(_manifest(statistics, used))}
    with atomic_writer(Path(path), force=force) as file:
        _write(file, metadata, _PARTS * len(used) + 2 * len(statistics.weights), _tensors(statistics, used, dtype))


_PARTS = 4
"""Tensors of a site, at most."""
_ENTRY_BYTES = 160
"""A tensor's entry in the header, at most."""


def _write(file: BinaryIO, metadata: dict[str, str], most: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of tensors that come one at a time: its header is written last, into room that is left."""
    room = len(json.dumps({"__metadata__": metadata}).encode()) + _ENTRY_BYTES * most
    room += -room % 8
    file.seek(8 + room)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors:
        data = tensor.contiguous().numpy().tobytes()
        header[key] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(data)]
        }  # fmt: skip
        end += len(data)
        file.write(data)
    file.seek(0)
    file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))


def _manifest(statistics: Statistics, used: Sequence[int]) -> dict[str, Any]:
    place = {site: i for i, site in enumerate(used)}
    sites = []
    for site in used:
        about = statistics.outline(site)
        sites.append({"columns": about.columns, "form": about.form, "width": about.width, "counts": list(about.counts)})
    weights = [
        {
            "name": name,
            "site": None if weight.site is None else place[weight.site],
            "axis": weight.axis,
            "n_gradient": weight.n_gradient,
            "lookup_gradient": weight.lookup_gradient,
            "n_lookup_gradient": weight.n_lookup_gradient,
        }
        for name, weight in statistics.weights.items()
    ]
    aliases = {alias: name for alias, name in statistics.aliases.items() if name in statistics.weights}
    return {"version": VERSION, "sites": sites, "weights": weights, "aliases": aliases}


def _tensors(statistics: Statistics, used: Sequence[int], dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    for i, site in enumerate(used):
        for part, tensor in _packed(statistics.site(site), _DTYPES[dtype]).items():
            yield f"site.{i}.{part}", tensor
    for i, weight in enumerate(statistics.weights.values()):
        for part in ("gradient", "lookups"):
            tensor = getattr(weight, part)
            if tensor is not None:
                yield f"weight.{i}.{part}", tensor.double().cpu()


def n_bytes_of(statistics: Statistics, *, dtype: str = "float16") -> int:
    """About the size of the file that `save` would write: within the length of its header."""
    used = {weight.site for weight in statistics.weights.values() if weight.site is not None}
    sites = sum(site_bytes(statistics.outline(site), dtype=dtype) for site in used)
    return sites + sum(weight_bytes(weight) for weight in statistics.weights.values())


def site_bytes(about: Outline, *, dtype: str = "float16") -> int:
    """What a site with all its parts takes in a file."""
    n = about.columns
    values = {"full": n * (n - 1) // 2, "blocks": -(-n // about.width) * about.width**2, "diagonal": 0}[about.form]
    return values * _DTYPES[dtype].itemsize + 24 * n + 8 * min(n, N_WATCHED) ** 2


def weight_bytes(weight: WeightSums) -> int:
    """What a weight takes in a file beside its site."""
    return sum(8 * part.numel() for part in (weight.gradient, weight.lookups) if part is not None)


def open_stats(path: str | Path) -> Statistics:
    """Statistics of a file, checked as a stranger's; matrices are read (and checked) when they are asked for.

    Raises `StatsError` where the file is none, is damaged, or was written by a newer pqcli.
    """
    from pqcli.stats.imatrix import is_gguf, open_imatrix

    path = Path(path)
    if is_gguf(path):
        return open_imatrix(path)
    try:
        file = safetensors.safe_open(str(path), framework="pt", backend="pread")
    except FileNotFoundError:
        raise StatsError(f"{path}: there is no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise StatsError(f"{path}: not a statistics file ({error}); `pqcli calibrate` makes one") from None
    try:
        return _Reader(file).statistics()
    except StatsError as error:
        raise StatsError(f"{path}: {error}") from None


class _Reader:
    """An open file and its manifest."""

    def __init__(self, file: Any) -> None:
        self._file = file
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise StatsError("not a statistics file; `pqcli calibrate` makes one")
        try:
            self._manifest = json.loads(metadata.get("manifest", ""))
        except (ValueError, RecursionError):
            raise StatsError("its manifest is no JSON; the file is damaged") from None
        version = self._manifest.get("version") if isinstance(self._manifest, dict) else None
        if version != VERSION:
            raise StatsError(f"its version is {version}, this pqcli reads {VERSION}; update pqcli")
        self._names = set(file.keys())

    def statistics(self) -> Statistics:
        """Everything but the matrices."""
        sites, records, aliases = (self._manifest.get(key) for key in ("sites", "weights", "aliases"))
        _demand(isinstance(sites, list) and isinstance(records, list) and isinstance(aliases, dict), "its manifest")
        self._sites = sites
        for i, site in enumerate(sites):
            _check_site(i, site)
        weights: dict[str, WeightSums] = {}
        for i, record in enumerate(records):
            _demand(isinstance(record, dict) and isinstance(record.get("name"), str), f"weight {i}")
            _demand(record["name"] not in weights, f"weight {i} (its name occurs twice)")
            weights[record["name"]] = self._weight(i, record, len(sites))
        for alias, name in aliases.items():
            _demand(name in weights and alias not in weights, f"the tied name {alias!r}")
        return Statistics(weights, aliases, len(sites), self._site, self._outline)

    def _outline(self, i: int) -> Outline:
        site = self._sites[i]
        return Outline(
            site["columns"], site["form"], site["width"], (float(site["counts"][0]), float(site["counts"][1]))
        )

    def _weight(self, i: int, record: Mapping[str, Any], n_sites: int) -> WeightSums:
        where = f"weight {record['name']!r}"
        site, axis = record.get("site"), record.get("axis")
        _demand(site is None or (_is_count(site) and site < n_sites), where)
        _demand(axis in (1, 0, -1, -2) and not isinstance(axis, bool), where)
        numbers = [record.get(key) for key in ("n_gradient", "lookup_gradient", "n_lookup_gradient")]
        _demand(all(_is_amount(number) for number in numbers), where)
        parts: dict[str, torch.Tensor | None] = {}
        for part in ("gradient", "lookups"):
            key = f"weight.{i}.{part}"
            parts[part] = self._tensor(key, None, torch.float64) if key in self._names else None
            tensor = parts[part]
            _demand(tensor is None or (tensor.dim() == 1 and bool((tensor >= 0).all())), where)
        return WeightSums(site, int(axis or 0), parts["gradient"], numbers[0], parts["lookups"], *numbers[1:])  # type: ignore[arg-type]

    def _site(self, i: int) -> SiteSums:
        site = self._sites[i]
        columns, form, width = site["columns"], site["form"], site["width"]
        where = f"site {i}"
        diagonal = self._tensor(f"site.{i}.diagonal", (2, columns), torch.float64)
        _demand(bool((diagonal >= 0).all()), where)
        total = seen = second = None
        if f"site.{i}.total" in self._names:
            total = self._tensor(f"site.{i}.total", (columns,), torch.float64)
        if f"site.{i}.watched" in self._names:
            size = min(columns, N_WATCHED)
            seen = self._tensor(f"site.{i}.watched", (2, size, size), torch.float32)
            _demand(bool(torch.allclose(seen, seen.mT, rtol=1e-3, atol=1e-3 * float(seen.abs().max()))), where)
        if form != "diagonal":
            shape = (columns * (columns - 1) // 2,) if form == "full" else (-(-columns // width), width, width)
            stored = self._tensor(f"site.{i}.{form}", shape, torch.float16, torch.float32)
            _demand(not stored.numel() or bool(stored.abs().max() <= 1.01), f"{where} (a correlation beyond 1)")
            _demand(form == "full" or bool(torch.equal(stored, stored.mT)), f"{where} (a block is not symmetric)")
            second = _unpacked(stored, diagonal.sum(0), form, width)
        return SiteSums(columns, form, width, second, diagonal, total, seen, [float(n) for n in site["counts"]])

    def _tensor(self, key: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> torch.Tensor:
        if key not in self._names:
            raise StatsError(f"'{key}' is missing; the file is damaged")
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise StatsError(f"'{key}' cannot be read ({error}); the file is damaged") from None
        if tensor.dtype not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
            raise StatsError(
                f"'{key}' is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {shape}; the file is damaged"
            )
        if not bool(tensor.isfinite().all()):
            raise StatsError(f"'{key}' holds values that are not finite; the file is damaged")
        return tensor


def _check_site(i: int, site: Any) -> None:
    where = f"site {i}"
    _demand(isinstance(site, dict) and site.get("form") in _FORMS, where)
    columns, width, counts = site.get("columns"), site.get("width"), site.get("counts")
    _demand(_is_count(columns) and 0 < columns <= _MAX_COLUMNS, where)
    _demand(_is_count(width) and 0 < width <= _MAX_FULL, where)
    _demand(site["form"] != "full" or columns <= _MAX_FULL, where)
    _demand(isinstance(counts, list) and len(counts) == 2 and all(_is_amount(n) for n in counts), where)


def _packed(sums: SiteSums, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {"diagonal": sums.diagonal.double().cpu()}
    if sums.total is not None:
        tensors["total"] = sums.total.double().cpu()
    if sums.watched is not None:
        tensors["watched"] = sums.watched.float().cpu()
    if sums.second is not None:
        scale = _scale(tensors["diagonal"].sum(0), sums.form, sums.width)
        second = sums.second.float().cpu()
        inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-30), torch.zeros(())).float()
        second = second * inverse[..., :, None] * inverse[..., None, :]
        second = ((second + second.mT) / 2).clamp_(-1, 1).to(dtype)
        if sums.form == "full":
            n = sums.columns
            second = torch.cat([second[row, :row] for row in range(n)]) if n > 1 else second.new_zeros(0)
        tensors[sums.form] = second
    return {part: tensor.contiguous() for part, tensor in tensors.items()}


def _unpacked(stored: torch.Tensor, diagonal: torch.Tensor, form: str, width: int) -> torch.Tensor:
    scale = _scale(diagonal, form, width)
    if form == "full":
        n = len(diagonal)
        second = torch.zeros(n, n)
        start = 0
        for row in range(n):
            second[row, :row] = stored[start : start + row]
            start += row
        second += second.mT.clone()
    else:
        second = stored.float()
    second *= scale[..., :, None]
    second *= scale[..., None, :]
    square = scale.double().square().float()
    second.diagonal(dim1=-2, dim2=-1).copy_(square)
    return second


def _scale(diagonal: torch.Tensor, form: str, width: int) -> torch.Tensor:
    """Square roots of the diagonal, float32: (c,), or (n, w) for blocks."""
    root = diagonal.sqrt().float()
    if form == "full":
        return root
    return torch.nn.functional.pad(root, (0, -len(root) % width)).view(-1, width)


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _is_amount(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) and number >= 0


def _demand(holds: bool, where: str) -> None:
    if not holds:
        raise StatsError(f"{where} makes no sense; the file is damaged")
