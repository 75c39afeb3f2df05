"""Whole checkpoints through the codecs that take all tensors together: compress, decode, verify, report, budgets."""

import math
import struct

import pytest
import safetensors.torch
import torch

import pqcli
from pqcli.codecs.rate.budget import BudgetError
from pqcli.codecs.rate.survey import spread
from pqcli.container import layout
from pqcli.container.checksum import ENTROPIES
from pqcli.container.layout import CODED
from pqcli.container.reader import Container, open_container
from pqcli.errors import ContainerError
from pqcli.recipe.recipe import Recipe
from tests.container.forging import taken_apart

CODECS = ("trellis", "pq")
QUICK = {"effort": 4}
"""Few states: everything but the last decibel is the same."""


def gaussian(*shape, seed=0, rms=1.0):
    return rms * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe(codec, **settings):
    budget = {} if Recipe(**settings).spending else {"quality": "balanced"}
    return Recipe(codec=codec, **QUICK, **budget, **settings)


def saved(folder, state, name="model"):
    path = folder / f"{name}.pt"
    torch.save(state, path)
    return path


def relative_mse(weight, decoded):
    return float((weight.double() - decoded.double()).square().sum() / weight.double().square().sum())


def network(n=96):
    """A bit of everything, all of it worth compressing."""
    return {
        "embed.weight": gaussian(200, n, seed=1, rms=0.05),
        "conv.weight": gaussian(48, 32, 3, 3, seed=2, rms=0.1),
        "conv.bias": gaussian(48, seed=3),
        "fc1.weight": gaussian(2 * n, n, seed=4, rms=0.08) * torch.linspace(0.3, 2.0, 2 * n)[:, None],
        "fc2.weight": gaussian(n, 2 * n, seed=5, rms=0.06),
        "norm.weight": torch.ones(n),
    }


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


def test_what_compress_reports_is_what_decode_gives(codec, tmp_path):
    state = network()
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    report = pqcli.compress(source, file, recipe(codec))
    decoded = torch.load(pqcli.decode(file), weights_only=True)
    assert list(decoded) == list(state)
    for tensor in report.tensors:
        if tensor.quantized:
            found = relative_mse(state[tensor.name], decoded[tensor.name])
            assert tensor.relative_mse == pytest.approx(found, rel=1e-4)
            assert 0.001 < found < 0.3
        else:
            assert torch.equal(decoded[tensor.name], state[tensor.name])
    assert report.compressed_bytes == file.stat().st_size
    assert pqcli.verify(file, source) == []
    again = pqcli.report(file, source)
    assert again.relative_mse == pytest.approx(report.relative_mse, rel=1e-4)
    assert again.compressed_bytes == report.compressed_bytes


def test_a_report_tells_the_entropy_of_what_was_coded_and_the_error_of_int4(codec, tmp_path):
    state = network()
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, recipe(codec))
    report = pqcli.report(file, source)
    for tensor in report.quantized:
        assert tensor.assignment_bytes == tensor.bytes
        assert 0.8 * tensor.bytes < tensor.entropy_bytes < 1.25 * tensor.bytes
        assert tensor.int4_relative_mse == pytest.approx(int4_relative_mse(state[tensor.name]), rel=1e-5)
    assert pqcli.report(file).entropy_bytes == report.entropy_bytes
    assert pqcli.report(file).int4_relative_mse is None
    assert report.paper_bytes is None


def entropies(file):
    return [tensor.entropy_bytes for tensor in pqcli.report(file).quantized]


def test_a_large_file_tells_its_entropies_and_a_report_decodes_nothing(codec, tmp_path, monkeypatch):
    source, small, large = saved(tmp_path, network()), tmp_path / "a.pq.safetensors", tmp_path / "b.pq.safetensors"
    pqcli.compress(source, small, recipe(codec))
    monkeypatch.setattr(layout, "ENTROPIES_SHARE", 1)
    report = pqcli.compress(source, large, recipe(codec))
    assert layout.ENTROPIES in safetensors.torch.load_file(large)
    assert layout.ENTROPIES not in safetensors.torch.load_file(small)
    assert report.compressed_bytes == large.stat().st_size
    assert pqcli.verify(large, source) == []
    computed = entropies(small)
    monkeypatch.setattr(Container, "_opened_decoder", lambda _: pytest.fail("decoded"))
    assert entropies(large) == pytest.approx(computed, rel=1e-3, abs=1)


def test_entropies_cost_less_than_a_two_thousandth_of_what_is_coded(tmp_path, monkeypatch):
    source, file = saved(tmp_path, {"w": gaussian(512, 1024)}), tmp_path / "model.pq.safetensors"
    told = pqcli.compress(source, file, recipe("trellis")).compressed_bytes
    assert layout.ENTROPIES in safetensors.torch.load_file(file)
    monkeypatch.setattr(layout, "ENTROPIES_SHARE", 10**9)
    untold = pqcli.compress(source, file, recipe("trellis"), force=True).compressed_bytes
    assert 0 < told - untold < told / 2000


def test_a_size_is_met_to_the_byte_with_entropies_in_the_file(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "ENTROPIES_SHARE", 1)
    source, file = saved(tmp_path, network()), tmp_path / "model.pq.safetensors"
    report = pqcli.compress(source, file, recipe(codec, target_bytes=14_000))
    assert report.compressed_bytes == file.stat().st_size <= 14_000


def test_an_entropy_that_is_no_number_is_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "ENTROPIES_SHARE", 1)
    file = tmp_path / "model.pq.safetensors"
    pqcli.compress(saved(tmp_path, network()), file, recipe("trellis"))
    forgery = taken_apart(file)
    entry = forgery.entries[ENTROPIES]
    entry[2] = struct.pack("<e", math.nan) + entry[2][2:]
    file.write_bytes(forgery.bytes())
    with pytest.raises(ContainerError, match="an entropy is no number of bits; the file is damaged"):
        pqcli.load(file)


def int4_relative_mse(weight):
    """Group by group."""
    groups = weight.flatten().split(128)
    scales = [float((group.abs().max() / 7).half()) for group in groups]
    decoded = [scale * (group / scale).round().clamp(-8, 7) for group, scale in zip(groups, scales, strict=True)]
    return relative_mse(weight.flatten(), torch.cat(decoded))


def test_plain_pq_reports_the_entropy_of_its_assignments(tmp_path):
    source, file = saved(tmp_path, {"w": gaussian(64, 128)}), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, Recipe(block_size=4, n_centroids=32))
    (tensor,) = pqcli.report(file).tensors
    n = 64 * 128 // 4
    assert tensor.assignment_bytes == n * 5 // 8
    assert tensor.entropy_bytes == math.ceil(n * tensor.assignment_entropy / 8) <= tensor.assignment_bytes


def test_the_bytes_of_the_tensors_add_up_to_the_coded_entry(codec, tmp_path):
    file = tmp_path / "model.pq.safetensors"
    report = pqcli.compress(saved(tmp_path, network()), file, recipe(codec))
    coded = safetensors.torch.load_file(file)[CODED]
    assert sum(tensor.bytes for tensor in report.quantized) == coded.numel()


def test_the_same_input_gives_the_same_bytes(codec, tmp_path):
    source = saved(tmp_path, network())
    files = [tmp_path / f"{i}.pq.safetensors" for i in range(2)]
    for file in files:
        pqcli.compress(source, file, recipe(codec, quality="small"))
    assert files[0].read_bytes() == files[1].read_bytes()


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "ratio"), [("trellis", 7), ("trellis", 12), ("pq", 10)])
def test_a_target_size_is_hit_within_one_percent_below(codec, ratio, tmp_path):
    source = saved(tmp_path, network(192))
    target = source.stat().st_size // ratio
    file = tmp_path / "model.pq.safetensors"
    report = pqcli.compress(source, file, recipe(codec, target_bytes=target))
    assert 0.99 * target <= file.stat().st_size <= target
    assert report.compressed_bytes == file.stat().st_size


def test_a_target_ratio_counts_the_files(tmp_path):
    source = saved(tmp_path, network(192))
    report = pqcli.compress(source, tmp_path / "o.pq.safetensors", recipe("trellis", target_ratio=10.0))
    assert 10.0 <= report.ratio <= 10.2


def test_target_bits_are_hit(tmp_path):
    report = pqcli.compress(saved(tmp_path, network(192)), None, recipe("trellis", target_bits=2.5))
    assert 2.5 * 0.99 <= report.bits_per_weight <= 2.5


@pytest.mark.parametrize("bound", [{"max_relative_mse": 0.05}, {"min_sqnr": 13.0103}])
def test_a_bound_on_the_error_is_kept_and_used(bound, tmp_path):
    report = pqcli.compress(saved(tmp_path, network()), None, recipe("trellis", **bound))
    assert 0.95 * 0.05 <= report.relative_mse <= 0.05 * (1 + 1e-6)


def test_a_size_that_cannot_be_reached_leaves_no_file(tmp_path):
    source, file = saved(tmp_path, network()), tmp_path / "model.pq.safetensors"
    with pytest.raises(BudgetError, match=r"a file of 500 B or less cannot be reached.* B of tensors are kept exactly"):
        pqcli.compress(source, file, recipe("trellis", target_bytes=500))
    assert not file.exists()


def test_better_qualities_are_larger_with_less_error(codec, tmp_path):
    source = saved(tmp_path, network())
    reports = [
        pqcli.compress(source, None, recipe(codec, quality=quality), force=True)
        for quality in ("tiny", "balanced", "near-lossless")
    ]
    assert sorted(reports, key=lambda r: r.compressed_bytes) == reports
    assert sorted(reports, key=lambda r: -r.relative_mse) == reports


# --- how large weights are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_spread_of_ordinary_weights_is_their_root_mean_square(dtype):
    weight = (gaussian(300, 200, rms=0.05) * torch.linspace(0.3, 2, 300)[:, None]).to(dtype)
    assert spread(weight) == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-6)


def test_the_spread_hardly_notices_outliers_nor_zeros():
    weight = gaussian(300, 200)
    weight[3, 4] = 1e6
    assert spread(weight) < 2.2
    sparse = gaussian(300, 200) * (gaussian(300, 200, seed=1) > 2)
    assert spread(sparse) == pytest.approx(float(sparse.square().mean().sqrt()), rel=1e-5)
    assert spread(torch.zeros(5, 5)) == 0


# --- all kinds of tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(codec, dtype, tmp_path):
    state = {"fc.weight": gaussian(128, 96, rms=0.1).to(dtype), "out.weight": gaussian(64, 128, rms=0.1)}
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, recipe(codec))
    decoded = pqcli.load(file)
    assert decoded["fc.weight"].dtype == dtype
    assert relative_mse(state["fc.weight"], decoded["fc.weight"]) < 0.2
    assert pqcli.verify(file, source) == []


def test_tied_tensors_are_stored_once_and_come_back_tied(codec, tmp_path):
    state = network()
    tied = {**state, "head.weight": state["embed.weight"]}
    single = pqcli.compress(saved(tmp_path, state, "single"), None, recipe(codec))
    file = tmp_path / "tied.pq.safetensors"
    double = pqcli.compress(saved(tmp_path, tied, "tied"), file, recipe(codec))
    assert double.compressed_bytes < single.compressed_bytes + 200
    decoded = pqcli.load(file)
    assert decoded["head.weight"].data_ptr() == decoded["embed.weight"].data_ptr()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_with_nan_or_infinity_is_kept_exactly(codec, value, tmp_path):
    state = network()
    state["fc2.weight"][3, 4] = value
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    report = pqcli.compress(source, file, recipe(codec))
    (kept,) = [tensor for tensor in report.tensors if tensor.name == "fc2.weight"]
    assert kept.action == "keep"
    assert "NaN" in kept.reason
    assert pqcli.load(file)["fc2.weight"].equal(state["fc2.weight"]) or math.isnan(value)
    assert pqcli.verify(file, source) == []


SHAPES = {
    "one row": gaussian(1, 4096),
    "one column": gaussian(4096, 1),
    "odd": gaussian(67, 61),
    "depthwise": gaussian(512, 1, 3, 3),
    "pointwise": gaussian(64, 64, 1, 1),
    "one dimension of kernel": gaussian(64, 32, 5),
    "experts": gaussian(4, 48, 32),
}
VALUES = {
    "zeros": torch.zeros(64, 64),
    "a constant": torch.full((64, 64), 0.25),
    "minus zero": torch.full((64, 64), -0.0),
    "tiny values": gaussian(64, 64, rms=1e-30),
    "huge values": gaussian(64, 64, rms=1e18),
    "sparse": gaussian(64, 64) * (gaussian(64, 64, seed=1) > 2),
    "zero rows": gaussian(64, 64) * (torch.arange(64) % 2)[:, None],
    "three levels": gaussian(64, 64).sign() * (gaussian(64, 64, seed=1) > 0),
}


@pytest.mark.parametrize("kinds", [SHAPES, VALUES], ids=["shapes", "values"])
def test_every_kind_of_tensor_survives_beside_ordinary_ones(codec, kinds, tmp_path):
    state = {**kinds, "fc.weight": gaussian(96, 96, seed=9, rms=0.1)}
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, recipe(codec))
    assert pqcli.verify(file, source) == []
    decoded = pqcli.load(file)
    for name, weight in state.items():
        assert decoded[name].shape == weight.shape
        assert decoded[name].isfinite().all(), name
        if weight.any():
            assert relative_mse(weight, decoded[name]) < (0.8 if name == "tiny values" else 0.6), name
        else:
            assert not decoded[name].any(), name


def test_one_gigantic_outlier_ruins_neither_its_tensor_nor_the_others(codec, tmp_path):
    state = network()
    state["fc2.weight"][5, 7] = 1e6
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, recipe(codec))
    decoded = pqcli.load(file)
    assert float(decoded["fc2.weight"][5, 7]) == pytest.approx(1e6, rel=0.01)
    for name in ("embed.weight", "conv.weight", "fc1.weight"):
        assert relative_mse(state[name], decoded[name]) < 0.2, name
    rows = torch.arange(len(state["fc2.weight"])) != 5
    assert relative_mse(state["fc2.weight"][rows], decoded["fc2.weight"][rows]) < 0.6
    assert pqcli.verify(file, source) == []


@pytest.mark.parametrize(("setting", "worst"), [({"target_bits": 2.0}, 0.6), ({}, 0.15)])
def test_where_one_tensor_holds_the_energy_the_others_keep_most_of_theirs(codec, setting, worst, tmp_path):
    """As in speech encoders, and in embeddings with rows of outliers: 99.99 % of the energy is in one tensor."""
    state = {**network(), "loud.weight": gaussian(128, 128, seed=8, rms=20.0)}
    file = tmp_path / "model.pq.safetensors"
    report = pqcli.compress(saved(tmp_path, state), file, recipe(codec, **setting))
    assert max(tensor.relative_mse for tensor in report.quantized) < worst


def test_a_checkpoint_with_nothing_to_quantize_is_kept_whole(codec, tmp_path):
    state = {"bias": gaussian(50), "steps": torch.tensor(7)}
    source, file = saved(tmp_path, state), tmp_path / "model.pq.safetensors"
    pqcli.compress(source, file, recipe(codec))
    assert torch.equal(pqcli.load(file)["bias"], state["bias"])


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CODECS)
def sound(request, tmp_path_factory):
    """The bytes of a good file, and where its coded entry lies."""
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "model.pq.safetensors"
    pqcli.compress(saved(folder, network()), file, recipe(request.param))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    with safetensors.safe_open(file, "pt") as opened:
        coded = opened.get_tensor(CODED).numpy().tobytes()
    start = data.index(coded, 8 + length)
    return data, start, start + len(coded)


def decode_all(path):
    with open_container(path) as container:
        for record in container.records:
            container.decode(record.name)


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_in_place_of_the_coded_ones_end_in_an_error(sound, seed, tmp_path):
    data, start, stop = sound
    length = stop - start
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (length,), dtype=torch.uint8, generator=generator).numpy().tobytes()
    kept = [0, 8, 64, length // 4, length // 2, length - 8][seed]  # the deeper, the more of it is believed
    file = tmp_path / "hostile.pq.safetensors"
    file.write_bytes(data[: start + kept] + noise[kept:] + data[stop:])
    with pytest.raises(ContainerError):
        decode_all(file)
    assert pqcli_findings(file)


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_constant_bytes_in_place_of_the_coded_ones_end_in_an_error(sound, fill, tmp_path):
    data, start, stop = sound
    file = tmp_path / "hostile.pq.safetensors"
    file.write_bytes(data[:start] + bytes([fill]) * (stop - start) + data[stop:])
    with pytest.raises(ContainerError):
        decode_all(file)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_ends_in_an_error(sound, share, tmp_path):
    data, start, stop = sound
    file = tmp_path / "short.pq.safetensors"
    file.write_bytes(data[: start + int(share * (stop - start))])
    with pytest.raises(ContainerError):
        decode_all(file)


def test_a_flipped_bit_is_found(sound, tmp_path):
    data, start, stop = sound
    file = tmp_path / "flipped.pq.safetensors"
    for i in range(8):
        hurt = bytearray(data)
        hurt[start + (stop - start) * i // 8] ^= 1 << i
        file.write_bytes(bytes(hurt))
        with pytest.raises(ContainerError):
            decode_all(file)


def pqcli_findings(file):
    """What `verify` says; a file that cannot even be opened is a finding too."""
    try:
        return pqcli.verify(file)
    except ContainerError as error:
        return [error]
