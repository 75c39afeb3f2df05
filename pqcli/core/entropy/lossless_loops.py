"""The loop of `pqcli.core.entropy.lossless`, compiled: one byte plane through the range coder."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel
from pqcli.core.entropy.rangecoder import adapt, code_bit

_LOCAL_LIMIT = 60


def fresh_models(start_count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The models (256, 2) that `code_plane` starts from: those of the whole plane, room for those of one tensor."""
    shared = np.full((256, 2), (32768, start_count), np.int32)
    shared[1, 1] = 0
    return shared, np.empty((256, 2), np.int32)


@kernel
def code_plane(encoding, plane, starts, start_count, shared, local, rates, window, buffer):
    """Write or read the bytes of `plane`; at each index in `starts` a new tensor begins.

    A byte is eight decisions down a binary tree. Each has a model for the whole plane and one for the tensor alone,
    forgotten at its end; they are averaged, weighing the tensor's the more the more often it was asked.
    """
    low, span, code, position, length = window[0], window[1], window[2], window[3], window[4]
    tensor = 0
    for i in range(plane.shape[0]):
        while tensor < starts.shape[0] and i == starts[tensor]:
            for node in range(256):
                local[node, 0] = 32768
                local[node, 1] = 0
            tensor += 1
        value = np.int64(plane[i])
        node = 1
        for place in range(7, -1, -1):
            known = 4 + 3 * min(np.int64(shared[node, 1]), 2)
            trust = 3 * min(np.int64(local[node, 1]), _LOCAL_LIMIT)
            if start_count > 0 and node > 1:
                trust = np.int64(0)
            probability = (known * shared[node, 0] + trust * local[node, 0]) // (known + trust)
            bit, low, span, code, position = code_bit(
                encoding, (value >> place) & 1, probability, low, span, code, position, length, buffer
            )
            adapt(shared, node, bit, rates)
            adapt(local, node, bit, rates)
            node = 2 * node + bit
        if not encoding:
            plane[i] = node - 256
    window[0], window[1], window[2], window[3] = low, span, code, position
