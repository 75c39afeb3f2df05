"""A report as MiniLM gives it (104 tensors, its real names and shapes), made up without compressing anything."""

import random
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

from pqcli.reports.figures import Report, TensorReport
from pqcli.tensors.info import TensorInfo


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all-MiniLM-L6-v2, in the order of its file."""
    found: dict[str, tuple[int, ...]] = {"embeddings.position_ids": (1, 512)}

    def norm(name):
        found[f"{name}.LayerNorm.bias"] = found[f"{name}.LayerNorm.weight"] = (384,)

    def dense(name, rows, columns):
        found[f"{name}.bias"] = (rows,)
        found[f"{name}.weight"] = (rows, columns)

    norm("embeddings")
    found["embeddings.position_embeddings.weight"] = (512, 384)
    found["embeddings.token_type_embeddings.weight"] = (2, 384)
    found["embeddings.word_embeddings.weight"] = (30522, 384)
    for layer in range(6):
        prefix = f"encoder.layer.{layer}"
        norm(f"{prefix}.attention.output")
        dense(f"{prefix}.attention.output.dense", 384, 384)
        for part in ("key", "query", "value"):
            dense(f"{prefix}.attention.self.{part}", 384, 384)
        dense(f"{prefix}.intermediate.dense", 1536, 384)
        norm(f"{prefix}.output")
        dense(f"{prefix}.output.dense", 384, 1536)
    dense("pooler.dense", 384, 384)
    return found


def tensor_report(name, shape, rng, block_size=8) -> TensorReport:
    """A tensor as plain PQ with 256 centroids would leave it; one-dimensional and tiny ones are kept."""
    n = prod(shape)
    base = TensorReport(
        name=name, shape=shape, dtype="float32", action="keep", reason="one-dimensional: norms and biases stay exact",
        scheme="kept", n_weights=n, original_bytes=4 * n, bytes=4 * n, bits_per_weight=32.0, kind="vector",
    )  # fmt: skip
    if "position_ids" in name:
        return replace(base, dtype="int64", reason="not a floating-point tensor", original_bytes=8 * n, bytes=8 * n)
    if len(shape) < 2:
        return base
    if shape[0] < 8:
        return replace(base, reason="would not get smaller: 4204 B as PQ, 3072 B dense", kind="embedding")
    size, mse = 256 * block_size * 2 + n // block_size, rng.uniform(0.29, 0.35)
    return replace(
        base, action="pq", reason="quantized by default: linear layer", scheme=f"PQ {block_size}x256", kind="linear",
        block_size=block_size, n_centroids=256, bytes=size, bits_per_weight=8 * size / n, relative_mse=mse,
        cosine=(1 - mse) ** 0.5, max_abs_error=rng.uniform(0.2, 1.4), energy=n * rng.uniform(0.001, 0.004),
        centroids_used=256, assignment_entropy=rng.uniform(7.6, 7.95),
    )  # fmt: skip


def minilm_report() -> Report:
    """MiniLM at block 8, 256 centroids."""
    rng = random.Random(8)
    tensors = tuple(tensor_report(name, shape, rng) for name, shape in shapes().items())
    return Report(
        source="model.safetensors", output="model.pq.safetensors", original_bytes=90_868_376,
        compressed_bytes=sum(tensor.bytes for tensor in tensors) + 14_321, seconds=4.21, tensors=tensors,
        recipe={"block_size": 8, "n_centroids": 256, "n_iter": 20, "rules": []},
    )  # fmt: skip


def report_of(*tensors: TensorReport, **fields) -> Report:
    """A report of a few tensors."""
    size = sum(tensor.bytes for tensor in tensors) + 100
    base = {"source": "a.pt", "output": "a.pq.safetensors", "original_bytes": 4_000_000, "compressed_bytes": size}
    return Report(**{**base, "tensors": tensors, **fields})


def quantized(name="fc.weight", **fields) -> TensorReport:
    """One quantized tensor, with any of its figures changed."""
    return replace(tensor_report(name, (64, 64), random.Random(0)), **fields)


@dataclass(frozen=True)
class Entry:
    """What a plan knows of a tensor."""

    info: TensorInfo
    kind: str
    action: str
    reason: str
    scheme: object | None
    predicted_bytes: int


def preview(report: Report) -> SimpleNamespace:
    """The dry run that predicts `report`."""
    entries = [
        Entry(
            TensorInfo(tensor.name, tensor.shape, tensor.dtype), tensor.kind, tensor.action, tensor.reason,
            SimpleNamespace(block_size=tensor.block_size, n_centroids=tensor.n_centroids) if tensor.quantized else None,
            tensor.bytes,
        )
        for tensor in report.tensors
    ]  # fmt: skip
    return SimpleNamespace(
        source=Path(report.source), output=Path(report.output), original_bytes=report.original_bytes,
        predicted_bytes=report.compressed_bytes, plan=SimpleNamespace(entries=entries), dropped=report.dropped,
        carried_bytes=report.carried_bytes, n_carried=report.n_carried, prediction=None,
    )  # fmt: skip
