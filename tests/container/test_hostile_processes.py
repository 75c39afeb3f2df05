"""Files from strangers, in real processes with little memory and time: one message, the right code, nothing left."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.container import small
from tests.container.forging import taken_apart

pytestmark = pytest.mark.slow

MEMORY_BYTES = 6 << 30
"""Address space: torch maps 3 GiB of it for itself."""
SECONDS = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file of each codec."""
    with pytest.MonkeyPatch.context() as patch:
        return {codec: small.make(codec, tmp_path_factory.mktemp(codec), patch) for codec in ("plain", "trellis")}


def bomb(file: Path) -> bytes:
    forgery = taken_apart(file)
    forgery.manifest["recipe"] = {"a": "@"}
    text = json.dumps(forgery.manifest).encode()
    forgery.manifest_packed = zlib.compress(text.replace(b'"@"', b"[" + b"[]," * 83_000_000 + b"[]]"), 9)
    return forgery.bytes()


def huge_tensor(file: Path) -> bytes:
    forgery = taken_apart(file)
    forgery.manifest["tensors"][1].update(shape=[1 << 20, 1 << 20])
    return forgery.bytes()


def odd_dtype(file: Path) -> bytes:
    forgery = taken_apart(file)
    entry = next(key for key in forgery.entries if key not in {"pqcli.manifest", "pqcli.checksum"})
    forgery.entries[entry][0] = "U16"
    return forgery.bytes()


def other_payload(file: Path) -> bytes:
    """With a true checksum: the hashes of tensors alone tell."""
    forgery = taken_apart(file)
    entry = max(
        (entry for key, entry in forgery.entries.items() if not key.startswith("pqcli.m")), key=lambda e: len(e[2])
    )
    entry[2] = bytes(byte ^ 0x55 for byte in entry[2])
    return forgery.bytes()


CONTAINERS = {
    "bomb": bomb, "huge tensor": huge_tensor, "odd dtype": odd_dtype, "other payload": other_payload,
    "cut short": lambda file: file.read_bytes()[:-100],
    "flipped": lambda file: bytes(byte ^ (i == 2000) for i, byte in enumerate(file.read_bytes())),
}  # fmt: skip


def limited(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pqcli", *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)), check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, code: int, folder: Path, name: str) -> None:
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert name in done.stderr
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("hostile", CONTAINERS)
@pytest.mark.parametrize(("codec", "command"), [("plain", "decode"), ("trellis", "decode"), ("plain", "verify")])
def test_a_hostile_container_ends_in_one_message(sound, tmp_path, hostile, codec, command):
    (tmp_path / "x.pq.safetensors").write_bytes(CONTAINERS[hostile](sound[codec]))
    done = limited(command, "x.pq.safetensors", cwd=tmp_path)
    refused(done, 3 if command == "verify" else 1, tmp_path, "x.pq.safetensors")


@pytest.mark.parametrize("command", ["report", "inspect"])
@pytest.mark.parametrize("hostile", ["bomb", "huge tensor"])
def test_nothing_is_told_of_a_container_that_cannot_be(sound, tmp_path, command, hostile):
    (tmp_path / "x.pq.safetensors").write_bytes(CONTAINERS[hostile](sound["plain"]))
    refused(limited(command, "x.pq.safetensors", cwd=tmp_path), 1, tmp_path, "x.pq.safetensors")


def in_zip(data: bytes, **how: object) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/version", "3\n")
    return file.getvalue()


def doubling() -> bytes:
    """A list of two lists of two lists: 2^60 nodes for who walks it."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return pickle.dumps({"w": value}, 2)


class Runs:
    """Would run a command if a pickle were run."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def saved(value: object, folder: Path) -> bytes:
    torch.save(value, folder / "tmp.pt")
    data = (folder / "tmp.pt").read_bytes()
    (folder / "tmp.pt").unlink()
    return data


CHECKPOINTS = {
    "code": lambda folder: saved({"w": torch.zeros(4), "x": Runs()}, folder),
    "old code": lambda _: pickle.dumps(Runs(), 2),
    "doubling": lambda _: in_zip(doubling()),
    "deflated": lambda _: in_zip(b"(" * (400 << 20), compression=zipfile.ZIP_DEFLATED),
    "long header": lambda _: struct.pack("<Q", 1 << 62) + b"{}",
    "deep header": lambda _: struct.pack("<Q", 800_000) + b"[" * 800_000,
    "huge tensor": lambda _: (lambda h: struct.pack("<Q", len(h)) + h)(
        b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    ),
    "huge bytearray": lambda _: in_zip(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
}


@pytest.mark.parametrize("hostile", CHECKPOINTS)
def test_a_hostile_checkpoint_ends_in_one_message_and_runs_nothing(tmp_path, hostile):
    (tmp_path / "x.pt").write_bytes(CHECKPOINTS[hostile](tmp_path))
    refused(limited("compress", "x.pt", cwd=tmp_path), 1, tmp_path, "x.pt")
