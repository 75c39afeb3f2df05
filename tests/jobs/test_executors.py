"""Jobs on workers: every one runs once, the largest first, within the memory allowed, side by side."""

import threading

import pytest
import torch

from pqcli.core.threads import n_threads
from pqcli.jobs import devices as machine
from pqcli.jobs import executors


def run_all(sizes, run, devices, in_flight_bytes=100):
    return list(executors.largest_first(sizes, run, lambda size: size, devices, in_flight_bytes))


def test_results_come_largest_first_whoever_is_done_first():
    devices = ["a", "b"]
    assert [size for size, _ in run_all([3, 9, 1, 5], lambda size, device: (size, device), devices)] == [9, 5, 3, 1]


def test_all_workers_are_at_work_at_once():
    together = threading.Barrier(3, timeout=10)
    run_all([1, 2, 3], lambda size, device: together.wait(), ["gpu 0", "gpu 0", "gpu 1"])


def test_a_device_has_one_job_per_worker_at_a_time():
    busy, most, lock = {"a": 0, "b": 0}, [], threading.Lock()

    def run(size, device):
        with lock:
            busy[device] += 1
            most.append(busy[device])
        threading.Event().wait(0.01)
        with lock:
            busy[device] -= 1

    run_all(list(range(1, 12)), run, ["a", "b"])
    assert max(most) == 1


def test_jobs_in_flight_stay_within_the_memory_allowed_unless_one_alone_is_larger():
    held, most, lock = [0], [], threading.Lock()

    def run(size, device):
        with lock:
            held[0] += size
            most.append(held[0])
        threading.Event().wait(0.005)
        with lock:
            held[0] -= size

    run_all([60, 50, 40, 30, 30, 20, 10], run, ["cpu"] * 4, in_flight_bytes=100)
    assert max(most) <= 100
    most.clear()
    run_all([150, 60, 30], run, ["cpu"] * 4, in_flight_bytes=100)
    assert max(most) == 150


def test_the_first_failure_ends_the_work_and_later_jobs_never_start():
    started = []

    def run(size, device):
        started.append(size)
        if size == 90:
            raise ValueError("no good")

    with pytest.raises(ValueError, match="no good"):
        run_all([90, 80, 70, 60], run, ["cpu"], in_flight_bytes=100)
    assert 60 not in started


def test_a_gpu_has_two_workers_so_that_it_need_not_wait_for_the_disk():
    card = torch.device("cuda", 0)
    assert machine.workers(card) == [card, card]
    assert len(machine.workers(torch.device("cpu"))) == n_threads()
