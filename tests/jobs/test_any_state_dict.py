"""Any state dict comes back through every codec: names, order, shapes, dtypes, ties, and every bit of what is kept."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pqcli
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.info import ITEM_BYTES
from tests.container.small import raw

CODECS = {
    "plain": {"n_centroids": 4, "n_iter": 1},
    "ecpq": {"rate_weight": 0.3},
    "trellis": {"codec": "trellis", "effort": 4},
    "auto": {"codec": "auto", "effort": 4},
}
DTYPES = sorted(ITEM_BYTES)
QUANTIZED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(), (0,), (1,), (7,), (0, 5), (3, 0, 2), (1, 1), (8, 8), (16, 24), (30, 7), (4, 3, 3, 3), (2, 8, 8), (1,) * 6]
KINDS = ["normal", "wide", "zeros", "some zeros", "few", "nan", "inf", "denormal"]
VIEWS = ["whole", "transposed", "strided", "expanded", "part"]


def values(shape, kind, generator):
    """Float64 of that kind."""
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "wide":
        found = found * 1e6 ** torch.randn(shape, generator=generator, dtype=torch.float64)
    elif kind == "zeros":
        found = torch.zeros(shape, dtype=torch.float64)
    elif kind == "some zeros":
        found[torch.rand(shape, generator=generator) < 0.1] = 0
    elif kind == "few":
        found = found.sign() * 3
    elif kind in ("nan", "inf") and found.numel():
        found.view(-1)[-1] = float(kind)
    elif kind == "denormal":
        found = found * 1e-42
    return found


def tensor_of(dtype, shape, kind, view, generator):
    """A tensor of that dtype and shape, in some memory."""
    dtype = getattr(torch, dtype)
    whole = values(shape, kind, generator)
    if dtype.is_complex:
        made = torch.complex(whole, whole.flip(-1) if shape else whole).to(dtype)
    elif dtype.is_floating_point:
        made = whole.to(torch.float32).to(dtype) if dtype.itemsize == 1 else whole.to(dtype)
    else:
        made = torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator).to(dtype)
    if view == "transposed" and made.dim() > 1:
        return made.mT.contiguous().mT
    if view == "strided" and made.dim():
        return torch.stack([made, made], -1)[..., 0]
    if view == "expanded" and made.dim() and made.shape[0] and dtype.itemsize > 1:
        return made[:1].expand(made.shape)
    if view == "part" and made.dim():
        return torch.cat([made, made])[made.shape[0] :]
    return made


@st.composite
def state_dicts(draw):
    """A few tensors, some of them tied to others, some equal to others, under texts or numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keys = st.one_of(st.text("abw.é/~ ", min_size=1, max_size=6), st.integers(-3, 40))
    names = draw(st.lists(keys, min_size=1, max_size=6, unique_by=str))
    found = {}
    for name in names:
        what = draw(st.sampled_from(["new", "new", "new", "tied", "equal"]))
        if found and what != "new":
            other = found[draw(st.sampled_from(sorted(found, key=str)))]
            found[name] = other if what == "tied" else other.clone()
            continue
        found[name] = tensor_of(
            *(draw(st.sampled_from(options)) for options in (DTYPES, SHAPES, KINDS, VIEWS)), generator
        )
    return found


def memory(tensor):
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(state=state_dicts())
def test_any_state_dict_comes_back(tmp_path_factory, codec, state):
    folder = tmp_path_factory.mktemp("any")
    torch.save(state, folder / "m.pt")
    report = pqcli.compress(folder / "m.pt", recipe=Recipe(**CODECS[codec]))
    file = folder / "m.pq.safetensors"
    assert file.stat().st_size == report.compressed_bytes
    assert pqcli.verify(file, folder / "m.pt") == []
    back = torch.load(pqcli.decode(file), weights_only=True)
    assert list(back) == list(state)
    quantized = {tensor.name: tensor.quantized for tensor in report.tensors}
    for (key, tensor), seen in zip(state.items(), report.tensors, strict=True):
        found = back[key]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        if quantized[seen.alias_of or seen.copy_of or seen.name]:
            assert tensor.dtype in QUANTIZED
            assert found.isfinite().all()
            assert (found[tensor == 0] == 0).all()
        else:
            assert raw(found.clone()) == raw(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor))
    owners: dict[int, object] = {}
    for key, seen in zip(state, report.tensors, strict=True):
        first = owners.setdefault(id(state[key]), key)
        assert first == key or state[key].numel() == 0 or seen.action == "alias"
    for one in back:
        for other in back:
            shares = back[one].numel() > 0 and back[one].data_ptr() == back[other].data_ptr()
            assert not shares or memory(state[one]) == memory(state[other])
