"""Workers that are those of a Ray cluster: this machine's, or many machines' that share a file system.

A task is one of Ray's, for one core, or for a share of a GPU where the cluster has some. Ray knows which nodes are
there; pqcli decides what is sent when (`pqcli.jobs.remote`), and sends again what is lost with a worker or a node. The
driver, this process, writes the file. Where it dies, its workers do, and its journal is what goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from pqcli.codecs.base import Found, Task
from pqcli.core.threads import n_threads
from pqcli.errors import MissingExtraError, UsageError
from pqcli.jobs import remote
from pqcli.jobs.devices import WORKERS_PER_GPU
from pqcli.jobs.executors import Hear, unheard
from pqcli.jobs.remote import Answer, LostWorkerError

LOCAL: Final = "local"
"""The address that means: start a cluster on this machine, for this run."""
INSTALL: Final = "pip install 'pqcli[ray]'"
LOOPBACK: Final = "127.0.0.1"
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else a loopback address would be replaced by that of a network
}
"""Read when Ray is imported."""
_MEMORY_GRAIN: Final = 1 << 28


@dataclass
class Cluster:
    """An executor of a Ray cluster: the one at `address`, "auto" for the one that this machine belongs to.

    Use as a context manager. With the device "cpu" GPUs stay unused. Raises MissingExtraError without Ray, UsageError
    where there is no such cluster.
    """

    address: str
    device: str
    in_flight_bytes: int
    _ray: Any = field(default=None, init=False)
    _is_ours: bool = field(default=True, init=False)
    _temporary: str | None = field(default=None, init=False)
    _run: Any = field(default=None, init=False)
    _options: dict[str, float] = field(default_factory=dict, init=False)
    _n_workers: int = field(default=1, init=False)
    _node_bytes: int = field(default=0, init=False)

    def __enter__(self) -> Self:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            ray: Any = importlib.import_module("ray")  # some of it is typed, and only where it is installed
        except ImportError:
            raise MissingExtraError(f"--ray needs Ray; {INSTALL}") from None
        self._ray = ray
        self._is_ours = not ray.is_initialized()  # a program that uses Ray itself stays connected, there and afterwards
        try:
            if self._is_ours:
                with _quiet():
                    ray.init(**self._settings(), log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"--ray {self.address}: no cluster there ({said}); start one with `ray start --head`, or use "
                f"--ray {LOCAL}"
            ) from error
        self._look()
        has_gpus = self.device != "cpu" and bool(ray.cluster_resources().get("GPU"))
        self.device = "cuda" if has_gpus else "cpu"
        self._options = {"num_cpus": 1, "max_retries": 0}
        if has_gpus:
            self._options["num_gpus"] = 1 / WORKERS_PER_GPU
        self._run = ray.remote(remote.run_pickled)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_ours:
            self._ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _settings(self) -> dict[str, Any]:
        """How to reach the cluster, or to start one that ends with this run."""
        if self.address != LOCAL:
            return {"address": self.address}
        self._temporary = tempfile.mkdtemp(prefix="pqcli-ray-")
        return {
            "address": "local", "num_cpus": n_threads(), "include_dashboard": False, "_node_ip_address": LOOPBACK,
            "_temp_dir": self._temporary,
        }  # fmt: skip

    def results(self, tasks: Sequence[Task[Found]], hear: Hear = unheard) -> Iterator[tuple[int, Found]]:  # noqa: ARG002
        """The largest are sent first; results as they come. Nothing is told of tasks before they are done."""
        self._look()
        return remote.results(self, tasks, self.in_flight_bytes)

    @property
    def n_workers(self) -> int:
        """Cores of the cluster, or shares of its GPUs, as last seen: nodes come and go."""
        return self._n_workers

    def send(self, task: bytes, n_bytes: int) -> Any:
        """To a node with so much memory left; one that no node has room for goes where there is most."""
        # few sizes, since Ray keeps workers apart by what they were asked for
        options = {**self._options, "memory": min(_MEMORY_GRAIN * -(-n_bytes // _MEMORY_GRAIN), self._node_bytes)}
        return self._run.options(**options).remote(task, self.device, 1)

    def first(self, handles: Sequence[Any]) -> Any:
        """Done or lost."""
        done, _ = self._ray.wait(list(handles), num_returns=1)
        return done[0]

    def take(self, handle: Any) -> Answer:
        """Raises LostWorkerError for whatever Ray says of itself; an error of pqcli's comes as an answer."""
        exceptions = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(handle)
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            self._look()
            raise LostWorkerError(type(error).__name__) from error
        return answer

    def cancel(self, handles: Sequence[Any]) -> None:
        """Tasks that run are killed with their workers."""
        for handle in handles:
            self._ray.cancel(handle, force=True)

    def _look(self) -> None:
        """See what the cluster has at the moment."""
        found = self._ray.cluster_resources()
        on_gpus = WORKERS_PER_GPU * found.get("GPU", 0) if self.device == "cuda" else 0
        self._n_workers = max(1, int(on_gpus or found.get("CPU", 1)))
        nodes = [node["Resources"].get("memory", 0) for node in self._ray.nodes() if node["Alive"]]
        self._node_bytes = int(max(nodes, default=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that Ray says while it starts is seen, from Python or from below: what goes wrong is an exception too."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
