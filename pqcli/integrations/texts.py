"""Texts become what a model runs on: windows of running text, or lines, drawn at random from all that there is.

Variety matters more than amount: a sample of one kind of text teaches an encoder that kind only. So examples come from
the whole of all files, wherever they lie in them, and none comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pqcli.errors import StatsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MOST_BYTES = 16 << 20
"""Text that is looked at: of more, chunks from all over are drawn."""
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True)
class Batch:
    """Token ids (examples, time) and a mask of the same shape, 0 where there is padding."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.mask.sum())


def windows(tokenizer: Any, paths: Sequence[Path], n: int, length: int, seed: int) -> list[list[int]]:
    """At most `n` stretches of `length` tokens, the tokens that the tokenizer puts around a text included.

    They do not overlap. Where the texts are shorter than one window, there is one, as long as they are.
    """
    before, after = _around(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise StatsError(f"a window of {length} tokens has no room for text; use --length {len(before + after) + 16}")
    generator = np.random.default_rng(seed)
    found: list[list[int]] = []
    longest: list[int] = []
    for text in _pieces(paths, generator):
        ids = _ids(tokenizer, text)
        start = int(generator.integers(len(ids) % room + 1)) if len(ids) >= room else 0
        found += [ids[i : i + room] for i in range(start, len(ids) - room + 1, room)]
        longest = max(longest, ids, key=len) if len(longest) < room else longest
    if not found:
        found = [longest] if longest else []
    return [before + ids + after for ids in _drawn(found, n, generator, paths)]


def lines(tokenizer: Any, paths: Sequence[Path], n: int, length: int, seed: int) -> list[list[int]]:
    """At most `n` different lines that are not empty, as tokens, cut at `length` tokens; short ones first."""
    before, after = _around(tokenizer)
    generator = np.random.default_rng(seed)
    whole = {line.strip(): None for text in _pieces(paths, generator) for line in text.splitlines()}
    chosen = _drawn([line for line in whole if line], n, generator, paths)
    room = max(length - len(before) - len(after), 1)
    return sorted((before + _ids(tokenizer, line)[:room] + after for line in chosen), key=len)


def batches(examples: Sequence[list[int]], size: int, padding: int) -> Iterator[Batch]:
    """Examples in their order, `size` at a time, padded on the right."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        yield Batch(ids, mask)


def _drawn(found: list[Any], n: int, generator: np.random.Generator, paths: Sequence[Path]) -> list[Any]:
    if not found:
        raise StatsError(f"{', '.join(map(str, paths))}: no text in it")
    return [found[i] for i in generator.permutation(len(found))[:n]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    plain = _ids(tokenizer, "a")
    dressed = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start], dressed[start + len(plain) :]
    return [], []


def _pieces(paths: Sequence[Path], generator: np.random.Generator) -> Iterator[str]:
    """All texts, a file at a time; or, where they are large, chunks from all over, without the lines they cut."""
    sizes = [_size(path) for path in paths]
    if sum(sizes) <= MOST_BYTES:
        for path in paths:
            yield path.read_bytes().decode("utf-8-sig", errors="replace")
        return
    ends = np.cumsum(sizes)
    n_chunks = MOST_BYTES // CHUNK_BYTES
    starts = ((np.arange(n_chunks) + generator.random(n_chunks)) * (float(ends[-1]) / n_chunks)).astype(np.int64)
    for start in starts:
        which = int(np.searchsorted(ends, start, side="right"))
        with paths[which].open("rb") as file:
            file.seek(int(start - (ends[which] - sizes[which])))
            text = file.read(CHUNK_BYTES).decode("utf-8", errors="ignore")
        whole = text.partition("\n")[2].rpartition("\n")[0]
        yield whole or text.partition(" ")[2].rpartition(" ")[0]


def _size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            if b"\0" in file.read(4096):
                raise StatsError(f"{path}: not a text; --text wants plain UTF-8")
        return path.stat().st_size
    except OSError as error:
        raise StatsError(f"{path}: {(error.strerror or str(error)).lower()}") from None
