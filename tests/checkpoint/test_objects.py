"""What stands beside the tensors of real checkpoints is read as data, and comes back as itself where that can be."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import enum
import fractions
import functools
import json
import pathlib
import random
import subprocess
import sys
import types
import uuid

import numpy as np
import pytest
import torch
from torch import nn

from pqcli import checkpoint
from pqcli.errors import CheckpointError, ContainerError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.checkpoint_cases import assert_same, round_trip


def through_pqcli(value, folder, **options):
    """What comes back, and what was told; the structure goes through JSON text, as in a container."""
    torch.save(value, folder / "a.pt", **options)
    with checkpoint.open(folder / "a.pt") as opened:
        skeleton = json.loads(json.dumps(opened.skeleton))
        checkpoint.write(folder / "b.pt", opened.tensors, opened.read, skeleton, format="pt", force=True)
    return torch.load(folder / "b.pt", weights_only=False), {item.path: item.reason for item in opened.dropped}


TENSOR = torch.arange(6.0).reshape(2, 3)
UTC = dt.timezone.utc  # noqa: UP017 - the class that pickles name


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}])
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(arch="transformer", lr=[0.1], nested=argparse.Namespace(a=1), none=None),
        types.SimpleNamespace(a=(1, 2)),
        collections.defaultdict(list, {"a": [1], "b": []}),
        collections.defaultdict(int, {3: 4}),
        collections.defaultdict(None, {}),
        collections.Counter("abracadabra"),
        collections.deque([1, "a", [2]], maxlen=5),
        collections.deque([1, 2]),
        {"a", "b", 3},
        frozenset({1.5, None}),
        set(),
        pathlib.PurePosixPath("runs/x"),
        pathlib.PureWindowsPath("C:/x"),
        pathlib.Path("/data/train"),
        dt.datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
        dt.datetime(2024, 2, 29, 12, 30, 1, 5),
        dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30), "IST")),
        dt.date(1999, 12, 31),
        dt.time(23, 59, 59, 999),
        dt.timedelta(days=-3, seconds=5),
        UTC,
        decimal.Decimal("0.10"),
        decimal.Decimal("NaN"),
        fractions.Fraction(-1, 3),
        uuid.UUID(int=2**127 + 1),
        {pathlib.PurePosixPath("x"): 1, fractions.Fraction(1, 2): {"deep": [dt.timedelta(1)]}},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_small_classes_of_the_standard_library_come_back_as_themselves(tmp_path, value, options):
    back, told = through_pqcli({"w": TENSOR, "x": value, "list": [value]}, tmp_path, **options)
    assert not told
    assert list(back) == ["w", "x", "list"]
    for got in (back["x"], back["list"][0]):
        assert type(got) is type(value)
        assert repr(got) == repr(value) if "NaN" in repr(value) else got == value
    if isinstance(value, collections.defaultdict):
        assert back["x"].default_factory == value.default_factory
    if isinstance(value, collections.deque):
        assert back["x"].maxlen == value.maxlen


def test_fairseqs_own_checkpoints_come_back_whole(tmp_path):
    value = {
        "args": argparse.Namespace(arch="transformer", encoder_layers=6, lr=[0.1], adam_betas="(0.9, 0.98)"),
        "model": collections.OrderedDict({"encoder.version": torch.Tensor([3]), "encoder.fc1.weight": TENSOR}),
        "optimizer_history": [{"criterion_name": "X", "num_updates": 10, "best_loss": 2.5}],
        "extra_state": {"train_iterator": {"epoch": 2}, "metrics": collections.OrderedDict()},
        "task_state": {},
    }
    back, told = through_pqcli(value, tmp_path)
    assert not told
    assert back["args"] == value["args"]
    assert_same({**back, "args": None}, {**value, "args": None})


def test_tensors_inside_carried_objects_are_tensors_of_the_checkpoint(tmp_path):
    value = {
        "state": argparse.Namespace(ema={"w": TENSOR}, step=3),
        "buffers": collections.defaultdict(list, {"a": [TENSOR + 1]}),
        "queue": collections.deque([TENSOR + 2]),
    }
    torch.save(value, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert [info.name for info in opened.tensors] == ["state.ema.w", "buffers.a.0", "queue.0"]
    back, told = through_pqcli(value, tmp_path)
    assert not told
    assert torch.equal(back["state"].ema["w"], TENSOR)
    assert torch.equal(back["buffers"]["a"][0], TENSOR + 1)
    assert torch.equal(back["queue"][0], TENSOR + 2)
    with checkpoint.open(tmp_path / "a.pt") as opened:
        tree = checkpoint.opened.without(opened.skeleton["tree"], opened.tensors, {"queue.0", "state.ema.w"})
    assert "queue" not in json.dumps(tree)
    assert "step" in json.dumps(tree)


# -- numpy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16", ">f4", ">i8"]
)
def test_numpy_arrays_are_tensors_and_come_back_as_arrays(tmp_path, dtype, protocol):
    array = np.arange(-3, 9).reshape(3, 4).astype(dtype)
    value = {"model": {"w": array, "f": np.asfortranarray(array), "s": np.full((), 1).astype(dtype), "t": TENSOR}}
    back, told = through_pqcli({**value, "empty": np.ones((0, 3), dtype)}, tmp_path, pickle_protocol=protocol)
    assert not told
    for name, expected in [*value["model"].items(), ("empty", np.ones((0, 3), dtype))]:
        got = back["model"].get(name) if name != "empty" else back[name]
        assert type(got) is type(expected)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype.newbyteorder("=") if isinstance(got, np.ndarray) else torch.float32
        assert (np.asarray(got) == np.asarray(expected)).all()


def test_one_array_in_two_places_is_one_tensor(tmp_path):
    array = np.arange(5.0)
    torch.save({"a": array, "b": array, "c": array.copy()}, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert [info.alias_of for info in opened.tensors] == [None, "a", None]
    back, _ = through_pqcli({"a": array, "b": array}, tmp_path)
    assert (back["a"] == back["b"]).all()


def test_an_array_decoded_to_a_dtype_that_numpy_lacks_is_a_tensor(tmp_path):
    torch.save({"a": np.arange(5.0)}, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        infos = [TensorInfo("a", (5,), "bfloat16")]
        checkpoint.write(
            tmp_path / "b.pt", infos, lambda n: opened.read(n).bfloat16(), opened.skeleton, format="pt"
        )  # fmt: skip
    assert torch.load(tmp_path / "b.pt")["a"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "value", [np.array(["a", "bc"]), np.array([None, {}]), np.array(["2020-01-01"], "M8[D]"), np.str_("x"),
              np.ones(2, np.longdouble), np.zeros(2, [("a", "f4"), ("b", "i4")]), np.bytes_(b"x")], ids=repr,
)  # fmt: skip
def test_what_numpy_holds_beside_numbers_is_told(tmp_path, value):
    back, told = through_pqcli({"w": TENSOR, "x": value}, tmp_path)
    assert list(back) == ["w"]
    assert "numpy" in told["x"]


# -- classes from elsewhere -------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes classes of modules that are not installed; they are gone before pqcli sees the file."""
    made = []

    def make(module, name, *bases, **members):
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            package = ".".join(parts[:length])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
                made.append(package)
        kind = (
            enum.Enum(name, members, module=module)
            if bases == (enum.Enum,)
            else type(name, bases, {"__module__": module, **members})
        )
        setattr(sys.modules[module], name, kind)
        return kind

    def save(value, path):
        torch.save(value, path)
        for package in made:
            sys.modules.pop(package)
        made.clear()
        return path

    make.save = save
    return make


@pytest.mark.parametrize(
    ("module", "name", "base", "filled"),
    [
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict, {"lr": 0.1, "a": {"b": [1]}}),
        ("lightning_fabric.utilities.data", "AttributeDict", dict, {}),
        ("some.config", "CfgNode", dict, {"MODEL": {"NAME": "x"}}),
        ("my.training", "MyOrderedDict", collections.OrderedDict, {"b": 1, "a": 2}),
    ],
)
def test_dicts_of_other_classes_come_back_as_dicts_and_are_told(tmp_path, elsewhere, module, name, base, filled):
    value = {"w": TENSOR, "hyper_parameters": elsewhere(module, name, base)(filled)}
    round_trip(elsewhere.save(value, tmp_path / "a.pt"), tmp_path / "b.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert [(item.path, item.reason) for item in opened.dropped] == [
            ("hyper_parameters", f"its class {module}.{name}: comes back as a plain dict")
        ]
    assert_same(torch.load(tmp_path / "b.pt"), {"w": TENSOR, "hyper_parameters": filled})


def test_a_state_dict_of_another_class_keeps_its_tensors_and_names(tmp_path, elsewhere):
    state = elsewhere("my.training", "StateDict", collections.OrderedDict)({"fc.weight": TENSOR})
    path = elsewhere.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    with checkpoint.open(path) as opened:
        assert [info.name for info in opened.tensors] == ["fc.weight"]
        assert "my.training.StateDict" in opened.dropped[0].reason


def test_omegaconf_comes_back_as_plain_values_and_is_told(tmp_path, elsewhere):
    node = elsewhere("omegaconf.nodes", "AnyNode", object)
    config = elsewhere("omegaconf.dictconfig", "DictConfig", object)
    sequence = elsewhere("omegaconf.listconfig", "ListConfig", object)
    metadata = elsewhere("omegaconf.base", "ContainerMetadata", object)

    def made(kind, **state):
        item = kind()
        vars(item).update(state)
        return item

    def wrapped(value, parent):
        content = {"_metadata": made(metadata, ref_type=None, key_type=int), "_parent": parent}
        if isinstance(value, dict):
            outer = made(config, **content)
            outer._content = {key: wrapped(item, outer) for key, item in value.items()}
            return outer
        if isinstance(value, list):
            outer = made(sequence, **content)
            outer._content = [wrapped(item, outer) for item in value]
            return outer
        return made(node, **content, _val=value)

    plain = {"model": {"dim": 512, "names": ["a", "${x.y}"]}, "lr": 0.1, "none": None, "empty": {}}
    path = elsewhere.save({"model": {"w": TENSOR}, "cfg": wrapped(plain, None)}, tmp_path / "a.pt")
    opened = round_trip(path, tmp_path / "b.pt")
    assert [(item.path, item.reason) for item in opened.dropped] == [
        ("cfg", "its class omegaconf.dictconfig.DictConfig: comes back as a plain dict")
    ]
    assert_same(torch.load(tmp_path / "b.pt"), {"model": {"w": TENSOR}, "cfg": plain})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (functools.partial(int, base=2), "functools.partial"),
        (random.Random(0), "random.Random"),
        (np.random.default_rng(0), "numpy.random"),
        (np.random.RandomState(0), "numpy.random"),
        (range(3), "builtins.range(0, 3, 1)"),
        (int, "a reference to builtins.int"),
        (nn.Linear, "a reference to torch.nn.modules.linear.Linear"),
        (torch.nn.functional.gelu, "a reference to torch._C._nn.gelu"),
        (torch.strided, "torch.layout"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_json_cannot_carry_is_left_out_and_told(tmp_path, value, reason):
    back, told = through_pqcli({"w": TENSOR, "x": value, "l": [1, value]}, tmp_path)
    assert list(back) == ["w", "l"]
    assert back["l"] == [1, None]
    assert reason in told["x"]
    assert reason in told["l.1"]


def test_an_enum_is_told_with_its_value(tmp_path, elsewhere):
    choice = elsewhere("fairseq.dataclass.constants", "Choice", enum.Enum, SUM="sum")
    path = elsewhere.save({"w": TENSOR, "x": choice.SUM, "k": {choice.SUM: 1}}, tmp_path / "a.pt")
    opened = round_trip(path, tmp_path / "b.pt")
    assert [(item.path, item.reason) for item in opened.dropped] == [
        ("x", "fairseq.dataclass.constants.Choice('sum'): no JSON value"),
        ("k.fairseq.dataclass.constants.Choice('sum')",
         "its key is fairseq.dataclass.constants.Choice('sum'): no JSON value"),
    ]  # fmt: skip


def test_tensors_in_the_attributes_of_an_object_come_back_in_a_plain_dict(tmp_path, elsewhere):
    ema = elsewhere("my.training", "EMA", object)()
    ema.decay, ema.shadow, ema.nested = 0.9, {"w": TENSOR}, [TENSOR + 1]
    path = elsewhere.save({"w": TENSOR + 2, "ema": ema}, tmp_path / "a.pt")
    with checkpoint.open(path) as opened:
        assert [info.name for info in opened.tensors] == ["w", "ema.shadow.w", "ema.nested.0"]
        assert [str(item.reason) for item in opened.dropped] == [
            "its class my.training.EMA: comes back as a plain dict"
        ]
        checkpoint.write(tmp_path / "b.pt", opened.tensors, opened.read, opened.skeleton, format="pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back["ema"]["decay"] == 0.9
    assert torch.equal(back["ema"]["shadow"]["w"], TENSOR)


def test_tensors_are_never_left_out_with_the_object_that_holds_them(tmp_path, elsewhere):
    held = elsewhere("my.training", "Held", dict)
    held.__reduce__ = lambda self: (held, (self["w"],))
    path = elsewhere.save({"w": TENSOR, "held": held(w=TENSOR + 1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"1 of its tensors are inside an object of my\.training\.Held"):
        checkpoint.open(path)
    key = elsewhere("my.training", "Key", object)()
    elsewhere.save({"w": TENSOR, "x": {key: {"a": TENSOR}}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds tensors, and its key cannot be carried"):
        checkpoint.open(tmp_path / "b.pt")


def test_a_dict_that_is_also_its_own_attributes_is_read_once(tmp_path, elsewhere):
    easy = elsewhere("easydict", "EasyDict", dict)
    item = easy(w=TENSOR, lr=0.5)
    vars(item).update(item)
    path = elsewhere.save({"x": item}, tmp_path / "a.pt")
    with checkpoint.open(path) as opened:
        assert [info.name for info in opened.tensors] == ["x.w"]


def test_tensor_and_parameter_subclasses_come_back_as_their_plain_kind_and_are_told(tmp_path, elsewhere):
    parameter = elsewhere("timm.layers", "ScaledParameter", nn.Parameter)(torch.ones(2, 3))
    tensor = torch.ones(3).as_subclass(elsewhere("torchvision.tv_tensors", "Image", torch.Tensor))
    path = elsewhere.save({"p": parameter, "t": tensor}, tmp_path / "a.pt")
    opened = round_trip(path, tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt")
    assert type(back["t"]) is torch.Tensor
    assert torch.equal(back["p"].detach(), torch.ones(2, 3))
    assert any("torchvision.tv_tensors.Image" in item.reason for item in opened.dropped)


class Shell:
    """Pickles as torch pickles a DTensor."""

    def __init__(self, local, shape):
        self.local, self.shape = local, shape

    def __reduce__(self):
        arguments = (_dtensor(), torch.float32, self.shape, (3, 1), 0, torch.strided, torch.device("cpu"), False)
        state = {"_local_tensor": self.local, "_spec": _dtensor()}
        return torch._tensor._rebuild_from_type_v2, (
            torch._utils._rebuild_wrapper_subclass, _dtensor(), arguments, state,
        )  # fmt: skip


def _dtensor():
    from torch.distributed.tensor import DTensor

    return DTensor


def test_a_dtensor_whose_whole_is_here_is_a_tensor_and_a_part_is_refused(tmp_path):
    torch.save({"w": Shell(TENSOR, (2, 3))}, tmp_path / "a.pt")
    opened = round_trip(tmp_path / "a.pt", tmp_path / "b.pt")
    assert_same(torch.load(tmp_path / "b.pt"), {"w": TENSOR})
    assert "torch.distributed.tensor.DTensor" in opened.dropped[0].reason
    torch.save({"w": Shell(TENSOR, (4, 3))}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"'w' is one process's part, of shape \[2, 3\], of a DTensor"):
        checkpoint.open(tmp_path / "c.pt")


# -- objects from hostile files ---------------------------------------------------------------------------------------


class Says:
    """Pickles as a call of anything, with attributes set on the result."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Says(dt.datetime, b"\xff" * 10),
        Says(dt.datetime, b"short"),
        Says(dt.timedelta, 10**20),
        Says(dt.timezone, "x"),
        Says(decimal.Decimal, "x"),
        Says(decimal.Decimal, "1" * 100_000),
        Says(fractions.Fraction, "1/0"),
        Says(fractions.Fraction, "1e999999999"),
        Says(pathlib.PurePosixPath, 7),
        Says(pathlib.PurePosixPath, ["x"]),
        Says(collections.deque, [1] * 3),
        Says(collections.defaultdict, nn.Linear),
        Says(argparse.Namespace, state=(None, {"x": 1})),
        Says(uuid.UUID, "x"),
    ],
    ids=lambda value: str(value.call)[:60],
)
def test_an_object_that_its_class_would_not_pickle_is_left_out_and_told(tmp_path, value):
    torch.save({"w": TENSOR, "x": value}, tmp_path / "a.pt")
    opened = round_trip(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [item.path for item in opened.dropped] == ["x"]


@pytest.mark.parametrize(
    "node",
    [
        {"class": "os.system", "args": ["true"]},
        {"class": "builtins.eval", "args": ["1"]},
        {"class": "pathlib.PosixPath", "args": [1]},
        {"class": "collections.defaultdict", "args": ["os.system"], "v": {}},
        {"class": "collections.defaultdict", "v": [1]},
        {"class": "collections.deque", "args": ["x"], "v": []},
        {"class": "argparse.Namespace", "v": []},
        {"class": "argparse.Namespace"},
        {"class": "builtins.set", "v": [[]]},
        {"class": "datetime.datetime", "args": [["datetime.datetime"]]},
        {"class": "datetime.timedelta", "args": [10**30]},
        {"class": ["x"]},
    ],
    ids=repr,
)
def test_a_hostile_object_in_a_container_builds_nothing(tmp_path, node):
    tree = {"top": {"$": "dict", "items": [1, ["x", {"$": "object", **node}]]}}
    infos = (TensorInfo("w", (1,), "float32"),)
    with pytest.raises(ContainerError, match="does not fit its tensors"):
        checkpoint.write(
            tmp_path / "x", infos, lambda _: torch.ones(1), {"source": "pt", "tree": tree}, format="pt"
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_file_is_imported(tmp_path, elsewhere):
    path = elsewhere.save({"w": TENSOR, "x": elsewhere("json.tool", "Thing", object)()}, tmp_path / "a.pt")
    code = (
        "import sys; from pqcli import checkpoint; before = set(sys.modules)\n"
        f"checkpoint.open({str(path)!r}); print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "json.tool" not in done.stdout, done.stderr
