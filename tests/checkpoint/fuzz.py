"""Random damage to headers, by the million: only pqcli's own errors may come out.

    python -m tests.checkpoint.fuzz TARGET --inputs 100000 --seconds 60 [--seed 0]

Targets: pickle, module, zip, legacy, safetensors, index, dcp, tree. Each starts from valid inputs and edits them:
flips, cuts, copies, numbers that are nearly too large, and pieces that the format itself is made of. What fails is
printed with its seed, and the input is kept. The last line gives the number of inputs.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import io
import json
import pathlib
import random
import sys
import tempfile
import time
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pqcli import checkpoint
from pqcli.checkpoint.folder import names_in
from pqcli.checkpoint.limits import Budget, Limits
from pqcli.checkpoint.pt.pickles import PickleReader
from pqcli.checkpoint.pt.tree import describe
from pqcli.errors import PQError
from pqcli.tensors.info import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = Limits(n_operations=200_000, n_entries=20_000, n_bytes=1 << 22, seconds=5)
_NUMBERS = (b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80", b"\xff" * 8, b"\xff" * 7 + b"\x7f")
_OPCODES = [
    bytes([code]) for code in b"()].}esaubtRcio\x81\x85\x86\x87\x88\x89NQPh0qrjX\x8c\x93\x94\x8f\x90\x91\x92KJM\x8a"
]
_GLOBALS = [
    b"c%s\n" % name
    for name in (
        b"collections\nOrderedDict", b"argparse\nNamespace", b"torch._utils\n_rebuild_tensor_v2",
        b"torch\nFloatStorage",
        b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct", b"datetime\ndatetime", b"builtins\ngetattr", b"x.y\nZ",
        b"collections\ndefaultdict", b"__builtin__\nset", b"torch\nSize", b"omegaconf.dictconfig\nDictConfig",
    )
]  # fmt: skip


_OF_MODULES = [
    b"X" + len(name).to_bytes(4, "little") + name
    for name in (
        b"_parameters",
        b"_buffers",
        b"_modules",
        b"_non_persistent_buffers_set",
        b"_state_dict_hooks",
        b"mask",
    )
]


def edited(data: bytes, pieces: list[bytes], generator: random.Random) -> bytes:
    """A few random edits."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 6))):
        at = generator.randrange(len(result) + 1)
        kind = generator.randrange(7)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << generator.randrange(8)
        elif kind == 1 and result:
            result[at % len(result)] = generator.randrange(256)
        elif kind == 2:
            del result[at : at + generator.choice((1, 2, 5, 50))]
        elif kind == 3:
            result[at:at] = generator.choice(pieces)
        elif kind == 4:
            result[at : at + 4] = generator.choice(_NUMBERS)
        elif kind == 5:
            start = generator.randrange(len(result) + 1)
            result[at:at] = result[start : start + generator.randrange(1, 60)]
        else:
            del result[at:]
    return bytes(result)


def checkpoint_value() -> dict[str, Any]:
    """A bit of everything."""
    tensor = torch.arange(6.0).reshape(2, 3)
    return {
        "state_dict": collections.OrderedDict({"a.weight": tensor, "a.tied": tensor, "row": tensor[0]}),
        "args": argparse.Namespace(lr=[0.1], names={"x"}),
        "time": dt.datetime(2024, 2, 29, tzinfo=dt.timezone.utc),  # noqa: UP017
        "path": pathlib.PurePosixPath("a/b"),
        "array": np.arange(5.0),
        "scalar": np.float32(1.5),
        "default": collections.defaultdict(list, {"a": [1]}),
        (1, "key"): [None, True, 2**70, -1.5, b"\0\xff", "text", torch.Size([1, 2]), torch.bfloat16],
    }


def model() -> dict[str, Any]:
    """Modules inside modules, and beside other things."""
    inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    inner.register_buffer("mask", torch.ones(2), persistent=False)
    return {"epoch": 1, "model": torch.nn.DataParallel(torch.nn.ModuleList([inner, inner[0]]))}


def saved(value: Any = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint_value() if value is None else value, buffer, **options)
    return buffer.getvalue()


def pickles_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


class Target:
    """Valid inputs, pieces to insert, and what is done with an edited input."""

    def __init__(self, seeds: list[bytes], pieces: list[bytes], run: Callable[[bytes], None]) -> None:
        self.seeds, self.pieces, self.run = seeds, pieces, run


def targets(folder: pathlib.Path) -> dict[str, Target]:
    path = folder / "input"

    def whole(data: bytes) -> None:
        path.write_bytes(data)
        with checkpoint.open(path, limits=LIMITS) as opened:
            for info in opened.tensors:
                opened.read(info.name)
            skeleton = json.loads(json.dumps(opened.skeleton))
            checkpoint.write(
                folder / "out", opened.tensors, opened.read, skeleton, format=opened.format, force=True
            )  # fmt: skip

    def only_pickle(data: bytes) -> None:
        budget = Budget(LIMITS)
        json.dumps(describe(PickleReader(budget).load(io.BytesIO(data)), budget).tree)

    def module(data: bytes) -> None:
        budget = Budget(LIMITS)
        json.dumps(describe(PickleReader(budget).load(io.BytesIO(data)), budget, from_module=True).tree)

    def index(data: bytes) -> None:
        (folder / "sharded" / "model.safetensors.index.json").write_bytes(data)
        checkpoint.open(folder / "sharded", limits=LIMITS).close()

    def distributed(data: bytes) -> None:
        (folder / "dcp" / ".metadata").write_bytes(data)
        checkpoint.open(folder / "dcp", limits=LIMITS).close()

    def tree(data: bytes) -> None:
        try:
            skeleton = json.loads(data)
        except (ValueError, RecursionError):
            return
        infos = (TensorInfo("a.weight", (2,), "float32"), TensorInfo("row", (2,), "float32"))
        checkpoint.write(
            folder / "out", infos, lambda _: torch.ones(2), {"source": "pt", "tree": skeleton}, format="pt", force=True
        )

    from safetensors.torch import save, save_file

    (folder / "sharded").mkdir()
    save_file({"a": torch.ones(2)}, folder / "sharded" / "m-1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "sharded" / "m-2.safetensors")
    weight_map = {"metadata": {"total_size": 16}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"a": torch.ones(3, 2)}, "step": 3, "l": [1, torch.ones(2)]}, checkpoint_id=folder / "dcp")
    modern = [saved(pickle_protocol=protocol) for protocol in (2, 4, 5)]
    with checkpoint.open(_put(path, modern[0])) as opened:
        tree_text = json.dumps(opened.skeleton["tree"]).encode()
    json_pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b'"$"',
        b":",
        b'"v"',
        b"1e999",
        b"-1",
        b"NaN",
        b'"../x"',
        b"null",
        b'"\\ud800"',
    ]
    kinds = [
        json.dumps({"$": kind, "v": [1]}).encode() for kind in ("tuple", "set", "object", "packed", "bytes", "int")
    ]
    return {
        "pickle": Target([pickles_of(data) for data in modern], _OPCODES + _GLOBALS, only_pickle),
        "module": Target([pickles_of(saved(model()))], _OPCODES + _GLOBALS + _OF_MODULES, module),
        "zip": Target(modern, [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", *_NUMBERS], whole),
        "legacy": Target([saved(_use_new_zipfile_serialization=False)], _OPCODES + _GLOBALS, whole),
        "safetensors": Target(
            [save({"a": torch.ones(2, 3), "b": torch.ones(2).half(), "c": torch.ones(0, 3)}, {"k": "v"})],
            [*json_pieces, b'"dtype":"F32"', b'"data_offsets":[0,8]', b'"shape":[]'], whole,
        ),
        "index": Target([json.dumps(weight_map).encode()], json_pieces, index),
        "dcp": Target([(folder / "dcp" / ".metadata").read_bytes()], _OPCODES + _GLOBALS, distributed),
        "tree": Target([tree_text, b'{"top":{"$":"odict","items":[2]}}'], json_pieces + kinds, tree),
    }  # fmt: skip


def _put(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.write_bytes(data)
    return path


def fuzz(name: str, n_inputs: int, seconds: float, seed: int) -> tuple[int, int, list[str]]:
    """The number of inputs tried, of those that were refused, and what went wrong."""
    failures: list[str] = []
    tried = n_refused = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        target = targets(folder)[name]
        assert names_in(folder / "sharded")
        end = time.monotonic() + seconds
        while tried < n_inputs and time.monotonic() < end and len(failures) < 5:
            generator = random.Random(f"{seed}/{tried}")
            data = edited(generator.choice(target.seeds), target.pieces, generator)
            tried += 1
            begun = time.monotonic()
            try:
                target.run(data)
            except PQError as error:
                n_refused += 1
                if "\n" in str(error):
                    failures.append(f"input {tried - 1} of seed {seed}: a message of several lines: {error}")
            except BaseException as error:  # noqa: BLE001 - whatever comes out is the finding
                failures.append(f"input {tried - 1} of seed {seed}: {type(error).__name__}: {error}")
                pathlib.Path(tempfile.gettempdir(), f"pqcli-fuzz-{name}-{seed}-{tried - 1}").write_bytes(data)
                if isinstance(error, KeyboardInterrupt):
                    break
            if time.monotonic() - begun > LIMITS.seconds + 5:
                failures.append(f"input {tried - 1} of seed {seed}: took {time.monotonic() - begun:.1f} s")
    return tried, n_refused, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["pickle", "module", "zip", "legacy", "safetensors", "index", "dcp", "tree"])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tried, n_refused, failures = fuzz(options.target, options.inputs, options.seconds, options.seed)
    print("\n".join(failures))
    print(f"{options.target}: {tried:,} inputs, {n_refused:,} refused, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
