"""What every format of the table must do: `check_format` tries it all, with whatever the format can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from pqcli import checkpoint
from pqcli.checkpoint import formats
from pqcli.checkpoint.sniff import sniff
from pqcli.errors import CheckpointError, OutputError
from pqcli.tensors.info import ITEM_BYTES, TensorInfo
from tests.checkpoint.checkpoint_cases import bits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SHAPES = ((), (0,), (1,), (7,), (3, 0, 2), (3, 5), (2, 3, 4, 5), (1,) * 12)


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    """Random bits of every dtype, in shapes with and without elements."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype, item_bytes in ITEM_BYTES.items():
        for number, shape in enumerate(_SHAPES):
            n_bytes = torch.Size(shape).numel() * item_bytes
            raw = torch.randint(0, 2 if dtype == "bool" else 256, (n_bytes,), dtype=torch.uint8, generator=generator)
            found[f"{dtype}.{number}"] = raw.view(getattr(torch, dtype)).reshape(shape)
    return found


def infos_of(tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str] | None = None) -> tuple[TensorInfo, ...]:
    """The headers of tensors, and of others that are tied to them (name: name of the owner)."""
    infos = [
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    ]
    owners = {info.name: info for info in infos}
    infos += [
        TensorInfo(name, owners[owner].shape, owners[owner].dtype, alias_of=owner)
        for name, owner in (aliases or {}).items()
    ]
    return tuple(infos)


def check_format(name: str, folder: Path) -> None:
    """Write, read, write again and damage files of the format; `folder` must be empty."""
    row = formats.FORMATS[name]
    tensors = {key: tensor for key, tensor in tensors_of_every_kind().items() if _can_hold(row, key, tensor)}
    assert "float32.5" in tensors
    path = folder / f"whole{row.suffixes[0]}"
    check_round_trip(name, path, tensors, {"tied": "float32.5", "tied.twice": "float32.5", "tied.scalar": "float32.0"})
    check_suffixes(name, path)
    small = folder / f"small{row.suffixes[0]}"
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}
    checkpoint.write(small, infos_of(values), values.__getitem__, None, format=name)
    check_truncations(small, folder / "part")
    check_flips(small, folder / "flipped")


def check_round_trip(name: str, path: Path, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
    """Names, order or not, dtypes, shapes and every bit come back; the same file is written again."""
    n_bytes = checkpoint.write(path, infos_of(tensors, aliases), tensors.__getitem__, None, format=name)
    assert n_bytes == path.stat().st_size
    values = {**tensors, **{alias: tensors[owner] for alias, owner in aliases.items()}}
    with checkpoint.open(path) as opened:
        assert opened.format == name
        assert opened.n_bytes == n_bytes
        assert {info.name for info in opened.tensors} == set(values)
        for info in opened.tensors:
            got, expected = opened.read(info.name), values[info.name]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), info.name
            assert bits(got) == bits(expected), info.name
            assert got.is_contiguous()
            middle = info.numel // 2
            assert bits(opened.read_flat(info.name, 0, middle)) + bits(
                opened.read_flat(info.name, middle, info.numel)
            ) == bits(expected), info.name
        again = path.with_name(f"again{path.suffix}")
        checkpoint.write(again, opened.tensors, opened.read, opened.skeleton, format=name)
    with checkpoint.open(again) as opened:
        third = path.with_name(f"third{path.suffix}")
        checkpoint.write(third, opened.tensors, opened.read, opened.skeleton, format=name)
    assert third.read_bytes() == again.read_bytes()


def check_suffixes(name: str, path: Path) -> None:
    """Every suffix of the row asks for the format; the contents tell it, whatever the suffix."""
    row = formats.FORMATS[name]
    assert all(checkpoint.by_suffix(path.with_suffix(suffix.upper())) == name for suffix in row.suffixes)
    assert checkpoint.default_suffix(name, {}) == row.suffixes[0]
    renamed = path.with_suffix(".weights")
    path.rename(renamed)
    assert sniff(renamed) == name
    with checkpoint.open(renamed) as opened:
        assert checkpoint.default_suffix(name, opened.skeleton) == ".weights"


def check_truncations(whole: Path, part: Path) -> None:
    """A file that ends early is refused, wherever it ends."""
    data = whole.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 400)):
        part.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.open(part).close()
        assert str(part) in str(caught.value)


def check_flips(whole: Path, flipped: Path) -> None:
    """A file with one wrong byte is read, or refused with a `CheckpointError`; nothing else happens."""
    data = whole.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 400)):
        for bit in (1, 128):
            flipped.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            try:
                with checkpoint.open(flipped) as opened:
                    for info in opened.tensors:
                        opened.read(info.name)
            except CheckpointError:
                pass


def _can_hold(row: formats.Format, key: str, tensor: torch.Tensor) -> bool:
    try:
        row.prepare(infos_of({key: tensor}), {key: tensor}.__getitem__, {})
    except OutputError:
        return False
    return True
