"""Moments in eight bits: what comes back is near, and second moments stay positive."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core import moments
from pqcli.core.moments import BLOCK, FIRST, SECOND


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(coded, form):
    return torch.from_numpy(moments.decode(coded, form))


def back(tensor, form):
    return decoded(moments.encode(tensor, form), form).reshape(tensor.shape).to(tensor.dtype)


def plain_encode(values, form):
    """The slow, obvious encoder."""
    codes = []
    for i, value in enumerate(values):
        block = values[i // BLOCK * BLOCK : (i // BLOCK + 1) * BLOCK]
        word = int(np.abs(block).max().view(np.uint32))
        scale = float(np.uint32(((word + 0xFFFF) >> 16) << 16).view(np.float32))
        share = min(abs(float(value)) / scale, 1.0) if scale else 0.0
        if form == FIRST:
            codes.append(128 + int(np.copysign(round(127 * share**0.5), value)))
        else:
            codes.append(max(round(255 * share**0.25), int(value > 0)))
    return codes


@pytest.mark.parametrize("form", [FIRST, SECOND])
def test_codes_are_those_of_the_obvious_encoder(form):
    values = gaussian(300) * torch.logspace(-6, 2, 300)
    values = values if form == FIRST else values.square()
    assert moments.encode(values, form).codes.tolist() == plain_encode(values.numpy(), form)


def test_a_first_moment_is_off_by_no_more_than_half_a_step_and_keeps_its_sign():
    values = gaussian(4, 1000)
    found, scales = back(values, FIRST), values.reshape(-1).abs()
    tops = torch.stack([part.max() for part in scales.split(BLOCK)]).repeat_interleave(BLOCK)[: scales.numel()]
    tops = tops.reshape(values.shape) * (1 + 2**-7)
    assert ((found - values).abs() <= tops * 0.502 * (2 * (values.abs() / tops).sqrt() / 127 + 1 / 127**2)).all()
    assert (found * values >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**127, width=32, allow_subnormal=True), min_size=1, max_size=300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_second_moment_is_zero_exactly_where_it_was_and_never_negative(values, dtype):
    tensor = torch.tensor(values).clamp(max=torch.finfo(dtype).max).to(dtype)
    coded = moments.encode(tensor, SECOND)
    found = decoded(coded, SECOND).clamp(max=torch.finfo(dtype).max).to(dtype)
    assert torch.equal(found == 0, tensor == 0)
    assert (found >= 0).all()
    assert torch.isfinite(found.float()).all()


def test_the_largest_of_a_block_is_within_a_hundredth():
    for form in (FIRST, SECOND):
        values = gaussian(64, BLOCK).abs() * torch.logspace(-30, 30, 64)[:, None]
        tops, found = values.max(1).values, back(values, form).max(1).values
        assert ((found / tops - 1).abs() < 0.01).all()


def test_chunks_meet_without_a_seam(monkeypatch):
    values = gaussian(5000).square()
    whole = {form: moments.encode(values, form) for form in (FIRST, SECOND)}
    monkeypatch.setattr(moments, "_CHUNK", 2 * BLOCK)
    for form, coded in whole.items():
        apart = moments.encode(values, form)
        assert np.array_equal(apart.codes, coded.codes)
        assert np.array_equal(apart.scales, coded.scales)
        assert torch.equal(decoded(apart, form), decoded(coded, form))


def test_what_is_coded_again_stays_as_it_is():
    for form in (FIRST, SECOND):
        once = back(gaussian(10, 500).square(), form)
        assert (back(once, form) - once).abs().max() <= 0.02 * once.max()


@pytest.mark.parametrize(
    ("tensor", "form"),
    [
        (torch.tensor([1.0, float("nan")]), FIRST),
        (torch.tensor([float("inf")]), SECOND),
        (torch.tensor([1.0, -1e-9]), SECOND),
        (torch.tensor([1e300], dtype=torch.float64), FIRST),
    ],
)
def test_what_is_no_moment_is_told(tensor, form):
    assert not moments.can_code(tensor, form)
    assert moments.can_code(torch.tensor([1.0, 0.0]), form)


def test_no_values_have_no_blocks():
    coded = moments.encode(torch.zeros(0), FIRST)
    assert (coded.codes.size, coded.scales.size, decoded(coded, FIRST).numel()) == (0, 0, 0)
