"""A whole pickled model comes back as its state dict, read as data; what is no plain module is refused by its class."""

import pickle

import pytest
import torch
from torch import nn

import pqcli
from pqcli import checkpoint
from pqcli.errors import CheckpointError
from pqcli.recipe.recipe import Recipe

RAN = []
SEQUENTIAL = "torch.nn.modules.container.Sequential"


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_parameter("bias", None)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.ones(2, 2), persistent=False)
        self.register_buffer("none", None)
        self.table = torch.ones(4)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3))
        self.several = nn.ModuleList([Inner(), nn.Conv2d(1, 2, 3)])
        self.named = nn.ModuleDict({"a": nn.LSTM(2, 2)})
        self.loose = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(1))])
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.body[0].weight
        self.again = self.several[0]
        self.missing = None
        self.config = {"sizes": [1, 2], "function": torch.nn.functional.gelu}

    def __setstate__(self, state):
        RAN.append("setstate")
        super().__setstate__(state)


def saved(value, path, *, new=True):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrapped", ["alone", "data-parallel", "in-a-dict", "twice"])
def test_a_model_is_its_state_dict(tmp_path, wrapped, new):
    model = nn.DataParallel(Outer()) if wrapped == "data-parallel" else Outer()
    value = {"in-a-dict": {"epoch": 3, "model": model}, "twice": {"model": model, "ema": [Inner()]}}.get(wrapped, model)
    path = saved(value, tmp_path / "m.pt", new=new)
    RAN.clear()
    expected = model.state_dict()
    with checkpoint.open(path, from_module=True) as opened:
        found = [info for info in opened.tensors if not info.name.startswith("ema.")]
        assert [info.name for info in found] == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(opened.read(name), tensor)
            assert opened.read(name).dtype == tensor.dtype
        checkpoint.write(tmp_path / "out.pt", opened.tensors, opened.read, opened.skeleton, format="pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    back = back["model"] if isinstance(value, dict) else back
    assert not any(tensor.requires_grad for tensor in back.values())
    assert not RAN
    Outer().load_state_dict({name.removeprefix("module."): tensor for name, tensor in back.items()})


def test_tied_parameters_and_shared_modules_are_tied(tmp_path):
    path = saved(Outer(), tmp_path / "m.pt")
    with checkpoint.open(path, from_module=True) as opened:
        ties = {info.name: info.alias_of for info in opened.tensors if info.alias_of}
    assert ties == {
        "head.weight": "body.0.weight",
        "again.weight": "several.0.weight",
        "again.count": "several.0.count",
    }


def test_what_is_no_part_of_the_state_dict_is_told(tmp_path):
    with checkpoint.open(saved(nn.Sequential(Inner()), tmp_path / "m.pt"), from_module=True) as opened:
        assert {(item.path, item.reason) for item in opened.dropped} == {
            ("0.mask", "a buffer that is not persistent: no part of the state dict"),
            ("(top level)", f"a whole module of the class {SEQUENTIAL}: comes back as its state dict"),
            ("(top level)", "1 tensor in attributes of its modules: no part of its state dict"),
        }  # fmt: skip


@pytest.mark.parametrize(("value", "place"), [(Inner(), ""), ({"net": {"m": Inner()}}, "['net']['m']")])
def test_without_being_asked_a_model_is_refused_with_the_flag_and_the_line(tmp_path, value, place):
    path = saved(value, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(path)
    assert "test_modules.Inner" in str(caught.value)
    assert "--from-module" in str(caught.value)
    line = f"torch.save(torch.load(path, weights_only=False){place}.state_dict(), 'weights.pt')"
    assert str(caught.value).endswith(f"convert it: {line}")


class Hooked(Inner):
    def __init__(self):
        super().__init__()
        self._register_state_dict_hook(hook)


def hook(*_):
    return None


class Odd(Inner):
    def __getstate__(self):
        return {**super().__getstate__(), "_parameters": [self.weight]}


class Hidden(Inner):
    def __reduce__(self):
        return (Hidden, (self.weight.data,))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Hooked(), r"Hooked is no plain module \(code of its own decides what its state dict holds\)"),
        (Odd(), r"Odd is no plain module \(its _parameters are no dict of names\)"),
        (Hidden(), r"1 of its tensors are inside an object of '?.*Hidden'?, which only running its code could build"),
        (nn.Sequential(Hidden()), r"Sequential is no plain module \(its part '0' is an object of .*Hidden\)"),
        (nn.Sequential(Hooked()), r"Hooked at '0' is no plain module"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_class(tmp_path, module, message):
    path = saved(module, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(path, from_module=True)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_parameter_that_is_not_there_yet_is_refused(tmp_path):
    path = saved(Lazy(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"is no plain module|holds no tensors"):
        checkpoint.open(path, from_module=True)


def test_a_module_that_contains_itself_is_refused(tmp_path):
    module = Inner()
    module._modules["self"] = module
    with pytest.raises(CheckpointError, match="contains itself"):
        checkpoint.open(saved(module, tmp_path / "m.pt"), from_module=True)


def test_a_module_shared_a_million_times_is_refused_in_time(tmp_path):
    module = nn.Linear(1, 1)
    for _ in range(30):
        module = nn.Sequential(module, module)
    with pytest.raises(CheckpointError, match=r"--limit (expansion|n_entries|n_bytes)=N"):
        checkpoint.open(saved(module, tmp_path / "m.pt"), from_module=True, limits=checkpoint.Limits(n_entries=20_000))


def test_another_process_opens_it_likewise(tmp_path):
    with checkpoint.open(saved(Inner(), tmp_path / "m.pt"), from_module=True) as opened:
        again = pickle.loads(pickle.dumps(opened))
        assert torch.equal(again.read("weight"), opened.read("weight"))


@pytest.mark.parametrize("codec", ["pq", "trellis"])
def test_compressing_a_model_and_holding_it_against_the_original(tmp_path, codec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    path = saved(model, tmp_path / "m.pt")
    pqcli.compress(path, recipe=Recipe(from_module=True, codec=codec, block_size=4, n_centroids=16))
    file = tmp_path / "m.pq.safetensors"
    assert pqcli.verify(file, path) == []
    assert pqcli.report(file, path).source == str(path)
    back = torch.load(pqcli.decode(file), weights_only=True)
    assert list(back) == list(model.state_dict())
    assert torch.equal(back["1.running_var"], model[1].running_var)
