"""`load_into`: the weights of a container go into a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pqcli.container.folder import compressed_folder
from pqcli.container.reader import Container, open_container
from pqcli.errors import ContainerError, UsageError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.events import Hook, Stage, ignore
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
    with open_container(_lone(file), limits=limits, base=base) as container:
        own = model.state_dict(keep_vars=True)
        places = _places(own, container)
        missing, unexpected = _unmatched(own, places, container)
        _check(own, places, container, (missing, unexpected) if strict else None)
        _fill(
            model,
            own,
            places,
            container,
            dtype,
            torch.device(device) if device is not None else None,
            hook_of(progress),
        )
    if dtype is not None or device is not None:
        _move(model, dtype, device)
    return Loaded(missing, unexpected)


def _lone(file: str | Path) -> Path:
    """The container; of a compressed folder, the one in it."""
    path = Path(file)
    if not path.is_dir():
        return path
    folder = compressed_folder(path)
    if len(folder.containers) > 1:
        raise UsageError(
            f"'{path}' holds {len(folder.containers)} containers ({', '.join(folder.containers.values())}); name one"
        )
    return path / next(iter(folder.containers.values()))


def _places(own: Mapping[str, object], container: Container) -> dict[str, str]:
    """The model's names by the container's, for the tensors of the model that the file holds."""
    theirs = [record.name for record in container.records if record.info.role == "model"]
    ours = matched(theirs, list(own))
    found = {name: ours.get(name, name) for name in theirs}
    return {name: other for name, other in found.items() if other in own}


def _unmatched(
    own: Mapping[str, torch.Tensor], places: Mapping[str, str], container: Container
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    filled = {id(own[name]) for name in places.values()}
    missing = tuple(
        name for name, tensor in own.items() if isinstance(tensor, torch.Tensor) and id(tensor) not in filled
    )
    unexpected = tuple(r.name for r in container.records if r.info.role == "model" and r.name not in places)
    return missing, unexpected


def _check(
    own: Mapping[str, torch.Tensor],
    places: Mapping[str, str],
    container: Container,
    unmatched: tuple[tuple[str, ...], tuple[str, ...]] | None,
) -> None:
    shapes = {name: (tuple(own[ours].shape), container.record(name).info.shape) for name, ours in places.items()}
    others = [f"{name} is {theirs}, the model's {ours}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    if others:
        raise ContainerError(
            f"{container.path}: {len(others)} tensors have other shapes: {_some(others)}; is it this model's?"
        )
    if unmatched is None or unmatched == ((), ()):
        return
    missing, unexpected = unmatched
    said = [f"it lacks {len(missing)} of the model's tensors ({_some(missing)})"] * bool(missing)
    said += [f"the model has no place for {len(unexpected)} of its tensors ({_some(unexpected)})"] * bool(unexpected)
    raise ContainerError(f"{container.path}: {' and '.join(said)}; strict=False loads what fits")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:N_NAMED]) + (", ..." if len(names) > N_NAMED else "")


def _fill(
    model: torch.nn.Module,
    own: Mapping[str, torch.Tensor],
    places: Mapping[str, str],
    container: Container,
    dtype: torch.dtype | None,
    device: torch.device | None,
    hook: Hook | None,
) -> None:
    """Decode in the file's order, which is the quickest."""
    done = Stage(hook or ignore, "decoding", sum(own[name].numel() for name in places.values()))
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    filled: set[int] = set()
    for theirs, ours in places.items():
        place = own[ours]
        if id(place) not in filled:  # tied parameters are one
            filled.add(id(place))
            decoded = container.decode(theirs)
            if place.is_meta:
                wanted = (dtype or place.dtype) if place.is_floating_point() else place.dtype
                made = decoded.to(device=device or torch.device("cpu"), dtype=wanted)
                if isinstance(place, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=place.requires_grad)
                for name in names[id(place)]:
                    module, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(module), leaf, made)
            else:
                with torch.no_grad():
                    place.copy_(decoded)
        done(place.numel(), theirs)


def _move(model: torch.nn.Module, dtype: torch.dtype | None, device: str | torch.device | None) -> None:
    """What the file did not hold goes along, unless it has no memory at all."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(device=device, dtype=wanted)
