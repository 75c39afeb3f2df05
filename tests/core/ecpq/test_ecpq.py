import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core import metrics
from pqcli.core.ecpq import ecpq, lattice, search
from pqcli.core.ecpq import payload as payload_module
from pqcli.core.entropy import bitfields
from pqcli.core.feeding import Inputs

BIT_PRICE = 0.05


def gaussian(rows, columns, seed=0, spread=1.0):
    """Gaussian weights whose rows and columns differ in size by octaves, `spread` of them as one standard deviation."""
    g = torch.Generator().manual_seed(seed)
    row = torch.exp2(spread * torch.randn(rows, 1, generator=g))
    column = torch.exp2(0.5 * spread * torch.randn(1, columns, generator=g))
    return torch.randn(rows, columns, generator=g) * row * column


@functools.cache
def model(bit_price=BIT_PRICE):
    return ecpq.fit([ecpq.draw(gaussian(64, 256)), ecpq.draw(gaussian(96, 36, seed=1))], bit_price)


def round_trip(matrix, of=None, bit_price=BIT_PRICE, **options):
    of = of or model()
    encoded = ecpq.encode(matrix, of, bit_price, **options)
    decoded = ecpq.decode(encoded.payload, of, *matrix.shape)
    assert torch.equal(decoded, encoded.decoded)
    assert decoded.shape == matrix.shape
    return encoded


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))
def test_every_shape_comes_back_within_the_error_that_an_escape_would_leave(rows, columns, seed):
    matrix = gaussian(rows, columns, seed)
    encoded = round_trip(matrix)
    assert metrics.compare(matrix, encoded.decoded).squared_error <= 3 * BIT_PRICE * (
        8 * len(encoded.payload) + matrix.numel()
    )


@pytest.mark.parametrize("matrix", [torch.zeros(7, 30), torch.full((16, 16), 0.7), torch.full((1, 1), -3.0)])
def test_constant_tensors_come_back(matrix):
    decoded = round_trip(matrix).decoded
    assert float((decoded - matrix).abs().max()) <= 2 * BIT_PRICE**0.5


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e3, 1e10, 3e38])
def test_weights_of_any_magnitude_come_back(magnitude):
    matrix = gaussian(8, 24, spread=0) / 4 * magnitude
    decoded = round_trip(matrix).decoded
    assert float((decoded - matrix).abs().max()) <= 6 * BIT_PRICE**0.5


def test_outliers_of_any_size_neither_cost_much_nor_ruin_their_neighbours():
    matrix = gaussian(64, 256)
    plain = round_trip(matrix)
    spoilt = matrix.clone()
    spoilt[3, 5], spoilt[10, 100], spoilt[40, 7] = 1e4, -1e30, 77.0
    encoded = round_trip(spoilt)
    difference = (encoded.decoded - spoilt).abs()
    assert float(difference[10, 100]) == 0
    assert max(float(difference[3, 5]), float(difference[40, 7])) <= 1
    rest = torch.ones_like(matrix, dtype=torch.bool)
    rest[3, 5] = rest[10, 100] = rest[40, 7] = False
    before = float((plain.decoded - matrix)[rest].square().sum())
    assert float((encoded.decoded - spoilt)[rest].square().sum()) <= 1.2 * before
    assert len(encoded.payload) <= 1.1 * len(plain.payload)


def test_columns_left_over_neither_pull_nor_ruin():
    matrix = gaussian(64, 257)
    of = model()
    whole, left = ecpq.encode(matrix, of, BIT_PRICE), (matrix - ecpq.encode(matrix, of, BIT_PRICE).decoded)[:, 256]
    body = ecpq.encode(matrix[:, :256].contiguous(), of, BIT_PRICE)
    assert len(whole.payload) <= len(body.payload) + 64 * 2
    assert float(left.square().mean()) <= 2 * BIT_PRICE


def test_a_larger_rate_weight_gives_fewer_bytes_and_a_larger_error():
    matrix = gaussian(128, 256, spread=0.5)
    sample = [ecpq.draw(matrix)]
    sizes, errors = [], []
    for bit_price in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        of = ecpq.fit(sample, bit_price)
        encoded = round_trip(matrix, of, bit_price)
        sizes.append(len(encoded.payload) + len(of.to_bytes()))
        errors.append(metrics.compare(matrix, encoded.decoded).squared_error)
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_the_estimate_is_what_encoding_costs():
    matrix = gaussian(256, 256, seed=5, spread=0.5)
    samples = [ecpq.draw(matrix)]
    estimate = ecpq.estimate(samples, model(), BIT_PRICE)
    encoded = round_trip(matrix)
    assert 8 * len(encoded.payload) == pytest.approx(estimate.bits, rel=0.02)
    assert metrics.compare(matrix, encoded.decoded).squared_error == pytest.approx(estimate.squared_error, rel=0.02)


def test_the_entropy_of_symbols_is_what_one_table_would_take_and_classes_take_less():
    even, uneven = gaussian(256, 256, spread=0), gaussian(256, 256)
    for matrix, least in ((even, 0.97), (uneven, 1.02)):
        of = ecpq.fit([ecpq.draw(matrix)], BIT_PRICE)
        payload = ecpq.encode(matrix, of, BIT_PRICE).payload
        assert least < ecpq.entropy(payload, of, 256, 256) / (8 * len(payload)) < least + 0.2
    assert ecpq.entropy(b"", model(), 0, 4) == 0


def test_a_gaussian_is_coded_within_1_4_db_of_the_shannon_bound_model_included():
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    of = ecpq.fit([ecpq.draw(matrix)], 0.15)
    encoded = round_trip(matrix, of, 0.15)
    rate = 8 * (len(encoded.payload) + len(of.to_bytes())) / matrix.numel()
    error = metrics.compare(matrix, encoded.decoded).relative_mse
    assert 10 * np.log10(error) + 20 * np.log10(2) * rate <= 1.4


def test_everything_scales_with_the_weights():
    matrix = gaussian(32, 64)
    for factor in (2.0**-40, 2.0**40):
        of = ecpq.fit([ecpq.draw(matrix * factor)], BIT_PRICE * factor**2)
        plain = ecpq.fit([ecpq.draw(matrix)], BIT_PRICE)
        scaled = round_trip(matrix * factor, of, BIT_PRICE * factor**2)
        assert torch.equal(scaled.decoded, round_trip(matrix, plain).decoded * factor)


def test_a_scale_is_undone_and_divides_the_error_level():
    matrix = gaussian(64, 64)
    scaled = round_trip(matrix * 16, scale=16.0)
    assert torch.equal(scaled.decoded, 16 * round_trip(matrix).decoded)


def test_the_same_input_gives_the_same_bytes_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(payload_module, "STREAM_SYMBOLS", 1000)
    matrix = gaussian(32, 64)
    before = torch.get_num_threads()
    payloads, models = set(), set()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            monkeypatch.setattr(payload_module, "n_threads", lambda n=n: n)
            of = ecpq.fit([ecpq.draw(matrix)], BIT_PRICE)
            models.add(of.to_bytes())
            payloads.add(round_trip(matrix, of).payload)
    finally:
        torch.set_num_threads(before)
    assert len(models) == len(payloads) == 1


def test_a_model_comes_back_from_its_bytes_and_decodes_alike():
    of = model()
    back = ecpq.Model.from_bytes(of.to_bytes())
    assert back.to_bytes() == of.to_bytes()
    assert all(codebook.magnitudes.flags.c_contiguous for codebook in back.codebooks)  # as loops in C take them
    matrix = gaussian(32, 64)
    encoded = ecpq.encode(matrix, of, BIT_PRICE)
    assert torch.equal(ecpq.decode(encoded.payload, back, 32, 64), encoded.decoded)


def test_a_model_of_nothing_still_encodes_what_turns_up():
    of = ecpq.fit([], BIT_PRICE)
    round_trip(gaussian(5, 9), ecpq.Model.from_bytes(of.to_bytes()))


def test_a_fit_may_start_from_the_model_of_a_nearby_rate_weight():
    samples = [ecpq.draw(gaussian(64, 256))]
    cold, warm = ecpq.fit(samples, 1.1 * BIT_PRICE), ecpq.fit(samples, 1.1 * BIT_PRICE, start=model())
    a, b = (ecpq.estimate(samples, of, 1.1 * BIT_PRICE) for of in (cold, warm))
    assert a.squared_error + BIT_PRICE * a.bits == pytest.approx(b.squared_error + BIT_PRICE * b.bits, rel=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    matrix = gaussian(4, 8)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        ecpq.encode(matrix, model(), BIT_PRICE)


@pytest.mark.parametrize("bit_price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_weight_that_cannot_be_meant_is_refused(bit_price):
    with pytest.raises(ValueError, match="rate weight"):
        ecpq.fit([], bit_price)


# --- hostile bytes ---------------------------------------------------------------------------------------------------


@functools.cache
def payload():
    return ecpq.encode(gaussian(24, 37), model(), BIT_PRICE).payload


def decodes_or_refuses(data, of):
    with contextlib.suppress(ValueError):
        assert ecpq.decode(data, of, 24, 37).shape == (24, 37)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_end_in_an_error_or_in_a_matrix(data):
    decodes_or_refuses(data, model())


@settings(deadline=None)
@given(st.data())
def test_a_payload_with_bytes_changed_ends_in_an_error_or_in_a_matrix(data):
    damaged = bytearray(payload())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=4)):
        damaged[at] = value
    decodes_or_refuses(bytes(damaged), model())


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_payload_cut_short_is_refused(at):
    with pytest.raises(ValueError, match=r"due|left|take|damaged|hold"):
        ecpq.decode(payload()[: at % len(payload())], model(), 24, 37)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_model_is_refused_or_still_decodes_without_harm(data):
    damaged = bytearray(model().to_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), min_size=1, max_size=4)):
        damaged[at] = value
    try:
        of = ecpq.Model.from_bytes(bytes(damaged))
    except ValueError:
        return
    decodes_or_refuses(payload(), of)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_random_bytes_are_no_model(data):
    with pytest.raises(ValueError, match=r"model"):
        ecpq.Model.from_bytes(data)


# --- the small parts -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-300, 300), max_size=200))
def test_rice_runs_come_back(values):
    run = bitfields.rice(np.array(values, np.int16))
    reader = bitfields.Reader(run)
    assert reader.rice(len(values)).tolist() == values
    assert reader.remaining == 0


@given(st.integers(-(2**33), 2**33))
def test_varints_come_back(value):
    assert bitfields.Reader(bitfields.signed(value)).signed() == value


@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_lattice_points_are_no_farther_than_their_neighbours_and_have_the_moment_they_claim(d):
    g = torch.Generator().manual_seed(0)
    scale = lattice.scale(d, 1.0)
    x = 20 * torch.rand(20_000, d, generator=g)
    points = lattice.nearest(x)
    assert torch.equal(lattice.nearest(points), points)
    error = float(((x - points) * scale).square().mean())
    assert error == pytest.approx(1 / (2 * np.log(2)), rel=0.02)


# --- a second decoder, slow and obvious, written from the format's description ----------------------------------------


class Slow:
    """Bytes, varints and bits, one at a time."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self):
        value = shift = 0
        while (byte := self.take(1)[0]) >= 128:
            value, shift = value + (byte - 128 << shift), shift + 7
        return value + (byte << shift)

    def bits(self, n_bytes):
        return iter([byte >> i & 1 for byte in self.take(n_bytes) for i in range(8)])

    def rice(self, n):
        k = self.take(1)[0]
        bits = self.bits(self.varint())
        high = []
        for _ in range(n):
            high.append(0)
            while not next(bits):
                high[-1] += 1
        return [unzigzag((h << k) + number(bits, k)) for h in high]


def unzigzag(v):
    return v >> 1 if v % 2 == 0 else -(v + 1 >> 1)


def number(bits, n):
    return sum(next(bits) << i for i in range(n))


def slow_decode(payload, of, rows, columns):
    data = Slow(payload)
    flags = data.take(1)[0]
    d = 2 ** (flags & 3)
    base = unzigzag(data.varint())
    scale = np.frombuffer(data.take(4), "<f4")[0] if flags & 16 else np.float32(1)
    row_scale = data.rice(rows) if flags & 4 else [0] * rows
    block_scale = data.rice(-(-columns // d)) if flags & 8 else [0] * -(-columns // d)
    out = np.zeros((rows, columns), np.float32)
    n_full = columns // d
    body = [(r, b * d, b) for r in range(rows) for b in range(n_full)]
    tail = [(r, c, n_full) for r in range(rows) for c in range(n_full * d, columns)]
    for vectors, size in ((body, d), (tail, 1)):
        codebook = of.codebook(size)
        m, frequencies = codebook.magnitudes.tolist(), codebook.tables.frequencies.tolist()
        n_streams = -(-len(vectors) // 2**20)
        for i in range(n_streams):
            part = vectors[i * len(vectors) // n_streams : (i + 1) * len(vectors) // n_streams]
            n_words, n_side = data.varint(), data.varint()
            x = int.from_bytes(data.take(8), "little")
            words = iter(np.frombuffer(data.take(4 * n_words), "<u4").tolist())
            side = data.bits(n_side)
            for r, column, b in part:
                f = frequencies[
                    min(max(base + row_scale[r] + block_scale[b] - codebook.low, 0), codebook.n_classes - 1)
                ]
                slot, s, start = x % 32768, 0, 0
                while start + f[s] <= slot:
                    start, s = start + f[s], s + 1
                x = f[s] * (x >> 15) + slot - start
                if x < 2**30:
                    x = x * 2**32 + next(words)
                for t in range(size):
                    out[r, column + t] = slow_value(side, m[s - 1][t] if s else None, np.float32(of.grid)) * scale
            assert x == 2**30
    assert data.at == len(payload)
    return out


def slow_value(side, magnitude, grid):
    if magnitude is not None:
        return np.float32(magnitude) * grid * (-1 if magnitude and next(side) else 1)
    length = number(side, 5)
    if not length:
        return np.float32(0)
    sign = -1 if next(side) else 1
    if length == 31:
        return sign * np.array([number(side, 31)], "<u4").view("<f4")[0]
    return sign * (np.float32(24 * (2 ** (length - 1) + number(side, length - 1))) * grid)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("columns", [1, 3, 16, 37])
def test_a_second_decoder_reads_the_same_weights(columns, scale):
    matrix = gaussian(20, columns)
    matrix[4, columns // 2], matrix[7, 0] = -500.0, 1e30
    encoded = ecpq.encode(matrix, model(), BIT_PRICE, scale=scale)
    assert np.array_equal(slow_decode(encoded.payload, model(), 20, columns), encoded.decoded.numpy())


# --- errors that are not all felt alike -----------------------------------------------------------------------------


def moments_of_inputs(n, seed=0):
    """Second moments of inputs of which a few directions hold most of the energy."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 8)
    return (mixing @ mixing.T + 0.05 * np.eye(n)).astype(np.float32)


@pytest.mark.parametrize(("shape", "axis"), [((64, 48), 1), ((64, 45), 1), ((48, 64), 0), ((48, 61), 0)])
def test_errors_fed_forward_leave_less_in_the_outputs_at_no_more_bits(shape, axis):
    matrix, inputs = gaussian(*shape, spread=0), Inputs(moments_of_inputs(shape[axis]), 0.0, axis)
    felt = ecpq.Felt.by_inputs(inputs, shape)
    plain, fed = (round_trip(matrix, bit_price=price, felt=f) for price, f in ((0.05, None), (0.02, felt)))
    damages = []
    for encoded in (plain, fed):
        errors = (matrix - encoded.decoded).double().numpy()
        across = errors if axis == 1 else errors.T
        damages.append(float(np.einsum("ij,ij->", across @ inputs.believed(), across)))
    in_bits = 20 * np.log10(2) * 8 * (len(fed.payload) - len(plain.payload)) / matrix.numel()
    assert 10 * np.log10(damages[1] / damages[0]) + in_bits < -1.5, (damages, in_bits)


def test_inputs_that_matter_alike_and_do_not_vary_together_change_nothing_but_the_order():
    matrix = gaussian(32, 24, spread=0)
    felt = ecpq.Felt.by_inputs(Inputs(np.eye(24, dtype=np.float32), 0.0), (32, 24))
    assert all(importance.is_uniform for importance in felt.importance.values())
    apart = (round_trip(matrix, felt=felt).decoded - round_trip(matrix).decoded).abs()
    assert float((apart > 0).float().mean()) < 0.15, "tables differ, and so a few choices"


def test_rows_that_matter_more_err_less():
    matrix = gaussian(64, 32, spread=0)
    felt = ecpq.Felt.by_rows(np.repeat([0.25, 4.0], 32), 32)
    errors = (round_trip(matrix, felt=felt).decoded - matrix).square().mean(1)
    assert float(errors[32:].mean()) < 0.75 * float(errors[:32].mean())


def test_an_importance_of_one_is_none():
    rng = np.random.default_rng(0)
    vectors = np.abs(rng.standard_normal((300, 4))).astype(np.float32) * 20
    codebook = model().codebook(4) if 4 in model().block_sizes else None
    codebook = codebook or ecpq.fit([ecpq.draw(gaussian(256, 256, spread=0))], 0.4).codebook(4)
    classes = rng.integers(0, codebook.n_classes, 300).astype(np.uint8)
    plain = search.choose(vectors, classes, codebook, 64.0)
    for shape in ((300, 1), (300, 4)):
        found = search.choose(vectors, classes, codebook, 64.0, np.ones(shape, np.float32))
        assert found.cost(64.0) == pytest.approx(plain.cost(64.0), rel=1e-6)
        assert float(np.mean(found.symbols != plain.symbols)) < 0.01
