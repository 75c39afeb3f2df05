"""The Python interface, as a training script uses it."""

import json
import math
import pickle
import subprocess
import sys
import tempfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

import pqcli
from pqcli import checkpoint
from pqcli.jobs.compress import Compression
from tests.conftest import REPOSITORY, file_size_limit

QUICK = pqcli.Recipe(n_iter=3)


class Tied(nn.Module):
    """An encoder whose head shares its embedding, with a layer of every kind that PQ takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 32, padding_idx=0)
        self.conv = nn.Conv2d(8, 32, 3)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.pointwise = nn.Conv2d(64, 64, 1)
        self.conv1d = nn.Conv1d(32, 32, 5)
        self.conv3d = nn.Conv3d(8, 16, 3)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 300)
        self.head.weight = self.embed.weight


@pytest.fixture
def network() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def file(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def relative_mse(a, b):
    return float((a.double() - b.double()).square().sum() / a.double().square().sum())


def test_importing_pqcli_does_not_import_torch():
    code = "import sys, pqcli; print('torch' in sys.modules, pqcli.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", pqcli.__version__]


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    for name in pqcli.__all__:
        assert getattr(pqcli, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        pqcli.nonsense  # noqa: B018


def test_a_model_loads_what_decode_wrote_with_strict_names_and_ties(file, network):
    report = pqcli.compress(file, recipe=QUICK)
    assert report.output == str(file.with_name("model.pq.safetensors"))
    target = pqcli.decode(report.output)
    assert target == file.with_name("model.decoded.pt")
    state = torch.load(target, weights_only=True)
    fresh = Tied()
    assert str(fresh.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert type(state) is OrderedDict
    assert state._metadata == network.state_dict()._metadata
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    for name, tensor in network.state_dict().items():
        if tensor.dim() < 2:
            assert torch.equal(state[name], tensor), name
        else:
            assert relative_mse(tensor, state[name]) < 0.5, name


def test_load_gives_dense_tensors_in_order_and_ties_stay_tied(file, network):
    pqcli.compress(file, recipe=QUICK)
    state = pqcli.load(file.with_name("model.pq.safetensors"))
    assert list(state) == list(network.state_dict())
    assert state["head.weight"] is state["embed.weight"]
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in network.state_dict().items()
    }
    state["conv.weight"].zero_()  # its own memory, writable
    Tied().load_state_dict(state, strict=True)


def test_open_decodes_one_tensor_at_a_time_and_knows_the_others(file):
    pqcli.compress(file, recipe=QUICK)
    loaded = pqcli.load(file.with_name("model.pq.safetensors"))
    with pqcli.open(file.with_name("model.pq.safetensors")) as container:
        assert [record.name for record in container.records] == list(loaded)
        for name in ("conv.weight", "head.weight", "norm.num_batches_tracked"):
            assert torch.equal(container.decode(name), loaded[name])
        with pytest.raises(pqcli.PQError, match=r"no tensor 'conv\.wieght'"):
            container.decode("conv.wieght")


def test_paths_may_be_text_or_path(file):
    report = pqcli.compress(str(file), str(file.with_name("a.pq.safetensors")), QUICK)
    assert list(pqcli.load(report.output)) == list(pqcli.load(file.with_name("a.pq.safetensors")))
    assert pqcli.verify(report.output, str(file)) == []
    assert pqcli.report(report.output, str(file)).relative_mse == pytest.approx(report.relative_mse, rel=1e-4)
    assert str(pqcli.decode(report.output, str(file.with_name("b.safetensors")))).endswith("b.safetensors")


def test_save_takes_a_state_dict_from_memory_with_ties_parameters_and_nesting(tmp_path, network):
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    value = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 4,
        "history": [0.5, float("nan"), (1, None, True)],
        3: {"deep": nn.Parameter(torch.randn(64, 64))},
    }
    report = pqcli.save(value, tmp_path / "run.pq.safetensors", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pq.safetensors"]
    assert report.compressed_bytes == (tmp_path / "run.pq.safetensors").stat().st_size
    back = torch.load(pqcli.decode(report.output), weights_only=True)
    assert (tmp_path / "run.decoded.pt").exists()
    assert list(back) == list(value)
    assert back["epoch"] == 4
    assert math.isnan(back["history"][1])
    assert back["history"][2] == (1, None, True)
    assert isinstance(back[3]["deep"], nn.Parameter)
    assert back["model"]["head.weight"].data_ptr() == back["model"]["embed.weight"].data_ptr()
    Tied().load_state_dict(back["model"], strict=True)
    fresh = torch.optim.Adam(Tied().parameters())
    fresh.load_state_dict(back["optimizer"])
    for index, moments in optimizer.state_dict()["state"].items():  # belongs to the run: kept to the bit
        assert torch.equal(moments["exp_avg_sq"], back["optimizer"]["state"][index]["exp_avg_sq"])


def test_save_gives_the_bytes_that_compress_of_the_same_file_gives(tmp_path, network):
    pqcli.save(network.state_dict(), tmp_path / "a.pq.safetensors", QUICK)
    torch.save(network.state_dict(), tmp_path / "b.pt")
    pqcli.compress(tmp_path / "b.pt", recipe=QUICK)
    with pqcli.open(tmp_path / "a.pq.safetensors") as a, pqcli.open(tmp_path / "b.pq.safetensors") as b:
        assert a.records == b.records
    for name, tensor in pqcli.load(tmp_path / "a.pq.safetensors").items():
        assert torch.equal(tensor, pqcli.load(tmp_path / "b.pq.safetensors")[name])


def test_save_reports_the_file_it_wrote_and_not_its_temporary_source(tmp_path, network):
    report = pqcli.save(network.state_dict(), tmp_path / "a.pq.safetensors", QUICK)
    assert "tmp" not in report.source.removeprefix(str(tmp_path))


def test_save_refuses_an_existing_file_and_a_folder_that_is_not_there(tmp_path):
    state = {"w": torch.randn(64, 64)}
    pqcli.save(state, tmp_path / "a.pq.safetensors", QUICK)
    before = (tmp_path / "a.pq.safetensors").read_bytes()
    with pytest.raises(pqcli.PQError, match="exists already"):
        pqcli.save(state, tmp_path / "a.pq.safetensors", QUICK)
    assert (tmp_path / "a.pq.safetensors").read_bytes() == before
    pqcli.save(state, tmp_path / "a.pq.safetensors", QUICK, force=True)
    with pytest.raises(pqcli.PQError, match="folder does not exist"):
        pqcli.save(state, tmp_path / "nowhere" / "a.pq.safetensors", QUICK)


def test_save_refuses_what_torch_load_would_not_take_and_leaves_nothing(tmp_path):
    class Config:
        pass

    with pytest.raises((pqcli.PQError, pickle.PicklingError, AttributeError)):
        pqcli.save({"w": torch.randn(8, 8), "config": Config()}, tmp_path / "a.pq.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_save_on_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    with file_size_limit(1 << 20), pytest.raises(pqcli.PQError, match=r"a\.pq\.safetensors': .* size limit"):
        pqcli.save({"w": torch.randn(1024, 1024)}, tmp_path / "a.pq.safetensors", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_puts_nothing_anywhere_that_a_kill_could_leave(file, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    seen = []
    coded = Compression.coded

    def watched(work, survey):
        streams = coded(work, survey)
        seen.extend((tmp_path / "temporary").iterdir())
        return streams

    monkeypatch.setattr(Compression, "coded", watched)
    recipe = pqcli.Recipe(rate_weight=0.1)
    predicted = pqcli.preview(file, recipe=recipe).predicted_bytes
    assert seen == list((tmp_path / "temporary").iterdir()) == []
    assert pqcli.compress(file, recipe=recipe).compressed_bytes == predicted


def test_the_device_may_be_named_and_one_that_is_not_there_is_a_usage_error(file):
    a = pqcli.compress(file, file.with_name("a.pq.safetensors"), QUICK, device="cpu")
    b = pqcli.compress(file, file.with_name("b.pq.safetensors"), QUICK, device="auto")
    if not torch.cuda.is_available():
        assert a.compressed_bytes == b.compressed_bytes
        assert file.with_name("a.pq.safetensors").read_bytes() == file.with_name("b.pq.safetensors").read_bytes()
    for device in ("cuda:99", "toaster", "meta", "", "cpu:x"):
        with pytest.raises(pqcli.PQError) as caught:
            pqcli.compress(file, file.with_name("c.pq.safetensors"), QUICK, device=device)
        assert caught.value.exit_code == 2
        assert device in str(caught.value)
    assert not file.with_name("c.pq.safetensors").exists()


def test_preview_knows_the_size_before_any_weight_is_read(file, network, monkeypatch):
    nn.init.normal_(network.embed.weight)  # headers do not tell that a row is zero
    torch.save(network.state_dict(), file)

    def refuse(*_):
        raise AssertionError("a preview read weights")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "read", refuse)
        seen = pqcli.preview(file, recipe=QUICK)
    report = pqcli.compress(file, recipe=QUICK)
    assert seen.predicted_bytes == report.compressed_bytes
    assert seen.output == file.with_name("model.pq.safetensors")
    assert [entry.action for entry in seen.plan.entries] == [tensor.action for tensor in report.tensors]


def test_a_report_is_json_and_adds_up(file):
    report = pqcli.compress(file, recipe=QUICK)
    for found in (report, pqcli.report(report.output), pqcli.report(report.output, file)):
        document = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert document["compressed_bytes"] == file.with_name("model.pq.safetensors").stat().st_size
        assert document["original_bytes"] == file.stat().st_size
        assert found.tensor_bytes + found.overhead_bytes == found.compressed_bytes
        assert sum(tensor["bytes"] for tensor in document["tensors"]) == document["totals"]["tensor_bytes"]


def test_reported_errors_are_those_of_the_decoded_tensors(file, network):
    report = pqcli.compress(file, recipe=QUICK)
    loaded, original = pqcli.load(report.output), network.state_dict()
    noise = energy = 0.0
    for tensor in report.quantized:
        a, b = original[tensor.name].double(), loaded[tensor.name].double()
        assert tensor.relative_mse == pytest.approx(relative_mse(a, b), rel=1e-6)
        assert tensor.max_abs_error == pytest.approx(float((a - b).abs().max()), rel=1e-6)
        assert tensor.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-6)
        assert tensor.sqnr_db == pytest.approx(-10 * math.log10(relative_mse(a, b)))
        noise, energy = noise + float((a - b).square().sum()), energy + float(a.square().sum())
    assert report.relative_mse == pytest.approx(noise / energy, rel=1e-6)


def test_decode_to_another_dtype_converts_floating_tensors_only(file):
    pqcli.compress(file, recipe=QUICK)
    for dtype in ("float16", "bfloat16", "float64"):
        target = file.with_name(f"{dtype}.pt")
        state = torch.load(pqcli.decode(file.with_name("model.pq.safetensors"), target, dtype=dtype), weights_only=True)
        assert state["conv.weight"].dtype == state["norm.bias"].dtype == getattr(torch, dtype)
        assert state["norm.num_batches_tracked"].dtype == torch.int64
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_decode_refuses_a_dtype_it_does_not_know(file):
    pqcli.compress(file, recipe=QUICK)
    with pytest.raises(pqcli.PQError, match="float99"):
        pqcli.decode(file.with_name("model.pq.safetensors"), file.with_name("x.pt"), dtype="float99")
    assert not file.with_name("x.pt").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_what_decode_wrote_can_be_compressed_again(file, suffix):
    pqcli.compress(file, recipe=QUICK)
    target = pqcli.decode(file.with_name("model.pq.safetensors"), file.with_name("dense" + suffix))
    again = pqcli.compress(target, file.with_name("again.pq.safetensors"), QUICK)
    assert again.relative_mse < 0.1  # it is made of 256 centroids already


def test_a_container_is_not_compressed_again(file):
    pqcli.compress(file, recipe=QUICK)
    with pytest.raises(pqcli.PQError, match="compressed already"):
        pqcli.compress(file.with_name("model.pq.safetensors"), file.with_name("again.pq.safetensors"))


def test_two_runs_give_the_same_file_and_another_seed_another_one(file):
    names = [file.with_name(f"{name}.pq.safetensors") for name in "abc"]
    for name, seed in zip(names, (0, 0, 1), strict=True):
        pqcli.compress(file, name, pqcli.Recipe(n_iter=3, seed=seed))
    a, b, c = (name.read_bytes() for name in names)
    assert a == b
    assert a != c


def test_a_tensor_is_coded_alike_whatever_else_is_in_the_checkpoint(tmp_path, network):
    state = network.state_dict()
    torch.save(state, tmp_path / "all.pt")
    torch.save({"conv.weight": state["conv.weight"]}, tmp_path / "one.pt")
    for name in ("all", "one"):
        pqcli.compress(tmp_path / f"{name}.pt", recipe=QUICK)
    alone, among = pqcli.load(tmp_path / "one.pq.safetensors"), pqcli.load(tmp_path / "all.pq.safetensors")
    assert torch.equal(alone["conv.weight"], among["conv.weight"])


def ends(events):
    """(stage, done, total) of every stage's last event; each stage starts at nothing and never goes back."""
    last = {}
    for event in events:
        assert 0 <= event.done <= event.total
        assert event.done == 0 or event.done >= last[event.stage].done
        last[event.stage] = event
    return {stage: (event.done, event.total) for stage, event in last.items()}


def test_events_tell_every_stage_and_every_weight(file):
    events = []
    report = pqcli.compress(file, recipe=QUICK, progress=events.append)
    kept = sum(tensor.n_weights for tensor in report.tensors if tensor.action == "keep")
    found = ends(events)
    assert found["keeping"] == (kept, kept)
    assert found["encoding"] == (report.n_quantized_weights,) * 2
    assert {event.name for event in events} >= {tensor.name for tensor in report.quantized}
    events.clear()
    pqcli.decode(report.output, progress=events.append)
    assert ends(events) == {"decoding": (report.n_weights,) * 2}
    events.clear()
    assert pqcli.verify(report.output, file, progress=events.append) == []
    assert ends(events) == {"verifying": (report.n_weights,) * 2}


def test_a_codec_with_streams_tells_of_all_it_does_on_the_way(file):
    events = []
    recipe = pqcli.Recipe(codec="trellis", effort=4, target_bits=3.0)
    report = pqcli.compress(file, recipe=recipe, progress=events.append)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["reading", "keeping", "learning", "searching", "encoding", "measuring"]
    found = ends(events)
    for stage in ("reading", "encoding", "measuring"):
        assert found[stage] == (report.n_quantized_weights,) * 2


def test_weights_smaller_than_float32_can_hold_are_kept_and_not_lost(tmp_path):
    state = {
        "vanishing": torch.randn(128, 64).double() * 1e-200,
        "denormal": torch.randn(128, 64).double() * 1e-44,
        "denormal32": torch.randn(128, 64) * 1e-40,
        "zero": torch.zeros(128, 64),
        "small": torch.randn(128, 64) * 1e-30,
        "mixed": torch.cat([torch.randn(64, 64), torch.randn(64, 64) * 1e-42]),
    }
    torch.save(state, tmp_path / "model.pt")
    report = pqcli.compress(tmp_path / "model.pt")
    assert {tensor.name: tensor.action for tensor in report.tensors} == {
        "vanishing": "keep", "denormal": "keep", "denormal32": "keep", "zero": "pq", "small": "pq", "mixed": "pq",
    }  # fmt: skip
    loaded = pqcli.load(report.output)
    assert torch.equal(loaded["vanishing"], state["vanishing"])
    assert torch.equal(loaded["zero"], state["zero"])
    assert relative_mse(state["small"], loaded["small"]) < 0.3
    assert pqcli.verify(report.output, tmp_path / "model.pt") == []


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_weights_of_any_scale_are_verified_against_the_original(tmp_path, scale):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(128, 64, generator=generator) * scale
    mixed = torch.cat(
        [torch.randn(64, 64, generator=generator) * 1e30, torch.randn(64, 64, generator=generator) * 1e-30]
    )
    torch.save({"w": weight, "mixed": mixed}, tmp_path / "model.pt")
    for recipe in (
        pqcli.Recipe(n_iter=3),
        pqcli.Recipe(block_size=64, n_centroids=100, n_iter=2, codebook_dtype="fp32"),
    ):
        report = pqcli.compress(tmp_path / "model.pt", recipe=recipe, force=True)
        assert pqcli.verify(report.output, tmp_path / "model.pt") == []
        assert report.relative_mse < 0.5


def test_pq_stands_on_the_same_core_as_compress(tmp_path):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    torch.save({"w": weight}, tmp_path / "model.pt")
    recipe = pqcli.Recipe(block_size=8, n_centroids=64, codebook_dtype="fp32")
    report = pqcli.compress(tmp_path / "model.pt", recipe=recipe)
    seed = pqcli.PQ(weight, 8, n_centroids=64).encode()
    assert relative_mse(weight, seed.decode()) == pytest.approx(report.relative_mse, rel=0.05)
    assert seed.centroids.shape == (64, 8)
    assert seed.assignments.shape == (96 * 8,)
    assert all(
        later <= earlier * (1 + 1e-6) for earlier, later in zip(seed.objective, seed.objective[1:], strict=False)
    )
