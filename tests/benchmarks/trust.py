"""SmolLM2's perplexity with errors drawn at random instead of coded: minutes where coding takes an hour.

usage: trust.py FOLDER STATS [--levels 0.25 0.4] [--trusts 1 0.75 0.5 0] [--windows 2]
FOLDER is what the kit's `smollm2.py build` wrote. A weight's error is what a fine quantizer with these steps and this
feedback leaves, Gaussian of variance step^2 / 12 where it is made; at one level all plans take about the same bits, as
the geometric mean of their steps is the same. Prints the perplexity without statistics, and by how far the steps of
tensors go from what they are without data (0) to one price of damage (1). STATS may be of another domain.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from second_order import SmolLM2

import pqcli.stats
from pqcli.core import second_order
from pqcli.core.trellis.feedback import Feedback


def known(stats, name, matrices):
    """What is known of a weight; layers that share inputs share the matrix."""
    seen, site = stats.moments(name), stats.weights[stats.aliases.get(name, name)].site
    inputs = second_order.Moments(
        matrices.setdefault(site, seen.second), seen.n_samples, seen.gradient, noise=seen.noise
    )
    if seen.row_frequency is None:
        return inputs
    lookups = seen.row_frequency * seen.n_lookups
    return second_order.RowImportance.of(lookups, seen.lookup_gradient, inputs, seen.row_gradient)


def drawn(rows: Feedback, n_outputs, factors, generator):
    """Errors (outputs, inputs) that coding in order with unit steps leaves."""
    if id(rows.known) not in factors:
        (part,) = rows.feeding()
        factors[id(rows.known)] = torch.from_numpy(np.ascontiguousarray(part.factor.T))
    order = torch.from_numpy(rows.order)
    made = torch.randn(len(order), n_outputs, generator=generator) * torch.from_numpy(rows.steps).float()[order, None]
    left = torch.linalg.solve_triangular(factors[id(rows.known)], made, upper=False, unitriangular=True)
    errors = torch.empty_like(left)
    errors[order] = left / math.sqrt(12)
    columns = 1.0 if rows.column_steps is None else torch.from_numpy(rows.column_steps).float()[:, None]
    return errors.T * columns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.4])
    parser.add_argument("--trusts", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.0])
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args()
    model, stats = SmolLM2(args.folder), pqcli.stats.open(args.stats)
    model.ids = model.ids[: 1024 * args.windows]
    weights = {key: value for key, value in model.state.items() if value.dim() == 2 and value.shape[0] > 2}
    plain = {
        key: second_order.Weights(value.numel(), value.square().mean().sqrt().item() ** 0.5)
        for key, value in weights.items()
    }
    matrices: dict = {}
    second_order.TRUST = 1.0
    plan = second_order.prepare(plain, {key: known(stats, key, matrices) for key in weights})
    generator, factors = torch.Generator().manual_seed(0), {}
    errors = {key: drawn(plan.rows[key], len(weights[key]), factors, generator).half() for key in weights}

    def score(steps, made):
        noisy = {key: weights[key] + steps[key] * made[key].float() for key in weights}
        return model.score({**model.state, **noisy})

    print(f"dense: {model.score(model.state)}", flush=True)
    for level in args.levels:
        steps = {key: level * about.plain_step for key, about in plain.items()}
        white = {key: (torch.randn(w.shape, generator=generator) / math.sqrt(12)).half() for key, w in weights.items()}
        print(f"level {level}, without statistics: {score(steps, white)}", flush=True)
        for trust in args.trusts:
            own = {key: step * (plan.steps[key] / plain[key].plain_step) ** trust for key, step in steps.items()}
            print(f"level {level}, trust {trust}: {score(own, errors)}", flush=True)


if __name__ == "__main__":
    main()
