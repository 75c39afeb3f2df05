"""What statistics predict of an error is what is then measured on the very samples they were collected from."""

import pytest
import torch
from torch import nn

import pqcli
from pqcli.errors import UsageError
from pqcli.recipe.recipe import Recipe
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
