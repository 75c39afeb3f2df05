"""Memory and time of encoding one wide layer with errors fed forward; made-up weights and moments.

usage: wide_layer.py [--outputs 4096] [--inputs 11008]
Prints a line of JSON: the peak resident set of the process in bytes, before encoding and after, seconds of processor
time for preparing and for encoding, bits per weight. (4,096 outputs of 11,008 inputs are a Llama 7B's widest layer.)
"""

import argparse
import json
import resource
import time

import numpy as np
from threadpoolctl import threadpool_limits

from pqcli.core.second_order import Moments, Weights, prepare
from pqcli.core.trellis import trellis
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.sources import Source

_RANK = 512


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=11008)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((args.outputs, args.inputs), dtype=np.float32)
    factors = rng.standard_normal((_RANK, args.inputs), dtype=np.float32)
    moments = factors.T @ factors
    moments /= np.float32(_RANK)
    moments[np.diag_indices(args.inputs)] += np.float32(0.5)
    before = peak_bytes()
    with threadpool_limits(1):
        started = time.process_time()
        known = {"w": Moments(moments, 1e4, 1.0, noise=0.05)}
        rows = prepare({"w": Weights(weights.size, 1.0)}, known).rows
        prepared = time.process_time()
        source = Source("w", weights.shape, *weights.shape)
        params = trellis.TrellisParams(0.5, 256, 0.3, mixing_gain=1.0)
        found = trellis.encode([source], lambda _: weights, params, Rotations(), None, 1, second_order=rows)
    about = {
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
        "preparing_s": round(prepared - started, 1),
        "encoding_s": round(time.process_time() - prepared, 1),
        "bits": round(8 * found.n_bytes / weights.size, 3),
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main()
