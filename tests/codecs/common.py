"""What every codec must do, whatever it is: `check_codec` is run for each row of the table."""

import math
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import safetensors.torch
import torch

import pqcli
from pqcli import checkpoint
from pqcli.codecs import registry
from pqcli.codecs.base import Piece, Weights, load
from pqcli.core.digests import tensor_hash
from pqcli.core.importance import Importance
from pqcli.jobs.compress import compression
from pqcli.jobs.events import ignore
from pqcli.jobs.executors import Threads, running
from pqcli.plan import plan
from pqcli.recipe.recipe import Recipe

CPU = torch.device("cpu")
RUN = running(Threads(CPU), ignore)


def gaussian(*shape, seed=0, rms=0.1):
    return rms * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything():
    """Tensors of all kinds: layers, an embedding with a second name, dtypes, odd sizes, what no codec can take."""
    embedding = gaussian(200, 48, seed=1)
    nan = gaussian(64, 32, seed=2)
    nan[3, 4] = math.nan
    return {
        "embedding.weight": embedding, "head.weight": embedding, "conv.weight": gaussian(24, 16, 3, 3, seed=3),
        "fc.weight": gaussian(96, 50, seed=4), "fc.bias": gaussian(96, seed=5), "half.weight": gaussian(64, 64).half(),
        "brain.weight": gaussian(64, 64, seed=6).bfloat16(), "double.weight": gaussian(40, 64, seed=7).double(),
        "experts.weight": gaussian(3, 32, 40, seed=8), "nan.weight": nan, "zero.weight": torch.zeros(48, 48),
        "empty.weight": torch.zeros(0, 8), "step": torch.tensor(7), "ids": torch.arange(512),
    }  # fmt: skip


def check_codec(name, folder, **settings):
    """All that is promised of a file, for the codec that a recipe with these settings means."""
    state, source, file = everything(), folder / "model.pt", folder / "model.pq.safetensors"
    torch.save(state, source)
    recipe = Recipe(codec=name, **settings)
    events = []
    report = pqcli.compress(source, file, recipe, progress=events.append)
    decoded = torch.load(pqcli.decode(file), weights_only=True)
    check_tensors(state, decoded, report)
    assert report.compressed_bytes == file.stat().st_size
    check_preview(folder, recipe)
    assert pqcli.verify(file, source) == []
    assert {event.stage for event in events} >= {"encoding"}
    check_report(pqcli.report(file), report)
    check_report(pqcli.report(file, source), report)
    before = file.read_bytes()
    pqcli.compress(source, file, recipe, force=True)
    assert file.read_bytes() == before, "the same input gives the same bytes"


def check_preview(folder, recipe):
    """A plan tells the size to the byte, where no value holds a surprise."""
    source, surprises = folder / "ordinary.pt", {"nan.weight", "zero.weight"}
    torch.save({name: weight for name, weight in everything().items() if name not in surprises}, source)
    predicted = pqcli.preview(source, recipe=recipe).predicted_bytes
    assert predicted == pqcli.compress(source, recipe=recipe).compressed_bytes


def check_tensors(state, decoded, report):
    """Names, order, shapes and dtypes come back; errors are as reported; what is kept is the same bit for bit."""
    assert list(decoded) == list(state)
    assert decoded["head.weight"].data_ptr() == decoded["embedding.weight"].data_ptr()
    for tensor in report.tensors:
        weight, found = state[tensor.name], decoded[tensor.name]
        assert (found.shape, found.dtype) == (weight.shape, weight.dtype)
        if tensor.quantized:
            error = float(
                (weight.double() - found.double()).square().sum() / weight.double().square().sum().clamp(1e-30)
            )
            assert abs(tensor.relative_mse - error) <= 1e-4 * error + 1e-12
        elif tensor.action == "keep":
            assert tensor_hash(weight) == tensor_hash(found), tensor.name


def check_report(told, report):
    """A report of the file says what compressing said."""
    assert [tensor.name for tensor in told.tensors] == [tensor.name for tensor in report.tensors]
    for one, other in zip(told.tensors, report.tensors, strict=True):
        assert (one.action, one.bytes, one.scheme, one.reason) == (
            other.action,
            other.bytes,
            other.scheme,
            other.reason,
        )
        assert (one.relative_mse is None) == (other.relative_mse is None)
        if one.relative_mse is not None:
            assert math.isclose(one.relative_mse, other.relative_mse, rel_tol=1e-4, abs_tol=1e-9)


class Important(Weights):
    """Weights of which the first half of the columns counts a hundred times as much."""

    def importance(self, name):
        rows, columns = next(info.shape for info in self.checkpoint.tensors if info.name == name)
        return Importance.of_columns(np.where(np.arange(columns) < columns // 2, 100.0, 1.0), rows)


def check_importance(name, folder, **settings):
    """What counts more is coded with less error, and the file is read as ever."""
    weight = gaussian(128, 64)
    source = folder / "model.safetensors"
    safetensors.torch.save_file({"fc.weight": weight}, source)
    recipe = Recipe(codec=name, **settings)

    def errors(kind):
        target = folder / f"{kind.__name__}.pq.safetensors"
        with checkpoint.open(source) as opened:
            wished = plan.make(recipe, opened.tensors)
            with compression(opened, wished, recipe, Threads(CPU), target) as work:
                work.weights = kind(opened)
                work.finish(work.coded(work.prepared()))
        assert pqcli.verify(target, source) == []
        squares = (pqcli.load(target)["fc.weight"] - weight).square()
        return float(squares[:, :32].mean()), float(squares[:, 32:].mean())

    usual, important = errors(Weights), errors(Important)
    assert important[0] < 0.95 * usual[0], (usual, important)
    assert important[1] > usual[1]


def run_pickled(job):
    """A job's result in another process, which opens the input anew."""
    return pickle.loads(job).run(CPU)


def check_jobs_in_another_process(name, folder, **settings):
    """Every job of a session gives there what it gives here."""
    source = folder / "model.pt"
    torch.save({key: value for key, value in everything().items() if key != "nan.weight"}, source)
    recipe = Recipe(codec=name, **settings)
    with checkpoint.open(source) as opened, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        weights = Weights(opened)
        codec = load(registry.chosen(name, has_budget=bool(recipe.spending)).name)
        entries = [
            entry for entry in plan.make(recipe, opened.tensors).entries if entry.action not in {"keep", "alias"}
        ]
        survey = codec.survey(entries, weights, RUN)
        level = 0.2 * survey.unit
        jobs = codec.fit(survey, weights, recipe, level, lambda n, name: None).jobs(level)
        assert jobs
        for job, there in zip(jobs, pool.map(run_pickled, [pickle.dumps(job) for job in jobs]), strict=True):
            here = job.run(CPU)
            if isinstance(here, Piece):
                assert (here.record, here.digest, here.error) == (there.record, there.digest, there.error)
                assert all((a[1] == b[1]).all() for a, b in zip(here.entries, there.entries, strict=True))
            else:
                assert here == there
