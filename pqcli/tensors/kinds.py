"""What a tensor is, judged by its shape and its name: a checkpoint holds no model code to ask.

Everything here is a pure function of a `TensorInfo`. Three questions are answered:

1. *What kind is it?* `kind_of` names one of

   | kind                             | shape                                                                      |
   |----------------------------------|----------------------------------------------------------------------------|
   | `linear`                         | (out, in)                                                                  |
   | `embedding`                      | (n, width), the name says embedding; also ViT's position table (1, n, width) |
   | `conv1d3`, ...                   | (out, in, kernel): a Conv1d, kernel size after the `d`                     |
   | `conv1x1`, `conv3x3`, `conv3x3x3`| (out, in, *kernel): Conv2d, Conv3d, transposed or grouped ones too         |
   | `depthwise`                      | a convolution with one input channel per filter                            |
   | `experts`                        | (expert, a, b): the linear layers of a mixture of experts, fused           |
   | `vector`                         | at most one dimension, or ones around a single one: norms, biases, tokens  |
   | `other`                          | more than five dimensions                                                  |

   and two groups may be asked for as well: `conv` (any convolution, depthwise included), `pointwise` (kernel of ones).
   A first convolution on one-channel images cannot be told from a depthwise one.

2. *How is it laid out as rows?* `rows_and_columns`: blocks run along the columns, and never across two rows.

3. *Which block size suits it?* `auto_block_size`, from the literature.
"""

from __future__ import annotations

import re
from math import prod

from pqcli.tensors.info import TensorInfo

_NAMED_KINDS = ("linear", "embedding", "depthwise", "experts", "vector", "other")
_GROUPS = ("conv", "pointwise")
_CONV_KIND = re.compile(r"conv(1d[1-9]\d*|[1-9]\d*x[1-9]\d*(x[1-9]\d*)?)")
_EMBEDDING_NAME = re.compile(r"embed|(^|[._])(w[tp]e|emb|relative_attention_bias)([._]|$)", re.IGNORECASE)
_PROJECTION_NAME = re.compile(r"embeddings\.\d+\.1(\.weight)?$")
"""fairseq's adaptive embeddings: each band is a table (`.0`) and a linear projection (`.1`)."""
_LONGEST_CONV1D_KERNEL = 31
"""A third dimension above this is a matrix of a fused expert, unless the name says `conv` (wav2vec's has 128)."""

KINDS = (*_NAMED_KINDS, *_GROUPS, "conv1x1", "conv3x3", "conv5x5", "conv7x7", "conv1d1", "conv1d3")
"""The kinds and groups worth suggesting; convolutions of any other kernel size exist as well."""


def kind_of(info: TensorInfo) -> str:
    """The kind of a tensor, from the table in this module's docstring."""
    shape = info.shape
    if len(shape) < 2 or (len(shape) > 2 and sum(size != 1 for size in shape) <= 1):
        return "vector"
    if len(shape) > 5:
        return "other"
    embeds = bool(_EMBEDDING_NAME.search(info.name)) and not _PROJECTION_NAME.search(info.name)
    if len(shape) == 2:
        return "embedding" if embeds else "linear"
    if len(shape) == 3 and shape[2] > _LONGEST_CONV1D_KERNEL and "conv" not in info.name.lower():
        return "embedding" if shape[0] == 1 and embeds else "experts"
    if shape[1] == 1:
        return "depthwise"
    return f"conv1d{shape[2]}" if len(shape) == 3 else "conv" + "x".join(map(str, shape[2:]))


def is_kind(text: str) -> bool:
    """Whether `text` names a kind or a group."""
    return text in _NAMED_KINDS or text in _GROUPS or _CONV_KIND.fullmatch(text) is not None


def belongs(kind: str, wanted: str) -> bool:
    """Whether a tensor of `kind` is meant by `wanted`, a kind or a group."""
    if wanted == "conv":
        return kind.startswith("conv") or kind == "depthwise"
    if wanted == "pointwise":
        return kind == "conv1d1" or re.fullmatch(r"conv1(x1)+", kind) is not None
    return kind == wanted


def rows_and_columns(info: TensorInfo) -> tuple[int, int]:
    """The matrix (rows, columns) that a tensor is cut into blocks as; its data stay in their order.

    One row per output (`shape[0]`), except that every matrix of fused experts keeps its own rows, and that a `vector`
    is a single row.
    """
    kind = kind_of(info)
    if kind == "vector":
        return 1, info.numel
    if kind == "experts" or (kind == "embedding" and len(info.shape) == 3):
        return info.shape[0] * info.shape[1], info.shape[2]
    return info.shape[0], prod(info.shape[1:])


def auto_block_size(info: TensorInfo) -> int:
    """The block size the literature recommends for this kind of tensor, fitted to its number of columns.

    - Linear layers, embeddings, experts: 8. Fan et al., "Training with Quantization Noise" (arXiv:2004.07320), use it
      for the feed-forward layers and the embeddings of transformers.
    - Pointwise convolutions: 4. Stock et al., "And the Bit Goes Down" (arXiv:1907.05686), "small blocks".
    - 3x3 convolutions: 9, one kernel plane (same source). Other kernels follow the idea: as many whole planes as fit
      into 9 values (3 -> 9, 2x2 -> 8, 5 -> 5); a larger plane is divided evenly, into its largest divisor from 4 to 9
      (5x5 -> 5, 7x7 -> 7, 16x16 -> 8), or, where there is none, cut by 8.

    Rows that this size does not divide are padded, as long as that wastes no more than a twentieth. Otherwise the size
    within a third of it that pads least is taken (30 columns: 8 -> 6).
    """
    _, columns = rows_and_columns(info)
    preferred = min(_preferred(info), max(columns, 1))
    if -columns % preferred * 20 <= columns:
        return preferred
    nearby = range(-(-preferred * 2 // 3), preferred * 4 // 3 + 1)
    return min(nearby, key=lambda size: (-columns % size, abs(size - preferred), size))


def _preferred(info: TensorInfo) -> int:
    kind = kind_of(info)
    if not belongs(kind, "conv"):
        return 8
    plane = prod(info.shape[2:])
    if kind != "depthwise" and plane == 1:
        return 4
    if 1 <= plane <= 9:
        return plane * (9 // plane)
    return max((size for size in range(4, 10) if plane % size == 0), default=8)
