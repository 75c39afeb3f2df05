"""The command line as a stranger uses it: real processes, real files, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]

COMMANDS = ["compress", "plan", "decode", "report", "inspect", "verify", "presets", "calibrate", "stats"]


def failed(done, code, *words):
    """The process ended with `code` and one clear message: no traceback, nothing on stdout."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    flat = " ".join(done.stderr.split())
    for word in words:
        assert word in flat, flat


def test_compress_then_decode_gives_the_same_checkpoint_structure_back(pqcli_process, model):
    assert pqcli_process("compress", model).returncode == 0
    assert pqcli_process("decode", "model.pq.safetensors").returncode == 0
    original, decoded = torch.load(model), torch.load(model.with_name("model.decoded.pt"))
    assert list(decoded) == list(original)
    assert decoded["epoch"] == 3
    assert decoded["args"] == {"lr": [0.1, 0.2]}
    a, b = original["state_dict"], decoded["state_dict"]
    assert [(k, v.shape, v.dtype) for k, v in a.items()] == [(k, v.shape, v.dtype) for k, v in b.items()]
    for kept in ("conv.bias", "norm.num_batches_tracked", "mask"):
        assert torch.equal(a[kept], b[kept])
    assert torch.equal(a["nan.weight"].view(torch.int32), b["nan.weight"].view(torch.int32))
    assert b["head.weight"].data_ptr() == b["embed.weight"].data_ptr()
    assert float((a["embed.weight"] - b["embed.weight"]).square().mean()) < 0.5


def test_json_of_compress_has_every_promised_field_and_true_sizes(pqcli_command, model):
    found = pqcli_command.json("compress", model)
    promised = {
        "output",
        "original_bytes",
        "compressed_bytes",
        "ratio",
        "relative_mse",
        "bits_per_weight",
        "seconds",
        "tensors",
    }
    assert promised <= found.keys()
    output = model.with_name("model.pq.safetensors")
    assert found["compressed_bytes"] == output.stat().st_size
    assert found["original_bytes"] == model.stat().st_size
    fields = {
        "name",
        "shape",
        "dtype",
        "action",
        "reason",
        "block_size",
        "n_centroids",
        "bits_per_weight",
        "relative_mse",
        "bytes",
    }
    actions = {}
    for tensor in found["tensors"]:
        assert fields <= tensor.keys()
        actions[tensor["name"]] = tensor["action"]
    assert actions["embed.weight"] == "pq"
    assert actions["head.weight"] == "alias"
    assert actions["nan.weight"] == actions["conv.bias"] == "keep"
    nan = next(tensor for tensor in found["tensors"] if tensor["name"] == "nan.weight")
    assert "NaN" in nan["reason"]


def test_the_dry_run_predicts_the_file_to_the_byte_and_writes_nothing(pqcli_command, resnet20, tmp_path):
    planned = pqcli_command.json("compress", resnet20, "-o", "small.pq.safetensors", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    found = pqcli_command.json("compress", resnet20, "-o", "small.pq.safetensors")
    assert planned["predicted_bytes"] == found["compressed_bytes"]
    assert [t["action"] for t in planned["tensors"]] == [t["action"] for t in found["tensors"]]
    assert pqcli_command.json("plan", resnet20)["predicted_bytes"] == planned["predicted_bytes"]


def test_the_real_resnet20_comes_back_in_every_format(pqcli_command, resnet20, tmp_path):
    assert pqcli_command("compress", resnet20, "-o", "r.pq.safetensors").returncode == 0
    original = torch.load(resnet20, weights_only=True, map_location="cpu")
    for name in ("r.th", "r.pt", "r.safetensors"):
        assert pqcli_command("decode", "r.pq.safetensors", "-o", name).returncode == 0
    for name in ("r.th", "r.pt"):
        decoded = torch.load(tmp_path / name, weights_only=True)
        assert list(decoded["state_dict"]) == list(original["state_dict"])
        assert decoded["best_prec1"] == original["best_prec1"]
    assert list(load_file(tmp_path / "r.safetensors")) == list(original["state_dict"])


def test_report_gives_the_same_tensors_in_every_format_and_against_the_original(pqcli_command, model, tmp_path):
    compressed = pqcli_command.json("compress", model)
    stored = pqcli_command.json("report", "model.pq.safetensors")
    measured = pqcli_command.json("report", "model.pq.safetensors", "--against", model)
    names = [tensor["name"] for tensor in compressed["tensors"]]
    for found in (stored, measured):
        assert [tensor["name"] for tensor in found["tensors"]] == names
        assert found["relative_mse"] == pytest.approx(compressed["relative_mse"], rel=1e-4)
    csv = pqcli_command("report", "model.pq.safetensors", "--format", "csv").stdout.splitlines()
    assert len(csv) == 1 + len(names)
    table = pqcli_command("report", "model.pq.safetensors").stdout
    assert "embed.weight" in table
    assert pqcli_command("report", "model.pq.safetensors", "--format", "html", "-o", "r.html").returncode == 0
    assert "embed.weight" in (tmp_path / "r.html").read_text()


def test_fail_above_exits_with_3_and_names_the_worst_layer(pqcli_command, model):
    pqcli_command("compress", model)
    done = pqcli_command("report", "model.pq.safetensors", "--fail-above", "relative_mse=1e-9")
    assert done.returncode == 3
    assert "embed.weight" in done.stderr
    assert pqcli_command("report", "model.pq.safetensors", "--fail-above", "relative_mse=0.9").returncode == 0
    failed(pqcli_command("report", "model.pq.safetensors", "--fail-above", "nonsense", "-q"), 2, "nonsense")


def test_verify_finds_a_flipped_bit_and_a_different_original(pqcli_command, model, tmp_path):
    pqcli_command("compress", model)
    assert pqcli_command("verify", "model.pq.safetensors", "--against", model).returncode == 0
    state = torch.load(model)
    state["state_dict"]["conv.bias"][3] += 1
    torch.save(state, tmp_path / "other.pt")
    done = pqcli_command("verify", "model.pq.safetensors", "--against", "other.pt")
    failed(done, 3, "conv.bias")
    data = bytearray((tmp_path / "model.pq.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pq.safetensors").write_bytes(data)
    assert pqcli_command("verify", "flipped.pq.safetensors").returncode in {1, 3}
    failed(pqcli_command("decode", "flipped.pq.safetensors", "-o", "x.pt"), 1, "damaged")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_ends_with_an_example(pqcli_command, command):
    done = pqcli_command(command, "--help")
    assert done.returncode == 0
    assert f"Example: pqcli {command}" in done.stdout.strip().splitlines()[-1]


def test_what_is_wrong_with_names_is_told_without_importing_torch(tmp_path):
    """Missing and foreign inputs, outputs in the way, keys and settings that are not there."""
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "empty").mkdir()
    for name in ("tensors.safetensors", "fine.pq.safetensors"):
        entry = "pqcli.manifest" if "pq" in name else "w"
        head = json.dumps({entry: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (tmp_path / name).write_bytes(len(head).to_bytes(8, "little") + head)
    told = {
        "compress none.pt": "none.pt",
        "plan none.pt": "none.pt",
        "compress page.pt": "HTML",
        "compress tensors.safetensors -o page.pt": "exists already",
        "compress tensors.safetensors --quality best": "best",
        "decode none": "no such file",
        "decode page.pt": "not a .pq.safetensors file",
        "report tensors.safetensors": "not compressed by pqcli",
        "report fine.pq.safetensors --sort bites": "did you mean",
        "report fine.pq.safetensors --fail-above mse": "KEY=X",
        "report fine.pq.safetensors -o page.pt": "exists already",
        "verify fine.pq.safetensors --against none.pt": "none.pt",
        "inspect empty": "a folder",
    }
    code = (
        "import sys\nfrom pqcli.cli.commands import app\n"
        "try: app()\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for line, words in told.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert words in done.stderr, line
        assert done.stdout in {"False 1\n", "False 2\n"}, line


def write(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return name


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.pt", b"", ["empty"]),
        ("page.safetensors", b"<!DOCTYPE html><html><body>404</body></html>", ["HTML"]),
        ("pointer.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["LFS"]),
        ("short.safetensors", (1 << 20).to_bytes(8, "little") + b'{"a":', ["short.safetensors"]),
    ],
)
def test_what_is_not_a_checkpoint_gets_one_message_and_writes_nothing(pqcli_command, tmp_path, name, data, words):
    write(tmp_path, name, data)
    failed(pqcli_command("compress", name), 1, name, *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_file_a_pickle_with_code_and_an_existing_output_are_refused(pqcli_process, model, tmp_path):
    failed(pqcli_process("compress", "nowhere.pt"), 1, "nowhere.pt")
    (tmp_path / "evil.pt").write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    failed(pqcli_process("compress", "evil.pt"), 1, "evil.pt")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "model.pq.safetensors").write_bytes(b"mine")
    failed(pqcli_process("compress", model), 1, "--force")
    assert (tmp_path / "model.pq.safetensors").read_bytes() == b"mine"
    assert pqcli_process("compress", model, "--force").returncode == 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--block-size", "0"], "0"),
        (["--block-size", "eight"], "eight"),
        (["--n-centroids", "70000"], "70000"),
        (["--codebook-dtype", "fp8"], "fp8"),
        (["--nonsense"], "nonsense"),
        (["--device", "toaster"], "toaster"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_flags_are_usage_errors_that_name_the_value(pqcli_process, model, flags, word):
    failed(pqcli_process("compress", model, *flags), 2, word)


def test_patterns_that_match_nothing_suggest_close_names(pqcli_command, model):
    failed(pqcli_command("compress", model, "--include", "embde.weight"), 1, "embde.weight", "embed.weight")
    failed(pqcli_command("compress", model, "--config", "kill-the-bit-small"), 1, "kill-the-bits-small")


def test_ctrl_c_ends_with_130_and_leaves_nothing_behind(tmp_path):
    save_file({"w": torch.randn(4096, 4096)}, tmp_path / "big.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "pqcli", "compress", tmp_path / "big.safetensors", "--n-centroids", "4096"],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["big.safetensors"]


def test_quiet_prints_nothing_and_progress_stays_off_without_a_terminal(pqcli_command, model):
    done = pqcli_command("compress", model, "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    done = pqcli_command("compress", model, "--force", "--json")
    assert json.loads(done.stdout)["output"]
    assert "\x1b" not in done.stderr


def test_names_with_markup_and_control_characters_are_shown_harmlessly(pqcli_command, tmp_path):
    save_file({"[red]a\x1b[31m.weight": torch.randn(64, 64), "../b": torch.randn(64, 64)}, tmp_path / "odd.safetensors")
    done = pqcli_command("compress", "odd.safetensors")
    assert done.returncode == 0, done.stderr
    table = pqcli_command("report", "odd.pq.safetensors").stdout
    assert "[red]a" in table
    assert "\x1b[31m" not in table
    assert pqcli_command("decode", "odd.pq.safetensors").returncode == 0
    assert set(load_file(tmp_path / "odd.decoded.safetensors")) == {"[red]a\x1b[31m.weight", "../b"}


def test_the_same_seed_gives_the_same_file_for_any_number_of_threads(pqcli_process, model, tmp_path):
    pqcli_process("compress", model, "-o", "a.pq.safetensors", OMP_NUM_THREADS="1")
    pqcli_process("compress", model, "-o", "b.pq.safetensors", OMP_NUM_THREADS="2")
    assert (tmp_path / "a.pq.safetensors").read_bytes() == (tmp_path / "b.pq.safetensors").read_bytes()
