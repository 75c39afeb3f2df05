"""`attach`: the tensors that plain PQ coded go into a model as they lie in the file, and their codebooks are trained.

What the model holds of such a tensor is its assignments, packed, and its codebook in float32, a parameter; the weight
is made of the two whenever the model asks for it (`pqcli.integrations.assignments`). `pqcli.export` writes what became
of them (`pqcli.jobs.export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pqcli.container.reader import Container, open_container
from pqcli.core.arrays import as_tensor
from pqcli.core.pq import packing
from pqcli.core.pq.lookup import Lookup
from pqcli.errors import ContainerError, UsageError
from pqcli.integrations.assignments import UNSUITABLE, Assignments, attached_in, put_in, zeros_of
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.loading import Fit, fill, fit_of, lone, move
from pqcli.tensors.records import Alias, Copy, Plain

if TYPE_CHECKING:
    from pqcli.core.pq.pq import PQTensor
    from pqcli.limits import Limits

Home = tuple[torch.nn.Module, str]
"""Where a parameter lies: a module, and the name that it has there."""


class Attached(NamedTuple):
    """What became of a model, in the names that its state dict had.

    `attached` are codebook and assignments now, `frozen` are quantized in a way that cannot be trained: dense, and
    without a gradient. `missing` and `unexpected` are as `load_into` tells them.
    """

    attached: tuple[str, ...]
    frozen: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@showing
def attach(
    model: torch.nn.Module,
    file: str | Path,
    *,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress = None,
    limits: Limits | None = None,
) -> Attached:
    """Put a container into a model so that it stays compressed there, and its codebooks can be trained.

    Every parameter that the file holds as plain PQ becomes a parametrization: `module.weight` is, bit for bit, what
    `load` gives, made anew whenever it is asked for; what is held is the packed assignments, a buffer, and the codebook
    (n_centroids, block_size) in float32, the parameter `module.parametrizations.weight.original`. The gradient of a
    centroid is the mean over the blocks assigned to it (Stock et al., "And the Bit Goes Down", ICLR 2020, section
    3.3); exact zeros stay zeros. This goes for parameters of all modules (linear, convolutions, embeddings, one's own)
    but recurrent ones of torch, whose weights are no attributes. Make optimizers afterwards: parameters are new ones.

    Names, `strict`, `dtype`, `device`, folders and the meta device are as for `load_into`, and so is every other tensor
    of the file: dense, and trained as ever if it is kept. What is quantized but cannot stay so (other codecs, buffers)
    is dense too, and frozen, because `export` could not write it anew. Tensors that are tied in the file or in the
    model share one codebook, and so do those that the file has as copies of one another.

    Raises ContainerError as `load_into` does, where the model ties what the file holds apart, and for a file that has a
    base, or none of whose tensors can be attached; UsageError for a model that is attached already. In all these cases
    no weight has been touched, but where a tensor turns out to be damaged.
    """
    if any(True for _ in attached_in(model)):
        raise UsageError("the model is attached to a file already; make a new one to attach")
    with open_container(lone(file), limits=limits) as container:
        if container.needs_base:
            raise ContainerError(
                f"{container.path}: it holds differences to a base, and these cannot be trained; decode it, and "
                "compress it anew without a base"
            )
        fit = fit_of(model, container, strict=strict)
        homes = _homes(model)
        groups = list(_groups(fit, container, homes))
        if not groups:
            raise ContainerError(
                f"{container.path}: none of its tensors is plain PQ and a parameter of the model; "
                "`pqcli compress --codec pq` without a budget makes a file to attach, `load_into` takes any"
            )
        apart = {theirs for _, names in groups for theirs in names}
        others = [theirs for theirs in fit.places if theirs not in apart]
        fill(model, fit, container, others, dtype, device, hook_of(progress))
        frozen = tuple(_frozen(model, fit, container, others))
        move(model, dtype, device, but=[fit.own[fit.places[theirs]] for theirs in apart])
        for owner, names in groups:
            _put(fit, container, owner, names, homes, dtype, device)
        return Attached(
            tuple(fit.places[theirs] for _, names in groups for theirs in names), frozen, fit.missing, fit.unexpected
        )


def owner_of(container: Container, name: str) -> str:
    """The tensor that holds what `name` comes back as: itself, unless it is an alias or a copy."""
    coding = container.record(name).coding
    return owner_of(container, coding.of) if isinstance(coding, Alias | Copy) else name


def _homes(model: torch.nn.Module) -> dict[int, list[Home]]:
    """All places of a model's parameters, by the id of these; a module that has several names counts once."""
    found: dict[int, list[Home]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((module, leaf))
    return found


def _groups(
    fit: Fit, container: Container, homes: Mapping[int, Sequence[Home]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every plain tensor that can be attached, with all names of the container that come back as it."""
    by_owner: dict[str, list[str]] = {}
    owners: dict[int, str] = {}
    for theirs, ours in fit.places.items():
        owner = owner_of(container, theirs)
        by_owner.setdefault(owner, []).append(theirs)
        first = owners.setdefault(id(fit.own[ours]), owner)
        if first != owner and any(isinstance(container.record(name).coding, Plain) for name in (first, owner)):
            raise ContainerError(
                f"{container.path}: the model ties {ours!r} to another tensor, and the file holds them apart as "
                f"{first!r} and {owner!r}; untie them, or compress the model as it is"
            )
    for owner, names in by_owner.items():
        if isinstance(container.record(owner).coding, Plain):
            places = [homes.get(id(fit.own[fit.places[theirs]]), []) for theirs in names]
            if all(places) and not any(isinstance(module, UNSUITABLE) for found in places for module, _ in found):
                yield owner, tuple(names)


def _frozen(model: torch.nn.Module, fit: Fit, container: Container, names: Iterable[str]) -> Iterator[str]:
    """Freeze what is quantized and dense; the model's names of it."""
    now = model.state_dict(keep_vars=True)
    for theirs in names:
        if container.record(owner_of(container, theirs)).quantized:
            ours = fit.places[theirs]
            now[ours].requires_grad_(False)
            yield ours


def _put(
    fit: Fit,
    container: Container,
    owner: str,
    names: Sequence[str],
    homes: Mapping[int, Sequence[Home]],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> None:
    """Attach one tensor, in all places that it has."""
    places = {id(fit.own[fit.places[theirs]]): fit.own[fit.places[theirs]] for theirs in names}
    first = next(iter(places.values()))
    wanted = device or (torch.device("cpu") if first.is_meta else first.device)
    container.decode(owner)  # raises where the hash is another
    tensor = container.pq_tensor(owner)
    assignments = _assignments(container, owner, tensor, dtype or first.dtype)
    needs_grad = any(place.requires_grad for place in places.values())
    codebook = torch.nn.Parameter(tensor.codebook.float().to(wanted), requires_grad=needs_grad)
    assignments.to(wanted)
    for place in places:
        for module, leaf in homes[place]:
            put_in(module, leaf, codebook, assignments)


def _assignments(container: Container, name: str, tensor: PQTensor, dtype: torch.dtype) -> Assignments:
    """What makes a weight in `dtype` of the codebook of a plain tensor."""
    record = container.record(name)
    rows, columns = record.matrix_shape
    lookup = Lookup(rows, columns, packing.n_bits(tensor.n_centroids), tensor.codebook.dtype, tensor.dtype)
    mask = container.zeros(name)
    return Assignments(
        lookup,
        as_tensor(container.packed_assignments(name)),
        None if mask is None else zeros_of(as_tensor(mask), columns),
        record.info.shape,
        dtype,
        name=name,
        of=container.identity,
    )
