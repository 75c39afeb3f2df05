"""The loop of `pqcli.core.entropy.lossless` (`lossless.c`): one byte plane through the range coder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy.rangecoder import RATES, RangeCoder
from pqcli.core.native.library import function, reads, writes

_code_plane = function(
    "code_plane",
    bool, int, int, writes(np.uint8), reads(np.int64), int, writes(np.int32), writes(np.int32), reads(np.int64),
    writes(np.int64), writes(np.uint8),
)  # fmt: skip


def code_plane(coder: RangeCoder, plane: NDArray[np.uint8], starts: NDArray[np.int64], start_count: int) -> None:
    """Write or read the bytes of `plane`; at each index in `starts` a new tensor begins.

    A byte is eight decisions down a binary tree. Each has a model for the whole plane and one for the tensor alone,
    forgotten at its end; they are averaged, weighing the tensor's the more the more often it was asked. Those of the
    plane start as if they had seen `start_count` bytes.
    """
    shared = np.full((256, 2), (32768, start_count), np.int32)
    shared[1, 1] = 0
    local = np.empty((256, 2), np.int32)
    _code_plane(
        coder.encoding, plane.size, starts.size, plane, starts, start_count, shared, local, RATES, coder.window,
        coder.buffer,
    )  # fmt: skip
