"""What statistics predict of an error is what is then measured on the very samples they were collected from."""

import pytest
import torch
from torch import nn

import pqcli
from pqcli.errors import UsageError
from pqcli.recipe.recipe import Recipe
from pqcli.stats import damage
from pqcli.stats.damage import predicted
from tests.stats.test_collecting import Conv1D, Experts, randn


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(12, 7, bias=False), randn(40, 12)),
        (nn.Conv2d(4, 5, 3, bias=False), randn(3, 4, 8, 8)),
        (nn.Embedding(20, 6), torch.arange(60).view(6, 10) ** 2 % 20),
        (Conv1D(12, 7), randn(5, 8, 12)),
    ],
)
def test_the_predicted_error_of_an_output_is_the_measured_one(model, x):
    for bias in [p for name, p in model.named_parameters() if name == "bias"]:
        nn.init.zeros_(bias)
    with pqcli.collect(model) as stats:
        before = model(x).detach()
    original = model.weight.detach().clone()
    decoded = original + 0.1 * randn(*original.shape, seed=9)
    model.weight.data = decoded
    after = model(x).detach()
    found = predicted(stats.moments("weight"), original, decoded)
    measured = float((before - after).square().sum() / before.square().sum())
    assert found.output_mse == pytest.approx(measured, rel=1e-4)
    assert found.damage is None


@pytest.mark.parametrize("part", ["up", "down"])
def test_stacked_experts_are_judged_by_their_pooled_inputs(part):
    model, x = Experts(), randn(3, 7, 6)
    with pqcli.collect(model) as stats:
        model(x)
    weight = getattr(model, part).detach()
    assert predicted(stats.moments(part), weight, torch.zeros_like(weight)).output_mse == pytest.approx(1)


def test_a_report_shows_it_beside_the_error_of_the_weights(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(model(randn(100, 32)))
    stats.save(tmp_path / "stats")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    pqcli.compress(tmp_path / "model.pt", recipe=Recipe(block_size=4, n_centroids=16))
    file = tmp_path / "model.pq.safetensors"
    report = pqcli.report(file, tmp_path / "model.pt", stats=tmp_path / "stats")
    assert [tensor.output_mse > 0 and tensor.damage > 0 for tensor in report.quantized] == [True, True]
    from pqcli.cli.console import Console

    assert "output MSE" in Console(width=200).rendered(report, "table")
    assert "output MSE" not in Console(width=200).rendered(pqcli.report(file), "table")
    with pytest.raises(UsageError, match="--against"):
        pqcli.report(file, stats=tmp_path / "stats")


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 4, "n_centroids": 16}, {"rate_weight": 0.02}, {"codec": "trellis", "target_bits": 3, "effort": 4}],
)
def test_a_file_keeps_it_and_a_report_needs_neither_the_original_nor_the_statistics(tmp_path, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16, bias=False))
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(model(randn(100, 32)))
    stats.save(tmp_path / "stats")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    said = pqcli.compress(tmp_path / "model.pt", recipe=Recipe(stats=str(tmp_path / "stats"), **settings))
    file = tmp_path / "model.pq.safetensors"
    measured = pqcli.report(file, tmp_path / "model.pt", stats=tmp_path / "stats")
    (tmp_path / "stats").unlink()
    told = pqcli.report(file)
    for name in ("output_mse", "damage"):
        expected = [getattr(tensor, name) for tensor in measured.quantized]
        assert [getattr(tensor, name) for tensor in said.quantized] == pytest.approx(expected)
        assert [getattr(tensor, name) for tensor in told.quantized] == pytest.approx(expected, rel=0.004)
    assert told.damage == pytest.approx(sum(tensor.damage for tensor in measured.quantized), rel=0.004)
    from pqcli.cli.console import Console

    for form in ("table", "html", "json"):
        assert ("output_mse" if form == "json" else "output MSE") in Console(width=200).rendered(told, form)
    assert "relative MSE says little" in Console(width=200).rendered(told, "table")


def test_a_layer_of_many_outputs_is_judged_by_some(monkeypatch):
    model, x = nn.Linear(12, 5000, bias=False), randn(40, 12)
    with pqcli.collect(model) as stats:
        model(x)
    weight = model.weight.detach()
    error, seen = 0.1 * randn(*weight.shape, seed=9), stats.moments("weight")
    some = predicted(seen, weight, weight + error)
    monkeypatch.setattr(damage, "MOST_OUTPUTS", 5000)
    assert some.output_mse == pytest.approx(predicted(seen, weight, weight + error).output_mse, rel=0.1)
    assert some != predicted(seen, weight, weight + error)
