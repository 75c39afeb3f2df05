"""How far a network is from what it was, against obvious computations; on tiny models."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import pqcli
from pqcli.cli.console import Console
from pqcli.core.outputs import neighbours_agree
from pqcli.errors import ContainerError, UsageError
from pqcli.jobs.compare import compare_folder
from pqcli.jobs.compare import compare_models as compare_networks
from pqcli.recipe.recipe import Recipe
from tests.jobs.test_calibrate import SAMPLING, bert, llama, mixtral, t5, text  # noqa: F401 - `text` is a fixture

pytestmark = pytest.mark.integrations

PLAIN = Recipe(block_size=4, n_centroids=16)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 24))


def compressed(tmp_path, model):
    pqcli.save(model.state_dict(), tmp_path / "model.pq.safetensors", PLAIN)
    return tmp_path / "model.pq.safetensors"


def test_outputs_are_compared_sample_by_sample_and_the_model_is_left_alone(tmp_path):
    model, x = network(), torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    file = compressed(tmp_path, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = pqcli.compare(model, file, [x[:20], x[20:]], by_layer=True)
    other = network()
    other.load_state_dict(pqcli.load(file))
    y, z = model(x).detach(), other(x).detach()
    assert found.n_examples == 50
    assert found.relative_mse == pytest.approx(float((y - z).square().sum() / y.square().sum()), rel=1e-4)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(y, z).mean()), rel=1e-5)
    assert [layer.name for layer in found.layers] == ["0.weight", "2.weight"]
    assert found.layers[-1].relative_mse == pytest.approx(found.relative_mse)
    a, b = model[0](x).detach(), other[0](x).detach()
    assert found.layers[0].relative_mse == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-4)
    similar = [F.normalize(v) @ F.normalize(v).T - 2 * torch.eye(50) for v in (y, z)]
    assert found.neighbours == pytest.approx(float((similar[0].argmax(1) == similar[1].argmax(1)).double().mean()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_network_is_at_no_distance():
    model = network()
    found = compare_networks(model, model, [torch.randn(5, 32)])
    assert (found.relative_mse, found.neighbours) == (0, 1)
    assert found.cosine == pytest.approx(1)


def test_a_file_of_another_model_is_refused_and_so_is_nothing_to_run(tmp_path):
    file = compressed(tmp_path, network())
    with pytest.raises(ContainerError, match=r"has no '0\.weight' of the model's shape \(2 weights lack"):
        pqcli.compare(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), file, [torch.ones(1, 8)])
    with pytest.raises(UsageError, match="no batches"):
        pqcli.compare(network(), file, [])


def test_neighbours_are_those_of_the_largest_cosine():
    vectors = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3]])
    assert neighbours_agree(vectors, vectors * torch.tensor([[9.0], [1], [2], [5]])) == 1
    assert neighbours_agree(vectors, torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0, 2]])) == 0
    assert math.isnan(neighbours_agree(vectors[:2], vectors[:2]))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def coded(tmp_path):
    def make(folder):
        return pqcli.compress(folder, tmp_path / "coded.pq.safetensors", PLAIN, force=True).output

    return make


def test_a_language_model_has_perplexities_and_a_divergence(tmp_path, text, coded):  # noqa: F811
    import transformers

    folder = llama(tmp_path / "llama")
    file = coded(folder)
    found = compare_folder(folder, file, [text], SAMPLING)
    # the slow, obvious version
    from pqcli.integrations import loading
    from pqcli.jobs.calibrate import drawn

    runnable = loading.load(folder)
    other = transformers.LlamaForCausalLM(runnable.model.config).eval()
    other.load_state_dict(pqcli.load(file), strict=False)
    other.tie_weights()
    windows = torch.tensor(drawn(runnable, [text], SAMPLING).ids)
    p, q = (model(windows).logits.detach().double().log_softmax(-1) for model in (runnable.model, other))
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for value, logs in ((found.dense_perplexity, p), (found.perplexity, q)):
        nll = F.nll_loss(logs[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert value == pytest.approx(float(nll.exp()), rel=1e-3)
    assert found.neighbours is None


@pytest.mark.parametrize("make", [bert, mixtral, t5])
def test_other_models_are_compared_layer_by_layer(tmp_path, text, coded, make):  # noqa: F811
    folder = make(tmp_path / "folder")
    found = compare_folder(folder, coded(folder), [text], SAMPLING, by_layer=True)
    assert 0 < found.relative_mse < 2
    assert (found.perplexity is None) == (make is bert)
    assert (found.neighbours is None) == (make is not bert)
    assert len(found.layers) > 4
    assert all(0 <= layer.relative_mse < math.inf for layer in found.layers)


def test_a_container_of_another_folder_is_refused(tmp_path, text, coded):  # noqa: F811
    file = coded(bert(tmp_path / "bert"))
    with pytest.raises(ContainerError, match=r"parameters of the model are not in it"):
        compare_folder(llama(tmp_path / "llama"), file, [text], SAMPLING)


def test_the_report_shows_it_below_its_table_and_in_its_json(tmp_path):
    model = network()
    file = compressed(tmp_path, model)
    report = pqcli.report(file)
    found = pqcli.compare(model, file, [torch.randn(8, 32)], by_layer=True)
    plain, document = io.StringIO(), io.StringIO()
    Console(stdout=plain, width=100).report(report, "table", found)
    assert "relative MSE of the output" in plain.getvalue()
    assert "same nearest neighbour" in plain.getvalue()
    assert "perplexity" not in plain.getvalue()
    Console(stdout=document, json=True).report(report, "table", found)
    network_figures = json.loads(document.getvalue())["network"]
    assert network_figures["relative_mse"] == found.relative_mse
    assert len(network_figures["layers"]) == 2


def test_options_of_a_comparison_that_cannot_be_meant_are_refused(tmp_path):
    from typer.testing import CliRunner

    from pqcli.cli.commands import app

    save_file({"a": torch.ones(2)}, tmp_path / "x")
    for options, said in (
        (["--by-layer"], "go with --model"),
        (["--model", "."], "wants text"),
        (["--model", ".", "--text", "x", "--format", "csv"], "table or json"),
    ):
        done = CliRunner().invoke(app, ["report", str(tmp_path / "x"), *options])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
