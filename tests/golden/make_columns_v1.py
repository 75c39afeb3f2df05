"""Makes `trellis-columns-v1` (container and JSON). It was made once; a change of pqcli must not make it again.

The moments and steps in it are drawn at random: what matters is that files with steps by column keep their meaning.
"""

import numpy as np
import torch

from pqcli.core.trellis.feedback import Feedback, RowSteps
from tests.golden.make_rows_v1 import write


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
    write("trellis-columns-v1", checkpoint(), known())


if __name__ == "__main__":
    main()
