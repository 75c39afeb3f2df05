"""A weight of a PyTorch module as codebook and assignments: a parametrization of torch's own kind.

`torch.nn.utils.parametrize` makes `module.weight` a property that is computed from the parameter
`module.parametrizations.weight.original`, here the codebook. So a module keeps its class, its code and its hooks, and
whatever asks for its weight gets the decoded one, made anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils import parametrize

from pqcli.core.pq.lookup import Lookup

if TYPE_CHECKING:
    from torch import Tensor

UNSUITABLE = (
    torch.nn.RNNBase,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
    parametrize.ParametrizationList,
    torch.jit.ScriptModule,
)
"""Modules that reach their parameters by other ways than their attributes."""


class Assignments(torch.nn.Module):
    """From a codebook (k, block_size) to the weight, of `shape` and of the dtype that the model has it in.

    `packed` are the assignments as the file has them, `zeros` the weight's exact zeros (`pqcli.core.pq.lookup`); both
    are buffers, and never trained. The weight's dtype follows the model's: `.half()` and `.to(torch.bfloat16)` mean
    the codebook too. `name` and `of` say which tensor of which file this is.
    """

    packed: Tensor
    zeros: Tensor | None
    like: Tensor

    def __init__(
        self,
        lookup: Lookup,
        packed: Tensor,
        zeros: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        name: str,
        of: bytes,
    ) -> None:
        super().__init__()
        self.lookup, self.shape, self.name, self.of = lookup, shape, name, of
        self.register_buffer("packed", packed)
        self.register_buffer("zeros", zeros)
        # has no bytes; what converts a model converts it, so that it tells the dtype that the model is in
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.device), persistent=False)

    def forward(self, codebook: Tensor) -> Tensor:
        """The weight; its gradient becomes that of the codebook, a mean over the members of each centroid."""
        matrix = self.lookup.matrix(codebook, self.packed, self.zeros, self.like.dtype)
        # an embedding's gradient may be sparse, and such a one goes through no view
        return matrix if matrix.shape == self.shape else matrix.view(self.shape)

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"{self.name}, {'x'.join(map(str, self.shape))}, {self.lookup.bits} bits an assignment"


def zeros_of(mask: Tensor, columns: int) -> Tensor:
    """The zeros that a `mask` (rows,) or (rows, columns) tells of, in whichever form takes less memory."""
    elements = (mask[:, None].expand(-1, columns) if mask.dim() == 1 else mask).reshape(-1)
    n, n_zeros = len(elements), int(elements.sum())
    dtype = torch.int32 if n <= torch.iinfo(torch.int32).max else torch.int64
    if dtype.itemsize * n_zeros <= n // 8:
        return elements.nonzero()[:, 0].to(dtype)
    bits = torch.nn.functional.pad(elements.to(torch.uint8), (0, -n % 8)).view(-1, 8)
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (bits * powers).sum(1, dtype=torch.uint8)


def put_in(module: torch.nn.Module, leaf: str, codebook: torch.nn.Parameter, assignments: Assignments) -> None:
    """Let a parameter of a module be what `assignments` make of the codebook.

    The same two may serve several modules: that is how tied weights stay tied.
    """
    # in place of the dense one first: torch would take the dtype and the shape of that for the codebook's
    module._parameters[leaf] = codebook  # noqa: SLF001 - as torch's own functions on modules do it
    parametrize.register_parametrization(module, leaf, assignments, unsafe=True)


class AttachedWeight(NamedTuple):
    """A weight of an attached model: its name there, its codebook, and what makes it of that."""

    name: str
    codebook: torch.nn.Parameter
    assignments: Assignments


def attached_in(model: torch.nn.Module) -> Iterator[AttachedWeight]:
    """The weights of a model that are codebook and assignments; a tied one under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
            continue
        for leaf, found in module.parametrizations.items():
            if isinstance(found[0], Assignments):
                yield AttachedWeight(f"{path}.{leaf}" if path else leaf, found.original, found[0])
