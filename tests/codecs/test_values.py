"""What is exact in few bits is stored exactly by every codec, and zeros stay zeros."""

import math

import pytest
import torch

import pqcli
from pqcli.codecs import values, zeros
from pqcli.codecs.base import Weights
from pqcli.errors import CheckpointError
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Coded, Plain, Record

CODECS = {
    "pq": {"codec": "pq"},
    "ecpq": {"codec": "pq", "quality": "balanced"},
    "trellis": {"codec": "trellis"},
    "auto": {"codec": "auto"},
}
G = torch.Generator().manual_seed(0)


def gaussian(*shape, rms=0.05):
    return rms * torch.randn(*shape, generator=G)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=G)


def causal(fill, dtype=torch.float32):
    visible = torch.tril(torch.ones(256, 256)).bool()
    return torch.zeros(256, 256, dtype=dtype).masked_fill(~visible, fill).view(1, 1, 256, 256)


FEW = {
    "constant": torch.full((256, 256), 0.1),
    "zeros": torch.zeros(256, 256),
    "ones in bfloat16": torch.ones(200, 200).bfloat16(),
    "tenth in float64": torch.full((256, 256), 0.1, dtype=torch.float64),
    "causal of ones": torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256),
    "causal of -1e4": causal(-1e4),
    "causal of -65504": causal(-65504.0, torch.float16),
    "causal of the least float32": causal(torch.finfo(torch.float32).min),
    "causal of the least bfloat16": causal(torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "causal of -inf": causal(-math.inf),
    "random mask": integers(0, 2, 256, 255).float(),
    "padding mask": (torch.arange(512) < integers(1, 512, 200, 1)).float(),
    "binary": 0.0317 * (2 * integers(0, 2, 256, 256) - 1).float(),
    "ternary": 0.0173 * (integers(0, 3, 250, 256) - 1).float(),
    "ternary in float16": (0.0173 * (integers(0, 3, 250, 256) - 1)).half(),
    "ternary convolution": (integers(0, 3, 64, 32, 3, 3) - 1).float(),
    "two bits": (integers(0, 4, 256, 256) * 0.1 - 0.15),
    "negative zero": torch.where(integers(0, 2, 256, 256) == 1, -0.0, 0.0),
    "denormal": 1e-40 * integers(0, 2, 256, 256).float(),
    "one hot": torch.eye(300),
}


@pytest.fixture(scope="module", params=CODECS)
def few_decoded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    source, file = folder / "model.pt", folder / "model.pq.safetensors"
    torch.save({"fc.weight": gaussian(256, 128)} | {f"{name}.weight": value for name, value in FEW.items()}, source)
    report = pqcli.compress(source, file, Recipe(**CODECS[request.param]))
    assert pqcli.verify(file, source) == []
    return pqcli.load(file), {tensor.name: tensor for tensor in report.tensors}


@pytest.mark.parametrize("name", FEW)
def test_few_distinct_values_come_back_bit_for_bit(few_decoded, name):
    decoded, reports = few_decoded
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[FEW[name].element_size()]
    assert torch.equal(decoded[f"{name}.weight"].view(words), FEW[name].view(words))
    told = reports[f"{name}.weight"]
    assert told.action == "keep" or told.relative_mse == 0
    if name not in ("causal of -inf", "tenth in float64", "denormal"):
        assert told.bits_per_weight <= values.FEW_BITS + 0.1, told
        assert "few distinct values, held exactly" in told.reason


def test_ordinary_weights_beside_them_are_coded(few_decoded):
    _, reports = few_decoded
    assert reports["fc.weight"].relative_mse > 0


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_counted_by_their_bits(n, dtype):
    few = values.few_values(torch.arange(64 * n).remainder(n).to(dtype))
    assert (few is None) == (n > values.FEW_VALUES)
    if few is not None:
        assert torch.equal(few.values[torch.from_numpy(few.codes).long()], torch.arange(64 * n).remainder(n).to(dtype))


def test_a_rare_seventeenth_value_at_the_end_is_found():
    weight = torch.arange(values._CHUNK + 5000).remainder(16).float()
    assert values.few_values(weight) is not None
    weight[-1] = 99
    assert values.few_values(weight) is None


def test_sixteen_values_that_take_four_bits_are_left_to_the_codec():
    weight = integers(0, 16, 512, 512).float()
    info = TensorInfo("fc.weight", (512, 512), "float32")
    assert values.exact_record(Record(info, Coded("trellis")), weight, is_compact=True) is None
    assert values.exact_record(Record(info, Plain(8, 256)), weight, is_compact=False) is None
    costly = Record(info, Plain(1, 256))
    found = values.exact_record(costly, weight, is_compact=False)
    assert found.coding == Plain(1, 16)
    assert found.payload_bytes < costly.payload_bytes


# --- zeros ------------------------------------------------------------------------------------------------------------


def padded_embedding():
    weight = gaussian(2000, 64, rms=1.0)
    weight[[0, 1999]] = 0
    return weight


def pruned(share, dtype=torch.float32):
    weight = gaussian(256, 256)
    weight[torch.rand(256, 256, generator=G) < share] = 0
    return weight.to(dtype)


def one_zero():
    weight = gaussian(256, 256)
    weight[100, 7] = 0
    return weight


def row_and_one_more():
    weight = one_zero()
    weight[3] = 0
    return weight


def two_of_four():
    weight = gaussian(256, 256)
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
    return weight


def dead_filters():
    weight = gaussian(64, 32, 3, 3)
    weight[::4] = 0
    weight[:, 5] = 0
    return weight


def expert_without_weights():
    weight = gaussian(4, 64, 128)
    weight[2] = 0
    return weight


def one_zero_column():
    weight = gaussian(256, 256)
    weight[:, 17] = 0
    return weight


SPARSE = {
    "padding row": padded_embedding(), "one zero column": one_zero_column(), "dead filters": dead_filters(),
    "expert without weights": expert_without_weights(), "2 of 4": two_of_four(),
    **{f"pruned by {share}": pruned(share) for share in (1e-4, 0.002, 0.01, 0.03, 0.05, 0.3, 0.9, 0.99)},
    "one zero": one_zero(), "one zero in float16": one_zero().half(), "a row, and one more": row_and_one_more(),
    "pruned in float16": pruned(0.5, torch.float16), "pruned in bfloat16": pruned(0.5, torch.bfloat16),
    "pruned in float64": pruned(0.5, torch.float64), "triangular": gaussian(256, 256).tril(),
    "block diagonal": torch.block_diag(*gaussian(8, 32, 32)), "relu": gaussian(256, 256).relu(),
    "odd columns": torch.cat([gaussian(300, 77), torch.zeros(3, 77)]),
}  # fmt: skip


@pytest.fixture(scope="module", params=CODECS)
def sparse_decoded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    source, file = folder / "model.pt", folder / "model.pq.safetensors"
    state = {"fc.weight": gaussian(256, 128)} | {f"{name}.weight": value for name, value in SPARSE.items()}
    torch.save(state, source)
    report = pqcli.compress(source, file, Recipe(**CODECS[request.param]))
    assert pqcli.verify(file, source) == []
    assert report.compressed_bytes == file.stat().st_size
    again = pqcli.report(file)
    assert [tensor.bytes for tensor in again.tensors] == [tensor.bytes for tensor in report.tensors]
    return pqcli.load(file), {tensor.name: tensor for tensor in report.tensors}


@pytest.mark.parametrize("name", SPARSE)
def test_zeros_stay_zeros(sparse_decoded, name):
    decoded, reports = sparse_decoded
    weight, found = SPARSE[name], decoded[f"{name}.weight"]
    assert (found[weight == 0] == 0).all()
    error = float((weight.double() - found.double()).square().sum() / weight.double().square().sum())
    assert math.isclose(reports[f"{name}.weight"].relative_mse, error, rel_tol=1e-3, abs_tol=1e-9)


def test_a_file_without_zeros_needs_no_feature(tmp_path):
    torch.save({"fc.weight": gaussian(256, 128)}, tmp_path / "model.pt")
    pqcli.compress(tmp_path / "model.pt", tmp_path / "c.pq.safetensors")
    with pqcli.open(tmp_path / "c.pq.safetensors") as container:
        assert "zeros" not in container.manifest.features


def test_a_few_zeros_by_chance_cost_a_few_bytes_each():
    record = Record(TensorInfo("w.weight", (1000, 1000), "float32"), Plain(8, 256))
    for n_zeros, most in ((1, 60), (10, 120), (1000, 2500)):
        weight = gaussian(1000, 1000)
        weight.view(-1)[torch.randperm(1_000_000, generator=G)[:n_zeros]] = 0
        assert len(zeros.held(record, weight)) < most


def test_rows_of_zeros_cost_next_to_nothing():
    record = Record(TensorInfo("e.weight", (2000, 64), "float32"), Plain(8, 256))
    assert len(zeros.held(record, padded_embedding())) < 40


@pytest.mark.parametrize("damage", [b"", b"\x02", b"\x00", b"\x00\x00\x00\x00", b"\x01\x00\x00" + bytes(8)])
def test_damaged_zeros_are_a_value_error(damage):
    record = Record(TensorInfo("e.weight", (2000, 64), "float32"), Plain(8, 256))
    with pytest.raises(ValueError, match=r"zeros of kind|bytes left|method|frame|are needed|hold|too many"):
        zeros.restored(padded_embedding().numpy(), record, damage)


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_kept_or_an_error_as_the_recipe_says(codec, value, tmp_path):
    weight = gaussian(128, 64)
    weight[3, 4] = value
    source, file = tmp_path / "model.pt", tmp_path / "model.pq.safetensors"
    torch.save({"odd.weight": weight, "fc.weight": gaussian(128, 64)}, source)
    pqcli.compress(source, file, Recipe(**CODECS[codec]))
    assert torch.equal(pqcli.load(file)["odd.weight"].view(torch.int32), weight.view(torch.int32))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'odd\.weight' holds NaN.*on-nonfinite keep"):
        pqcli.compress(source, file, Recipe(**CODECS[codec], on_nonfinite="error"))
    assert not file.exists()


def test_weights_of_a_wrong_number_of_values_are_no_exact_piece():
    record = Record(TensorInfo("fc.weight", (64, 64), "float32"), Plain(1, 16))
    with pytest.raises(ValueError, match="more than 16 values"):
        values.exact_piece(record, gaussian(64, 64))
    assert values.job_of(record, gaussian(64, 64), Weights(None), is_compact=True) is None
