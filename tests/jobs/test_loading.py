"""`load_into`: what a model gets is what the file decodes to, in its own memory, and nothing is lost in silence."""

import pytest
import torch
from torch import nn

import pqcli
from pqcli.errors import ContainerError, UsageError

RECIPE = pqcli.Recipe(block_size=4, n_centroids=16, n_iter=2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.fc = nn.Linear(32, 48).half()
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(5))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    path = tmp_path / "m.pt"
    torch.save({"state_dict": model.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.randn(64, 32)}}}}, path)
    pqcli.compress(path, tmp_path / "m.pq.safetensors", RECIPE)
    return tmp_path / "m.pq.safetensors"


def same(model, file):
    decoded = pqcli.load(file)
    return all(torch.equal(tensor, decoded[name]) for name, tensor in model.state_dict().items())


def test_tensors_go_into_the_memory_that_the_model_has(saved):
    model = Tied()
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    events = []
    assert pqcli.load_into(model, saved, progress=events.append) == ((), ())
    assert same(model, saved)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    assert model.head.weight is model.embed.weight
    assert events[-1].done == events[-1].total


def test_a_model_on_the_meta_device_is_made_and_tied_parameters_stay_tied(saved):
    with torch.device("meta"):
        model = Tied()
    model.fc.weight.requires_grad_(False)
    pqcli.load_into(model, saved, device="cpu")
    assert same(model, saved)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.fc.weight, nn.Parameter)
    assert not model.fc.weight.requires_grad
    assert model.embed.weight.requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dtype_is_of_all_floating_tensors_and_of_no_others(saved, device):
    with torch.device(device):
        model = Tied()
    pqcli.load_into(model, saved, dtype=torch.float64)
    decoded = pqcli.load(saved)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float64 if decoded[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, decoded[name].to(tensor.dtype))


def test_a_wrapper_of_the_model_is_no_difference(saved):
    model = nn.DataParallel(Tied())
    assert pqcli.load_into(model, saved) == ((), ())
    assert same(model.module, saved)


def test_what_only_one_side_has_is_an_error_or_told_and_other_shapes_are_an_error(saved):
    model = Tied()
    model.more = nn.Linear(2, 2)
    del model.fc
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ContainerError, match=r"lacks 2 of the model's tensors \(more.weight, more.bias\)") as error:
        pqcli.load_into(model, saved)
    assert "no place for 2 of its tensors (fc.weight, fc.bias)" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pqcli.load_into(model, saved, strict=False) == (("more.weight", "more.bias"), ("fc.weight", "fc.bias"))
    assert torch.equal(model.embed.weight, pqcli.load(saved)["embed.weight"])
    model.embed = nn.Embedding(65, 32)
    with pytest.raises(ContainerError, match=r"embed.weight is \(64, 32\), the model's \(65, 32\)"):
        pqcli.load_into(model, saved, strict=False)
    with pytest.raises(ContainerError, match="lacks"):
        pqcli.load_into(nn.Linear(2, 2), saved)


def test_a_compressed_folder_of_one_container_will_do(saved, tmp_path):
    (tmp_path / "f").mkdir()
    saved.rename(tmp_path / "f" / "model.pq.safetensors")
    model = Tied()
    pqcli.load_into(model, tmp_path / "f")
    assert same(model, tmp_path / "f")
    (tmp_path / "f" / "other.pq.safetensors").write_bytes((tmp_path / "f" / "model.pq.safetensors").read_bytes())
    with pytest.raises(UsageError, match="2 containers"):
        pqcli.load_into(model, tmp_path / "f")
