"""What people hand over beside checkpoints: each is told in one line, with what to do; exit code 1, no traceback."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pqcli
from pqcli.checkpoint.pt.objects import Global
from pqcli.checkpoint.pt.torch_objects import CALLS, StorageRef, TensorRef, Unsupported
from pqcli.cli.commands import app
from tests.conftest import REPOSITORY

WEIGHTS = {"w": torch.ones(4, 4)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


FILES = {
    "m.gguf": (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "a GGUF model; export the weights"),
    "page.pt": (lambda path: path.write_text("\n<!DOCTYPE html><title>Sign in"), "an HTML page, not the weights"),
    "denied.bin": (lambda path: path.write_text('<?xml version="1.0"?><Error>'), "an XML or HTML document"),
    "error.safetensors": (lambda path: path.write_text('{"error": "Not found"}'), "a JSON text, not the weights"),
    "lfs.safetensors": (lambda path: path.write_bytes(LFS), "run 'git lfs pull'"),
    "m.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(9)), "an HDF5 file"),
    "m.npz": (lambda path: np.savez(path, a=np.ones(3)), "a numpy .npz archive; save the arrays"),
    "m.npy": (lambda path: np.save(path, np.ones(3)), "a numpy array; save a dict of tensors"),
    "torch.onnx": (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x03" + bytes(9)), "an ONNX model"),
    "other.onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x05tf2ox" + bytes(9)), "an ONNX model"),
    "m.nemo": (tarred, "a tar archive; unpack it first"),
    "m.zip": (lambda path: zipped(path, "a/model.safetensors"), "contains checkpoints; unpack it first"),
    "script.pt": (lambda path: zipped(path, "m/constants.pkl", "m/data.pkl"), "TorchScript archive .*torch.jit.load"),
    "empty.pt": (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
    "zeros.pt": (lambda path: path.write_bytes(bytes(99)), "full of zeros"),
    "model.pt": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "Linear is a whole model.*--from-module"),
}
FOLDERS = {
    "gguf": ({"m-Q4.gguf": b"GGUF", "config.json": b"{}"}, r"its m-Q4.gguf is a GGUF model; export"),
    "flax": ({"flax_model.msgpack": b"\x81"}, r"its flax_model.msgpack is Flax weights; load them with from_flax=True"),
    "keras": ({"tf_model.h5": b"\x89HDF\r\n\x1a\n"}, r"its tf_model.h5 is Keras weights; load them with from_tf=True"),
    "tensorflow": ({"saved_model.pb": b"\x08\x01"}, r"a TensorFlow SavedModel; load it"),
    "onnx": ({"model.onnx": b"\x08\x07"}, r"its model.onnx is an ONNX model"),
    "npz": ({"w.npz": b"PK\x03\x04"}, r"its w.npz is a numpy archive; save its arrays"),
    "lfs": ({"weights.pt": LFS, "config.json": b"{}"}, r"weights.pt' is a Git LFS pointer"),
    "lfs by name": ({"model.safetensors": LFS}, r"model.safetensors' is a Git LFS pointer"),
    "deepspeed": (
        {"zero_to_fp32.py": b"", "latest": b"g"},
        r"a DeepSpeed checkpoint.*python .*/zero_to_fp32.py .* out",
    ),
    "deepspeed step": ({"zero_pp_rank_0_mp_rank_00_optim_states.pt": b""}, r"python -m deepspeed.utils.zero_to_fp32 /"),
    "fsdp": ({"model_world_size_2_rank_0.pt": b""}, r"an FSDP checkpoint.*FULL_STATE_DICT"),
    "llama": ({"a.00.pth": WEIGHTS, "a.01.pth": WEIGHTS}, r"holds 2 checkpoints and no index.*name one of the files"),
    "nothing": ({}, "a folder without weights"),
}


def told(path):
    done = CliRunner().invoke(app, ["plan", str(path)], env={"COLUMNS": "2000"})
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, name):
    make, message = FILES[name]
    make(tmp_path / name)
    matched(message, told(tmp_path / name))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_weights_for_us_is_told_in_one_line(tmp_path, name):
    files, message = FOLDERS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, content in files.items():
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            torch.save(content, folder / file)
    matched(message, told(folder))


def matched(pattern, text):
    assert re.search(pattern, text), text


def test_the_script_of_deepspeed_is_named_where_it_lies(tmp_path):
    step = tmp_path / "run" / "global_step9"
    step.mkdir(parents=True)
    (step.parent / "zero_to_fp32.py").write_bytes(b"")
    (step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert f"python {step.parent}/zero_to_fp32.py {step.parent} out joins them" in told(step)


QUANTIZED = {
    "gptq": {
        "l.qweight": torch.arange(8 * 64, dtype=torch.int32).view(8, 64), "l.scales": torch.rand(2, 64).half(),
        "l.qzeros": torch.arange(16, dtype=torch.int32).view(2, 8), "l.g_idx": torch.arange(64, dtype=torch.int32),
    },
    "bitsandbytes": {
        "l.weight": torch.arange(2048).remainder(251).to(torch.uint8).view(-1, 1), "l.weight.absmax": torch.rand(64),
        "l.weight.quant_map": torch.rand(16), "l.weight.nested_absmax": torch.rand(1, 4),
    },
    "fp8": {"l.weight": torch.rand(64, 64).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.rand(16, 16)},
    "mlx": {
        "l.weight": torch.arange(512, dtype=torch.int32).view(64, 8), "l.scales": torch.rand(64, 8),
        "l.biases": torch.rand(64, 8),
    },
}  # fmt: skip


@pytest.mark.parametrize("codec", ["pq", "trellis"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_and_their_scales_come_back_bit_for_bit(tmp_path, name, codec):
    save_file(QUANTIZED[name], tmp_path / "m.safetensors")
    report = pqcli.compress(tmp_path / "m.safetensors", recipe=pqcli.Recipe(codec=codec))
    assert {tensor.action for tensor in report.tensors} == {"keep"}
    assert pqcli.verify(tmp_path / "m.pq.safetensors", tmp_path / "m.safetensors") == []


def test_a_shell_whose_attributes_are_slots_is_its_local_tensor(tmp_path):
    """As torch 2.13 pickles a DTensor: the state is (attributes or None, those that have slots)."""
    local = TensorRef(StorageRef("0", "float32", 6, "cpu"), "float32", 0, (2, 3), (3, 1))
    kind, wrapper = Global("torch.distributed.tensor.DTensor"), Global("torch._utils._rebuild_wrapper_subclass")
    build = CALLS["torch._tensor._rebuild_from_type_v2"]
    arguments = (kind, None, (2, 3), (3, 1), 0, None, None, False)
    found = build(wrapper, kind, arguments, (None, {"_local_tensor": local}))
    assert (found.shape, found.subclass) == ((2, 3), "torch.distributed.tensor.DTensor")
    part = build(wrapper, kind, (kind, None, (4, 3), *arguments[3:]), (None, {"_local_tensor": local}))
    assert isinstance(part, Unsupported)
    assert "one process's part, of shape [2, 3], of a DTensor of shape [4, 3]" in part.reason


class Attack:
    """Leaves a file where it is unpickled by its code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_optimised_python_and_the_environment_of_torch_run_no_code_and_change_no_word(tmp_path):
    """The messages of refusals, the findings and every byte that is written, in processes of their own."""
    torch.save({"w": torch.ones(2), "x": Attack(tmp_path / "ran")}, tmp_path / "hostile.pt")
    generator = torch.Generator().manual_seed(0)
    torch.save({"w": torch.randn(64, 32, generator=generator), "n": torch.zeros(3)}, tmp_path / "m.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    environment.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

    def everything(*options, **more):
        said = []
        for command in (
            ("plan", "hostile.pt"), ("plan", "model.pt"), ("compress", "m.pt", "--force", "--quiet"),
            ("verify", "m.pq.safetensors", "--against", "m.pt"),
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, *options, "-m", "pqcli", *command],
                cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
            said.append((done.returncode, done.stdout, done.stderr))
        return said, (tmp_path / "m.pq.safetensors").read_bytes()

    usual = everything()
    assert [code for code, *_ in usual[0]] == [1, 1, 0, 0]
    assert "it needs posix.mkdir" in usual[0][0][2]
    assert everything("-OO", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1") == usual
    assert not (tmp_path / "ran").exists()
