"""Small sound containers of every codec, and what can be asked of any file: an answer, or an error of pqcli's."""

from pathlib import Path
from typing import Any

import torch

import pqcli
from pqcli.codecs.trellis import session
from pqcli.jobs.report import inspect

RECIPES = {
    "plain": pqcli.Recipe(n_centroids=8, n_iter=2),
    "ecpq": pqcli.Recipe(rate_weight=0.2),
    "trellis": pqcli.Recipe(codec="trellis", quality="small", effort=4),
    "trellis-mixing": pqcli.Recipe(codec="trellis", quality="small", effort=4),
}


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


def make(codec: str, folder: Path, monkeypatch: Any, *, large: bool = False) -> Path:
    """The file of that codec; `trellis-mixing` mixes every stream."""
    if codec.startswith("trellis"):
        gain = -1.0 if codec == "trellis-mixing" else 1.0
        monkeypatch.setattr(session, "MIXING_GAINS", ((float("inf"), gain),))
    torch.save(state(large=large), folder / "model.pt")
    pqcli.compress(folder / "model.pt", folder / "model.pq.safetensors", RECIPES[codec])
    return folder / "model.pq.safetensors"


def answers(file: Path) -> tuple[Any, ...]:
    """All that can be asked of a file, each answer or the error; anything but a `PQError` is raised."""
    return tuple(_asked(verb, file) for verb in (_reported, _inspected, _loaded, _decoded, _verified))


def _asked(verb: Any, file: Path) -> Any:
    try:
        return verb(file)
    except pqcli.PQError as error:
        return type(error)


def _reported(file: Path) -> Any:
    return pqcli.report(file).to_json()


def _inspected(file: Path) -> Any:
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
