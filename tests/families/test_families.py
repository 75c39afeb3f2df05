"""Fine-tunes beside their bases: what is coded, what comes back, and what is said where the base is not there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import pqcli
from pqcli.errors import BaseError, CheckpointError, PQError
from pqcli.jobs.report import inspect
from tests.families.family import CODECS, base_state, gaussian, same, saved, tuned

SLOW = ("ecpq", "auto")


@pytest.fixture
def family(tmp_path):
    base = base_state()
    return saved(tmp_path, "base.pt", base), saved(tmp_path, "tuned.pt", tuned(base))


@pytest.mark.parametrize(
    "codec", ["plain", "trellis", *(pytest.param(codec, marks=pytest.mark.slow) for codec in SLOW)]
)
def test_a_fine_tune_comes_back_from_its_base_with_far_less_error(family, tmp_path, codec):
    base, source = family
    by_itself = pqcli.compress(source, tmp_path / "self.pq.safetensors", CODECS[codec])
    file = tmp_path / "tuned.pq.safetensors"
    report = pqcli.compress(source, file, CODECS[codec], base=base)
    tensors = {tensor.name: tensor for tensor in report.tensors}
    differing = {name for name, tensor in tensors.items() if tensor.difference and tensor.quantized}
    assert differing == {"embed.weight", "fc.weight", "conv.weight", "half.weight", "pruned.weight"}
    assert {name for name, tensor in tensors.items() if tensor.action == "base"} == {
        "frozen.weight", "frozen.bias", "ids"
    }  # fmt: skip
    assert all(tensors[name].bytes == 0 for name in ("frozen.weight", "frozen.bias", "ids"))
    assert tensors["large.bias"].difference
    assert not tensors["large.bias"].quantized
    assert (tensors["head.weight"].action, tensors["head.weight"].alias_of) == ("alias", "embed.weight")
    alone = {tensor.name: tensor for tensor in by_itself.tensors}
    for name in differing - {"half.weight"}:
        assert tensors[name].relative_mse < 1e-3 * alone[name].relative_mse, name
        assert tensors[name].bytes < 1.3 * alone[name].bytes + 40, name
    for name in ("resized.weight", "unlike.weight", "new.weight"):
        assert not tensors[name].difference
        assert tensors[name].relative_mse < 2 * alone[name].relative_mse

    original, decoded = torch.load(source), pqcli.load(file, base=base)
    assert list(decoded) == list(original)
    for name, tensor in tensors.items():
        if not tensor.quantized and tensor.action != "alias":
            assert same(decoded[name], original[name]), name
    assert torch.equal(decoded["pruned.weight"] == 0, original["pruned.weight"] == 0)
    assert decoded["head.weight"].data_ptr() == decoded["embed.weight"].data_ptr()
    assert pqcli.verify(file, source, base=base) == []
    measured = pqcli.report(file, source, base=base)
    assert measured.relative_mse == pytest.approx(report.relative_mse, rel=1e-3)
    stored = pqcli.report(file)
    assert (stored.compressed_bytes, stored.base) == (report.compressed_bytes, report.base)
    before = file.read_bytes()
    pqcli.compress(source, file, CODECS[codec], base=base, force=True)
    assert file.read_bytes() == before


@pytest.mark.slow
def test_the_base_may_be_a_container_and_what_it_has_lost_is_made_good(family, tmp_path):
    base, source = family
    lossy, file = tmp_path / "base.pq.safetensors", tmp_path / "tuned.pq.safetensors"
    pqcli.compress(base, lossy, CODECS["plain"])
    for codec in CODECS:
        report = pqcli.compress(source, file, CODECS[codec], base=lossy, force=True)
        alone = pqcli.compress(source, tmp_path / "self.pq.safetensors", CODECS[codec], force=True)
        assert report.base.n_differences
        assert report.relative_mse < alone.relative_mse
        found, expected = pqcli.load(file), torch.load(source)  # the hint leads to the base beside the file
        assert all(same(found[name], expected[name]) for name in ("fc.bias", "frozen.bias", "steps", "ids"))


def test_a_chain_of_three_is_found_by_hints_and_among_what_is_given(family, tmp_path):
    base, first = family
    state = torch.load(first)
    second = saved(tmp_path, "second.pt", tuned({**state, "gone.weight": gaussian(8, 8)}, seed=50))
    recipe = CODECS["plain"]
    files = [tmp_path / f"{name}.pq.safetensors" for name in ("base", "first", "second")]
    pqcli.compress(base, files[0], recipe)
    pqcli.compress(first, files[1], recipe, base=files[0])
    pqcli.compress(second, files[2], recipe, base=files[1])
    expected = pqcli.load(files[2])
    assert pqcli.verify(files[2], second) == []
    elsewhere = tmp_path / "elsewhere"
    for i, file in enumerate(files):
        (elsewhere / str(i)).mkdir(parents=True)
        shutil.copy(file, elsewhere / str(i) / f"{i}.pq.safetensors")
    copies = [elsewhere / str(i) / f"{i}.pq.safetensors" for i in range(3)]
    for given in ([copies[0], copies[1]], [copies[1], copies[0]]):
        found = pqcli.load(copies[2], base=given)
        assert all(same(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(BaseError, match=r"1\.pq\.safetensors' cannot be it .*does not lie beside it"):
        pqcli.load(copies[2], base=copies[1])
    pqcli.compress(second, tmp_path / "again.pq.safetensors", recipe, base=[copies[1], copies[0]])
    assert pqcli.load(tmp_path / "again.pq.safetensors", base=copies[:2]).keys() == expected.keys()


def test_a_base_that_is_missing_or_another_one_is_told_with_both_hashes(family, tmp_path, pqcli_command):
    base, source = family
    file = tmp_path / "far" / "tuned.pq.safetensors"
    file.parent.mkdir()
    report = pqcli.compress(source, file, CODECS["trellis"], base=base)
    other = saved(tmp_path, "other.pt", tuned(base_state(), seed=90) | {"resized.weight": gaussian(40, 32, seed=8)})
    reshaped = saved(tmp_path, "reshaped.pt", base_state() | {"fc.weight": gaussian(96, 41)})
    less = saved(tmp_path, "less.pt", {"fc.weight": gaussian(96, 40)})
    with pytest.raises(BaseError, match=rf"{report.base.hash} \('base.pt' when .*does not lie beside it; give it with"):
        pqcli.decode(file)
    for wrong, problem in (
        (other, r"other.pt' has the hash [0-9a-f]{32}; give the right one"),
        (reshaped, r"'fc.weight' has the shape \[96, 41\] in '.*reshaped.pt', not \[96, 40\]"),
        (less, "less.pt' has no tensor 'embed.weight'"),
    ):
        with pytest.raises(BaseError, match=problem) as caught:
            pqcli.decode(file, base=wrong)
        assert report.base.hash in str(caught.value)
    with pytest.raises(CheckpointError, match=r"nowhere.pt"):
        pqcli.load(file, base=tmp_path / "nowhere.pt")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert pqcli.load(file, base=[less, other, base]).keys() == torch.load(source).keys()


def test_what_a_file_needs_is_said_without_its_base(family, tmp_path):
    base, source = family
    file = tmp_path / "far" / "tuned.pq.safetensors"
    file.parent.mkdir()
    report = pqcli.compress(source, file, CODECS["trellis"], base=base)
    found = inspect(file)
    assert "base" in found["features"]
    assert found["base"]["hash"] == report.base.hash
    assert (found["base"]["path"], found["base"]["n_same"]) == ("base.pt", 3)
    assert json.loads(json.dumps(pqcli.report(file).to_json()))["base"]["n_differences"] == report.base.n_differences
    with pytest.raises(BaseError):
        pqcli.verify(file)
    with pqcli.open(file) as container, pytest.raises(BaseError):
        container.decode("fc.weight")
    with pqcli.open(file) as container:
        assert container.decode("new.weight").shape == (40, 40)


def test_the_hash_is_of_the_content_whatever_file_holds_it(family, tmp_path):
    base, source = family
    state = {name: tensor.clone() for name, tensor in torch.load(base).items()}
    save_file(state, tmp_path / "base.safetensors")
    hashes = set()
    for one in (base, tmp_path / "base.safetensors"):
        report = pqcli.compress(source, tmp_path / "t.pq.safetensors", CODECS["plain"], base=one, force=True)
        hashes.add(report.base.hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_dtype_serves(family, tmp_path, dtype):
    base, source = family
    cast = saved(tmp_path, "cast.pt", {n: t.to(dtype) if t.is_floating_point() else t for n, t in base_state().items()})
    file = tmp_path / "tuned.pq.safetensors"
    report = pqcli.compress(source, file, CODECS["trellis"], base=cast)
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert by_name["fc.weight"].difference
    assert by_name["fc.weight"].relative_mse < 1e-5
    assert pqcli.verify(file, source, base=cast) == []
    # the other way round: a checkpoint that was only converted takes nothing
    report = pqcli.compress(cast, tmp_path / "cast.pq.safetensors", CODECS["trellis"], base=base)
    is_rounded = dtype != torch.float64
    assert all(one.action in {"base", "alias"} for one in report.tensors) == is_rounded or not is_rounded
    assert pqcli.verify(tmp_path / "cast.pq.safetensors", cast, base=base) == []


@pytest.mark.slow
def test_budgets_are_met_and_errors_are_relative_to_the_tensors(family, tmp_path):
    base, source = family
    file = tmp_path / "tuned.pq.safetensors"
    for codec in ("pq", "trellis"):
        loose = pqcli.compress(source, file, pqcli.Recipe(codec=codec, max_relative_mse=1e-2), base=base, force=True)
        tight = pqcli.compress(source, file, pqcli.Recipe(codec=codec, max_relative_mse=1e-7), base=base, force=True)
        assert loose.relative_mse <= 1e-2
        assert 0.9e-7 < tight.relative_mse <= 1e-7
        assert loose.compressed_bytes < tight.compressed_bytes
        budget = int(1.1 * loose.compressed_bytes)
        sized = pqcli.compress(source, file, pqcli.Recipe(codec=codec, target_bytes=budget), base=base, force=True)
        assert 0.97 * budget < sized.compressed_bytes <= budget
        assert sized.relative_mse < loose.relative_mse
        preview = pqcli.preview(source, file, pqcli.Recipe(codec=codec, target_bytes=budget), base=base)
        assert preview.predicted_bytes == sized.compressed_bytes


def test_a_base_that_spares_nothing_is_said_and_not_needed(tmp_path):
    source = saved(tmp_path, "model.pt", {"fc.weight": gaussian(64, 64, seed=1)})
    for i, state in enumerate(({"fc.weight": gaussian(64, 64, seed=2)}, {"other.weight": gaussian(64, 64)})):
        stranger, file = saved(tmp_path, "stranger.pt", state), tmp_path / f"{i}.pq.safetensors"
        report = pqcli.compress(source, file, CODECS["trellis"], base=stranger)
        assert report.base is None
        assert "spares nothing" in report.warnings[0]
        stranger.unlink()
        assert pqcli.load(file)["fc.weight"].shape == (64, 64)


def test_equal_checkpoints_take_a_manifest(family, tmp_path):
    base, _ = family
    for codec in ("plain", "trellis"):
        report = pqcli.compress(base, tmp_path / f"{codec}.pq.safetensors", CODECS[codec], base=base)
        assert report.tensor_bytes == 0
        assert report.compressed_bytes < 3000
        found = pqcli.load(tmp_path / f"{codec}.pq.safetensors")
        assert all(same(found[name], tensor) for name, tensor in base_state().items())


def test_the_model_alone_and_its_base(tmp_path):
    base = {"state_dict": base_state(), "optimizer": {"m": gaussian(64, 64)}}
    after = {"state_dict": tuned(base["state_dict"]), "optimizer": {"m": gaussian(64, 64, seed=3)}}
    torch.save(base, tmp_path / "base.pt")
    torch.save(after, tmp_path / "tuned.pt")
    recipe = pqcli.Recipe(codec="trellis", effort=4, model_only=True)
    file = tmp_path / "tuned.pq.safetensors"
    report = pqcli.compress(tmp_path / "tuned.pt", file, recipe, base=tmp_path / "base.pt")
    assert report.base.n_differences
    assert pqcli.verify(file, tmp_path / "tuned.pt") == []


@pytest.mark.slow
def test_the_commands_take_a_base(family, tmp_path, pqcli_command):
    base, _ = family
    (tmp_path / "far").mkdir()
    shutil.move(base, tmp_path / "far" / "base.pt")
    done = pqcli_command("compress", "tuned.pt", "--base", "far/base.pt", "--codec", "trellis", "--effort", "4")
    assert done.returncode == 0, done.stderr
    assert "as differences" in done.stderr
    shutil.move(tmp_path / "far" / "base.pt", tmp_path / "moved.pt")
    done = pqcli_command("decode", "tuned.pq.safetensors")
    assert done.returncode == 1
    assert "--base" in done.stderr
    assert "far/base.pt" in done.stderr
    assert pqcli_command("decode", "tuned.pq.safetensors", "--base", "moved.pt").returncode == 0
    assert (
        pqcli_command("verify", "tuned.pq.safetensors", "--base", "moved.pt", "--against", "tuned.pt").returncode == 0
    )
    done = pqcli_command("report", "tuned.pq.safetensors")
    assert "as in it, for nothing" in done.stdout
    assert pqcli_command("inspect", "tuned.pq.safetensors").returncode == 0
    done = pqcli_command("compress", "tuned.pt", "--base", "nowhere.pt", "-o", "x.pq.safetensors")
    assert done.returncode == 1
    assert "nowhere.pt" in done.stderr


def test_no_error_is_anything_but_ours(family, tmp_path):
    """A base that changes under way, is a folder, a pipe, or no checkpoint."""
    _, source = family
    (tmp_path / "text").write_text("hello")
    for wrong in (tmp_path / "text", tmp_path, "/dev/zero", source.with_suffix(".none")):
        with pytest.raises(PQError):
            pqcli.compress(source, tmp_path / "x.pq.safetensors", base=wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("pq", {}),
        ("pq", {"target_bytes": 5_000}),
        ("trellis", {}),
        ("trellis", {"target_bytes": 5_000}),
        ("trellis", {"quality": "high"}),
    ],
)
def test_statistics_count_beside_a_base(tmp_path, codec, settings):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
    base = saved(tmp_path, "base.pt", network.state_dict())
    with torch.no_grad():
        for i, weight in enumerate(network.parameters()):
            weight += gaussian(*weight.shape, seed=i, rms=1e-4)
    source = saved(tmp_path, "tuned.pt", network.state_dict())
    seen = gaussian(600, 64, seed=5, rms=1.0) * torch.exp(-torch.arange(64) / 10.0)
    with pqcli.collect(network, gradients=True) as stats:
        stats.backward(network(seen))
    stats.save(tmp_path / "s.stats.safetensors")
    errors = []
    for given in (None, str(tmp_path / "s.stats.safetensors")):
        file = tmp_path / "tuned.pq.safetensors"
        report = pqcli.compress(source, file, pqcli.Recipe(codec=codec, stats=given, **settings), base=base, force=True)
        assert report.relative_mse < 1e-5
        assert pqcli.verify(file, source, base=base) == []
        with torch.inference_mode():
            found = torch.func.functional_call(network, pqcli.load(file), (seen,))
            error = float((found - network(seen)).square().mean())
        errors.append(error * 4**report.bits_per_weight)  # as at equal bits
    assert errors[1] < errors[0]
