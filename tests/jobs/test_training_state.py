"""`--training-state`: kept without loss, dropped, or moments in eight bits, after which training goes on as before."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import pqcli
from pqcli import checkpoint
from pqcli.cli.commands import app
from pqcli.codecs.rate.budget import BudgetError
from pqcli.errors import RecipeError, UsageError
from pqcli.recipe import flags
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.moments import form_of

SMALL = Recipe(block_size=4, n_centroids=16, n_iter=2)
EIGHT = replace(SMALL, training_state="8bit")
EXACT = replace(EIGHT, exclude=("*",))


class Training:
    """A small network that learns what another one does."""

    def __init__(self, optimizer):
        torch.manual_seed(0)
        self.model = nn.Sequential(OrderedDict(up=nn.Linear(64, 192), act=nn.Tanh(), down=nn.Linear(192, 64)))
        self.teacher = nn.Linear(64, 64)
        self.optimizer = optimizer(self.model.parameters())

    def steps(self, n):
        losses = []
        for _ in range(n):
            x = torch.randn(32, 64)
            loss = functional.mse_loss(self.model(x), self.teacher(x).detach().tanh())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng_state": torch.get_rng_state(),
            "epoch": 3,
        }

    def resume(self, path, *, with_state=True):
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        if with_state:
            self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng_state"])
        return self


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.95),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training checkpoint of AdamW, whose state is two thirds of it."""
    training = Training(OPTIMIZERS["AdamW"])
    training.steps(30)
    path = tmp_path_factory.mktemp("run") / "run.pt"
    torch.save(training.state(), path)
    return path


def compressed(run, tmp_path, recipe, **more):
    return pqcli.compress(run, tmp_path / "x.pq.safetensors", recipe, force=True, **more)


def tensors(path):
    with checkpoint.open(path) as opened:
        return {info.name: opened.read(info.name) for info in opened.tensors}


def same_bytes(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# --- training goes on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(tmp_path, name):
    """Kept, to the bit; in eight bits, far nearer to it than an optimizer that starts anew."""
    training = Training(OPTIMIZERS[name])
    training.steps(60)
    source = tmp_path / "run.pt"
    torch.save(training.state(), source)
    expected = training.steps(40)

    def losses(recipe, *, with_state=True):
        file = pqcli.compress(source, tmp_path / "x.pq.safetensors", recipe, force=True).output
        back = pqcli.decode(file, tmp_path / "back.pt", force=True)
        return Training(OPTIMIZERS[name]).resume(back, with_state=with_state).steps(40)

    def distance(found):
        return sum((a - b) ** 2 for a, b in zip(found, expected, strict=True)) ** 0.5

    kept = replace(EXACT, training_state="keep")
    assert losses(kept) == expected
    assert 0 < distance(losses(EXACT)) < 0.05 * distance(losses(kept, with_state=False))


# --- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pq", "trellis"])
def test_state_that_is_kept_comes_back_bit_for_bit_in_fewer_bytes(run, tmp_path, codec):
    report = compressed(run, tmp_path, replace(SMALL, codec=codec, effort=4 if codec == "trellis" else None))
    state, found = tensors(run), pqcli.load(report.output)
    names = [name for name in state if name.startswith(("optimizer", "rng"))]
    assert all(same_bytes(found[name], state[name]) for name in names)
    assert report.state.n_kept == report.state.n_tensors == len(names)
    assert report.state.bytes < 0.9 * report.state.original_bytes
    assert pqcli.verify(report.output, run) == []


def test_plain_files_are_as_ever_where_there_is_little_state_or_none(tmp_path):
    training = Training(OPTIMIZERS["AdamW"])
    for state in (
        training.model.state_dict(),
        {"model": training.model.state_dict(), "rng_state": torch.get_rng_state()},
    ):
        torch.save(state, tmp_path / "m.pt")
        report = compressed(tmp_path / "m.pt", tmp_path, SMALL)
        with pqcli.open(report.output) as container:
            assert container.manifest.features == ("checksum", "pq")


def test_with_a_base_state_is_told_by_differences_or_in_eight_bits(run, tmp_path):
    training = Training(OPTIMIZERS["AdamW"]).resume(run)
    training.steps(1)
    torch.save(training.state(), tmp_path / "next.pt")
    kept = compressed(tmp_path / "next.pt", tmp_path, replace(SMALL, training_state="keep"), base=run)
    found, state = pqcli.load(kept.output, base=run), tensors(tmp_path / "next.pt")
    assert all(same_bytes(found[name], tensor) for name, tensor in state.items() if name.startswith("optimizer"))
    eight = compressed(tmp_path / "next.pt", tmp_path, EIGHT, base=run)
    assert eight.state.n_moments == 4
    assert {tensor.difference for tensor in eight.tensors if tensor.action == "moments"} == {False}
    assert pqcli.verify(eight.output, tmp_path / "next.pt", base=run) == []


# --- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["pq", "trellis"])
def test_moments_take_a_quarter_and_all_else_of_the_state_is_exact(run, tmp_path, codec):
    report = compressed(run, tmp_path, replace(EIGHT, codec=codec, effort=4 if codec == "trellis" else None))
    state, found = tensors(run), pqcli.load(report.output)
    moments = {tensor.name for tensor in report.tensors if tensor.action == "moments"}
    assert moments == {f"optimizer.state.{i}.{word}" for i in (0, 2) for word in ("exp_avg", "exp_avg_sq")}
    for name, tensor in state.items():
        if name in moments:
            error = (found[name].double() - tensor.double()).square().sum() / tensor.double().square().sum()
            assert error < 1e-4
            assert not name.endswith("sq") or torch.equal(found[name] == 0, tensor == 0)
        elif name.startswith(("optimizer", "rng")):
            assert same_bytes(found[name], tensor)
    dense = sum(state[name].nbytes for name in moments)
    assert sum(tensor.bytes for tensor in report.tensors if tensor.action == "moments") < 0.255 * dense
    assert report.state.n_kept == report.state.n_tensors - 4
    assert pqcli.verify(report.output, run) == []
    value = torch.load(pqcli.decode(report.output, tmp_path / "back.pt"), weights_only=True)
    assert value["optimizer"]["param_groups"] == torch.load(run, weights_only=True)["optimizer"]["param_groups"]


def test_figures_of_weights_do_not_count_moments(run, tmp_path):
    eight, kept = compressed(run, tmp_path, EIGHT), compressed(run, tmp_path, SMALL)
    assert (eight.bits_per_weight, eight.relative_mse) == (kept.bits_per_weight, kept.relative_mse)
    assert eight.int4_bytes == kept.int4_bytes
    again = pqcli.report(compressed(run, tmp_path, EIGHT).output, run)
    assert again.state.bytes == eight.state.bytes
    assert again.state.relative_mse == pytest.approx(eight.state.relative_mse, rel=1e-3)
    assert 0 < again.state.relative_mse < 1e-4


def test_moments_that_are_damaged_are_found_out_and_others_than_reported_too(run, tmp_path):
    report = compressed(run, tmp_path, EIGHT)
    value = torch.load(run, weights_only=True)
    value["optimizer"]["state"][0]["exp_avg"] *= 1.01
    torch.save(value, tmp_path / "other.pt")
    findings = pqcli.verify(report.output, tmp_path / "other.pt")
    assert {finding.name for finding in findings} == {"optimizer.state.0.exp_avg"}
    assert "relative_mse" in " ".join(map(str, findings))


@pytest.mark.parametrize("recipe", [SMALL, EIGHT, replace(EIGHT, codec="trellis", effort=4)])
def test_a_plan_tells_the_size_of_the_file_with_its_state(run, tmp_path, recipe):
    report = compressed(run, tmp_path, recipe)
    found = pqcli.preview(run, tmp_path / "x.pq.safetensors", recipe)
    assert found.predicted_bytes == report.compressed_bytes
    planned = {entry.info.name: (entry.action, entry.predicted_bytes) for entry in found.plan.entries}
    assert planned == {tensor.name: (tensor.action, tensor.bytes) for tensor in report.tensors}


@pytest.mark.slow
def test_a_size_that_is_asked_for_counts_the_state(run, tmp_path):
    size = 120_000
    recipe = Recipe(codec="trellis", effort=4, target_bytes=size, training_state="8bit")
    assert 0.97 * size < compressed(run, tmp_path, recipe).compressed_bytes <= size
    with pytest.raises(BudgetError, match=r"training state: --training-state 8bit makes .* drop leaves it out"):
        compressed(run, tmp_path, replace(recipe, training_state="keep"))
    with pytest.raises(BudgetError, match=r"are training state: --training-state drop leaves it out"):
        compressed(run, tmp_path, replace(recipe, target_bytes=20_000))


def test_what_a_pattern_names_is_treated_as_it_says(run, tmp_path):
    recipe = replace(EIGHT, exclude=("*exp_avg_sq",))
    report = compressed(run, tmp_path, recipe)
    assert report.state.n_moments == 2
    rules = (pqcli.Rule(match="optimizer.state.0.*", action="keep"),)
    assert compressed(run, tmp_path, replace(EIGHT, rules=rules)).state.n_moments == 2


# --- which tensors are moments ----------------------------------------------------------------------------------------


def forms(value, tmp_path):
    torch.save(value, tmp_path / "v.pt")
    with checkpoint.open(tmp_path / "v.pt") as opened:
        return {info.name: form_of(info) for info in opened.tensors}


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda state: state, "state.0"),
        (lambda state: {"model": {"w": torch.ones(4, 4)}, "optimizer": state}, "optimizer.state.0"),
        (
            lambda state: {"state_dict": {"w": torch.ones(4, 4)}, "optimizer_states": [state]},
            "optimizer_states.0.state.0",
        ),
        (lambda state: {"m": {"w": torch.ones(4)}, "optimizer_state_dict": state}, "optimizer_state_dict.state.0"),
        (lambda state: {"w": torch.ones(4, 4), "last_optimizer_state": state}, "last_optimizer_state.state.0"),
    ],
)
def test_moments_are_known_wherever_an_optimizer_is_saved(tmp_path, wrap, prefix):
    words = {"exp_avg": "first", "exp_avg_sq": "second", "step": None, "master": None}
    state = {"state": {0: {word: torch.ones(4, 4) for word in words}}, "param_groups": [{"lr": 1}]}
    found = forms(wrap(state), tmp_path)
    assert {name: form for name, form in found.items() if name.startswith(prefix)} == {
        f"{prefix}.{word}": form for word, form in words.items()
    }


def test_moments_of_sharded_and_flattened_optimizers_are_known(tmp_path):
    fsdp = {"state": {"layers.0.weight": {"exp_avg": torch.ones(2, 2)}}, "param_groups": []}
    flat = {"state.layers.0.weight.exp_avg_sq": torch.ones(2, 2), "param_groups.layers.0.weight.lr": 1.0}
    found = forms({"model": {"w": torch.ones(4, 4)}, "optimizer": fsdp, "optim": flat}, tmp_path)
    assert found["optimizer.state.layers.0.weight.exp_avg"] == "first"
    assert found["optim.state.layers.0.weight.exp_avg_sq"] == "second"
    found = forms({"w": torch.ones(4, 4), "optimizer.state.w.momentum_buffer": torch.ones(4, 4)}, tmp_path)
    assert found == {"w": None, "optimizer.state.w.momentum_buffer": "first"}


def test_a_models_own_tensors_are_never_moments():
    for name in ("layer.exp_avg", "state.0.exp_avg", "ema.state.x.exp_avg"):
        assert form_of(TensorInfo(name, (4, 4), "float32")) is None


@pytest.mark.parametrize("name", ["Adafactor", "Adadelta", "Adagrad", "Adamax", "RMSprop", "NAdam"])
def test_every_optimizer_of_torch_goes_on_from_eight_bits(tmp_path, name):
    training = Training(getattr(torch.optim, name))
    training.steps(4)
    torch.save(training.state(), tmp_path / "run.pt")
    report = pqcli.compress(tmp_path / "run.pt", recipe=EXACT)
    assert report.state.n_moments >= (0 if name == "Adafactor" else 2)  # whose moments here are of rows and columns
    resumed = Training(getattr(torch.optim, name)).resume(pqcli.decode(report.output))
    assert all(torch.isfinite(torch.tensor(resumed.steps(4))))


def test_an_optimizer_that_is_saved_alone_is_training_state(run, tmp_path):
    torch.save(torch.load(run, weights_only=True)["optimizer"], tmp_path / "optimizer.pt")
    report = pqcli.compress(tmp_path / "optimizer.pt", recipe=EIGHT)
    assert {tensor.role for tensor in report.tensors} == {"other"}
    assert report.state.n_moments == 4
    assert report.quantized == ()
    assert pqcli.verify(report.output, tmp_path / "optimizer.pt") == []


# --- the command line -------------------------------------------------------------------------------------------------


def said(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.stdout, " ".join(done.stderr.split())


def test_the_command_line_tells_of_training_state(run, tmp_path):
    file = tmp_path / "x.pq.safetensors"
    _, noted = said("compress", run, "-o", file, "--training-state", "8bit", "--block-size", "4")
    assert "training state: 13 tensors, " in noted
    assert "4 in eight bits a value (relative MSE " in noted
    shown, _ = said("report", file)
    assert "4 tensors of moments" in shown
    assert "8 bits, second moments" in shown
    assert json.loads(said("inspect", file, "--json")[0])["state"]["n_moments"] == 4
    planned, _ = said("plan", run, "--training-state", "8bit")
    assert "state     13 tensors, " in planned
    assert "every tensor decodes" in said("verify", file, "--against", run)[1]


def test_drop_and_model_only_are_the_same(run, tmp_path):
    files = [tmp_path / f"{name}.pq.safetensors" for name in "ab"]
    said("compress", run, "-o", files[0], "--training-state", "drop", "--block-size", "4")
    said("compress", run, "-o", files[1], "--model-only", "--training-state", "drop", "--block-size", "4")
    assert (
        pqcli.load(files[0]).keys()
        == pqcli.load(files[1]).keys()
        == {"up.weight", "up.bias", "down.weight", "down.bias"}
    )
    assert "left it out: optimizer" in said("verify", files[0], "--against", run)[1]


@pytest.mark.parametrize("meant", ["keep", "8bit"])
def test_model_only_beside_another_meaning_is_refused(run, meant):
    _, error = said("compress", run, "--model-only", "--training-state", meant, code=2)
    assert f"--model-only means --training-state drop, and --training-state {meant} says otherwise" in error
    with pytest.raises(RecipeError, match=f"model_only means training_state drop, and training_state is {meant}"):
        Recipe(model_only=True, training_state=meant)


def test_a_flag_has_the_last_word_over_a_recipe():
    assert flags.override(Recipe(model_only=True), training_state="8bit").state == "8bit"
    assert flags.override(Recipe(training_state="8bit"), model_only=True).state == "drop"
    assert flags.override(Recipe(model_only=True), training_state="keep").state == "keep"
    with pytest.raises(UsageError, match="'keep', 'drop' or '8bit'"):
        flags.override(Recipe(), training_state="4bit")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainers(tmp_path):
    """A folder as transformers' Trainer leaves it."""
    training = Training(OPTIMIZERS["AdamW"])
    training.steps(3)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_file(training.model.state_dict(), folder / "model.safetensors")
    torch.save(training.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"python": 1}, folder / "rng_state.pth")
    (folder / "config.json").write_text("{}")
    return folder


def test_the_optimizer_in_a_trainers_folder_is_held_in_eight_bits_and_comes_back(trainers, tmp_path):
    recipe = replace(EIGHT, codec="trellis", effort=4)
    report = pqcli.compress(trainers, recipe=recipe)
    assert {path.name for path in (tmp_path / "checkpoint-3.pq").iterdir()} == {
        "model.pq.safetensors", "optimizer.pq.safetensors", "rng_state.pth", "config.json",
    }  # fmt: skip
    assert report.state.n_moments == 4
    assert pqcli.verify(report.output, trainers) == []
    back = pqcli.decode(report.output)
    assert {path.name for path in back.iterdir()} == {path.name for path in trainers.iterdir()}
    found, state = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (back, trainers))
    assert found["param_groups"] == state["param_groups"]
    assert torch.equal(found["state"][0]["step"], state["state"][0]["step"])
    torch.testing.assert_close(found["state"][0]["exp_avg"], state["state"][0]["exp_avg"], rtol=0.2, atol=1e-3)
    assert pqcli.preview(trainers, recipe=recipe).predicted_bytes == report.compressed_bytes


def test_without_eight_bits_the_optimizer_in_a_trainers_folder_is_copied(trainers):
    folder = Path(pqcli.compress(trainers, recipe=SMALL).output)
    assert (folder / "optimizer.pt").read_bytes() == (trainers / "optimizer.pt").read_bytes()
    dropped = folder.with_name("dropped.pq")
    pqcli.compress(trainers, dropped, replace(SMALL, training_state="drop"))
    assert not (dropped / "optimizer.pt").exists()


def test_a_size_of_a_trainers_folder_counts_its_optimizer(trainers):
    recipe = Recipe(codec="trellis", effort=4, training_state="8bit", target_bytes=75_000)
    assert 72_000 < pqcli.compress(trainers, recipe=recipe).compressed_bytes <= 75_000
    with pytest.raises(BudgetError, match=r"optimizer\.pq\.safetensors: --training-state drop leaves it out"):
        pqcli.compress(trainers, recipe=replace(recipe, target_bytes=40_000), force=True)
