"""Running a model on text, and what is asked of its output so that layers are felt.

Language models, classifiers and all that have `logits` are asked for labels drawn from their own prediction; encoders
for a random projection of their output, which for a sentence encoder is the pooled vector that it is used for.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pqcli.integrations.loading import Runnable
    from pqcli.integrations.texts import Batch

IGNORED = -100
"""The label of what is not to be guessed, as in transformers."""
MASKED = 0.15
"""Share of the tokens that a masked language model gets to guess, as in its training."""


def output_of(runnable: Runnable, batch: Batch, generator: torch.Generator | None = None) -> Any:
    """What the model makes of a batch: its own output, or the vectors of sentences.

    A masked language model has some tokens masked where there is a `generator`. A model with a decoder gets the first
    half of every example to read and the second to write.
    """
    device = next(runnable.model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    if runnable.is_pair:
        return _pair(runnable, ids)
    if runnable.is_masked and generator is not None:
        ids = _masked(runnable, ids, mask, generator)
    output = runnable.model(**_accepted(runnable, {"input_ids": ids, "attention_mask": mask, "use_cache": False}))
    return output if runnable.pooling is None else pooled(output.last_hidden_state, mask, runnable.pooling)


def labels_of(runnable: Runnable, batch: Batch) -> torch.Tensor | None:
    """What the model should have said, -100 where nobody knows; None for models that are not asked for text."""
    if runnable.is_pair:
        return batch.ids[:, _half(batch.ids) :]
    return torch.where(batch.mask.bool(), batch.ids, IGNORED) if runnable.is_causal else None


def pooled(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Unit vectors (examples, c) of sentences from hidden states (examples, time, c)."""
    if how == "cls":
        return torch.nn.functional.normalize(hidden[:, 0], dim=-1)
    weights = mask[..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _accepted(runnable: Runnable, inputs: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(runnable.model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def _pair(runnable: Runnable, ids: torch.Tensor) -> Any:
    config = runnable.model.config
    candidates = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
    start = next((token for token in candidates if token is not None), 0)
    half = _half(ids)
    written = torch.cat([torch.full_like(ids[:, :1], start), ids[:, half:-1]], 1)
    inputs = {"input_ids": ids[:, :half], "decoder_input_ids": written, "use_cache": False}
    return runnable.model(**_accepted(runnable, inputs))


def _half(ids: torch.Tensor) -> int:
    return max(ids.shape[1] // 2, 1)


def _masked(runnable: Runnable, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    token = getattr(runnable.tokenizer, "mask_token_id", None)
    if token is None:
        return ids
    special = torch.tensor(runnable.tokenizer.all_special_ids, device=ids.device)
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED).to(ids.device)
    return torch.where(chosen & mask.bool() & ~torch.isin(ids, special), token, ids)
