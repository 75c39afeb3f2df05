"""Work in other processes and on a Ray cluster: the same bytes as here, whoever is lost on the way."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pqcli
from pqcli.core import threads
from pqcli.errors import CheckpointError, MissingExtraError, UsageError, WorkerError
from pqcli.jobs import remote
from pqcli.jobs.remote import Answer, LostWorkerError
from tests.conftest import REPOSITORY

RECIPES = {
    "plain": pqcli.Recipe(block_size=4, n_centroids=64, n_iter=3),
    "trellis": pqcli.Recipe(codec="trellis", effort=4, target_bits=2.0),
}


@dataclass(frozen=True)
class Number:
    value: int
    n_bytes: int = 10
    fails: bool = False

    @property
    def name(self):
        return f"number {self.value}"

    n_weights = 1

    def run(self, device):
        if self.fails:
            raise CheckpointError("no good")
        return self.value * 10


class FakePool:
    """Runs what it is sent when it is asked for it; loses what `loses` says, each time it is sent."""

    def __init__(self, n_workers=2, loses=()):
        self.n_workers, self.loses, self.sent, self.most, self.cancelled = n_workers, list(loses), {}, 0, []
        self.order = deque()

    def send(self, task, n_bytes):
        handle = len(self.order) + len(self.sent) * 1000
        self.sent[handle] = task
        self.order.append(handle)
        return handle

    def first(self, handles):
        self.most = max(self.most, len(handles))
        return handles[-1]  # not in the order that they were sent in

    def take(self, handle):
        task = pickle.loads(self.sent[handle])
        if task.value in self.loses:
            self.loses.remove(task.value)
            raise LostWorkerError("gone")
        return remote.run_pickled(self.sent[handle], "cpu")

    def cancel(self, handles):
        self.cancelled += handles


def test_every_task_gives_its_result_once_within_the_window():
    pool = FakePool()
    found = dict(remote.results(pool, [Number(i) for i in range(9)], 1000))
    assert found == {i: 10 * i for i in range(9)}
    assert pool.most == remote.TASKS_A_WORKER * 2
    assert pool.cancelled == []


def test_memory_bounds_the_window_unless_one_alone_is_larger():
    pool = FakePool()
    tasks = [Number(0, 300), Number(1, 60), Number(2, 60), Number(3, 60)]
    assert len(list(remote.results(pool, tasks, 70))) == 4
    assert pool.most == 2


def test_a_task_that_is_lost_runs_again_and_one_that_kills_workers_ends_the_run():
    pool = FakePool(loses=[3, 3, 5])
    assert dict(remote.results(pool, [Number(i) for i in range(9)], 1000))[3] == 30
    pool = FakePool(loses=[3] * remote.MOST_ATTEMPTS)
    with pytest.raises(WorkerError, match=r"'number 3': 4 workers were lost with it \(gone\)"):
        list(remote.results(pool, [Number(i) for i in range(9)], 1000))
    assert pool.cancelled


def test_an_error_arrives_as_it_was_and_names_another_host(monkeypatch):
    tasks = [Number(0), Number(1, fails=True)]
    with pytest.raises(CheckpointError, match=r"^no good$"):
        list(remote.results(FakePool(), tasks, 1000))
    monkeypatch.setattr(
        FakePool, "take", lambda self, handle: Answer(error=CheckpointError("no good"), host="elsewhere")
    )
    with pytest.raises(CheckpointError, match=r"^on elsewhere: no good"):
        list(remote.results(FakePool(), tasks, 1000))


def test_a_worker_with_another_pqcli_ends_the_run(monkeypatch):
    monkeypatch.setattr(FakePool, "take", lambda self, handle: Answer(1, host="elsewhere", version="0.0"))
    with pytest.raises(WorkerError, match=r"elsewhere has pqcli 0\.0, this is"):
        list(remote.results(FakePool(), [Number(0)], 1000))


def test_what_cannot_be_sent_is_told():
    with pytest.raises(UsageError, match="cannot be given to another process"):
        list(remote.results(FakePool(), [Number(lambda: None)], 1000))


def test_a_worker_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(threads, "_most", None)
    threads.limit(1)
    assert threads.n_threads() == 1


def test_wishes_that_cannot_be_meant_are_refused(model, tmp_path):
    with pytest.raises(UsageError, match="give one of them"):
        pqcli.compress(model, tmp_path / "x.pq.safetensors", ray="auto", workers=2)
    with pytest.raises(UsageError, match="workers 0"):
        pqcli.compress(model, tmp_path / "x.pq.safetensors", workers=0)


def test_without_ray_the_message_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pqcli\[ray\]'"):
        pqcli.compress(model, tmp_path / "x.pq.safetensors", ray="local")


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": 0.05 * torch.randn(96 + 8 * i, 128, generator=generator) for i in range(10)}
    path = tmp_path_factory.mktemp("source") / "m.pt"
    torch.save({"state_dict": state, "step": 3}, path)
    return path


@pytest.fixture(scope="module")
def here(source):
    """What threads of this process write."""
    found = {}
    for name, recipe in RECIPES.items():
        path = source.with_name(f"{name}.pq.safetensors")
        pqcli.compress(source, path, recipe)
        found[name] = path.read_bytes()
    return found


def children(word):
    """Processes whose command begins with a word, by their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if command.startswith(word):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_processes_write_the_same_bytes_and_one_that_is_killed_costs_its_tasks(source, here, tmp_path):
    target, killed = tmp_path / "x.pq.safetensors", []

    def kill(event):
        if event.stage == "encoding" and event.done and not killed:
            workers = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat") if is_worker(p)]
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    pqcli.compress(source, target, RECIPES["trellis"], workers=2, progress=kill)
    assert killed
    assert target.read_bytes() == here["trellis"]


def is_worker(path):
    try:
        command, parent = (path.parent / "cmdline").read_bytes(), path.read_text().rpartition(")")[2].split()[1]
    except OSError:
        return False
    return int(parent) == os.getpid() and b"spawn_main" in command


@pytest.fixture(scope="module")
def cluster():
    """A head and another node on the loopback interface."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    try:
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.second = cluster.add_node(**node)
    except (RuntimeError, OSError) as error:  # a sandbox that lets no server listen, for one
        pytest.skip(f"no Ray cluster starts on this machine: {error}")
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("codec", RECIPES)
def test_a_cluster_writes_the_same_bytes_though_a_worker_is_killed(cluster, source, here, tmp_path, codec):
    target, killed = tmp_path / "x.pq.safetensors", []

    def kill(event):
        if event.stage == "encoding" and event.done and not killed:
            killed.extend((children(b"ray::run_pickled") or children(b"ray::IDLE"))[:1])
            os.kill(killed[0], signal.SIGKILL)

    pqcli.compress(source, target, RECIPES[codec], ray=cluster.address, progress=kill)
    assert killed
    assert target.read_bytes() == here[codec]


@pytest.mark.slow
def test_an_error_on_a_worker_is_the_same_error(cluster, source, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(source.read_bytes())

    def shrink(event):
        if event.stage == "reading" and not event.done:
            path.write_bytes(source.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        pqcli.compress(path, tmp_path / "x.pq.safetensors", RECIPES["trellis"], ray=cluster.address, progress=shrink)
    assert [one.name for one in tmp_path.iterdir()] == ["m.pt"]


DRIVER = """
import sys
import pqcli.jobs.journal.journal as journals
from pqcli.cli.commands import app
journals.AFTER_SECONDS = 0
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_where_it_stopped(cluster, source, here, tmp_path):
    flags = ["--block-size", "4", "--n-centroids", "64", "--n-iter", "3", "-o", "x.pq.safetensors"]
    command = [sys.executable, "-c", DRIVER, "compress", str(source), *flags, "--ray", cluster.address]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    while not any("journal" in path.name and path.stat().st_size > 4000 for path in tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert (tmp_path / "x.pq.safetensors").read_bytes() == here["plain"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pq.safetensors"]


@pytest.mark.slow
def test_a_node_that_is_removed_costs_its_tasks(cluster, source, here, tmp_path):
    """The last one: the cluster has one node afterwards."""
    target, removed = tmp_path / "x.pq.safetensors", []

    def remove(event):
        if event.stage == "encoding" and event.done and not removed:
            removed.append(cluster.second)
            cluster.remove_node(cluster.second, allow_graceful=False)

    pqcli.compress(source, target, RECIPES["trellis"], ray=cluster.address, progress=remove)
    assert removed
    assert target.read_bytes() == here["trellis"]
