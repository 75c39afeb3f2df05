"""Views of one storage that share bytes are told as a group; views side by side are not."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli import checkpoint
from pqcli.checkpoint.bytesource import Region, Strided
from pqcli.checkpoint.overlaps import overlapping
from tests.checkpoint.checkpoint_cases import small_model

BASE = torch.arange(64.0 * 64)


def groups(value, tmp_path, **options):
    torch.save(value, tmp_path / "a.pt", **options)
    with checkpoint.open(tmp_path / "a.pt") as opened:
        return {info.name: info.overlaps for info in opened.tensors if info.overlaps}


@pytest.mark.parametrize("zipped", [True, False])
def test_parts_of_a_fused_tensor_saved_beside_it_are_one_group(tmp_path, zipped):
    qkv = BASE.view(64, 64)[:48]
    value = {"q": qkv[:16], "k": qkv[16:32], "v": qkv[32:], "qkv": qkv, "other": BASE.clone()}
    found = groups(value, tmp_path, _use_new_zipfile_serialization=zipped)
    assert found == dict.fromkeys(("q", "k", "v", "qkv"), "q")


@pytest.mark.parametrize(
    "value",
    [
        {"a": BASE[:100], "b": BASE[100:200]},
        {"q": BASE.view(64, 64)[:, :32], "k": BASE.view(64, 64)[:, 32:]},
        {"even": BASE[::2], "odd": BASE[1::2]},
        {"real": torch.view_as_real(torch.randn(9, dtype=torch.complex64))[:, 0]},
        {"x": BASE.view(8, 8, 64)[:, 2:4, :8], "y": BASE.view(8, 8, 64)[:, 4:6, 8:16]},
        {"a": BASE[:0], "b": BASE[:5]},
    ],
)
def test_views_side_by_side_are_no_group(tmp_path, value):
    assert groups(value, tmp_path) == {}


@pytest.mark.parametrize(
    "value",
    [
        {"a": BASE[:100], "b": BASE[99:200]},
        {"w": BASE.view(64, 64), "wt": BASE.view(64, 64).t()},
        {"a": BASE[::2], "b": BASE[::3]},
        {"x": BASE.view(8, 8, 64)[:, 2:4, :9], "y": BASE.view(8, 8, 64)[:, 3:6, 8:16]},
        {"one": BASE[:1].expand(5), "all": BASE[:9]},
        {"w": BASE.view(64, 64), "row": BASE[64:128]},
    ],
)
def test_views_that_share_bytes_are_a_group(tmp_path, value):
    first, second = value
    assert groups(value, tmp_path) == {first: first, second: first}


def test_tied_tensors_are_no_group_and_follow_their_owner(tmp_path):
    assert groups(small_model().state_dict(), tmp_path) == {}
    value = {"w": BASE.view(64, 64), "tied": BASE.view(64, 64), "row": BASE[:64]}
    assert groups(value, tmp_path) == dict.fromkeys(value, "w")


def test_without_the_training_state_what_is_left_is_grouped_anew(tmp_path):
    value = {"model": {"w": BASE[:64]}, "optimizer": {"flat": BASE, "a": BASE[:9], "b": BASE[9:20]}}
    torch.save(value, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert {info.overlaps for info in opened.tensors} == {"w"}
        assert [info.overlaps for info in opened.model_only().tensors] == [None]


def bytes_of(view):
    """Every byte of the file that the view touches, by brute force."""
    item = {"float32": 4, "float16": 2, "uint8": 1}[view.dtype]
    places = torch.zeros(view.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        places = places + (torch.arange(size) * stride).reshape(
            [-1 if a == axis else 1 for a in range(len(view.shape))]
        )
    return {int(p) * item + byte for p in (places + view.offset).reshape(-1) for byte in range(item)}


_views = st.builds(
    lambda dtype, offset, axes: Strided(
        Region(0, 10_000), dtype, tuple(n for n, _ in axes), offset, tuple(step for _, step in axes)
    ),
    st.sampled_from(["float32", "float16", "uint8"]),
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(views=st.lists(_views, min_size=2, max_size=4))
def test_no_two_tensors_that_share_a_byte_are_ever_in_different_groups(views):
    named = {f"t{number}": view for number, view in enumerate(views)}
    found = overlapping(named)
    for one, two in combinations(named, 2):
        if bytes_of(named[one]) & bytes_of(named[two]):
            assert found.get(one) == found.get(two) is not None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_slices_of_a_matrix_are_grouped_exactly(data):
    """The usual case is not only safe but exact."""
    named = {}
    for number in range(2):
        low = [data.draw(st.integers(0, 6)) for _ in range(2)]
        size = [data.draw(st.integers(1, 8 - at)) for at in low]
        named[f"t{number}"] = Strided(Region(0, 256), "float32", tuple(size), low[0] * 8 + low[1], (8, 1))
    shared = bool(bytes_of(named["t0"]) & bytes_of(named["t1"]))
    assert bool(overlapping(named)) == shared


def test_thousands_of_views_at_one_place_take_no_time(tmp_path):
    value = {f"t{n}": BASE[n : n + 1000] for n in range(3000)}
    assert set(groups(value, tmp_path).values()) == {"t0"}
