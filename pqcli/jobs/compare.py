"""`compare`: how far a whole network is from what it was, when its weights come out of a container."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pqcli.core.outputs import OutputSums, PredictionSums, neighbours_agree
from pqcli.defaults import N_LINES_COMPARED, N_WINDOWS_COMPARED
from pqcli.errors import ContainerError, UsageError
from pqcli.integrations.running import IGNORED
from pqcli.jobs import notebook
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.decode import load
from pqcli.jobs.events import Hook, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pqcli.jobs.calibrate import Sampling


@dataclass(frozen=True)
class LayerComparison:
    """How far the output of one layer is, the errors of all before it included."""

    name: str
    relative_mse: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of a network are from what they were. What does not apply is None.

    relative_mse, cosine        |y - y'|^2 / |y|^2 of the outputs (logits, hidden states, or vectors), their mean cosine
    kl_divergence, agreement    of predictions: mean divergence in nats; share with the same most likely class
    perplexity, dense_perplexity  of the decoded and of the original network, where there are labels
    neighbours                  of vectors: share of the examples whose nearest neighbour is the same
    layers                      layer by layer, where asked
    """

    n_examples: int
    relative_mse: float
    cosine: float
    kl_divergence: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    dense_perplexity: float | None = None
    neighbours: float | None = None
    layers: tuple[LayerComparison, ...] = ()

    def __repr__(self) -> str:
        return notebook.comparison_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.comparison_page(self)


@showing
def compare(
    model: torch.nn.Module,
    file: str | Path,
    batches: Iterable[Any],
    *,
    by_layer: bool = False,
    base: str | Path | Sequence[str | Path] = (),
    progress: Progress = None,
) -> Comparison:
    """Run a model with its own weights and with those of a container, and say how far the outputs are.

    `model` holds the original weights and is left as it is; a copy of it takes the decoded ones, by the names of its
    state dict. A batch is a tensor, a tuple of arguments or a dict of them. With `labels` in a dict (for language
    models as transformers wants them, -100 for what does not count) there are perplexities; the model does not get
    them. `attention_mask` leaves padding out. `base` as for `decode`. Needs the memory of two models.

    Raises ContainerError where the file is damaged, or is of another model.
    """
    decoded = copy.deepcopy(model)
    _take(decoded, load(file, base=base), Path(file))
    return compare_models(model, decoded, batches, by_layer=by_layer, progress=progress)


@showing
def compare_folder(
    folder: str | Path,
    file: str | Path,
    text: Sequence[str | Path],
    sampling: Sampling | None = None,
    *,
    by_layer: bool = False,
    base: str | Path | Sequence[str | Path] = (),
    progress: Progress = None,
) -> Comparison:
    """The same for the model of a Hugging Face folder, on text; see `calibrate` for how examples are drawn.

    Raises what `calibrate` raises, too.
    """
    from pqcli.integrations import loading, running, texts
    from pqcli.jobs.calibrate import Sampling, drawn

    sampling = sampling or Sampling()
    folder = Path(folder)
    dense = loading.load(folder, sampling.dtype)
    decoded = loading.load(folder, sampling.dtype, load(file, base=base))
    lacking = set(decoded.missing) - set(dense.missing)
    if lacking:
        raise ContainerError(
            f"{file}: has no '{min(lacking)}' ({len(lacking)} parameters of the model are not in it); was it made from "
            f"'{folder}'?"
        )
    examples = drawn(dense, [Path(path) for path in text], sampling, N_WINDOWS_COMPARED, N_LINES_COMPARED)
    padding = getattr(dense.tokenizer, "pad_token_id", None) or 0
    batches = [
        {"batch": batch, "attention_mask": batch.mask, "labels": running.labels_of(dense, batch)}
        for batch in texts.batches(examples.ids, examples.batch, padding)
    ]

    def run(runnable: loading.Runnable) -> Callable[[Any], Any]:
        return lambda batch: running.output_of(runnable, batch["batch"])

    return _compared(
        (dense.model, run(dense)), (decoded.model, run(decoded)), batches, dense.is_causal, by_layer, hook_of(progress)
    )


@showing
def compare_models(
    dense: torch.nn.Module,
    decoded: torch.nn.Module,
    batches: Iterable[Any],
    *,
    by_layer: bool = False,
    progress: Progress = None,
) -> Comparison:
    """How far the outputs of `decoded` are from those of `dense`."""
    is_causal = type(dense).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    pairs = ((dense, lambda batch: _called(dense, batch)), (decoded, lambda batch: _called(decoded, batch)))
    return _compared(*pairs, batches, is_causal, by_layer, hook_of(progress))


Run = tuple[torch.nn.Module, "Callable[[Any], Any]"]


def _compared(
    dense: Run, decoded: Run, batches: Iterable[Any], is_causal: bool, by_layer: bool, hook: Hook
) -> Comparison:
    outputs, predictions = OutputSums(), PredictionSums()
    layers: dict[str, OutputSums] = {}
    vectors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    n_examples = 0
    stage = Stage(hook, "comparing", len(batches) if isinstance(batches, Sequence) else 0)
    for batch in batches:
        with torch.inference_mode():
            found = []
            for model, run in (dense, decoded):
                with _recorded(model, by_layer) as seen:
                    found.append((*_output(run(batch)), seen))
        (before, has_logits, seen), (after, _, seen_after) = found
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        n_examples += len(before)
        outputs.add(_rows(before, mask), _rows(after, mask))
        if has_logits:
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            predictions.add(*_predictions(before, after, mask, labels, is_causal))
        else:
            for each, kept in zip((before, after), vectors, strict=True):
                kept.append(_vectors(each, mask))
        for name, value in seen.items():
            layers.setdefault(name, OutputSums()).add(_rows(value, mask), _rows(seen_after[name], mask))
        stage(1, "")
    if not n_examples:
        raise UsageError("there is nothing to compare on: no batches")
    perplexities = predictions.perplexities
    return Comparison(
        n_examples=n_examples,
        relative_mse=outputs.relative_mse,
        cosine=outputs.cosine,
        kl_divergence=_known(predictions.kl_divergence),
        agreement=_known(predictions.agreement),
        perplexity=_known(perplexities[1]),
        dense_perplexity=_known(perplexities[0]),
        neighbours=_known(neighbours_agree(*map(torch.cat, vectors))) if vectors[0] else None,
        layers=tuple(LayerComparison(name, sums.relative_mse, sums.cosine) for name, sums in layers.items()),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _called(model: torch.nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _output(output: Any) -> tuple[torch.Tensor, bool]:
    """The tensor of an output, and whether it is logits."""
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits, True
    value = getattr(output, "last_hidden_state", output)
    value = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"the model gave {type(value).__name__}; compare wants a tensor, logits or hidden states")
    return value, False


def _rows(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Samples (n, c) of an output, without padding where the mask fits."""
    if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape:
        return value[mask.bool()]
    if mask is not None and value.dim() == 2 and len(value) == mask.numel():
        return value[mask.flatten().bool()]
    if value.dim() > 3 or value.dim() == 1:
        return value.reshape(len(value), -1)  # images, numbers: an example is a sample
    return value.reshape(-1, value.shape[-1])


def _vectors(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One vector for each example: the mean over time where there is time."""
    if value.dim() == 3 and mask is not None and value.shape[:2] == mask.shape:
        weights = mask[..., None].to(value.dtype)
        return (value * weights).sum(1) / weights.sum(1).clamp_min(1)
    return value.mean(1) if value.dim() == 3 else value.flatten(1) if value.dim() > 1 else value[:, None]


def _predictions(
    before: torch.Tensor,
    after: torch.Tensor,
    mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits as rows, and their targets: those of the next token where the model reads from left to right."""
    targets = None
    if labels is not None and labels.shape == before.shape[:-1]:
        targets = labels.clone()
        if is_causal:
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)
    fits = mask is not None and before.dim() == 3 and before.shape[:2] == mask.shape
    if targets is not None:
        targets = targets[mask.bool()] if fits and mask is not None else targets.flatten()
    return _rows(before, mask), _rows(after, mask), targets


@contextmanager
def _recorded(model: torch.nn.Module, by_layer: bool) -> Iterator[dict[str, torch.Tensor]]:
    """What every layer with a weight of two dimensions or more gives, by the weight's name, while the block runs."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(_module: Any, _arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen[name] = output.detach()

        return record

    for name, module in model.named_modules() if by_layer else ():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() > 1:
            handles.append(module.register_forward_hook(recorder(f"{name}.weight" if name else "weight")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _take(model: torch.nn.Module, decoded: Mapping[str, torch.Tensor], file: Path) -> None:
    """Put decoded tensors in the place of the model's own; all of the model's matrices must be there."""
    own = model.state_dict()
    shared = {name: tensor for name, tensor in decoded.items() if name in own and own[name].shape == tensor.shape}
    lacking = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and name not in shared]
    if lacking:
        theirs = ", ".join(list(decoded)[:2])
        raise ContainerError(
            f"{file}: has no '{lacking[0]}' of the model's shape ({len(lacking)} weights lack; it holds {theirs}, "
            "...); was it made from this model's state dict?"
        )
    model.load_state_dict(shared, strict=False)
