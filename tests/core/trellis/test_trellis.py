import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core.entropy.rangecoder import RATES, RangeCoder
from pqcli.core.importance import Importance
from pqcli.core.trellis import side as sides
from pqcli.core.trellis.loops import BYTES_PER_LEVEL
from pqcli.core.trellis.mixing_loops import Mixing, code_levels_mixed
from pqcli.core.trellis.params import N_STATES, TrellisParams
from pqcli.core.trellis.rotation import Rotation, Rotations, fit_rotations
from pqcli.core.trellis.side import make_side, parse_side, write_side
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.stream import decode_stream, encode_stream
from pqcli.core.trellis.streams import stream_layout
from pqcli.core.trellis.trellis import (
    EncodedStreams,
    decode,
    encode,
    entropies,
    gather_streams,
    segment_weights,
)


def model(seed=0):
    """Sources and weights of every shape: dense, convolutional, depthwise, low-rank, tiny and empty."""
    rng = np.random.default_rng(seed)
    smooth = rng.standard_normal((12, 5, 1)) + 0.3 * rng.standard_normal((12, 5, 9))
    weights = {
        "dense": rng.standard_normal((40, 33)),
        "conv": smooth.reshape(12, 45),
        "depthwise": rng.standard_normal((30, 9)),
        "low rank": 3 * rng.standard_normal((300, 2)) @ rng.standard_normal((2, 24)) + rng.standard_normal((300, 24)),
        "row": rng.standard_normal((1, 50)),
        "column": rng.standard_normal((50, 1)),
        "no rows": np.zeros((0, 7)),
        "scalar": np.ones((1, 1)),
    }
    shapes = {"conv": (12, 5, 3, 3), "depthwise": (30, 1, 3, 3)}
    sources = [Source(key, shapes.get(key, w.shape), *w.shape, 9 if key in shapes else 1) for key, w in weights.items()]
    return sources, {key: w.astype(np.float32) for key, w in weights.items()}


def round_trip(sources, weights, params, steps=None, **options):
    rotations = fit_rotations(
        sources, weights.__getitem__, {s.key: (steps or {}).get(s.key, params.step) for s in sources}
    )
    encoded = encode(sources, weights.__getitem__, params, rotations, steps, **options)
    return encoded, dict(decode(encoded, sources))


def relative_mse(weights, decoded):
    return sum(float(np.sum((weights[k] - decoded[k]) ** 2)) for k in weights) / sum(
        float(np.sum(w**2)) for w in weights.values()
    )


@pytest.mark.parametrize("n_states", N_STATES)
def test_every_tensor_comes_back_near_what_it_was(n_states):
    sources, weights = model()
    _, decoded = round_trip(sources, weights, TrellisParams(0.2, n_states))
    assert [s.key for s in sources] == list(decoded)
    for source in sources:
        assert decoded[source.key].shape == (source.rows, source.columns)
        np.testing.assert_allclose(decoded[source.key], weights[source.key], atol=1.2)
    assert relative_mse(weights, decoded) < 0.01


def test_the_error_that_the_encoder_states_is_the_error_made():
    sources, weights = model()
    encoded, decoded = round_trip(sources, weights, TrellisParams(0.5), {"dense": 0.1})
    for key, stated in encoded.squared_errors.items():
        np.testing.assert_allclose(stated, np.sum((weights[key] - decoded[key]) ** 2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("stream_weights", "learning"), [(1024, 0.08), (1 << 20, 0.02)])
def test_the_entropy_of_levels_is_about_what_independent_weights_are_coded_in(stream_weights, learning):
    rng = np.random.default_rng(0)
    weights = {
        "zeros": np.zeros((20, 30), np.float32),
        "w": rng.standard_normal((200, 200)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    sources = [Source(key, w.shape, *w.shape) for key, w in weights.items()]
    encoded, _ = round_trip(sources, weights, TrellisParams(0.3, 8, stream_weights=stream_weights))
    bits = entropies(encoded, sources)
    assert bits == {"zeros": 0, "w": pytest.approx(8 * encoded.coded_bytes["w"], rel=learning), "empty": 0}


def test_more_states_find_less_error():
    weights = {"w": np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)}
    sources = [Source("w", (200, 200), 200, 200)]
    scores = []
    for n_states in (4, 32, 256):
        encoded, decoded = round_trip(sources, weights, TrellisParams(0.7, n_states))
        scores.append(10 * np.log10(relative_mse(weights, decoded)) + 6.02 * encoded.n_bytes * 8 / 40_000)
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] < 0.6  # dB from the Shannon bound of a Gaussian, all bytes counted


@pytest.mark.parametrize("stream_weights", [256, 4096])
def test_bytes_depend_on_neither_threads_nor_run(stream_weights):
    sources, weights = model()
    params = TrellisParams(0.4, 32, stream_weights=stream_weights)
    first = round_trip(sources, weights, params, n_threads=1)
    second = round_trip(sources, weights, params, n_threads=4)
    assert first[0] == second[0]
    for key in weights:
        np.testing.assert_array_equal(first[1][key], second[1][key])


def passed_on(*arguments):
    """As another process would get them."""
    return pickle.loads(pickle.dumps(arguments))


def test_streams_coded_one_by_one_as_another_process_would_make_the_same_bytes():
    sources, weights = model()
    params = TrellisParams(0.4, 16, stream_weights=1024)
    steps = {"conv": 0.1}
    rotations = fit_rotations(sources, weights.__getitem__, {s.key: steps.get(s.key, 0.4) for s in sources})
    whole = encode(sources, weights.__getitem__, params, rotations, steps)
    side = make_side(sources, params, rotations, steps)
    layout = stream_layout(sources, rotations.transposed, params.stream_weights)
    coded = []
    for segments in layout:
        named = [sources[segment.source] for segment in segments]
        own = [segment_weights(weights[s.key], t, s, side) for s, t in zip(named, segments, strict=True)]
        coded += passed_on(encode_stream(*passed_on(own, segments, sources, params, rotations)))
    assert gather_streams(coded, layout, sources, side) == whole
    found = dict(decode(whole, sources))
    known, _ = parse_side(whole.side, sources, len(layout))
    for i, segments in enumerate(layout):
        parts = decode_stream(*passed_on(whole.streams[i], i in known.mixed, segments, sources, known))
        for segment, part in zip(segments, parts, strict=True):
            key = sources[segment.source].key
            matrix = found[key].T if key in known.rotations.transposed else found[key]
            np.testing.assert_array_equal(part, matrix[segment.start : segment.stop])


def test_single_tensors_decode_alone_and_alike():
    sources, weights = model()
    encoded, decoded = round_trip(sources, weights, TrellisParams(0.4, stream_weights=256))
    assert len(encoded.streams) > 5
    for key in weights:
        ((found, alone),) = decode(encoded, sources, [key])
        assert found == key
        np.testing.assert_array_equal(alone, decoded[key])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12), st.integers(0, 10))
def test_streams_hold_every_row_once_and_in_order(shapes, log_weights):
    sources = [Source(str(i), shape, *shape) for i, shape in enumerate(shapes)]
    layout = stream_layout(sources, {"1"}, 1 << log_weights)
    covered = dict.fromkeys(range(len(shapes)), 0)
    for segments in layout:
        assert segments
        for segment in segments:
            assert covered[segment.source] == segment.start < segment.stop
            covered[segment.source] = segment.stop
    for i, (rows, columns) in enumerate(shapes):
        assert covered[i] == (0 if rows * columns == 0 else columns if i == 1 else rows)


@pytest.mark.parametrize(
    "values",
    [np.zeros((20, 30)), np.full((20, 30), 3.7), np.full((20, 30), 1e-40), np.full((20, 30), 3e38)],
    ids=["zeros", "constant", "denormal", "huge"],
)
def test_uniform_weights_of_any_size_survive(values):
    weights = {"w": values.astype(np.float32)}
    step = max(float(np.abs(weights["w"]).max()) / 8, 1e-44)
    _, decoded = round_trip([Source("w", (20, 30), 20, 30)], weights, TrellisParams(step, 32))
    np.testing.assert_allclose(decoded["w"].astype(float), weights["w"].astype(float), atol=2 * step)


def test_an_outlier_a_million_times_larger_is_kept_and_spares_the_rest():
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    w[5, 7] = 1e6
    w[9, 9] = -3e7
    _, decoded = round_trip([Source("w", w.shape, *w.shape)], {"w": w}, TrellisParams(0.3, 32))
    error = np.abs(decoded["w"] - w)
    assert error[5, 7] < 16
    assert error[9, 9] < 16
    error[[5, 9]] = 0
    error[:, [7, 9]] = 0
    assert error.max() < 3


def test_fine_steps_give_fine_weights():
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    encoded, decoded = round_trip([Source("w", w.shape, *w.shape)], {"w": w}, TrellisParams(1e-4, 32))
    assert np.abs(decoded["w"] - w).max() < 3e-4
    assert encoded.n_bytes * 8 / w.size < 15.3  # the entropy is log2(sqrt(2 pi e) / 1e-4) - 1 = 14.3 bits


def test_long_rows_restart_the_trellis_and_still_round_trip():
    w = np.random.default_rng(0).standard_normal((3, 9001)).astype(np.float32)
    _, decoded = round_trip([Source("w", w.shape, *w.shape)], {"w": w}, TrellisParams(0.3, 64, stream_weights=1024))
    assert np.abs(decoded["w"] - w).max() < 1.5


def test_a_weight_too_large_for_its_step_is_refused():
    weights = {"w": np.full((2, 2), 1e30, np.float32)}
    with pytest.raises(ValueError, match=r"a weight of magnitude 1e\+30 is too large for the step 1"):
        encode([Source("w", (2, 2), 2, 2)], weights.__getitem__, TrellisParams(1.0), Rotations())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.0}, "not a positive float32"),
        ({"step": float("nan")}, "not a positive float32"),
        ({"step": 1.0, "n_states": 12}, "12 states; a trellis has one of 4, 8"),
        ({"step": 1.0, "stream_weights": 1000}, "1000 weights per stream is not a power of two"),
    ],
)
def test_parameters_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrellisParams(**options)


ALWAYS, NEVER = -1.0, 1.0
"""`mixing_gain`s."""


def test_both_coders_of_levels_code_the_same_levels():
    sources, weights = model()
    mixed, plain = (
        round_trip(sources, weights, TrellisParams(0.3, 32, mixing_gain=gain))[0] for gain in (ALWAYS, NEVER)
    )
    assert (mixed.mixes, plain.mixes) == (True, False)
    assert mixed.streams != plain.streams
    assert entropies(mixed, sources) == entropies(plain, sources)


def test_leaning_towards_what_was_guessed_never_raises_the_error():
    sources, weights = model()
    steps = np.arange(64) * np.linspace(0.1, 0.6, 30)[:, None]
    weights["waves"] = np.sin(steps).astype(np.float32)
    sources.append(Source("waves", (30, 64), 30, 64))
    mixed, plain = (
        round_trip(sources, weights, TrellisParams(0.3, 32, mixing_gain=gain))[0].squared_errors
        for gain in (ALWAYS, NEVER)
    )
    assert all(mixed[key] <= plain[key] * (1 + 1e-6) for key in weights)
    assert mixed["waves"] < 0.95 * plain["waves"]


def test_streams_are_mixed_one_by_one_where_that_saves_enough():
    rng = np.random.default_rng(0)
    steps = np.arange(128) * rng.uniform(0.05, 0.5, (128, 1))
    weights = {
        "noise": rng.standard_normal((128, 128)).astype(np.float32),
        "waves": np.sin(steps + rng.uniform(0, 6, (128, 1))).astype(np.float32),
    }
    sources = [Source(key, w.shape, *w.shape) for key, w in weights.items()]

    def encoded(mixing_gain):
        params = TrellisParams(0.3, 32, stream_weights=1 << 14, mixing_gain=mixing_gain)
        return encode(sources, weights.__getitem__, params, Rotations())

    plain, either, mixed = encoded(NEVER), encoded(0.05), encoded(ALWAYS)
    assert either.mixes
    assert either.streams == (plain.streams[0], mixed.streams[1])
    assert len(mixed.streams[1]) < 0.8 * len(plain.streams[1])
    assert encoded(0.0).streams == tuple(min(pair, key=len) for pair in zip(plain.streams, mixed.streams, strict=True))
    found = dict(decode(either, sources, ["waves"]))
    np.testing.assert_array_equal(found["waves"], dict(decode(mixed, sources))["waves"])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_mixing_gives_back_levels_of_any_size_and_shape(data):
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    period = data.draw(st.sampled_from([p for p in range(1, columns + 1) if columns % p == 0]))
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=columns, max_size=columns)), np.uint8)
    size = data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4, 1e8]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    levels = 2 * (size * rng.standard_cauchy((rows, columns))).clip(-5e8, 5e8).astype(np.int32)
    scale0 = data.draw(st.sampled_from([64, 4096, 1 << 26]))
    one_state = np.zeros((1, 2), np.int64)

    def code(coder, levels):
        guesses = np.empty(levels.shape, np.int32)
        for _ in range(2):  # two segments that share what is learned
            own = labels, np.zeros(rows, np.uint8), max(1, 2048 // columns)
            how = *own, period, scale0, one_state, mixings.pop(), guesses
            assert code_levels_mixed(coder.encoding, levels, *how, RATES, coder.window, coder.buffer)
        return guesses

    mixings = [Mixing.fresh()] * 2
    writer = RangeCoder.writer(2 * BYTES_PER_LEVEL * levels.size, 1)
    guesses = code(writer, levels.copy())
    mixings = [Mixing.fresh()] * 2
    found = np.empty_like(levels)
    reader = RangeCoder.reader(writer.finish(), 1)
    np.testing.assert_array_equal(code(reader, found), guesses)
    np.testing.assert_array_equal(found, levels)
    reader.finish()


def small(mixing_gain):
    sources, weights = model()
    sources = [s for s in sources if s.key in ("conv", "low rank", "row", "no rows")]
    params = TrellisParams(0.5, 32, stream_weights=4096, mixing_gain=mixing_gain)
    return sources, round_trip(sources, weights, params)[0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_counts_more_comes_back_with_less_error(axis, is_transposed):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((160, 96)).astype(np.float32)
    source = Source("w", w.shape, *w.shape)
    rotations = Rotations(transposed=frozenset({"w"} if is_transposed else ()))

    def errors(factor):
        factors = np.ones(w.shape[axis], np.float32)
        factors[:20] = factor
        importance = (Importance.of_rows if axis == 0 else Importance.of_columns)(factors, w.shape[1 - axis])
        params = TrellisParams(0.8, 32, stream_weights=4096)
        encoded = encode([source], lambda _: w, params, rotations, importance={"w": importance})
        ((_, decoded),) = decode(encoded, [source])
        by_axis = np.mean((w - decoded) ** 2, axis=1 - axis)
        return by_axis[:20].mean(), by_axis[20:].mean(), encoded

    plain, more, most = errors(1.0), errors(2.0), errors(6.0)
    assert plain[0] > more[0] > most[0]
    assert plain[1] < most[1]
    assert errors(3.0)[2] != plain[2]
    assert plain[2] == encode([source], lambda _: w, TrellisParams(0.8, 32, stream_weights=4096), rotations)


def test_importance_lowers_the_error_that_it_weighs_at_the_same_rate():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((256, 128)).astype(np.float32)
    importance = Importance.of_columns(np.exp(rng.normal(0, 0.7, 128)).astype(np.float32), 256)
    source = Source("w", w.shape, *w.shape)

    def score(step, importance_used):
        used = {"w": importance_used} if importance_used else None
        encoded = encode([source], lambda _: w, TrellisParams(step, 32), Rotations(), importance=used)
        ((_, decoded),) = decode(encoded, [source])
        error = float(np.sum((w - decoded) ** 2 * importance.columns))
        return 10 * np.log10(error) + 6.02 * encoded.n_bytes * 8 / w.size  # dB at one rate

    assert score(0.8, importance) < score(0.8, None) - 0.5


def test_importance_of_columns_that_a_rotation_mixes_is_refused():
    w = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    rotations = Rotations((Rotation(np.eye(8, dtype=np.int32)[:2] * 8, (3, 3)),), {"w": 0})
    source = Source("w", (20, 8), 20, 8)
    rows, columns = (np.arange(1, n + 1).astype(np.float32) for n in (20, 8))
    params = TrellisParams(0.5, 8)
    encode([source], lambda _: w, params, rotations, importance={"w": Importance.of_rows(rows, 8)})
    with pytest.raises(ValueError, match="'w' has columns of different importance that its rotation mixes"):
        encode([source], lambda _: w, params, rotations, importance={"w": Importance.of_columns(columns, 20)})
    with pytest.raises(ValueError, match=r"importance of \(8, 20\) for 20 x 8 weights"):
        encode([source], lambda _: w, params, rotations, importance={"w": Importance.of_columns(columns, 20).T})


SMALL = {}


def hostile_decode(sources, side, streams):
    try:
        decoded = dict(decode(EncodedStreams(side, streams), sources))
    except ValueError as error:
        assert str(error)  # noqa: PT017 - an error or tensors of the right shape: both are fine
        return
    assert all(decoded[s.key].shape == (s.rows, s.columns) for s in sources)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_streams_end_in_a_value_error_or_in_tensors(data):
    mixing_gain = data.draw(st.sampled_from([ALWAYS, NEVER]))
    if mixing_gain not in SMALL:  # encoded once
        SMALL[mixing_gain] = small(mixing_gain)
    sources, encoded = SMALL[mixing_gain]
    parts = [encoded.side, *encoded.streams]
    which = data.draw(st.integers(0, len(parts) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "random", "longer"]))
    part = bytearray(parts[which])
    if kind == "flip":
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del part[data.draw(st.integers(0, len(part) - 1)) :]
    elif kind == "random":
        part = data.draw(st.binary(max_size=100))
    else:
        part += data.draw(st.binary(min_size=1, max_size=20))
    parts[which] = bytes(part)
    hostile_decode(sources, parts[0], tuple(parts[1:]))


def test_a_stream_too_short_for_its_shapes_is_refused_before_memory_is_asked_for():
    source = [Source("w", (64, 64), 64, 64)]
    encoded = encode(source, lambda _: np.zeros((64, 64), np.float32), TrellisParams(1.0), Rotations())
    claimed = [Source("w", (10**7, 10**3), 10**7, 10**3)]
    n = len(stream_layout(claimed, (), 1 << 20))
    with pytest.raises(ValueError, match="cannot hold"):
        list(decode(EncodedStreams(encoded.side, encoded.streams * n), claimed))


def test_a_missing_stream_is_an_error():
    sources, weights = model()
    encoded, _ = round_trip(sources, weights, TrellisParams(0.5, stream_weights=256))
    with pytest.raises(ValueError, match="streams where the shapes make"):
        list(decode(EncodedStreams(encoded.side, encoded.streams[:-1]), sources))


def test_a_transposed_tensor_is_coded_along_its_columns():
    w = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    rotations = Rotations((Rotation(np.eye(20, dtype=np.int32)[:2] * 8, (3, 3)),), {"w": 0}, frozenset({"w"}))
    source = [Source("w", (20, 8), 20, 8)]
    encoded = encode(source, lambda _: w, TrellisParams(0.1), rotations)
    ((_, decoded),) = decode(encoded, source)
    np.testing.assert_allclose(decoded, w, atol=0.5)


def test_rotations_share_one_limit_so_that_a_few_bytes_cannot_fill_memory(monkeypatch):
    sources = [Source(f"w{i}", (2, 4096), 2, 4096) for i in range(3)]
    items = tuple(Rotation(np.zeros((16, 4096), np.int32), (3,) * 16) for _ in sources)
    rotations = Rotations(items, {source.key: i for i, source in enumerate(sources)})
    data = write_side(make_side(sources, TrellisParams(step=0.1), rotations), sources, n_streams=1)
    assert len(data) < 100
    assert len(parse_side(data, sources, 1)[0].rotations.items) == 3
    monkeypatch.setattr(sides, "_SPARE_ENTRIES", 2 * 65536)
    with pytest.raises(ValueError, match="16 basis vectors of size 4096, more than the 24576 entries"):
        parse_side(data, sources, 1)
