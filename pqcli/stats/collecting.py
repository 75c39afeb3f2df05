"""Watching a model run: which inputs reach each weight, and how much the network's output feels what leaves it.

    with pqcli.collect(model, gradients=True) as stats:
        for batch in loader:
            stats.backward(model(**batch))
    stats.save("model.stats.safetensors")

One torch function mode sees every `F.linear`, convolution, matrix product and embedding, whichever class calls it, and
knows the weight by its identity. So no layer needs a hook and nothing is attached to the model but one hook that reads
the padding mask; both are gone when the block ends, also by an exception. Weights whose values were copied in another
way than `.to()` and its kin (autocast, a fused kernel) are not recognised and get no statistics.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch.overrides import TorchFunctionMode

from pqcli.defaults import BLOCK_WIDTH, FULL_WIDTH
from pqcli.errors import StatsError
from pqcli.stats.patches import patches
from pqcli.stats.renaming import stacked_name
from pqcli.stats.sums import SiteSums, WeightSums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from pqcli.stats.moments import Moments, Statistics

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
_COPIES = (
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type,
    torch.Tensor.type_as, torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.cpu, torch.Tensor.cuda,
)  # fmt: skip
_SOURCE = "_pqcli_source"
Samples = tuple[torch.Tensor, torch.Tensor | None]
"""Examples (examples, n, c), and which of the n are no padding (examples, n) where some are."""
_CHUNK = 1 << 24
"""Numbers of patches that are laid out at a time."""
_NARROWEST = 64
"""Width of blocks, at least, however many matrices a stack has."""


def collect(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    *,
    gradients: bool = False,
    full_width: int = FULL_WIDTH,
    block_width: int = BLOCK_WIDTH,
    seed: int = 0,
    split_stacks: bool = False,
) -> Collector:
    """A context manager in which every run of `model` adds to the statistics of its weights.

    `model` is a module, or names and tensors (a state dict) where the forward pass is code of your own. With
    `gradients`, call `backward` with each output; weights take no gradients of their own meanwhile. Matrices wider than
    `full_width` are kept as blocks of `block_width`. `seed` draws projections, labels and the places of large images.
    The matrices of a stack (experts in one parameter) are pooled; with `split_stacks` each has statistics of its own,
    named `NAME[3]`.

    Memory, until the statistics are saved: 4 c^2 bytes for each input of c columns up to `full_width`, and
    4 c `block_width` beyond; a split stack takes no more than one matrix of `full_width`.
    """
    return Collector(
        model,
        gradients=gradients,
        full_width=full_width,
        block_width=block_width,
        seed=seed,
        split_stacks=split_stacks,
    )


class Collector(TorchFunctionMode):
    """Statistics in the making; made by `collect`. They can be read and saved inside the block and after it."""

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        gradients: bool,
        full_width: int,
        block_width: int,
        seed: int,
        split_stacks: bool,
    ) -> None:
        super().__init__()
        if full_width < 0 or block_width < 1:
            raise StatsError(f"widths must be positive, not {full_width} and {block_width}")
        self._model = model if isinstance(model, torch.nn.Module) else None
        self._gradients, self._full_width, self._block_width = gradients, full_width, block_width
        self._split_stacks = split_stacks
        self._generator = torch.Generator().manual_seed(seed)
        self._names: dict[int, str] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, str] = {}
        for name, tensor in _named_tensors(model):
            first = self._names.setdefault(id(tensor), name)
            if first == name:
                self._weights[name] = tensor
            else:
                self._aliases[name] = first
        self._n_stacked: dict[str, int] = {}
        self._n_groups: dict[str, int] = {}
        self._sites = _Sites()
        self._sums: dict[str, WeightSums] = {}
        self._mask: torch.Tensor | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._leaving = contextlib.ExitStack()

    @property
    def has_gradients(self) -> bool:
        """Whether `backward` may be called."""
        return self._gradients

    # --- the block ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Collector:
        if self._model is not None:
            handle = self._model.register_forward_pre_hook(self._read_mask, with_kwargs=True)
            self._leaving.callback(handle.remove)
            # the fused attention of torch's own transformer shows no linear layer
            self._leaving.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving.close()
        self._mask = None
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def masked(self, mask: torch.Tensor | None) -> Iterator[None]:
        """Leave padding out of what runs inside: `mask` (examples, time) is 0 there. For models that are plain code."""
        before, self._mask = self._mask, None if mask is None else mask.bool()
        try:
            yield
        finally:
            self._mask = before

    def backward(self, output: Any = None, *, logits: torch.Tensor | None = None) -> None:
        """Add the gradients of one run, given what the network returned. Needs `gradients=True`.

        A tensor (or `last_hidden_state` of a transformers output) is projected on a random direction; with `logits`
        (..., classes), or an output that has them, the loss is that of labels drawn from the model's own prediction.
        Padding counts for neither. No parameter's `.grad` is touched.
        """
        if not self._gradients:
            raise StatsError("this collection has no gradients; call collect(model, gradients=True)")
        if logits is None:
            logits = getattr(output, "logits", None)
        loss = self._label_loss(logits) if logits is not None else self._projection(output)
        if not loss.requires_grad:
            raise StatsError(
                "the output depends on no watched layer; run the model inside the block, with gradients on"
            )
        # with the parameters that ask for gradients, so that layers before the anchor's place are reached too
        leaves = [w for w in self._weights.values() if w.requires_grad and w.is_leaf]
        torch.autograd.grad(loss, [self._anchor, *leaves], allow_unused=True)

    def save(self, path: str | Path, *, dtype: str = "float16", force: bool = False) -> None:
        """Write the statistics; see `pqcli.stats.files.save`."""
        from pqcli.stats.files import save

        save(self.statistics(), path, dtype=dtype, force=force)

    def moments(self, name: str) -> Moments | None:
        """What is known about the weight so far; None where nothing is."""
        return self.statistics().moments(name)

    def statistics(self) -> Statistics:
        """The sums so far, as they would be read from a file."""
        from pqcli.stats.moments import Statistics

        return Statistics(dict(self._sums), dict(self._aliases), len(self._sites.sums), self._sites.sums.__getitem__)

    # --- losses ---------------------------------------------------------------------------------------------------

    def _projection(self, output: Any) -> torch.Tensor:
        value = getattr(output, "last_hidden_state", output)
        if not isinstance(value, torch.Tensor):
            raise StatsError("backward() wants a tensor, or an output with `logits` or `last_hidden_state`")
        direction = torch.randn(value.shape, generator=self._generator).to(value.device, value.dtype)
        if self._mask is not None and value.shape[:2] == self._mask.shape and value.dim() > 2:
            direction = direction * self._mask[..., None]
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - the only name it has
            return (value * direction).sum()

    def _label_loss(self, logits: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - the only name it has
            rows = logits.flatten(0, -2).float()
            if self._mask is not None and logits.shape[:-1] == self._mask.shape:
                rows = rows[self._mask.flatten()]
            # inverse transform sampling with an own generator: no global random state is touched
            levels = rows.detach().softmax(-1).cumsum(-1)
            draws = torch.rand(len(rows), 1, generator=self._generator).to(rows.device) * levels[:, -1:]
            labels = torch.searchsorted(levels, draws).clamp_(max=rows.shape[-1] - 1)
            return F.cross_entropy(rows, labels[:, 0], reduction="sum")

    # --- what the mode sees ---------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # gradient checkpointing runs a layer a second time during the backward pass
        if torch._C._current_graph_task_id() != -1:  # noqa: SLF001 - the only way to ask
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._convolution(func, _CONVOLUTIONS[func], *args, **kwargs)
        if func in _TRANSPOSED:
            return self._transposed(func, *args, **kwargs)
        if func is F.embedding:
            return self._embedding(
                func, args[0], args[1] if len(args) > 1 else kwargs.pop("weight"), *args[2:], **kwargs
            )
        if func is torch.addmm or func in _PRODUCTS:
            return self._product(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _COPIES and isinstance(result, torch.Tensor):
            known = self._find(args[0])
            if known is not None and result is not args[0]:
                setattr(result, _SOURCE, known)
        return result

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002 - torch's keyword
        found = self._place(weight)
        if found is None:
            return F.linear(input, weight, bias)
        name, axis = found
        self._see(name, axis, input, lambda: [_laid_out(input, self._mask)])
        output, mask = F.linear(input, weight.detach() if self._gradients else weight, bias), self._mask
        return self._feel(name, output, lambda g: _laid_out(g, mask))

    def _convolution(
        self,
        func: Callable[..., torch.Tensor],
        n: int,
        input: torch.Tensor,  # noqa: A002 - torch's keyword
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        name = self._find(weight)
        if name is None:
            return func(input, weight, bias, stride, padding, dilation, groups)
        kernel, steps, spread = tuple(weight.shape[2:]), _each(stride, n), _each(dilation, n)
        zeros = _zeros(padding, kernel, spread)

        def rows() -> Iterator[Samples]:
            x = input.detach() if input.dim() == n + 2 else input.detach()[None]
            size = max(1, _CHUNK // max(1, 256 * weight[0].numel() * groups))
            for part in torch.split(x, size):
                yield patches(part, kernel, steps, zeros, spread, groups, self._generator), None

        self._see(name, 1, input, rows, (kernel, steps, zeros, spread, groups))
        used = weight.detach() if self._gradients else weight
        output = func(input, used, bias, stride, padding, dilation, groups)
        return self._feel(name, output, lambda g: _channels_last(g, n))

    def _transposed(
        self,
        func: Callable[..., torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - torch's keyword
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> torch.Tensor:
        how = bias, stride, padding, output_padding, groups, dilation
        name = self._find(weight)
        if name is None:
            return func(input, weight, *how)
        n = weight.dim() - 2
        self._n_groups[name] = groups
        self._see(name, 0, input, lambda: [_channels_last(input.detach(), n)], ("groups", groups))
        output = func(input, weight.detach() if self._gradients else weight, *how)
        return self._feel(name, output, lambda g: _channels_last(g, n))

    def _product(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x @ W` and `addmm(bias, x, W)`: the input's columns are rows of W (unless W is a transposed view)."""
        place = 1 if func is not torch.addmm else 2
        if len(args) != place + 1:
            return func(*args, **kwargs)
        x, weight = args[place - 1], args[place]
        found = self._place(weight.mT) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None
        known = self._find(weight)
        if known is not None:
            found = (known, 0)
        if found is None or not isinstance(x, torch.Tensor) or x.dim() < 2:
            return func(*args, **kwargs)
        name, axis = found
        self._see(name, axis, x, lambda: [_laid_out(x, self._mask)])
        used = weight.detach() if self._gradients else weight
        output, mask = func(*args[:place], used, **kwargs), self._mask
        return self._feel(name, output, lambda g: _laid_out(g, mask))

    def _embedding(
        self,
        func: Callable[..., torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - torch's keyword
        weight: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        name = self._find(weight)
        if name is None:
            return func(input, weight, *args, **kwargs)
        sums = self._of(name)
        seen = input.detach()
        mask = self._mask
        if mask is not None and (seen.shape == mask.shape or (seen.dim() == 2 and seen.shape[1] == mask.shape[1])):
            seen = seen.expand(mask.shape)[mask.to(seen.device)]
        counts = torch.bincount(seen.flatten(), minlength=weight.shape[0]).double()
        sums.lookups = counts if sums.lookups is None else sums.lookups + counts
        output = func(input, weight.detach() if self._gradients else weight, *args, **kwargs)
        if not self._differentiable():
            return output
        output = self._attached(output)
        shared = mask is not None and seen.shape != input.shape and input.shape != mask.shape

        def felt(gradient: torch.Tensor) -> None:
            rows = gradient.detach().double().square().mean(-1)
            if mask is not None and rows.shape == mask.shape:
                rows = rows[mask.to(rows.device)]
            sums.lookup_gradient += float(rows.sum())
            sums.n_lookup_gradient += float(seen.numel()) if shared else float(rows.numel())

        output.register_hook(felt)  # type: ignore[no-untyped-call]
        return output

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Torch's multi-head attention, its projections taken out so that they are seen as the linear layers they are.

        What is left runs with identity matrices in their place, which changes nothing.
        """
        names = ("embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
                 "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names):
            given |= dict(zip(("training", "key_padding_mask", "need_weights", "attn_mask"), args[10:], strict=False))
        separate = given.pop("use_separate_proj_weight", False)
        own = [given.pop(f"{part}_proj_weight", None) for part in "qkv"]
        packed, bias = given.pop("in_proj_weight"), given.pop("in_proj_bias")
        width = query.shape[-1]
        if separate:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (self._linear(x, w, b) for x, w, b in zip((query, key, value), own, biases, strict=True))
        elif query is key and key is value:
            q, k, v = self._linear(query, packed, bias).chunk(3, -1)
        else:
            rows = [packed[i * width : (i + 1) * width] for i in range(3)]
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (self._linear(x, w, b) for x, w, b in zip((query, key, value), rows, biases, strict=True))
        same = torch.eye(width, dtype=q.dtype, device=q.device)
        out_weight, out_bias = given.pop("out_proj_weight"), given.pop("out_proj_bias")
        mixed, shares = F.multi_head_attention_forward(
            q, k, v, in_proj_weight=None, in_proj_bias=None, out_proj_weight=same, out_proj_bias=None,
            use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same, v_proj_weight=same, **given,
        )  # fmt: skip
        return self._linear(mixed, out_weight, out_bias), shares

    # --- bookkeeping ----------------------------------------------------------------------------------------------

    def _find(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        return self._names.get(id(tensor)) or getattr(tensor, _SOURCE, None)

    def _place(self, weight: torch.Tensor) -> tuple[str, int] | None:
        """The name of a linear layer's weight (out, in), and the dimension of the named tensor that `in` belongs to."""
        name = self._find(weight)
        if name is not None:
            return name, 1
        base = weight._base  # noqa: SLF001 - the only way to ask what a view looks at
        name = self._find(base)
        if base is None or name is None or weight.dim() != 2 or base.dim() not in (2, 3):
            return None
        if base.dim() == 3 and self._split_stacks:
            name = stacked_name(name, (weight.storage_offset() - base.storage_offset()) // base.stride(0))
            self._n_stacked[name] = len(base)
        last, second_last = base.stride(-1), base.stride(-2)
        if weight.stride(1) == last and weight.shape[1] == base.shape[-1]:
            return name, 1 if base.dim() == 2 else -1
        if weight.stride(1) == second_last and weight.stride(0) == last and weight.shape[1] == base.shape[-2]:
            return name, 0 if base.dim() == 2 else -2
        return None

    def _of(self, name: str) -> WeightSums:
        return self._sums.setdefault(name, WeightSums())

    def _see(
        self,
        name: str,
        axis: int,
        x: torch.Tensor,
        rows: Callable[[], Iterable[Samples]],
        how: tuple[Any, ...] | None = None,
    ) -> None:
        """Add the input `x`, as the examples that `rows` gives, unless a layer that shares it has done so."""
        sums = self._of(name)
        sums.axis = axis
        with torch.inference_mode(False), torch.no_grad():
            new, index = self._sites.enter(name, x, how)
            sums.site = index
            if new:
                self._sites.add(index, rows(), *self._widths(name, x.shape[-1]))

    def _widths(self, name: str, columns: int) -> tuple[int, int]:
        """Columns up to which the whole matrix is kept, and the width of blocks beyond.

        All matrices of a stack together take no more than one whole matrix of the widest kind. Of a transposed
        convolution in groups the blocks are the groups: inputs of different ones reach different outputs.
        """
        n_groups = self._n_groups.get(name, 1)
        if n_groups > 1:
            width = len(self._weights[name]) // n_groups
            return 0, width if width <= self._full_width else math.gcd(width, self._block_width)
        n_stacked = self._n_stacked.get(name, 1)
        most = self._full_width**2
        if n_stacked == 1 or n_stacked * columns**2 <= most:
            return self._full_width, self._block_width
        return 0, max(min(self._block_width, most // (n_stacked * columns)), _NARROWEST)

    def _differentiable(self) -> bool:
        return self._gradients and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def _attached(self, output: torch.Tensor) -> torch.Tensor:
        """`output` on a path to the anchor, so that a gradient reaches it whatever the parameters ask for."""
        if output.requires_grad:
            return output
        return output + self._anchor.to(output.device, output.dtype)

    def _feel(self, name: str, output: torch.Tensor, rows: Callable[[torch.Tensor], Samples]) -> torch.Tensor:
        if not self._differentiable():
            return output
        output = self._attached(output)
        sums = self._of(name)

        def felt(gradient: torch.Tensor) -> None:
            samples, kept = rows(gradient.detach())
            flat = samples.flatten(0, 1) if kept is None else samples[kept]
            squares = flat.float().square().sum(0, dtype=torch.float64)
            if sums.gradient is None:
                sums.gradient = squares
            elif len(squares) == len(sums.gradient):
                sums.gradient = sums.gradient + squares
            else:  # slices of a packed weight may differ in rows: only their mean is kept
                sums.gradient = sums.gradient.mean().reshape(1) + squares.mean().reshape(1)
            sums.n_gradient += len(flat)

        output.register_hook(felt)  # type: ignore[no-untyped-call]
        return output

    def _read_mask(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import inspect

        mask = kwargs.get("attention_mask")
        if mask is None and args:
            names = list(inspect.signature(model.forward).parameters)
            mask = dict(zip(names, args, strict=False)).get("attention_mask")
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2
        self._mask = mask.bool() if usable and mask is not None else None


class _Sites:
    """Inputs that were seen, and which weights share them.

    A weight joins the site of the input it is called with first. Should it later be called with another one, it leaves
    with a copy of the sums.
    """

    def __init__(self) -> None:
        self.sums: list[SiteSums] = []
        self._examples: list[int] = []
        self._members: list[set[str]] = []
        self._done: list[set[str]] = []
        self._input: list[tuple[weakref.ref[torch.Tensor], int, Any] | None] = []
        self._site: dict[str, int] = {}
        self._latest: dict[int, int] = {}

    def enter(self, name: str, x: torch.Tensor, how: Any) -> tuple[bool, int]:
        """Whether these samples have still to be added, and the site they belong to (its sums are made in `add`)."""
        index = self._site.get(name)
        if index is None:
            index = self._latest.get(id(x), -1)
            if index < 0 or not self._is_current(index, x, how):
                return True, self._open(name, x, how)
            self._site[name] = index
            self._members[index].add(name)
        if self._is_current(index, x, how) and name not in self._done[index]:
            self._done[index].add(name)
            return False, index
        return True, self._next(index, name, x, how)

    def _next(self, index: int, name: str, x: torch.Tensor, how: Any) -> int:
        """A new input for the site; those who did not take the last one leave first."""
        late = self._members[index] - self._done[index]
        if name in late:
            # it is called with something else while its companions had an input that it has not seen
            late = {name}
        for each in late:
            copy = self._open(each, None, None)
            self.sums[copy] = self.sums[index].copy()
            self._examples[copy] = self._examples[index]
            self._members[index].discard(each)
        index = self._site[name]
        self._done[index] = {name}
        self._remember(index, x, how)
        return index

    def _open(self, name: str, x: torch.Tensor | None, how: Any) -> int:
        index = len(self.sums)
        self.sums.append(_NOTHING)
        self._examples.append(0)
        self._members.append({name})
        self._done.append({name})
        self._input.append(None)
        self._site[name] = index
        if x is not None:
            self._remember(index, x, how)
        return index

    def _remember(self, index: int, x: torch.Tensor, how: Any) -> None:
        self._input[index] = (weakref.ref(x), _version(x), how)
        self._latest[id(x)] = index

    def _is_current(self, index: int, x: torch.Tensor, how: Any) -> bool:
        known = self._input[index]
        return known is not None and known[0]() is x and known[1] == _version(x) and known[2] == how

    def add(self, index: int, samples: Iterable[Samples], full_width: int, block_width: int) -> None:
        """Add samples to the site; every other example goes to the second half."""
        for part, kept in samples:
            if self.sums[index] is _NOTHING:
                self.sums[index] = SiteSums.empty(part.shape[-1], part.device, full_width, block_width)
            first = self._examples[index] % 2
            for half in (0, 1):
                chosen = slice((half - first) % 2, None, 2)
                rows = part[chosen].flatten(0, 1) if kept is None else part[chosen][kept[chosen]]
                if len(rows):
                    self.sums[index].add(rows.float(), half)
            self._examples[index] += len(part)


_NOTHING = SiteSums(0, "diagonal", 0, None, torch.zeros(2, 0), None, None)


def _named_tensors(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, torch.nn.Module):
        yield from model.named_parameters(remove_duplicate=False)
    elif isinstance(model, Mapping):
        yield from ((name, tensor) for name, tensor in model.items() if isinstance(tensor, torch.Tensor))
    else:
        raise StatsError(f"collect() wants a module or names with tensors, not {type(model).__name__}")


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version  # noqa: SLF001 - the only way to ask


def _laid_out(x: torch.Tensor, mask: torch.Tensor | None) -> Samples:
    """Samples of a linear layer's input or output (..., c); the mask is used where its shape says that it fits."""
    x = x.detach()
    if mask is not None and x.dim() == 2 and len(x) == mask.numel():
        x = x.view(*mask.shape, -1)
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x, mask.to(x.device)
    return x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1]), None


def _channels_last(x: torch.Tensor, n: int) -> Samples:
    """Samples of `x` ([examples,] channels, *space) with `n` dimensions of space: every place."""
    x = x if x.dim() == n + 2 else x[None]
    return x.flatten(2).mT, None


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)


def _zeros(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after in each dimension, as a convolution's `padding` says it."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _each(padding, len(kernel)))
