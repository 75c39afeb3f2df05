"""Makes `moments-v1` and `trellis-moments-v1` (container and JSON). They were made once; never make them again.

    python -m tests.golden.make_moments_v1

Training checkpoints with moments in eight bits: both forms, all dtypes, blocks cut short, zeros and what is near them,
state that is no moment, and moments that share memory or bytes.
"""

import torch

import pqcli
from tests.golden.make_plain_v1 import write


def checkpoint() -> dict:
    """A model and the state of optimizers."""
    generator = torch.Generator().manual_seed(20261126)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * torch.randn(shape[0], 1, generator=generator)

    first, second = gaussian(48, 30), gaussian(48, 30).square() * 1e-6
    second[3], second[5, :7], second[9] = 0, 1e-45, 1e-38 * torch.rand(30, generator=generator)
    second[20, 4] = 3.4e38
    momentum = gaussian(1100, 1)
    states = {
        0: {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second},
        1: {"exp_avg": first.clone(), "exp_avg_sq": second.clone(), "max_exp_avg_sq": second},
        2: {"momentum_buffer": momentum, "exp_avg": first[:2].clone(), "hessian": gaussian(40, 40)},
        3: {"exp_avg": first.half() * 2, "exp_avg_sq": (second * 1e3).clamp(max=6e4).half()},
        4: {"exp_avg": first.bfloat16() * 3, "exp_avg_sq": second.bfloat16() * 5, "square_avg": second.double() / 7},
        5: {"exp_avg": torch.zeros(48, 30), "exp_avg_sq": torch.full((48, 30), float("nan"))},
    }
    return {
        "model": {"fc.weight": gaussian(48, 30), "fc.bias": gaussian(48, 1)[:, 0]},
        "optimizer": {"state": states, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "epoch": 3,
    }


def main() -> None:
    """Write the files beside this script."""
    recipes = {
        "moments": pqcli.Recipe(n_centroids=16, training_state="8bit"),
        "trellis-moments": pqcli.Recipe(codec="trellis", quality="small", effort=4, training_state="8bit"),
    }
    write(checkpoint(), recipes)


if __name__ == "__main__":
    main()
