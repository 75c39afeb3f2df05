"""`Source`: what the trellis codec must know of a tensor before it reads a single weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A tensor as a matrix: `rows` output channels by `columns` inputs.

    `kernel` counts the kernel positions per input channel (1 for anything but a convolution), so that
    `columns = inputs * kernel`. `key` names the tensor to the reader and nothing else.
    """

    key: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    kernel: int = 1

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The trailing dimensions that make up `kernel`, with 0 before them where each input has one channel only."""
        dims: tuple[int, ...] = ()
        product = 1
        for size in reversed(self.shape):
            if product >= self.kernel:
                break
            dims = (size, *dims)
            product *= size
        return (0, *dims) if self.columns == self.kernel else dims
