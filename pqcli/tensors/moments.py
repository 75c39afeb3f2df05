"""Which tensors of a training run are moments of an optimizer, and of which form: told by where they lie.

An optimizer of torch saves `{"state": {parameter: {"exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": ...}`, wherever
that lies in a checkpoint, and distributed checkpoints save the same with joined names. So a moment is a tensor of the
training run whose name ends in `state.PARAMETER.WORD` with one of the words below. All else (step counters, master
copies of weights, preconditioners, quantized states, generator states) is none, whatever it may be.
"""

from __future__ import annotations

import re
from typing import Final

from pqcli.tensors.info import TensorInfo

_FIRST: Final = ("exp_avg", "exp_avg_slow", "exp_avg_fast", "exp_avg_diff", "momentum_buffer", "grad_avg")
"""Adam and its kin, AdEMAMix, Adan; SGD; RMSprop. They have signs."""
_SECOND: Final = (
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum",
    "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance",
)  # fmt: skip
"""Adam, AMSGrad, Adamax; RMSprop, Adadelta, Adagrad; Adafactor of transformers and of torch. None is negative."""
_FORMS: Final = dict.fromkeys(_FIRST, "first") | dict.fromkeys(_SECOND, "second")
_NAME: Final = re.compile(rf"(?:.*\.)?state\..+\.({'|'.join(_FORMS)})(?:~\d+)?", re.DOTALL)


def form_of(info: TensorInfo) -> str | None:
    """The form of an optimizer's moment, "first" or "second"; None for any other tensor."""
    found = None if info.role == "model" else _NAME.fullmatch(info.name)
    return _FORMS[found[1]] if found else None


def is_moment_name(name: str) -> bool:
    """Whether a tensor is called as moments of optimizers are, wherever it lies."""
    return _NAME.fullmatch(name) is not None
