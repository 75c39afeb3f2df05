"""Real bytes of pqcli beside ideal entropies of scalar quantizers that know the same statistics: WaterSIC, GPTQ.

usage: entropies.py STATS [--bytes 2330828 ...]
STATS is what `kit_stats.py minilm` wrote. Files of MiniLM are made by `pqcli.compress`. Every layer with moments is
then coded again by scalar quantizers with the same feedback, with the step at which errors do the same damage:

    WaterSIC        a step an input, in proportion to d^(-1/2) of H = F diag(d) F' (arXiv 2603.04956); the empirical
                    order-0 entropy of each input's symbols, without tables
    GPTQ, Huffman   one step a layer; a Huffman code of the layer's symbols, without its table

Neither pays for tables or steps, so both are flattered: the empirical entropy of 384 symbols by tenths of a bit. In
the last column each input's symbols pay for having their table learned from them (Krichevsky and Trofimov's
estimator). pqcli pays for everything. Prints bits per weight over all these layers.
"""

import argparse
import heapq
import math
import tempfile
from pathlib import Path

import numpy as np
from second_order import MiniLM
from threadpoolctl import threadpool_limits

import pqcli
from pqcli.core import second_order
from pqcli.core.trellis.feedback import triangle

BLOCK = 128


def scalar(weights, steps, factor):
    """Symbols and errors of (inputs, outputs) weights in order, the errors fed forward."""
    symbols, errors = np.empty(weights.shape, np.int64), np.empty_like(weights)
    target = weights.copy()
    for start in range(0, len(weights), BLOCK):
        stop = min(start + BLOCK, len(weights))
        for j in range(start, stop):
            fed = target[j] + factor[start:j, j] @ errors[start:j]
            symbols[j] = np.rint(fed / steps[j])
            errors[j] = weights[j] - symbols[j] * steps[j]
        target[stop:] += factor[start:stop, stop:].T @ errors[start:stop]
    return symbols, errors


def entropy_bits(symbols):
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def learned_bits(symbols):
    """What an adaptive code takes that starts knowing the range of the symbols alone."""
    counts = np.bincount((symbols - symbols.min()).ravel())
    nats = sum(math.lgamma(n + 0.5) - math.lgamma(0.5) for n in counts if n)
    return (math.lgamma(symbols.size + len(counts) / 2) - math.lgamma(len(counts) / 2) - nats) / math.log(2)


def huffman_bits(symbols):
    heap = [int(n) for n in np.unique(symbols, return_counts=True)[1]]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


def at_damage(weights, shape, factor, damage, wanted):
    """The symbols with steps of this shape, scaled until the damage is the wanted one to 0.01 dB."""
    low, high = 1e-4, 1e4
    for _ in range(40):
        scale = math.sqrt(low * high)
        symbols, errors = scalar(weights, (scale * shape).astype(np.float32), factor)
        found = damage(errors)
        if abs(10 * math.log10(found / wanted)) < 0.01:
            break
        low, high = (scale, high) if found < wanted else (low, scale)
    return symbols


def compared(weight, decoded, moments):
    """Bits of the scalar quantizers for a layer, at the damage of what was decoded."""
    order = second_order.coding_order(moments.matrix)
    factor, pivots = triangle(moments.matrix, order, moments.shrinkage())
    factor = np.triu(factor, 1)
    ordered = moments.matrix[np.ix_(order, order)].astype(np.float64)

    def damage(errors):
        return float(np.einsum("ij,ij->", ordered @ errors, errors, dtype=np.float64))

    weights = np.ascontiguousarray(weight.T[order])
    wanted = damage(np.ascontiguousarray((decoded - weight).T[order]))
    spread = float(weights.std())
    watersic = at_damage(weights, spread * np.sqrt(pivots.mean() / pivots), factor, damage, wanted)
    gptq = at_damage(weights, np.full(len(weights), spread), factor, damage, wanted)
    return sum(map(entropy_bits, watersic)), huffman_bits(gptq), sum(map(learned_bits, watersic))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--bytes", type=int, nargs="+", default=[2330828, 4141998])
    args = parser.parse_args()
    model, stats = MiniLM(None), pqcli.stats.open(args.stats)
    for size in args.bytes:
        with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
            file = Path(folder) / "model.pq.safetensors"
            recipe = pqcli.Recipe(codec="trellis", target_bytes=size, stats=str(args.stats))
            report = pqcli.compress(model.checkpoint, file, recipe)
            decoded = pqcli.load(file)
        ours, theirs, n_weights = 0, np.zeros(3), 0
        for tensor in report.tensors:
            seen = stats.moments(tensor.name) if tensor.name in stats else None
            if seen is None or seen.second is None or seen.row_frequency is not None or tensor.action != "trellis":
                continue
            moments = second_order.Moments(seen.second, seen.n_samples, seen.gradient, noise=seen.noise)
            weight = model.state[tensor.name].float().numpy()
            ours += 8 * tensor.bytes
            theirs += compared(weight, decoded[tensor.name].float().numpy(), moments)
            n_weights += weight.size
        sic, gptq, learned = theirs / n_weights
        print(
            f"{report.compressed_bytes:,} B, {n_weights:,} weights: pqcli {ours / n_weights:.3f} bits a weight, "
            f"WaterSIC {sic:.3f}, GPTQ with Huffman {gptq:.3f}, WaterSIC with tables learned {learned:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
