"""Statistics of inputs: the same bytes, less error of what the network gives."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pqcli
from pqcli import checkpoint
from pqcli.codecs import registry
from pqcli.codecs.base import Weights, load
from pqcli.codecs.trellis import session
from pqcli.errors import StatsError
from pqcli.plan import plan
from tests.codecs import common

WIDTH, HIDDEN = 160, 256


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


def inputs(n, seed):
    """Correlated, as features of trained networks are: a few directions hold most of the energy."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.exp(-torch.arange(WIDTH) / 25.0)[:, None]
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(network, its checkpoint, its statistics)."""
    folder = tmp_path_factory.mktemp("statistics")
    made = network()
    torch.save(made.state_dict(), folder / "model.pt")
    with pqcli.collect(made, gradients=True) as stats:
        for batch in inputs(4000, seed=2).split(500):
            stats.backward(made(batch))
    stats.save(folder / "model.stats.safetensors")
    return made, folder / "model.pt", folder / "model.stats.safetensors"


def output_error(made, file):
    other = network()
    other.load_state_dict(pqcli.load(file))
    with torch.inference_mode():
        expected, found = (one(inputs(1000, seed=3)) for one in (made, other))
    return float((expected - found).square().mean())


@pytest.mark.parametrize("codec", ["trellis", "auto"])
def test_the_output_errs_less_at_the_same_bytes(model, codec, tmp_path):
    made, source, stats = model
    errors = []
    for name, given in (("without", None), ("with", str(stats))):
        file = tmp_path / f"{name}.pq.safetensors"
        recipe = pqcli.Recipe(codec=codec, effort=64, target_bytes=26_000, stats=given)
        report = pqcli.compress(source, file, recipe)
        assert report.compressed_bytes <= 26_000
        assert report.compressed_bytes > 25_000
        assert pqcli.verify(file, source) == []
        errors.append(output_error(made, file))
    assert errors[1] <= 0.7 * errors[0], errors


@pytest.mark.parametrize(
    "wish",
    [
        {"block_size": 8, "n_centroids": 64},
        {"block_size": 3, "n_centroids": 64},
        pytest.param({"target_bits": 2.5}, marks=pytest.mark.slow),
    ],
)
def test_plain_and_entropy_constrained_pq_err_less_at_the_same_bytes(model, wish, tmp_path):
    made, source, stats = model
    errors, sizes = [], []
    for name, given in (("without", None), ("with", str(stats))):
        file = tmp_path / f"{name}.pq.safetensors"
        sizes.append(pqcli.compress(source, file, pqcli.Recipe(stats=given, **wish)).compressed_bytes)
        assert pqcli.verify(file, source) == []
        errors.append(output_error(made, file))
    assert sizes[1] < 1.01 * sizes[0]
    assert errors[1] <= 0.6 * errors[0], errors


def test_statistics_of_a_model_without_its_wrapper_are_known_by_their_names(model, tmp_path):
    """Checkpoints of DataParallel call their tensors `module.` and so on."""
    made, source, stats = model
    wrapped = {f"module.{name}": weight for name, weight in made.state_dict().items()}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    files = []
    for one in (source, tmp_path / "wrapped.pt"):
        recipe = pqcli.Recipe(block_size=8, n_centroids=16, n_iter=2, stats=str(stats))
        files.append(pqcli.compress(one, tmp_path / f"{one.stem}.pq.safetensors", recipe))
    bare, other = (report.tensors for report in files)
    errors = [[t.relative_mse or 0 for t in tensors] for tensors in (bare, other)]
    assert errors[0] == pytest.approx(errors[1], abs=0.2)  # names decide where EM starts
    free = pqcli.compress(source, tmp_path / "free.pq.safetensors", pqcli.Recipe(block_size=8, n_centroids=16))
    assert files[1].relative_mse > 1.02 * free.relative_mse


@pytest.mark.parametrize("wish", [{"block_size": 8}, {"target_bits": 2.5}])
def test_jobs_with_statistics_run_in_another_process(model, wish):
    _, source, stats = model
    with checkpoint.open(source) as opened:
        weights, recipe = Weights(opened), pqcli.Recipe(stats=str(stats), n_iter=2, **wish)
        codec = load(registry.chosen("pq", has_budget=bool(recipe.spending)).name)
        entries = [entry for entry in plan.make(recipe, opened.tensors).entries if entry.action != "keep"]
        survey = codec.survey(entries, weights, common.RUN)
        job = codec.fit(survey, weights, recipe, 0.3, lambda n, name: None).jobs(0.3 * survey.unit)[0]
        here = job.run(common.CPU)
        there = pickle.loads(pickle.dumps(job)).run(common.CPU)
    assert str(here) == str(there)


def test_the_file_is_read_in_another_process_and_names_the_statistics(model, tmp_path):
    _, source, stats = model
    file = tmp_path / "model.pq.safetensors"
    report = pqcli.compress(source, file, pqcli.Recipe(codec="trellis", effort=16, quality="small", stats=str(stats)))
    assert report.recipe["stats"] == "model.stats.safetensors"
    with pqcli.open(file) as container:
        assert "trellis-rows" in container.manifest.features
    script = f"import pqcli, torch; torch.save(pqcli.load({str(file)!r}), {str(tmp_path / 'there.pt')!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    there, here = torch.load(tmp_path / "there.pt", weights_only=True), pqcli.load(file)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_plan_tells_the_size(model, tmp_path):
    _, source, stats = model
    recipe = pqcli.Recipe(codec="trellis", effort=16, quality="small", stats=str(stats))
    predicted = pqcli.preview(source, recipe=recipe).predicted_bytes
    assert predicted == pqcli.compress(source, tmp_path / "a.pq.safetensors", recipe).compressed_bytes


def test_jobs_run_in_another_process_and_one_holds_all_streams_of_a_layer(model, monkeypatch):
    """Errors go from one stream to the next, so these are one job."""
    made, source, stats = model
    usual = session.TrellisSession._params
    monkeypatch.setattr(
        session.TrellisSession, "_params", lambda self, level: replace(usual(self, level), stream_weights=1 << 12)
    )
    with checkpoint.open(source) as opened:
        weights, recipe = Weights(opened), pqcli.Recipe(codec="trellis", effort=16, stats=str(stats))
        entries = [entry for entry in plan.make(recipe, opened.tensors).entries if entry.action != "keep"]
        codec = load("trellis")
        survey = codec.survey(entries, weights, common.RUN)
        fitted = codec.fit(survey, weights, recipe, 0.3 * survey.unit, lambda n, name: None)
        jobs = fitted.jobs(0.3 * survey.unit)
        assert [job.n_streams > 1 for job in jobs] == [True, True]
        pieces = [job.run(common.CPU) for job in jobs]
        assert pickle.loads(pickle.dumps(jobs[0])).run(common.CPU) == pieces[0]
        streams = fitted.finish(0.3 * survey.unit, [piece for some in pieces for piece in some])
        assert "trellis-rows" in streams.features
    decoder = codec.decoder(streams, fitted.sources)
    for name, weight in made.state_dict().items():
        if weight.dim() == 2:
            assert np.square(decoder.matrix(name) - weight.numpy()).mean() < 0.3 * weight.square().mean()


@pytest.mark.parametrize(
    "wish",
    [
        {"codec": "trellis", "effort": 64, "target_bits": 2.5},
        {"block_size": 4},
        pytest.param({"target_bits": 2.5}, marks=pytest.mark.slow),
    ],
)
def test_layers_stored_the_other_way_round_are_coded_as_they_lie(tmp_path, wish):
    """Weights (inputs, outputs), as transposed convolutions have them: the statistics are of rows."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.ConvTranspose2d(64, 32, 2, stride=2), nn.Flatten())
    mixing = torch.randn(64, 64) * torch.exp(-torch.arange(64) / 10.0)[:, None]

    def images(n):
        return (torch.randn(n, 3, 3, 64) @ mixing).permute(0, 3, 1, 2)

    torch.save(made.state_dict(), tmp_path / "model.pt")
    with pqcli.collect(made, gradients=True) as stats:
        stats.backward(made(images(200)))
    stats.save(tmp_path / "model.stats.safetensors")
    errors, seen = [], images(50)
    for given in (None, str(tmp_path / "model.stats.safetensors")):
        recipe = pqcli.Recipe(stats=given, **wish)
        pqcli.compress(tmp_path / "model.pt", tmp_path / "model.pq.safetensors", recipe, force=True)
        decoded = pqcli.load(tmp_path / "model.pq.safetensors")
        with torch.inference_mode():
            found = torch.func.functional_call(made, decoded, (seen,))
            errors.append(float((found - made(seen)).square().mean()))
    assert errors[1] <= 0.7 * errors[0], errors


def test_statistics_of_something_else_are_refused(model, tmp_path):
    _, source, stats = model
    other = tmp_path / "other.pt"
    torch.save({"0.weight": common.gaussian(96, 50)}, other)
    recipe = pqcli.Recipe(codec="trellis", effort=4, stats=str(stats))
    with pytest.raises(StatsError, match=r"0\.weight: statistics of 160 inputs, but the weight has 50"):
        pqcli.compress(other, recipe=recipe)
    torch.save({"decoder.weight": common.gaussian(96, 50)}, other)
    with pytest.raises(StatsError, match=r"none of its 2 weights .* is one of the 1 tensors"):
        pqcli.compress(other, recipe=recipe)
    with pytest.raises(StatsError, match="there is no such file"):
        pqcli.compress(source, recipe=pqcli.Recipe(codec="trellis", stats=str(tmp_path / "none.safetensors")))


def test_statistics_that_are_not_there_are_told_before_any_work(tmp_path):
    save_file({"w.weight": torch.randn(64, 32)}, tmp_path / "m.safetensors")
    recipe = pqcli.Recipe(stats=str(tmp_path / "none"))
    for work in (pqcli.preview, pqcli.compress):
        with pytest.raises(StatsError, match="there is no such file"):
            work(tmp_path / "m.safetensors", tmp_path / "m.pq.safetensors", recipe)


class Unusual(nn.Module):
    """Layers whose statistics are not one matrix by the columns of a weight."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 48, 64) / 8) for _ in range(2))
        self.wide = nn.Linear(192, 32)
        self.conv, self.turned = nn.Conv1d(64, 32, 3, groups=4), nn.ConvTranspose1d(64, 48, 3, groups=2)

    def forward(self, x):
        experts = sum(nn.functional.linear(x, self.up[e]).relu() @ self.down[e] for e in range(3))
        images = x.view(-1, 10, 64).mT
        return [experts, self.wide(torch.cat([x, experts, x * experts], 1)), self.conv(images), self.turned(images)]


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """(its checkpoint, its statistics): wide inputs in blocks, experts pooled, groups apart."""
    folder = tmp_path_factory.mktemp("unusual")
    torch.manual_seed(0)
    made = Unusual()
    torch.save(made.state_dict(), folder / "model.pt")
    with pqcli.collect(made, gradients=True, full_width=100, block_width=40) as stats, torch.enable_grad():
        for batch in inputs(2000, seed=4)[:, :64].split(500):
            stats.backward(torch.cat([one.flatten() for one in made(batch)]))
    stats.save(folder / "model.stats.safetensors")
    return folder / "model.pt", folder / "model.stats.safetensors"


def test_stacked_experts_wide_layers_and_groups_err_less_too(unusual, tmp_path):
    source, stats = unusual
    damages, reports = [], []
    for given in (None, str(stats)):
        file = tmp_path / f"{given is None}.pq.safetensors"
        reports.append(
            pqcli.compress(source, file, pqcli.Recipe(codec="trellis", effort=16, target_bits=2.0, stats=given))
        )
        told = pqcli.report(file, source, stats=stats)
        damages.append({one.name: one.damage for one in told.quantized})
    assert set(damages[0]) == {"up", "down", "wide.weight", "conv.weight", "turned.weight"}
    assert [report.warnings for report in reports] == [(), ()]
    assert sum(damages[1].values()) < 0.7 * sum(damages[0].values())


def test_statistics_that_cannot_be_used_are_told_in_one_line(unusual, monkeypatch, tmp_path):
    from pqcli.codecs import statistics

    source, stats = unusual
    found = pqcli.stats.open(stats)
    del found.weights["conv.weight"]
    pqcli.stats.save(found, tmp_path / "less")
    monkeypatch.setattr(statistics, "WIDEST", 128)
    recipe = pqcli.Recipe(block_size=4, n_centroids=8, n_iter=1, stats=str(tmp_path / "less"))
    report = pqcli.compress(source, tmp_path / "x.pq.safetensors", recipe)
    (line,) = report.warnings
    assert line == (
        "statistics of 1 tensor, down were not used (experts stacked with their inputs first); statistics of 1 tensor, "
        "wide.weight were not used (more than 128 inputs); statistics tell nothing of 1 tensor, conv.weight: coded as "
        "without statistics"
    )
    recipe = pqcli.Recipe(codec="trellis", effort=4, quality="small", stats=str(tmp_path / "less"))
    (line,) = pqcli.compress(source, tmp_path / "y.pq.safetensors", recipe).warnings
    assert line == "statistics tell nothing of 1 tensor, conv.weight: coded as without statistics"
