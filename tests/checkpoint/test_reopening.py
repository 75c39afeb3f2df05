"""Checkpoints that go to another process, and tensors that are read in pieces."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pqcli import checkpoint
from pqcli.checkpoint import opening, reopening
from pqcli.errors import CheckpointError
from tests.checkpoint.checkpoint_cases import nested_checkpoint
from tests.checkpoint.test_folder import sharded

DESCRIPTORS = Path("/proc/self/fd")


def total(source, name):
    """What a job in another process would do."""
    with source:
        return float(source.read(name).double().sum()), [info.name for info in source.tensors], source.n_bytes


def make(kind, folder):
    if kind == "folder":
        sharded(folder / "a")
        return folder / "a"
    if kind == "safetensors":
        save_file({"w": torch.randn(3, 4)}, folder / "a.safetensors")
        return folder / "a.safetensors"
    torch.save(nested_checkpoint(), folder / "a.pt")
    return folder / "a.pt"


def test_a_real_process_opens_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("pt", tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool, checkpoint.open("a.pt") as opened:
        model = opened.model_only()
        name = model.tensors[1].name
        for source in (opened, model):
            expected = (float(source.read(name).double().sum()), [i.name for i in source.tensors], source.n_bytes)
            assert pool.apply(total, (source, name)) == expected


@pytest.mark.parametrize("kind", ["pt", "safetensors", "folder"])
def test_an_unpickled_checkpoint_is_the_same(tmp_path, kind):
    with checkpoint.open(make(kind, tmp_path)) as opened:
        again = pickle.loads(pickle.dumps(opened))
        assert (again.tensors, again.skeleton, again.format, again.dropped, again.n_bytes, again.side_files) == (
            opened.tensors, opened.skeleton, opened.format, opened.dropped, opened.n_bytes, opened.side_files,
        )  # fmt: skip
        assert all(torch.equal(again.read(i.name), opened.read(i.name)) for i in opened.tensors)
        assert len(pickle.dumps(opened)) < 1000


def test_headers_are_parsed_once_per_process_and_closing_one_leaves_the_others(tmp_path, monkeypatch):
    reopening._opened_once.cache_clear()
    with checkpoint.open(make("pt", tmp_path)) as opened:
        message, message_model = pickle.dumps(opened), pickle.dumps(opened.model_only())
        calls = []
        real = opening._open_file
        monkeypatch.setattr(opening, "_open_file", lambda *arguments: calls.append(1) or real(*arguments))
        first, second = pickle.loads(message), pickle.loads(message)
        assert len(calls) == 1
        name = opened.tensors[0].name
        first.close()
        with pytest.raises(CheckpointError, match="closed already"):
            first.read(name)
        second.model_only().close()
        assert torch.equal(second.read(name), opened.read(name))
        assert torch.equal(pickle.loads(pickle.dumps(second)).read(name), opened.read(name))
        assert all(info.role == "model" for info in pickle.loads(message_model).tensors)
        assert len(calls) == 2


@pytest.mark.parametrize("kind", ["pt", "safetensors", "folder"])
@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_file_that_changed_meanwhile_is_refused_by_name(tmp_path, kind, change):
    path = make(kind, tmp_path)
    with checkpoint.open(path) as opened:
        message = pickle.dumps(opened)
    file = path / "model-00002-of-00002.safetensors" if kind == "folder" else path
    if change == "size":
        file.write_bytes(file.read_bytes() + b"\0")
    elif change == "time":
        os.utime(file, ns=(0, 12345))
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has changed since|does not exist") as caught:
        pickle.loads(message)
    assert str(file) in str(caught.value)


def test_an_index_that_changed_meanwhile_is_refused(tmp_path):
    with checkpoint.open(make("folder", tmp_path)) as opened:
        message = pickle.dumps(opened)
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"index\.json' has changed"):
        pickle.loads(message)


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="needs /proc")
def test_a_forgotten_checkpoint_leaves_no_open_file(tmp_path):
    path = make("safetensors", tmp_path)
    before = sum(1 for _ in DESCRIPTORS.iterdir())
    checkpoint.open(path)
    gc.collect()
    assert sum(1 for _ in DESCRIPTORS.iterdir()) == before


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    base = torch.arange(240.0)
    value = {
        "whole": torch.randn(40, 6),
        "slice": base[10:30],
        "transposed": base.view(12, 20).t(),
        "expanded": base[:1].expand(3, 4),
        "conjugate": torch.randn(9, dtype=torch.complex64).conj(),
        "empty": base[:0],
        "scalar": base[5],
    }
    torch.save(value, tmp_path / "a.pt")
    torch.save(value, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({name: tensor.resolve_conj().contiguous() for name, tensor in value.items()}, tmp_path / "a.safetensors")
    return value


@pytest.mark.parametrize("file", ["a.pt", "old.pt", "a.safetensors"])
@pytest.mark.parametrize("n_pieces", [1, 2, 5])
def test_pieces_make_the_whole_in_any_order(tmp_path, odd, file, n_pieces):
    for backwards in (False, True):
        with checkpoint.open(tmp_path / file) as opened:
            for name, expected in odd.items():
                borders = [round(expected.numel() * i / n_pieces) for i in range(n_pieces + 1)]
                ranges = list(pairwise(borders))
                pieces = {}
                for start, stop in reversed(ranges) if backwards else ranges:
                    pieces[start, stop] = opened.read_flat(name, start, stop)
                    assert pieces[start, stop].shape == (stop - start,)
                assert torch.equal(torch.cat([pieces[place] for place in ranges]), expected.resolve_conj().reshape(-1))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 241), (241, 241)])
def test_a_piece_outside_the_tensor_is_refused(tmp_path, odd, start, stop):
    with (
        checkpoint.open(tmp_path / "a.pt") as opened,
        pytest.raises(CheckpointError, match=r"'whole'.*are not among its 240"),
    ):
        opened.read_flat("whole", start, stop)


def reads_of(opened, monkeypatch):
    source = opened._sources[0]
    counted = []
    real = source._fill
    monkeypatch.setattr(source, "_fill", lambda buffer, *rest: counted.append(len(buffer)) or real(buffer, *rest))
    return counted


@pytest.mark.parametrize(("file", "expected"), [("a.safetensors", [40]), ("old.pt", [40]), ("a.pt", [960, 40])])
def test_only_the_piece_is_read(tmp_path, odd, monkeypatch, file, expected):
    """A zip's checksum costs one pass over the storage where a piece does not begin at its start."""
    with checkpoint.open(tmp_path / file) as opened:
        counted = reads_of(opened, monkeypatch)
        opened.read_flat("whole", 100, 110)
        assert counted == expected
        opened.read_flat("whole", 100, 110)
        assert counted == [*expected, 40]


def test_pieces_in_order_are_checked_without_an_extra_pass(tmp_path, odd, monkeypatch):
    data = (tmp_path / "a.pt").read_bytes()
    raw = odd["whole"].numpy().tobytes()
    place = data.index(raw)
    with checkpoint.open(tmp_path / "a.pt") as opened:
        counted = reads_of(opened, monkeypatch)
        for start in range(0, 240, 60):
            opened.read_flat("whole", start, start + 60)
        assert counted == [240] * 4
    for wrong in (place, place + 500, place + 959):
        (tmp_path / "b.pt").write_bytes(data[:wrong] + bytes([data[wrong] ^ 1]) + data[wrong + 1 :])
        with checkpoint.open(tmp_path / "b.pt") as opened, pytest.raises(CheckpointError, match="checksum"):
            torch.cat([opened.read_flat("whole", start, start + 60) for start in range(0, 240, 60)])
        with checkpoint.open(tmp_path / "b.pt") as opened, pytest.raises(CheckpointError, match="checksum"):
            opened.read_flat("whole", 60, 61)
