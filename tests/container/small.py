"""Small sound containers of every codec, and what can be asked of any file: an answer, or an error of pqcli's."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pqcli
from pqcli.codecs.trellis import session
from pqcli.core.trellis.feedback import Feedback, RowSteps
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.trellis import turned
from pqcli.jobs.report import inspect

RECIPES = {
    "plain": pqcli.Recipe(n_centroids=8, n_iter=2),
    "ecpq": pqcli.Recipe(rate_weight=0.2),
    "trellis": pqcli.Recipe(codec="trellis", quality="small", effort=4),
    "trellis-mixing": pqcli.Recipe(codec="trellis", quality="small", effort=4),
    "trellis-rows": pqcli.Recipe(codec="trellis", quality="small", effort=4),
}
FIVE_KB = {
    "plain": pqcli.Recipe(n_centroids=128, block_size=4, n_iter=2),
    "ecpq": pqcli.Recipe(rate_weight=0.0002),
    "trellis": pqcli.Recipe(codec="trellis", target_bits=8, effort=4),
    "trellis-mixing": pqcli.Recipe(codec="trellis", target_bits=8, effort=4),
    "trellis-rows": pqcli.Recipe(codec="trellis", target_bits=8, effort=4),
}
"""The same with so many bits that the files take about 5 kB."""


def state(*, large: bool) -> dict:
    """A nested checkpoint: tensors to quantize, kept ones small and perhaps large, an alias, text and numbers."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 32, generator=generator)
    tensors = {
        "embed.weight": weight,
        "conv.weight": torch.randn(16, 8, 3, 3, generator=generator),
        "half.weight": torch.randn(32, 32, generator=generator).half(),
        "head.weight": weight,
        "bias": torch.randn(9, generator=generator),
        "steps": torch.tensor(7),
        **({"large": torch.arange(9000) // 4000} if large else {}),
    }
    return {"state_dict": tensors, "epoch": 3, "args": {"lr": [0.1, float("inf")], "näme": "x"}}


def make(codec: str, folder: Path, monkeypatch: Any, *, large: bool = False, five_kb: bool = False) -> Path:
    """The file of that codec; `trellis-mixing` mixes every stream, `trellis-rows` has steps by row, feedback."""
    if codec.startswith("trellis"):
        gain = -1.0 if codec == "trellis-mixing" else 1.0
        monkeypatch.setattr(session, "MIXING_GAINS", ((float("inf"), gain),))
    if codec == "trellis-rows":
        monkeypatch.setattr(session.TrellisSession, "fitted", partial(_with_rows, session.TrellisSession.fitted))
    torch.save(state(large=large), folder / "model.pt")
    recipe = (FIVE_KB if five_kb else RECIPES)[codec]
    pqcli.compress(folder / "model.pt", folder / "model.pq.safetensors", recipe)
    return folder / "model.pq.safetensors"


def _with_rows(fitted: Any, *given: Any) -> Any:
    """A session as statistics of inputs would make it: an embedding with steps by row, a layer with feedback."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((128, 32)) @ rng.standard_normal((32, 32))
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    made = fitted(*given)
    conv = Feedback(np.exp2(rng.normal(size=72)), 0, rng.permutation(72), np.eye(72, dtype=np.float32), 0.1)
    made.rows = {
        "conv.weight": replace(conv, column_steps=np.exp2(rng.normal(size=16))),
        "embed.weight": RowSteps(np.exp2(rng.normal(size=48)), 2),
        "half.weight": Feedback(np.exp2(rng.normal(size=32)), 0, rng.permutation(32), moments, 0.1),
    }
    made.rotations = Rotations(transposed=turned(made.rows))
    return made


def answers(file: Path) -> tuple[Any, ...]:
    """All that can be asked of a file, each answer or the error; anything but a `PQError` is raised."""
    return tuple(asked(verb, file) for verb in (reported, inspected, _loaded, _decoded, _verified))


def asked(verb: Any, file: Path) -> Any:
    """What a verb answers of a file; the class of its error, if it is one of pqcli's."""
    try:
        return verb(file)
    except pqcli.PQError as error:
        return type(error)


def reported(file: Path) -> Any:
    """The report."""
    return pqcli.report(file).to_json()


def inspected(file: Path) -> Any:
    """What the file says of itself."""
    return inspect(file)


def _loaded(file: Path) -> Any:
    return {name: (str(tensor.dtype), tuple(tensor.shape), raw(tensor)) for name, tensor in pqcli.load(file).items()}


def _decoded(file: Path) -> Any:
    target = file.with_name("decoded.pt")
    target.unlink(missing_ok=True)
    try:
        pqcli.decode(file, target)
    except pqcli.PQError:
        assert not target.exists()
        raise
    return target.read_bytes()


def _verified(file: Path) -> Any:
    return [str(finding) for finding in pqcli.verify(file)]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
