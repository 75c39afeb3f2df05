"""`.pt` files: everything that torch.save writes comes in, and goes out again the same."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pqcli import checkpoint
from pqcli.checkpoint.pt import writer as pt_writer
from pqcli.errors import CheckpointError, ContainerError, OutputError
from pqcli.tensors.info import ITEM_BYTES, TensorInfo
from tests.checkpoint.checkpoint_cases import assert_same, bits, nested_checkpoint, round_trip, small_model

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))


def save(value, path, *, zipped=True, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def load(path, **options):
    return torch.load(path, weights_only=True, map_location="cpu", **options)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_nested_training_checkpoint_comes_back_the_same(tmp_path, zipped, protocol):
    value = nested_checkpoint()
    source = save(value, tmp_path / "a.pt", zipped=zipped, protocol=protocol)
    opened = round_trip(source, tmp_path / "b.pt")
    assert not opened.dropped
    assert_same(load(tmp_path / "b.pt"), value)
    assert_same(load(tmp_path / "b.pt", mmap=True), value)


def test_the_model_has_bare_names_and_training_state_has_full_paths(tmp_path):
    with checkpoint.open(save(nested_checkpoint(), tmp_path / "a.pt")) as opened:
        roles = {info.name: info.role for info in opened.tensors}
    assert list(roles)[:2] == ["0.weight", "1.weight"]
    assert roles["0.weight"] == "model"
    assert roles["best_acc1"] == "model"
    assert roles["optimizer.state.0.exp_avg"] == "other"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "net", "params", "weights"])
def test_every_usual_place_of_the_model_is_its_root(tmp_path, key):
    value = {"epoch": 1, key: {"encoder": {"fc.weight": torch.ones(2, 2)}}, "ema": {"fc.weight": torch.ones(2)}}
    with checkpoint.open(save(value, tmp_path / "a.pt")) as opened:
        assert [info.name for info in opened.tensors] == ["encoder.fc.weight", "ema.fc.weight"]
    round_trip(tmp_path / "a.pt", tmp_path / "b.pt")
    assert_same(load(tmp_path / "b.pt"), value)


def test_a_flat_state_dict_has_a_tiny_skeleton(tmp_path):
    value = {f"module.layer{i}.weight": torch.zeros(2) for i in range(500)}
    with checkpoint.open(save(value, tmp_path / "a.pth")) as opened:
        assert len(json.dumps(opened.skeleton)) < 120
        assert checkpoint.default_suffix("pt", opened.skeleton) == ".pth"
        assert checkpoint.default_suffix("safetensors", opened.skeleton) == ".safetensors"
        assert checkpoint.default_suffix("folder", opened.skeleton) == ""


def test_module_versions_of_a_state_dict_survive(tmp_path):
    state = small_model().state_dict()
    assert state._metadata["2"] == {"version": 2}
    round_trip(save(state, tmp_path / "a.pt"), tmp_path / "b.pt")
    restored = load(tmp_path / "b.pt")
    assert restored._metadata == state._metadata
    small_model().load_state_dict(restored, strict=True)


def test_tied_tensors_are_aliases_and_come_back_tied(tmp_path):
    source = save(small_model().state_dict(), tmp_path / "a.pt")
    with checkpoint.open(source) as opened:
        assert {info.name: info.alias_of for info in opened.tensors if info.alias_of} == {"4.weight": "0.weight"}
        calls = []

        def read(name):
            calls.append(name)
            return opened.read(name)

        checkpoint.write(tmp_path / "b.pt", opened.tensors, read, opened.skeleton, format="pt")
        checkpoint.write(tmp_path / "c.st", opened.tensors, read, opened.skeleton, format="safetensors")
    owners = [info.name for info in opened.tensors if not info.alias_of]
    assert sorted(calls) == sorted(owners * 2)
    restored = load(tmp_path / "b.pt")
    assert restored["0.weight"].data_ptr() == restored["4.weight"].data_ptr()
    with checkpoint.open(tmp_path / "c.st") as copies:
        assert torch.equal(copies.read("4.weight"), copies.read("0.weight"))


def test_views_and_odd_layouts_keep_their_values(tmp_path):
    base = torch.arange(240.0)
    value = {
        "slice": base[10:30],
        "strided": base[::7],
        "transposed": base.view(12, 20).t(),
        "channels_last": base.view(2, 3, 8, 5).contiguous(memory_format=torch.channels_last),
        "expanded": base[:1].expand(3, 4),
        "scalar": base[5],
        "empty": base[:0],
        "empty_rows": torch.empty(3, 0, 2),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex128).conj().imag,
        "ones": torch.ones(1, 5)[:, 2:3],
    }
    source = save(value, tmp_path / "a.pt")
    with checkpoint.open(source) as opened:
        for name, expected in value.items():
            got = opened.read(name)
            assert got.is_contiguous()
            assert got.untyped_storage().nbytes() >= got.numel() * got.itemsize
            assert torch.equal(got, expected), name
    round_trip(source, tmp_path / "b.pt")
    restored = load(tmp_path / "b.pt")
    assert all(torch.equal(restored[name], value[name]) for name in value)


@pytest.mark.parametrize("dtype", sorted(set(ITEM_BYTES) - {"complex32"}))
def test_every_dtype_is_kept_to_the_bit(tmp_path, dtype):
    raw = torch.randint(0, 256, (7 * ITEM_BYTES[dtype] * 3,), dtype=torch.uint8)
    if dtype == "bool":
        raw = raw % 2
    value = {"x": raw.view(getattr(torch, dtype)).reshape(7, 3), "s": raw.view(getattr(torch, dtype))[0].clone()}
    source = save(value, tmp_path / "a.pt")
    with checkpoint.open(source) as opened:
        assert bits(opened.read("x")) == raw.numpy().tobytes()
    round_trip(source, tmp_path / "b.pt")
    assert_same(load(tmp_path / "b.pt"), value)
    if dtype != "complex128":
        round_trip(source, tmp_path / "c.safetensors", "safetensors")
        with checkpoint.open(tmp_path / "c.safetensors") as opened:
            assert bits(opened.read("x")) == raw.numpy().tobytes()


def test_parameters_come_back_as_parameters(tmp_path):
    value = {"p": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(2), requires_grad=False)}
    value["leaf"] = torch.ones(3, requires_grad=True)
    round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    restored = load(tmp_path / "b.pt")
    assert [type(tensor) for tensor in restored.values()] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert [tensor.requires_grad for tensor in restored.values()] == [True, False, True]


def test_numpy_scalars_come_back_as_the_equal_number(tmp_path):
    value = {"w": torch.ones(2, 2), "best_acc": np.float64(0.1), "step": np.int32(-7), "half": np.float32(0.1)}
    value |= {"ok": np.bool_(True), "c": np.complex128(1 + 2j)}
    opened = round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    assert not opened.dropped
    restored = load(tmp_path / "b.pt")
    assert {key: restored[key] for key in value if key != "w"} == {
        "best_acc": 0.1, "step": -7, "half": float(np.float32(0.1)), "ok": True, "c": 1 + 2j,
    }  # fmt: skip


def test_empty_bytes_are_not_taken_for_code(tmp_path):
    round_trip(save({"w": torch.ones(2), "b": b""}, tmp_path / "a.pt"), tmp_path / "b.pt")
    # torch itself refuses what it writes for b"", hence not weights_only
    assert torch.load(tmp_path / "b.pt", weights_only=False)["b"] == b""


def test_what_json_cannot_carry_is_listed_as_dropped(tmp_path):
    value = {"w": torch.ones(2, 2), "span": range(3), "nested": {"list": [1, slice(1, 2), 3]}}
    opened = round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    assert [(item.path, item.reason.split(":")[0]) for item in opened.dropped] == [
        ("span", "builtins.range(0, 3, 1)"),
        ("nested.list.1", "builtins.slice(1, 2)"),
    ]
    restored = load(tmp_path / "b.pt")
    assert "span" not in restored
    assert restored["nested"] == {"list": [1, None, 3]}


def test_names_that_collide_are_told_apart(tmp_path):
    value = {"a": {"b": torch.zeros(1), 1: torch.ones(1), "1": torch.full((1,), 2.0)}, "a.b": torch.full((1,), 3.0)}
    value |= {"": torch.full((1,), 4.0), "tensor": torch.full((1,), 5.0)}
    opened = round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    assert [info.name for info in opened.tensors] == ["a.b", "a.1", "a.1~2", "a.b~2", "tensor", "tensor~2"]
    assert_same(load(tmp_path / "b.pt"), value)


@pytest.mark.parametrize(
    "value", [torch.ones(3), [torch.ones(3), torch.zeros(2)], (torch.ones(1), {"a": torch.ones(1)})]
)
def test_a_checkpoint_need_not_be_a_dict(tmp_path, value):
    round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    assert_same(load(tmp_path / "b.pt"), value)


_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.binary(min_size=1, max_size=5),
    st.builds(lambda n: torch.full((n,), float(n)), st.integers(0, 4)),
    st.builds(lambda n: torch.full((n, 2), n, dtype=torch.int16), st.integers(0, 4)),
)  # fmt: skip
_keys = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.tuples(st.integers(0, 2), st.text(max_size=2)))
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(_keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=_values, zipped=st.booleans())
def test_any_nesting_comes_back_the_same(tmp_path_factory, value, zipped):
    folder = tmp_path_factory.mktemp("any")
    value = {"anchor": torch.ones(1, 1), "value": value}
    source = save(value, folder / "a.pt", zipped=zipped)
    with checkpoint.open(source) as opened:
        skeleton = json.loads(json.dumps(opened.skeleton))
        checkpoint.write(folder / "b.pt", opened.tensors, opened.read, skeleton, format="pt")
    assert_same(load(folder / "b.pt"), value)


def test_records_are_aligned_and_checked(tmp_path):
    import zipfile

    round_trip(save(nested_checkpoint(), tmp_path / "a.pt"), tmp_path / "b.pt")
    data = (tmp_path / "b.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            name_bytes = int.from_bytes(data[entry.header_offset + 26 : entry.header_offset + 28], "little")
            extra_bytes = int.from_bytes(data[entry.header_offset + 28 : entry.header_offset + 30], "little")
            assert (entry.header_offset + 30 + name_bytes + extra_bytes) % 64 == 0


def test_records_beyond_32_bits_are_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(pt_writer, "_ZIP64_FROM", 8)
    value = nested_checkpoint()
    round_trip(save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    assert_same(load(tmp_path / "b.pt"), value)
    assert_same(load(tmp_path / "b.pt", mmap=True), value)
    round_trip(tmp_path / "b.pt", tmp_path / "c.pt")
    assert_same(load(tmp_path / "c.pt"), value)


def test_equal_input_gives_equal_bytes(tmp_path):
    source = save(nested_checkpoint(), tmp_path / "a.pt")
    round_trip(source, tmp_path / "b.pt")
    round_trip(source, tmp_path / "c.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


def test_write_needs_no_skeleton(tmp_path):
    infos = (TensorInfo("a", (2,), "float32"), TensorInfo("b", (2,), "float32", alias_of="a"))
    n_bytes = checkpoint.write(tmp_path / "x.pt", infos, lambda _: torch.ones(2), None, format="pt")
    assert n_bytes == (tmp_path / "x.pt").stat().st_size
    assert_same(load(tmp_path / "x.pt"), {"a": torch.ones(2), "b": torch.ones(2)})


def test_tensors_in_another_order_than_the_skeleton_are_refused(tmp_path):
    with checkpoint.open(save(nested_checkpoint(), tmp_path / "a.pt")) as opened:
        with pytest.raises(ContainerError, match="order has changed"):
            checkpoint.write(tmp_path / "b.pt", opened.tensors[::-1], opened.read, opened.skeleton, format="pt")
        with pytest.raises(ContainerError, match="does not fit its tensors"):
            checkpoint.write(tmp_path / "b.pt", opened.tensors[:-1], opened.read, opened.skeleton, format="pt")
    assert not (tmp_path / "b.pt").exists()


def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path):
    infos = (TensorInfo("a", (2,), "float32"),)
    for format_ in ("pt", "safetensors", "folder"):
        with pytest.raises(OutputError, match="announced as float32"):
            checkpoint.write(tmp_path / "x", infos, lambda _: torch.ones(3), None, format=format_)
        assert not list(tmp_path.iterdir())


def test_decoding_to_another_dtype_writes_that_dtype(tmp_path):
    with checkpoint.open(save(small_model().state_dict(), tmp_path / "a.pt")) as opened:
        half = tuple(
            TensorInfo(i.name, i.shape, "float16" if i.dtype == "float32" else i.dtype, i.alias_of, i.role)
            for i in opened.tensors
        )

        def read(name):
            tensor = opened.read(name)
            return tensor.half() if tensor.dtype == torch.float32 else tensor

        checkpoint.write(tmp_path / "b.pt", half, read, opened.skeleton, format="pt")
    restored = load(tmp_path / "b.pt")
    assert restored["4.weight"].dtype == torch.float16
    assert restored["2.num_batches_tracked"].dtype == torch.int64


@pytest.mark.skipif(not (KIT / "models" / "resnet20.th").exists(), reason="the kit is not here")
def test_resnet20_straight_from_disk(tmp_path):
    source = KIT / "models" / "resnet20.th"
    opened = round_trip(source, tmp_path / "b.th")
    assert checkpoint.default_suffix(opened.format, opened.skeleton) == ".th"
    assert len(opened.tensors) == 97
    assert opened.tensors[0].name == "module.conv1.weight"
    assert opened.n_bytes == 1_099_231
    assert len(json.dumps(opened.skeleton)) < 200
    assert_same(load(tmp_path / "b.th"), load(source))


def test_a_closed_checkpoint_says_so(tmp_path):
    opened = checkpoint.open(save({"a": torch.ones(2)}, tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        opened.read("b")
    opened.close()
    opened.close()
    with pytest.raises(CheckpointError, match="closed already"):
        opened.read("a")
