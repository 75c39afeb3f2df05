"""`load_into`: the weights of a container go into a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.modules.batchnorm import _NormBase

from pqcli.container.folder import compressed_folder
from pqcli.container.reader import Container, open_container
from pqcli.errors import ContainerError, UsageError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.events import Hook, Stage
from pqcli.tensors.prefixes import matched

if TYPE_CHECKING:
    from pqcli.limits import Limits

N_NAMED = 3
"""Names of a kind that a message tells."""


class Loaded(NamedTuple):
    """What did not fit: names that the model has and the file lacks, and the other way round."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@showing
def load_into(
    model: torch.nn.Module,
    file: str | Path,
    *,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    base: str | Path | Sequence[str | Path] = (),
    progress: Progress = None,
    limits: Limits | None = None,
) -> Loaded:
    """Decode the container's tensors into the model's parameters and buffers, by the names of its state dict.

    Tensors are decoded one by one into the memory that the model has: no second copy of it is ever held. What the model
    has on the meta device is made anew, on `device` or else the CPU, so that a model built there never takes memory
    twice; tied parameters stay tied. `dtype` is what floating parameters and buffers become (else they stay what they
    are), `device` where all of it goes. Training state in the file is left alone. Where all names of one side begin
    with the same prefix (`module.`), that is no difference.

    With `strict`, names that only one side has are an error; without it they are returned. Raises ContainerError for
    these and for other shapes, before any weight is touched; for a damaged tensor, when it is decoded: the model then
    holds some new weights and some old ones. `base` as for `decode`, `progress` as for `compress`.
    """
    with open_container(lone(file), limits=limits, base=base) as container:
        fit = fit_of(model, container, strict=strict)
        fill(model, fit, container, list(fit.places), dtype, device, hook_of(progress))
    move(model, dtype, device)
    return Loaded(fit.missing, fit.unexpected)


@dataclass(frozen=True)
class Fit:
    """Which tensor of a model is which of a container.

    `own` are the model's tensors by their names, `places` these names by the container's, for the tensors that both
    have; `missing` and `unexpected` are as in `Loaded`.
    """

    own: Mapping[str, torch.Tensor]
    places: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def lone(file: str | Path) -> Path:
    """The container; of a compressed folder, the one in it. Raises UsageError where there are several."""
    path = Path(file)
    if not path.is_dir():
        return path
    folder = compressed_folder(path)
    if len(folder.containers) > 1:
        raise UsageError(
            f"'{path}' holds {len(folder.containers)} containers ({', '.join(folder.containers.values())}); name one"
        )
    return path / next(iter(folder.containers.values()))


def fit_of(model: torch.nn.Module, container: Container, *, strict: bool) -> Fit:
    """How a container fits a model.

    Raises ContainerError where shapes differ, and with `strict` where one side lacks a name.
    """
    own = model.state_dict(keep_vars=True)
    places = places_of(own, container)
    filled = {id(own[name]) for name in places.values()} | {id(counter) for _, counter in _counters(model)}
    missing = tuple(
        name for name, tensor in own.items() if isinstance(tensor, torch.Tensor) and id(tensor) not in filled
    )
    unexpected = tuple(r.name for r in container.records if r.info.role == "model" and r.name not in places)
    fit = Fit(own, places, missing, unexpected)
    _check_shapes(fit, container)
    if strict:
        _check_names(fit, container)
    return fit


def _counters(model: torch.nn.Module) -> Iterator[tuple[_NormBase, torch.Tensor]]:
    """How many batches a batch norm has seen: checkpoints of before torch 0.4.1 lack it, and torch does not miss it."""
    for module in model.modules():
        if isinstance(module, _NormBase) and isinstance(module.num_batches_tracked, torch.Tensor):
            yield module, module.num_batches_tracked


def places_of(names: Iterable[str], container: Container) -> dict[str, str]:
    """The names of a model's tensors by the container's, for those that both have."""
    known = set(names)
    theirs = [record.name for record in container.records if record.info.role == "model"]
    ours = matched(theirs, list(names))
    found = {name: ours.get(name, name) for name in theirs}
    return {name: other for name, other in found.items() if other in known}


def _check_shapes(fit: Fit, container: Container) -> None:
    shapes = {
        name: (tuple(fit.own[ours].shape), container.record(name).info.shape) for name, ours in fit.places.items()
    }
    others = [f"{name} is {theirs}, the model's {ours}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    if others:
        raise ContainerError(
            f"{container.path}: {len(others)} tensors have other shapes: {some(others)}; is it this model's?"
        )


def _check_names(fit: Fit, container: Container) -> None:
    missing, unexpected = fit.missing, fit.unexpected
    if not missing and not unexpected:
        return
    said = [f"it lacks {len(missing)} of the model's tensors ({some(missing)})"] * bool(missing)
    said += [f"the model has no place for {len(unexpected)} of its tensors ({some(unexpected)})"] * bool(unexpected)
    raise ContainerError(f"{container.path}: {' and '.join(said)}; strict=False loads what fits")


def some(names: Sequence[str]) -> str:
    """The first few of these, as a message tells them."""
    return ", ".join(names[:N_NAMED]) + (", ..." if len(names) > N_NAMED else "")


def fill(
    model: torch.nn.Module,
    fit: Fit,
    container: Container,
    chosen: Sequence[str],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    hook: Hook,
) -> None:
    """Decode the chosen tensors, in the container's names and order, which is the quickest, into their places."""
    done = Stage(hook, "decoding", sum(fit.own[fit.places[theirs]].numel() for theirs in chosen))
    names: dict[int, list[str]] = {}
    for name, tensor in fit.own.items():
        names.setdefault(id(tensor), []).append(name)
    filled: set[int] = set()
    for theirs in chosen:
        place = fit.own[fit.places[theirs]]
        if id(place) not in filled:  # tied parameters are one
            filled.add(id(place))
            decoded = container.decode(theirs)
            if place.is_meta:
                wanted = (dtype or place.dtype) if place.is_floating_point() else place.dtype
                made = decoded.to(device=device or "cpu", dtype=wanted)
                if isinstance(place, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=place.requires_grad)
                for name in names[id(place)]:
                    module, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(module), leaf, made)
            else:
                with torch.no_grad():
                    place.copy_(decoded)
        done(place.numel(), theirs)
    for norm, counter in list(_counters(model)):
        if counter.is_meta:
            norm.num_batches_tracked = torch.zeros_like(counter, device=device or "cpu")


def move(
    model: torch.nn.Module,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    but: Sequence[torch.Tensor] = (),
) -> None:
    """What the file did not hold goes along, unless it has no memory at all; `but` some tensors stay."""
    stay = {id(tensor) for tensor in but}
    if dtype is None and device is None:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta and id(tensor) not in stay:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device=device, dtype=wanted)
