"""Error against bytes, of whole files: pqcli's codecs, plain PQ, integers in groups, and others if installed.

    python tests/benchmarks/rate_distortion.py resnet20.th --scorer 'python eval_resnet_cifar10.py {}'
    python tests/benchmarks/rate_distortion.py model.safetensors --sizes 2330828,6316994 --codecs trellis,rtn
    python tests/benchmarks/rate_distortion.py model.safetensors --json curve.json --plot curve.svg
    python tests/benchmarks/rate_distortion.py model.safetensors --nncodec-python venv-nnc/bin/python --qp=-26,-32,-38
    python tests/benchmarks/rate_distortion.py resnet20.th --codecs rtn,gguf,hqq

Everybody is measured alike, from what decodes: relative MSE over all floating tensors with two dimensions or more,
bytes of the whole file, and bits per weight as these bytes less all other tensors as they were. NNCodec's figures hold
such tensors beside its stream, uncompressed. Integers in groups lie in a safetensors file together with them, and so
does what the packages gguf and hqq make of groups of weights, where they can be imported. Where figures
of NNCodec are published for a checkpoint (it is recognized by its SHA-256), they are the anchors, and every curve is
compared with them twice:

- at equal file bytes, as a user meets them. NNCodec's files hold the kept tensors raw, pqcli's hold them coded, which
  is worth some of the gain;
- at equal bits of the quantized weights: all that a file holds beside its kept tensors (pqcli's header and manifest
  count, so does NNCodec's whole stream), divided by the number of weights. This compares the coders alone.

Between the points of a curve the logarithm of the error is interpolated. The scorer is a command that gets the path of
a decoded checkpoint for `{}` and prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import pqcli
from pqcli import checkpoint as checkpoints
from pqcli.errors import PQError
from pqcli.recipe.recipe import Recipe

CODECS = ("trellis", "ecpq", "pq", "rtn", "gguf", "hqq")
RATIOS = (32, 24, 16, 12, 8)
"""Original bytes per byte of the file, where neither sizes nor anchors say otherwise."""
PQ_BLOCKS = (8, 4, 2)
RTN_BITS = (8, 4, 3)
GROUP = 128
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""The types that gguf can make itself; it only reads the K and IQ ones."""
GGUF_BLOCK = 32
HQQ_BITS = (8, 4, 3, 2)
HQQ_GROUP = 64
HQQ_PACKED = 4
"""Groups that it packs together."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Point:
    """One file: who made it, how large it is, how far it is from the original.

    `bits` counts kept tensors as if they were raw, `coded_bits` as the file holds them; None where that is the same.
    """

    codec: str
    setting: str
    n_bytes: int
    bits: float
    relative_mse: float
    seconds: float | None = None
    score: Mapping[str, float] = field(default_factory=dict)
    coded_bits: float | None = None

    @property
    def weight_bits(self) -> float:
        """Bits per weight that everything but the kept tensors takes."""
        return self.bits if self.coded_bits is None else self.coded_bits


@dataclass(frozen=True)
class Model:
    """A checkpoint, and everything needed to measure what others make of it."""

    path: Path
    tensors: Tensors
    scorer: str | None
    folder: Path
    anchors: tuple[Point, ...]

    @property
    def weights(self) -> Tensors:
        """The tensors that error is measured over."""
        return {name: t for name, t in self.tensors.items() if t.ndim >= 2 and t.is_floating_point()}

    @property
    def others(self) -> Tensors:
        """All the rest: what NNCodec's files hold uncompressed."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.weights}

    def bits(self, n_bytes: int) -> float:
        """Bits per weight of a file of this size."""
        kept = sum(tensor.numel() * tensor.element_size() for tensor in self.others.values())
        return 8 * (n_bytes - kept) / sum(weight.numel() for weight in self.weights.values())

    def point(self, codec: str, setting: str, n_bytes: int, decoded: Tensors, seconds: float) -> Point:
        """The measurements of one contestant."""
        error = relative_mse(self.weights, decoded)
        return Point(codec, setting, n_bytes, self.bits(n_bytes), error, seconds, self.score(decoded))

    def score(self, decoded: Tensors) -> dict[str, float]:
        """What the scorer says of these weights."""
        if self.scorer is None:
            return {}
        file = self.folder / "decoded.safetensors"
        clones = {name: decoded.get(name, tensor).contiguous().clone() for name, tensor in self.tensors.items()}
        safetensors.torch.save_file(clones, file)
        command = [str(file) if word == "{}" else word for word in shlex.split(self.scorer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        file.unlink()
        if done.returncode:
            sys.exit(f"the scorer failed: {shlex.join(command)}\n{done.stderr}")
        found = json.loads(done.stdout)
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def relative_mse(weights: Tensors, decoded: Tensors) -> float:
    """|W - W_hat|^2 / |W|^2 over all of them together."""
    noise = sum(float((weight.double() - decoded[name].double()).square().sum()) for name, weight in weights.items())
    return noise / sum(float(weight.double().square().sum()) for weight in weights.values())


# --- NNCodec's published figures --------------------------------------------------------------------------------------

SOURCE = "NNCodec 2.1.3 (ISO/IEC 15938-17), one QP for all, other tensors as they were in fp32; measured November 2026"
ANCHORS = {
    # ResNet-20 of akamaster/pytorch_resnet_cifar10
    "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8": (
        "top1",
        ((53_152, 1.132, 0.23187, 71.39), (76_196, 1.822, 0.07943, 88.00), (103_236, 2.631, 0.02369, 90.27),
         (131_906, 3.489, 0.00650, 92.13), (162_874, 4.416, 0.00171, 92.04)),
    ),
    # all-MiniLM-L6-v2, model.safetensors
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": (
        "spearman",
        ((2_330_828, 0.776, 0.43017, 70.035), (4_141_998, 1.415, 0.17092, 79.754), (6_316_994, 2.182, 0.05554, 85.225),
         (8_735_869, 3.035, 0.01609, 86.387), (11_309_553, 3.943, 0.00435, 86.553)),
    ),
}  # fmt: skip


def anchors_of(path: Path) -> tuple[Point, ...]:
    """The published figures for this very file, if there are any."""
    metric, rows = ANCHORS.get(hashlib.sha256(path.read_bytes()).hexdigest(), ("", ()))
    return tuple(Point("NNCodec", "published", *row[:3], score={metric: row[3]}) for row in rows)


# --- contestants ------------------------------------------------------------------------------------------------------


def trellis(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """`--codec trellis` at the sizes."""
    for n_bytes in sizes:
        yield from _pqcli(model, "trellis", f"{n_bytes:,} B", Recipe(codec="trellis", target_bytes=n_bytes, **recipe))


def ecpq(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """Entropy-constrained PQ: `--codec pq` with a budget."""
    for n_bytes in sizes:
        yield from _pqcli(model, "ecpq", f"{n_bytes:,} B", Recipe(codec="pq", target_bytes=n_bytes, **recipe))


def plain_pq(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """A codebook of 256 centroids a tensor, assignments of eight bits."""
    del sizes, recipe
    for block_size in PQ_BLOCKS:
        yield from _pqcli(model, "pq", f"block {block_size}", Recipe(block_size=block_size, n_centroids=256))


def _pqcli(model: Model, codec: str, setting: str, recipe: Recipe) -> Iterator[Point]:
    file = model.folder / "compressed.pq.safetensors"
    started = time.perf_counter()
    try:
        report = pqcli.compress(model.path, file, recipe, force=True)
    except PQError as error:
        print(f"{codec} {setting}: {error}", file=sys.stderr)
        return
    seconds = time.perf_counter() - started
    kept_bytes = sum(tensor.bytes for tensor in report.tensors if not tensor.quantized)
    coded_bits = 8 * (report.compressed_bytes - kept_bytes) / report.n_quantized_weights
    point = model.point(codec, setting, file.stat().st_size, pqcli.load(file), seconds)
    yield replace(point, coded_bits=coded_bits)


Packed = tuple[Tensors, torch.Tensor]
"""What a file would hold of groups of weights, and the groups that it gives back."""


def _grouped(model: Model, codec: str, setting: str, group: int, pack: Callable[[torch.Tensor], Packed]) -> Point:
    """A file of groups of weights, each packed by `pack` (n, group), and all other tensors as they were."""
    started = time.perf_counter()
    stored, decoded = dict(model.others), dict(model.others)
    for name, weight in model.weights.items():
        n_groups = -(-weight.numel() // group)
        groups = torch.nn.functional.pad(weight.flatten().float(), (0, n_groups * group - weight.numel()))
        pieces, back = pack(groups.reshape(n_groups, group))
        decoded[name] = back.float().flatten()[: weight.numel()].reshape(weight.shape)
        stored |= {f"{name}.{part}": piece.contiguous() for part, piece in pieces.items()}
    seconds = time.perf_counter() - started
    n_bytes = len(safetensors.torch.save(stored))  # a real file's: header and all
    return model.point(codec, setting, n_bytes, decoded, seconds)


def round_to_nearest(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """Integers in groups of 128 that share an fp16 scale."""
    del sizes, recipe
    for bits in RTN_BITS:
        largest = 2 ** (bits - 1) - 1

        def pack(groups: torch.Tensor, bits: int = bits, largest: int = largest) -> Packed:
            scales = (groups.abs().amax(1, keepdim=True) / largest).half()
            integers = (groups / scales.float().clamp(min=1e-12)).round().clamp(-largest - 1, largest)
            packed = torch.empty(-(-groups.numel() * bits // 8), dtype=torch.uint8)
            return {"scales": scales, "integers": packed}, integers * scales.float()

        yield _grouped(model, "rtn", f"int{bits}", GROUP, pack)


def gguf_blocks(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """The block formats of llama.cpp, as far as the package gguf can write them."""
    del sizes, recipe
    from gguf import GGMLQuantizationType, quants

    for kind in GGUF_TYPES:
        qtype = GGMLQuantizationType[kind]

        def pack(groups: torch.Tensor, qtype: object = qtype) -> Packed:
            packed = quants.quantize(groups.numpy(), qtype)
            return {"blocks": torch.from_numpy(packed)}, torch.from_numpy(quants.dequantize(packed, qtype))

        yield _grouped(model, "gguf", kind, GGUF_BLOCK, pack)


def half_quadratic(model: Model, sizes: Sequence[int], recipe: Mapping[str, float]) -> Iterator[Point]:
    """HQQ in groups of 64 with its own packing; scales and zero points in fp16."""
    del sizes, recipe
    from hqq.core.quantize import Quantizer

    for bits in HQQ_BITS:

        def pack(groups: torch.Tensor, bits: int = bits) -> Packed:
            packed, meta = Quantizer.quantize(
                groups, nbits=bits, group_size=HQQ_GROUP, axis=1, device="cpu", compute_dtype=torch.float32
            )
            pieces = {"packed": packed, "scale": meta["scale"].half(), "zero": meta["zero"].half()}
            rounded = {"scale": pieces["scale"].float(), "zero": pieces["zero"].float()}
            return pieces, Quantizer.dequantize(packed, {**meta, **rounded})

        yield _grouped(model, "hqq", f"{bits} bits", HQQ_PACKED * HQQ_GROUP, pack)


_NNCODEC = """
import pickle, sys, time, unittest.mock
for name in (  # imported by NNCodec, and not needed to code tensors
    "torchvision torchvision.datasets torchvision.transforms h5py pandas cv2 wandb flwr sklearn sklearn.metrics "
    "sentencepiece torchmetrics ptflops tqdm"
).split():
    try: __import__(name)
    except ImportError: sys.modules[name] = unittest.mock.MagicMock()
from nncodec import nnc
weights, qp, folder = pickle.load(open(sys.argv[1], "rb"))
started = time.perf_counter()
stream = nnc.compress(weights, bitstream_path=folder + "/stream.nnc", qp=qp, return_bitstream=True)
seconds = time.perf_counter() - started
pickle.dump((len(stream), nnc.decompress(stream), seconds), open(sys.argv[2], "wb"))
"""


def nncodec(model: Model, python: str, qps: Sequence[int]) -> Iterator[Point]:
    """NNCodec, in the Python that has it: the standard's reference software, at one QP for all tensors."""
    import pickle

    weights = {name: weight.float().numpy() for name, weight in model.weights.items()}
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.others.values())
    task, result = model.folder / "task.pickle", model.folder / "result.pickle"
    for qp in qps:
        task.write_bytes(pickle.dumps((weights, qp, str(model.folder))))
        done = subprocess.run(
            [python, "-c", _NNCODEC, str(task), str(result)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"NNCodec failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return
        stream_bytes, arrays, seconds = pickle.loads(result.read_bytes())
        decoded = {name: torch.from_numpy(np.asarray(arrays[name])) for name in weights}
        yield model.point("NNCodec", f"qp {qp}", stream_bytes + kept, decoded, seconds)


CONTESTANTS: dict[str, Callable[[Model, Sequence[int], Mapping[str, float]], Iterator[Point]]] = {
    "trellis": trellis, "ecpq": ecpq, "pq": plain_pq, "rtn": round_to_nearest, "gguf": gguf_blocks,
    "hqq": half_quadratic,
}  # fmt: skip
PACKAGES = {"gguf": "gguf", "hqq": "hqq"}
"""What a contestant needs beside this project."""


def is_installed(codec: str) -> bool:
    """Whether all that a contestant needs is there."""
    return codec not in PACKAGES or importlib.util.find_spec(PACKAGES[codec]) is not None


# --- comparing --------------------------------------------------------------------------------------------------------


def gap_at_bytes(curve: Sequence[Point], anchor: Point) -> float | None:
    """How many dB less error a curve has at the anchor's file bytes; None where it does not reach there.

    A curve ends at the last size it was asked for, and may miss it by a percent: it is carried over with 6 dB a bit.
    """
    places = [(math.log(point.n_bytes), _log_error(point)) for point in curve]
    slope = -2 * math.log(2) * anchor.bits
    return _gap_db(anchor, _interpolated(places, math.log(anchor.n_bytes), reach=0.011, slope=slope))


def gap_at_bits(curve: Sequence[Point], anchor: Point) -> float | None:
    """How many dB less error a curve has at the anchor's bits of the quantized weights; None where it ends short."""
    places = [(point.weight_bits, _log_error(point)) for point in curve]
    return _gap_db(anchor, _interpolated(places, anchor.weight_bits, reach=0.011 * anchor.bits, slope=-2 * math.log(2)))


def _interpolated(places: Sequence[tuple[float, float]], x: float, *, reach: float, slope: float) -> float | None:
    """The y of a curve at x, linear between its places; beyond its ends, as far as `reach`, with this slope."""
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(places)):
        if x0 <= x <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    near = min(places, key=lambda place: abs(place[0] - x), default=(math.inf, 0.0))
    return near[1] + slope * (x - near[0]) if abs(near[0] - x) <= reach else None


def _log_error(point: Point) -> float:
    return math.log(max(point.relative_mse, 1e-30))


def _gap_db(anchor: Point, log_error: float | None) -> float | None:
    return None if log_error is None else 10 * (math.log(anchor.relative_mse) - log_error) / math.log(10)


def table(points: Sequence[Point]) -> str:
    """The curve as a Markdown table."""
    metrics = sorted({name for point in points for name in point.score if name != "n"})
    heads = ["codec", "setting", "bytes", "bits", "bits of weights", "relative MSE", "seconds", *metrics]
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads)]
    for point in sorted(points, key=lambda point: point.n_bytes):
        seconds = "" if point.seconds is None else f"{point.seconds:.1f}"
        scores = [f"{point.score[name]:.4g}" if name in point.score else "" for name in metrics]
        sizes = [f"{point.n_bytes:,}", f"{point.bits:.3f}", f"{point.weight_bits:.3f}"]
        cells = [point.codec, point.setting, *sizes, f"{point.relative_mse:.5f}", seconds, *scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gaps(curves: Mapping[str, Sequence[Point]], anchors: Sequence[Point]) -> str:
    """The gaps of every curve to every anchor as a Markdown table: at equal file bytes, at equal bits of weights."""
    lines = [f"dB less error than the anchor. Anchors: {SOURCE}.", ""]
    heads = [f"{name} at equal {what}" for name in curves for what in ("bytes", "bits")]
    lines.append("| bytes | bits | anchor | " + " | ".join(heads) + " |")
    lines.append("|" + "---|" * (3 + len(heads)))
    for anchor in anchors:
        found = [gap(curve, anchor) for curve in curves.values() for gap in (gap_at_bytes, gap_at_bits)]
        cells = ["" if gap is None else f"{gap:+.2f}" for gap in found]
        lines.append(
            f"| {anchor.n_bytes:,} | {anchor.bits:.3f} | {anchor.relative_mse:.5f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


# --- the plot ---------------------------------------------------------------------------------------------------------

COLOURS = {"trellis": "#0b6e4f", "ecpq": "#1f78b4", "pq": "#8da0cb", "rtn": "#e08214", "NNCodec": "#b2182b",
    "gguf": "#7b3294", "hqq": "#c51b7d"}  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 420, 60, 110, 34, 46


def plot(title: str, curves: Mapping[str, Sequence[Point]]) -> str:
    """Signal to noise in dB over bits per weight, as an SVG that stands by itself."""
    shown = {name: sorted(curve, key=lambda p: p.bits) for name, curve in curves.items() if curve}
    everything = [(point.bits, -_db(point)) for curve in shown.values() for point in curve]
    right = math.ceil(max(x for x, _ in everything))
    low, high = (
        5 * round_(edge(y for _, y in everything) / 5) for round_, edge in ((math.floor, min), (math.ceil, max))
    )

    def place(bits: float, db: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * bits / right
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (db - low) / (high - low), 1)

    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    middle = f'x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})"'
    parts = [
        f'<svg {frame} font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{_escaped(title)}</text>',
        f'<text x="{(WIDTH - RIGHT + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">bits per weight</text>',
        f'<text {middle} text-anchor="middle">signal to noise, dB</text>',
    ]
    for bits in range(right + 1):
        (x, bottom), (_, top) = place(bits, low), place(bits, high)
        parts.append(f'<path d="M{x} {bottom}V{top}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{bits}</text>')
    for db in range(low, high + 1, 5):
        (x0, y), (x1, _) = place(0, db), place(right, db)
        parts.append(
            f'<path d="M{x0} {y}H{x1}" stroke="#ddd"/><text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{db}</text>'
        )
    for i, (name, curve) in enumerate(shown.items()):
        colour = COLOURS.get(name, "black")
        places = [place(point.bits, -_db(point)) for point in curve]
        line = "L".join(f"{x} {y}" for x, y in places)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places]
        y = TOP + 16 + 18 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y}">{_escaped(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _db(point: Point) -> float:
    return 10 * math.log10(max(point.relative_mse, 1e-10))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


# --- the command line -------------------------------------------------------------------------------------------------


def read(path: Path) -> Tensors:
    """All tensors of a checkpoint, those of several names once."""
    with checkpoints.open(path) as opened:
        return {info.name: opened.read(info.name) for info in opened.tensors if info.alias_of is None}


def curves_of(model: Model, options: argparse.Namespace) -> dict[str, list[Point]]:
    """The points of every contestant, printed as they come."""
    original = model.path.stat().st_size
    sizes = options.sizes or sizes_for(model) or [original // ratio for ratio in RATIOS]
    recipe = {} if options.objective is None else {"objective": options.objective}
    curves: dict[str, list[Point]] = {}
    runs = {name: CONTESTANTS[name](model, sizes, recipe) for name in options.codecs}
    if options.nncodec_python:
        runs["NNCodec"] = nncodec(model, options.nncodec_python, options.qp)
    for name, points in runs.items():
        for point in points:
            print(json.dumps(asdict(point)), file=sys.stderr, flush=True)
            curves.setdefault(name, []).append(point)
    return curves


def sizes_for(model: Model) -> list[int]:
    """The anchors' bytes, and one size below them all, so that curves reach down to the anchors' bits as well."""
    found = sorted(anchor.n_bytes for anchor in model.anchors)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.others.values())
    return [found[0] - kept, *found] if found else []


def numbered(path: Path, index: int, n: int) -> Path:
    """A path of its own for each of several checkpoints."""
    return path if n == 1 else path.with_stem(f"{path.stem}-{index + 1}")


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--scorer", action="append", help="command with {} for the file; once, or once a checkpoint")
    parser.add_argument("--sizes", type=lambda text: [int(word) for word in text.split(",")], help="bytes, by commas")
    parser.add_argument(
        "--codecs", type=lambda text: text.split(","), default=[name for name in CODECS if is_installed(name)]
    )
    parser.add_argument("--objective", type=float, help="as in `pqcli compress`")
    parser.add_argument("--nncodec-python", help="a Python that can import nncodec")
    parser.add_argument("--qp", type=lambda t: [int(word) for word in t.split(",")], default=[-14, -20, -26, -32, -38])
    parser.add_argument("--json", type=Path, help="write all points here")
    parser.add_argument("--plot", type=Path, help="write an SVG here, for several checkpoints with a number each")
    options = parser.parse_args()
    if unknown := set(options.codecs) - set(CODECS):
        parser.error(f"--codecs: {', '.join(sorted(unknown))}: not among {', '.join(CODECS)}")
    if missing := [PACKAGES[name] for name in options.codecs if not is_installed(name)]:
        parser.error(f"--codecs: not installed here: {', '.join(missing)}")
    scorers = options.scorer or [None]
    if len(scorers) not in {1, len(options.checkpoints)}:
        parser.error("--scorer: give one, or one for each checkpoint")
    document = {}
    for i, path in enumerate(options.checkpoints):
        with tempfile.TemporaryDirectory() as folder:
            model = Model(path, read(path), scorers[i % len(scorers)], Path(folder), anchors_of(path))
            curves = curves_of(model, options)
        published = {"NNCodec": list(model.anchors)} if model.anchors else {}
        shown = {**published, **curves}  # what was measured here counts more than what was published
        print(f"\n## {path.name}\n\n{table([point for curve in shown.values() for point in curve])}\n")
        if model.anchors:
            print(gaps(curves, model.anchors))
        if options.plot:
            numbered(options.plot, i, len(options.checkpoints)).write_text(plot(path.name, shown))
        document[str(path)] = {name: [asdict(point) for point in curve] for name, curve in shown.items()}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
