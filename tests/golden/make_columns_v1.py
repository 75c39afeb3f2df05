"""Makes `trellis-columns-v1` (container and JSON). It was made once; a change of pqcli must not make it again.

The moments and steps in it are drawn at random: what matters is that files with steps by column keep their meaning.
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
    """A tied embedding, a convolution, one tensor without steps of its own."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = gaussian(300, 24)
    return {
        "embedding.weight": embedding,
        "conv.weight": gaussian(32, 4, 3, 3),
        "plain.weight": gaussian(40, 40),
        "head.weight": embedding,
        "bias": gaussian(24),
    }


def known() -> dict[str, RowSteps]:
    """Feedback and steps of columns, by tensor."""
    rng = np.random.default_rng(0)

    def feedback(n: int, n_columns: int) -> Feedback:
        inputs = rng.standard_normal((4 * n, n)) @ rng.standard_normal((n, n))
        moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
        columns = np.exp2(rng.normal(size=n_columns))
        return Feedback(np.exp2(rng.normal(size=n)), 0, rng.permutation(n), moments, 0.1, column_steps=columns)

    return {"embedding.weight": feedback(24, 300), "conv.weight": feedback(36, 32)}


def main() -> None:
    """Write the files beside this script."""
    fitted, second_order = session.TrellisSession.fitted, known()

    def with_rows(*given):  # type: ignore[no-untyped-def]
        made = fitted(*given)
        made.rows, made.rotations = second_order, Rotations(transposed=turned(second_order))
        return made

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(session.TrellisSession, "fitted", with_rows):
        source = Path(folder) / "model.pt"
        torch.save(checkpoint(), source)
        target = HERE / "trellis-columns-v1.pq.safetensors"
        pqcli.compress(source, target, pqcli.Recipe(codec="trellis", quality="small"))
        text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
        (HERE / "trellis-columns-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
