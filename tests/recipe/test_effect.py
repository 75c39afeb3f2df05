"""Every setting that means something to some codecs only, with every codec: what is said to be idle is idle."""

import functools
import hashlib
import json

import pytest
import torch
from safetensors import safe_open

import pqcli
from pqcli.codecs import registry
from pqcli.recipe import effect, flags

CODECS = {
    "pq": {},
    "ecpq": {"quality": "balanced"},
    "trellis": {"codec": "trellis", "effort": 8},
    "auto": {"codec": "auto", "effort": 8},
}
"""What makes a recipe one for this codec."""
OTHER = {
    "n_centroids": 16, "block_size": 4, "n_iter": 1, "codebook_dtype": "fp32", "clamp": "quarter", "sample": 300,
    "restarts": 3, "eps": 0.5, "max_tentatives": 1, "seed": 1, "objective": 1, "effort": 4,
}  # fmt: skip
"""A value for each setting that no codec has as its default."""
RARE = {("pq", "eps"), ("pq", "max_tentatives"), ("ecpq", "seed"), ("auto", "seed")}
"""Where a setting means something, but not for the checkpoint of this test: it has no empty clusters and no samples."""


def recipe(codec, *settings):
    return flags.override(pqcli.Recipe(), **{**CODECS[codec], **{name: OTHER[name] for name in settings}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("effect") / "model.pt"
    torch.save(
        {
            "a.weight": torch.randn(96, 64, generator=generator),
            "b.weight": torch.randn(64, 48, generator=generator) * 3,
            "c.weight": torch.randn(24, 8, 3, 3, generator=generator) / 5,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def plainly(checkpoint):
    """What the file of each codec holds without any of the settings, found out once."""
    return functools.cache(lambda codec: coded(checkpoint, recipe(codec)))


def coded(path, made):
    """What the file holds of weights: all of its entries but those that quote the recipe."""
    target = path.with_name("out.pq.safetensors")
    pqcli.compress(path, target, made, force=True, journal=False)
    found = hashlib.sha1(usedforsecurity=False)
    with safe_open(target, "pt") as file:
        for key in sorted(set(file.keys()) - {"pqcli.manifest", "pqcli.checksum"}):
            found.update(key.encode() + file.get_tensor(key).numpy().tobytes())
    return found.hexdigest()


def test_the_table_has_every_setting_that_means_something_to_some_codecs_only():
    assert set(OTHER) == registry.special_settings()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("setting", OTHER)
def test_each_pair_is_heard_or_said_to_be_without_effect(codec, setting):
    idle = effect.without_effect(recipe(codec, setting), [*CODECS[codec], setting])
    assert idle == (() if setting in registry.row(codec).settings else (setting,))


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_said_to_be_without_effect_changes_no_byte(codec, checkpoint, plainly):
    idle = [name for name in OTHER if name not in registry.row(codec).settings]
    assert idle
    assert coded(checkpoint, recipe(codec, *idle)) == plainly(codec)


@pytest.mark.parametrize(
    ("codec", "setting"),
    [
        pytest.param(codec, name, marks=[pytest.mark.slow] if codec == "auto" else [])
        for codec in CODECS
        for name in OTHER
        if name in registry.row(codec).settings and (codec, name) not in RARE
    ],
)
def test_what_is_not_said_to_be_without_effect_changes_bytes(codec, setting, checkpoint, plainly):
    assert coded(checkpoint, recipe(codec, setting)) != plainly(codec)


def test_options_of_the_command_that_mean_nothing_are_said_too(pqcli_command, model):
    done = pqcli_command("compress", model, "--codec", "trellis", "--device", "cpu", "--seed", "3", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "without effect with codec trellis: --seed, --device" in done.stderr
    done = pqcli_command("compress", model, "--with-copies", "--shard-size", "1GB", "--dry-run")
    assert "without effect, because the result is one file: --with-copies, --shard-size" in done.stderr


def test_a_recipe_of_python_and_one_of_yaml_are_judged_alike():
    made = pqcli.Recipe(codec="trellis", block_size=4)
    assert effect.without_effect(made) == ("block_size",)
    assert json.dumps(effect.situation(made)) == '"with codec trellis"'
