"""Loops in C: found, called with what they take, and giving the same bytes whatever the registers of the processor."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import pqcli
from pqcli.core.entropy import ans
from pqcli.core.native import library
from pqcli.core.native.library import function, reads, writes
from pqcli.errors import NotBuiltError, UsageError

GOLDEN = Path(__file__).parents[2] / "golden"
LOWER = library.levels()[:-1]

_decision = function(
    "code_decision",
    bool, int, writes(np.int32), int, reads(np.int64), writes(np.int64), writes(np.uint8),
    returns=int,
)  # fmt: skip


def arguments():
    """Of one decision of the range coder."""
    models, rates = np.full((4, 2), (32768, 0), np.int32), np.full(501, 100)
    return [True, 1, models, 0, rates, np.array([0, 1 << 48, 0, 0, 64]), np.zeros(64, np.uint8)]


@pytest.fixture
def fresh():
    """Libraries are looked for anew, in this test and after it."""
    library._load.cache_clear()
    library._open.cache_clear()
    library._forget()
    yield
    library._load.cache_clear()
    library._open.cache_clear()
    library._forget()


def test_a_function_takes_arrays_and_numbers_and_gives_a_number():
    assert _decision(*arguments()) == 1


def test_read_arrays_need_not_be_writable():
    given = arguments()
    given[4].flags.writeable = False
    assert _decision(*given) == 1


def changed(place, value):
    given = arguments()
    given[place] = value(given[place])
    return given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(2, lambda a: a.astype(np.int64)), "an array of int64 where int32 belongs"),
        (changed(2, lambda a: a[:, ::-1]), r"an array of shape \(4, 2\) and strides \(8, -4\), not contiguous"),
        (changed(6, lambda a: np.frombuffer(bytes(64), np.uint8)), r"of shape \(64,\) that is to be written cannot be"),
        (changed(2, lambda a: a.tolist()), "'list' object has no attribute 'dtype'"),
        (changed(1, lambda a: "1"), "argument 2"),
        (changed(1, lambda a: 1.5), "argument 2"),
        (arguments()[:-1], "code_decision of 7 arguments"),
        ([*arguments(), 1], "code_decision of 7 arguments"),
    ],
)
def test_what_a_function_cannot_take_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        _decision(*given)


def test_a_library_that_was_not_built_is_named_and_how_to_build_it(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(NotBuiltError, match=r"loops-.* it was not built; install pqcli .*pqcli/core/native/build.py"):
        _decision(*arguments())


def test_a_library_that_is_no_library_is_named(fresh, monkeypatch, tmp_path):
    for level in library._LEVELS["x86_64"] + ("native",):
        for suffix in (".so", ".dll", ".dylib"):
            (tmp_path / f"loops-{level}{suffix}").write_bytes(b"of another machine")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(NotBuiltError, match=r"loops-.* cannot be loaded: "):
        _decision(*arguments())


def test_the_level_can_be_chosen_by_the_environment(fresh, monkeypatch):
    monkeypatch.setenv(library.OVERRIDE, library.levels()[0])
    assert library.level() == library.levels()[0]
    monkeypatch.setenv(library.OVERRIDE, "mmx")
    with pytest.raises(UsageError, match="PQCLI_INSTRUCTIONS=mmx: this processor has "):
        library.level()


def test_threads_run_functions_side_by_side():
    problems = [np.random.default_rng(i).integers(0, 16, 50_000).astype(np.uint16) for i in range(4)]
    classes = np.zeros(50_000, np.uint8)
    tables = ans.Tables(ans.frequencies(np.zeros((1, 16), np.int64)))
    alone = [ans.encode(symbols, classes, tables) for symbols in problems]
    together: list[bytes] = [b""] * 4

    def run(i: int) -> None:
        together[i] = ans.encode(problems[i], classes, tables)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("level", LOWER)
@pytest.mark.parametrize("file", ["plain-v1", "ecpq-v1", "trellis-v1"])
def test_every_level_decodes_the_same(level, file):
    path = GOLDEN / f"{file}.pq.safetensors"
    expected = pqcli.load(path)
    with library.at(level):
        found = pqcli.load(path)
    for name, tensor in expected.items():  # as bytes: there are NaNs
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("codec", "bits"), [("pq", None), ("pq", 3), ("trellis", None)])
def test_every_level_writes_the_same_file(tmp_path, codec, bits):
    g = torch.Generator().manual_seed(0)
    weights = {f"{i}.weight": torch.randn(48, 64, generator=g) * 0.05 for i in range(3)}
    weights |= {"bias": torch.randn(300, generator=g)}
    files = []
    for level in library.levels():
        with library.at(level):
            pqcli.save(weights, tmp_path / level, pqcli.Recipe(codec=codec, target_bits=bits))
        files.append((tmp_path / level).read_bytes())
    assert len(set(files)) == 1


def test_what_is_built_is_what_is_looked_for():
    path = Path(library.__file__).with_name("build.py")
    spec = importlib.util.spec_from_file_location("build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for name, target in build.TARGETS.items():
        machine = name.split("-")[0]
        assert tuple(target.levels) == library._LEVELS.get(machine, ("native",))
    here = build.chosen()
    assert {f"loops-{level}{here.suffix}" for level in here.levels} <= {path.name for path in library.FOLDER.iterdir()}


def test_no_compiler_is_loaded():
    code = (
        "import sys, pqcli\n"
        f"for codec in ('trellis', 'ecpq'): pqcli.load(r'{GOLDEN}/' + codec + '-v1.pq.safetensors')\n"
        "sys.exit(bool({'numba', 'llvmlite'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
