"""Makes `trellis-rows-v1` (container and JSON). It was made once; a change of pqcli must not make it again.

The moments and row steps in it are drawn at random: what matters is that files with steps by row keep their meaning.
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import pqcli
from pqcli.codecs.trellis import session
from pqcli.core.trellis.feedback import Feedback, RowSteps
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.trellis import turned
from tests.golden.make_plain_v1 import digests

HERE = Path(__file__).parent


def checkpoint() -> dict[str, torch.Tensor]:
    """Layers with feedback, an embedding with steps by row, one tensor without either."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embedding.weight": gaussian(300, 24),
        "layer.weight": gaussian(70, 48),
        "conv.weight": gaussian(32, 4, 3, 3),
        "plain.weight": gaussian(40, 40),
        "bias": gaussian(24),
    }


def known() -> dict[str, RowSteps]:
    """Feedback and row steps, by tensor."""
    rng = np.random.default_rng(0)

    def feedback(n: int) -> Feedback:
        inputs = rng.standard_normal((4 * n, n)) @ rng.standard_normal((n, n))
        moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
        return Feedback(np.exp2(rng.normal(size=n)), 0, rng.permutation(n), moments, 0.1)

    return {
        "embedding.weight": RowSteps(np.exp2(rng.normal(size=300)), 2),
        "layer.weight": feedback(48),
        "conv.weight": feedback(36),
    }


def main() -> None:
    """Write the files beside this script."""
    write("trellis-rows-v1", checkpoint(), known())


def write(name: str, tensors: dict[str, torch.Tensor], second_order: dict[str, RowSteps]) -> None:
    """Write the container of these tensors, coded with these steps and feedback, and the digests of what it holds."""
    fitted = session.TrellisSession.fitted

    def with_rows(*given):  # type: ignore[no-untyped-def]
        made = fitted(*given)
        made.rows, made.rotations = second_order, Rotations(transposed=turned(second_order))
        return made

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(session.TrellisSession, "fitted", with_rows):
        source = Path(folder) / "model.pt"
        torch.save(tensors, source)
        target = HERE / f"{name}.pq.safetensors"
        pqcli.compress(source, target, pqcli.Recipe(codec="trellis", quality="small"))
        text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
