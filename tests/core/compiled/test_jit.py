"""Kernels: what they compute is numba's, how they are kept is this project's (`pqcli.core.compiled.jit`)."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pqcli.core.compiled import jit

OFFSET = 3


@jit.kernel
def plus(a, b):
    return a + b + OFFSET


@jit.kernel
def total(values, twice, scale):
    """Uses another kernel, and an array of its own."""
    scratch = np.zeros(values.shape[0], np.float64)
    for i in range(values.shape[0]):
        scratch[i] = plus(values[i], 0.0) * scale
    result = 0.0
    for i in range(values.shape[0]):
        result += scratch[i]
    return 2 * result if twice else result


@jit.kernel
def ends(values):
    return values[0], values[values.shape[0] - 1]


@jit.kernel
def makes_an_array(n):
    return np.zeros(n)


@jit.kernel
def is_positive(value):
    return value > 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where kernels are stored, of this test alone."""
    monkeypatch.setattr(jit, "_folders", lambda _: iter([tmp_path]))
    return tmp_path


def anew(kernel):
    """The kernel as another process sees it: nothing is loaded yet."""
    return jit.Kernel(kernel.function)


def test_a_kernel_gives_numbers_and_tuples_and_takes_arrays_of_any_layout(folder):
    values = np.arange(10.0)
    assert anew(total)(values, False, 1.0) == 45 + 30
    assert anew(total)(values[::3], True, np.float32(0.5)) == 18 + 12
    assert anew(ends)(np.arange(5, 9)) == (5, 8)
    assert anew(is_positive)(1) is True
    assert anew(is_positive)(-1.5) is False


def test_what_was_compiled_once_is_loaded_without_compiling(folder, monkeypatch):
    assert anew(plus)(1, 2) == 6
    monkeypatch.setattr(jit, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert anew(plus)(5, 6) == 14


def test_a_change_in_a_constant_or_in_a_called_kernel_compiles_anew(folder, monkeypatch):
    assert anew(total)(np.zeros(1), False, 1.0) == 3
    changed = anew(plus)
    monkeypatch.setitem(globals(), "OFFSET", 4)
    monkeypatch.setitem(globals(), "plus", changed)
    assert anew(total)(np.zeros(1), False, 1.0) == 4


def test_a_damaged_file_is_compiled_over(folder):
    assert anew(plus)(1, 2) == 6
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", b"{}\n", b"[]\n" + whole, whole[:200] + b"\0" + whole[201:]):
        path.write_bytes(damaged)
        assert anew(plus)(1, 2) == 6
        assert jit._Machine.read(path, plus.fingerprint) is not None


def test_a_folder_that_cannot_be_written_to_gives_way_to_the_next_or_to_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    places = [tmp_path / "file" / "a", tmp_path / "new" / "b"]
    monkeypatch.setattr(jit, "_folders", lambda _: iter(places))
    assert anew(plus)(1, 2) == 6
    assert len(list(places[1].iterdir())) == 1
    monkeypatch.setattr(jit, "_folders", lambda _: iter(places[:1]))
    assert anew(plus)(1, 2) == 6


def test_what_a_kernel_cannot_take_or_give_is_named():
    with pytest.raises(TypeError, match="takes arrays and numbers, no str"):
        plus("a", 1)
    with pytest.raises(TypeError, match="makes_an_array returns array"):
        makes_an_array(3)


def test_code_that_cannot_leave_numba_is_run_by_numba(folder, monkeypatch):
    monkeypatch.setattr(jit, "_LIBRARY", frozenset())
    assert anew(total)(np.arange(10.0), False, 1.0) == 45 + 30
    assert list(folder.iterdir()) == []


def test_threads_that_call_a_kernel_for_the_first_time_agree(folder):
    kernel, found = anew(plus), []
    threads = [threading.Thread(target=lambda i=i: found.append(kernel(i, 0) - i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [OFFSET] * 8
    assert len(list(folder.iterdir())) == 1


def test_a_second_process_decodes_without_numba():
    golden = Path(__file__).parents[2] / "golden"
    code = (
        "import sys, pqcli\n"
        f"for codec in ('trellis', 'ecpq'): pqcli.load(r'{golden}/' + codec + '-v1.pq.safetensors')\n"
        "print('numba' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
        for _ in range(2)
    ]
    assert runs[1].stdout == "False\n"
