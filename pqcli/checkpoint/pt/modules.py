"""A whole pickled `nn.Module` read as its state dict: as data, without its class, and nothing is run.

`torch.save(model)` pickles every module as its class and its attributes, among them three dicts: `_parameters`,
`_buffers` and `_modules`. From these the state dict follows, names and order as `model.state_dict()` has them. That is
true of plain modules only: one that changes how it is pickled, or what its state dict holds, does so by code, and is
refused by the name of its class.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from pqcli.checkpoint.pt.naming import tensors_in
from pqcli.checkpoint.pt.objects import Instance
from pqcli.checkpoint.pt.torch_objects import Attributed, TensorRef, Unsupported
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pqcli.checkpoint.limits import Budget
    from pqcli.checkpoint.pt.naming import Path

_PARTS: Final = ("_parameters", "_buffers", "_modules")
_HOOKS: Final = ("_state_dict_hooks", "_state_dict_pre_hooks")


def is_module(value: Any) -> bool:
    """Whether an object of a pickle is an `nn.Module`: it has what every module has."""
    return isinstance(value, Instance) and isinstance(value.state, dict) and all(part in value.state for part in _PARTS)


@dataclass(frozen=True)
class Unpacked:
    """A pickle's value with state dicts in place of its modules; `told` are places, each with what is left out."""

    value: Any
    told: tuple[tuple[Path, str], ...] = ()


def unpacked(value: Any, budget: Budget) -> Unpacked:
    """The value with the state dict of every module in its dicts, lists and tuples in the module's place.

    Raises `CheckpointError`, naming the class, for a module that is not plain.
    """
    walk = _Walk(budget)
    return Unpacked(walk.replaced(value, ()), tuple(walk.told))


@dataclass
class _Walk:
    budget: Budget
    told: list[tuple[Path, str]] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)
    _told_of: set[int] = field(default_factory=set)
    """Tensors that are in a state dict, or are told by their name."""

    def replaced(self, value: Any, path: Path) -> Any:
        """The value itself, or what takes its place."""
        self.budget.entries()
        self.budget.level(len(path))
        if is_module(value):
            return self._state_dict(value, path)
        if isinstance(value, Instance):
            value.state = self.replaced(value.state, path)
            return value
        if type(value) not in {dict, list, tuple, Attributed}:
            return value
        if id(value) in self._open:
            return value  # a cycle, which is refused where the structure is described
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                for key, item in value.items():
                    value[key] = self.replaced(item, (*path, str(key)))
                return value
            items = [self.replaced(item, (*path, str(i))) for i, item in enumerate(value)]
            if isinstance(value, list):
                value[:] = items
                return value
            return tuple(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
        finally:
            self._open.discard(id(value))

    def _state_dict(self, module: Instance, path: Path) -> Any:
        """The module's state dict; the module itself where that would be empty."""
        found = Attributed()
        for name, ref in self._entries(module, path):
            if name in found:
                raise CheckpointError(f"two tensors of {_called(module, path)} are called {ascii(name)[:100]}")
            self._told_of.add(id(ref))
            found[name] = ref
            if isinstance(ref, TensorRef):  # detached, as in a state dict
                found[name] = replace(ref, parameter=False, requires_grad=False)
        if not found:
            return module
        self.told.append((path, f"a whole module of the class {module.name[:120]}: comes back as its state dict"))
        left = {id(ref) for ref in tensors_in(module, self.budget.entries)} - self._told_of
        if left:
            tensors = f"{len(left)} tensor{'s' * (len(left) > 1)}"
            self.told.append((path, f"{tensors} in attributes of its modules: no part of its state dict"))
        return found

    def _entries(self, module: Instance, path: Path) -> Iterator[tuple[str, TensorRef | Unsupported]]:
        """The names and tensors of a module's state dict, in its order."""
        self.budget.entries()
        self.budget.level(len(path))
        if id(module) in self._open:
            raise CheckpointError(f"{_called(module, path)} contains itself")
        self._open.add(id(module))
        state = module.state
        if any(state.get(hooks) for hooks in _HOOKS):
            raise _not_plain(module, path, "code of its own decides what its state dict holds")
        passing = state.get("_non_persistent_buffers_set")
        for part in ("_parameters", "_buffers"):
            for name, value in self._named(module, part, path):
                if part == "_buffers" and isinstance(passing, Instance) and name in passing.elements:
                    self._told_of.add(id(value))
                    self.told.append(((*path, name), "a buffer that is not persistent: no part of the state dict"))
                elif isinstance(value, (TensorRef, Unsupported)):
                    yield name, value
                elif value is not None:
                    raise _not_plain(module, path, f"its {name!r} is {_kind(value)}")
        for name, value in self._named(module, "_modules", path):
            if is_module(value):
                yield from ((f"{name}.{below}", ref) for below, ref in self._entries(value, (*path, name)))
            elif value is not None:
                raise _not_plain(module, path, f"its part {name!r} is {_kind(value)}")
        self._open.discard(id(module))

    def _named(self, module: Instance, part: str, path: Path) -> Iterator[tuple[str, Any]]:
        entries = module.state[part]
        if type(entries) not in {dict, Attributed} or not all(isinstance(name, str) for name in entries):
            raise _not_plain(module, path, f"its {part} are no dict of names")
        for name, value in entries.items():
            self.budget.entries()
            yield name, value


def refusal(module: Instance, path: Path) -> CheckpointError:
    """What to say of a module where none was asked for."""
    return CheckpointError(
        f"{_called(module, path)} is a whole model, not its state dict: --from-module reads its parameters and buffers "
        f"without running anything. Or, if you trust the file, {_conversion(path)}"
    )


def _not_plain(module: Instance, path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{_called(module, path)} is no plain module ({why}), so only running its code would tell its tensors, and "
        f"pqcli refuses it. If you trust the file, {_conversion(path)}"
    )


def _conversion(path: Path) -> str:
    """The line of Python that makes a state dict of a whole model; it runs the file's code."""
    place = "".join(f"[{ascii(part)[:60]}]" for part in path)
    return f"convert it: torch.save(torch.load(path, weights_only=False){place}.state_dict(), 'weights.pt')"


def _called(module: Instance, path: Path) -> str:
    where = f" at {ascii('.'.join(path))[:120]}" if path else ""
    return f"its object of the class {ascii(module.name)[1:-1][:120]}{where}"


def _kind(value: Any) -> str:
    return (
        f"an object of {ascii(value.name)[1:-1][:120]}" if isinstance(value, Instance) else f"a {type(value).__name__}"
    )
