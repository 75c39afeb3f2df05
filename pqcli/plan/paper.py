"""The size of a compressed network by the accounting of the papers on product quantization."""

from __future__ import annotations

from collections.abc import Iterable

_UNCOUNTED_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def paper_bytes(tensors: Iterable[tuple[str, int, tuple[int, int, int] | None]]) -> int:
    """The size that the kill-the-bits papers would state, in bytes (they divide by 2^20).

    Each tensor is (name, number of elements, (n_vectors, n_centroids, block_size) or None where it is kept). log2(k)
    bits per block and fp16 codebooks; everything else counts as fp32, except that running statistics of batch norm do
    not count at all. Tied tensors should be given once.
    """
    bits = 0
    for name, numel, coded in tensors:
        if coded is not None:
            n_vectors, n_centroids, block_size = coded
            bits += n_vectors * (n_centroids - 1).bit_length() + n_centroids * block_size * 16
        elif not name.endswith(_UNCOUNTED_BUFFERS):
            bits += numel * 32
    return -(-bits // 8)
