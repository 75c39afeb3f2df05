"""The presets: they load, suit the models they are made for, and reproduce the papers' sizes to the byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pqcli.plan import plan
from pqcli.plan.paper import paper_bytes
from pqcli.recipe import loading, strictyaml
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.recipe.settings import settings_of
from pqcli.tensors.info import TensorInfo


def batch_norm(name: str, width: int) -> Iterator[TensorInfo]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield TensorInfo(f"{name}.{part}", (width,), "float32")
    yield TensorInfo(f"{name}.num_batches_tracked", (), "int64")


def convolution(name: str, norm: str, shape: tuple[int, int, int]) -> Iterator[TensorInfo]:
    c_in, c_out, kernel = shape
    yield TensorInfo(f"{name}.weight", (c_out, c_in, kernel, kernel), "float32")
    yield from batch_norm(norm, c_out)


def resnet(n_blocks: tuple[int, ...], bottleneck: bool) -> list[TensorInfo]:
    """Names and shapes of torchvision's ResNets."""
    tensors = [*convolution("conv1", "bn1", (3, 64, 7))]
    c_in = 64
    for stage, (count, width) in enumerate(zip(n_blocks, (64, 128, 256, 512), strict=True), start=1):
        c_out = width * 4 if bottleneck else width
        for index in range(count):
            block = f"layer{stage}.{index}"
            wide = [(c_in, width, 1), (width, width, 3), (width, c_out, 1)]
            basic = [(c_in, width, 3), (width, width, 3)]
            for number, shape in enumerate(wide if bottleneck else basic, start=1):
                tensors += convolution(f"{block}.conv{number}", f"{block}.bn{number}", shape)
            if index == 0 and c_in != c_out:
                tensors += convolution(f"{block}.downsample.0", f"{block}.downsample.1", (c_in, c_out, 1))
            c_in = c_out
    return [*tensors, TensorInfo("fc.weight", (1000, c_in), "float32"), TensorInfo("fc.bias", (1000,), "float32")]


RESNET18 = resnet((2, 2, 2, 2), bottleneck=False)
RESNET50 = resnet((3, 4, 6, 3), bottleneck=True)


def test_the_generator_gives_torchvisions_parameter_counts() -> None:
    def count(tensors: list[TensorInfo]) -> int:
        return sum(info.numel for info in tensors if not info.name.endswith(("_mean", "_var", "_tracked")))

    assert (count(RESNET18), count(RESNET50)) == (11_689_512, 25_557_032)


def paper_items(planned: plan.Plan) -> list[tuple[str, int, tuple[int, int, int] | None]]:
    """The model's tensors of a plan, as `paper_bytes` takes them."""
    return [
        (
            entry.info.name,
            entry.info.numel,
            None if entry.scheme is None else (entry.n_vectors, entry.scheme.n_centroids, entry.scheme.block_size),
        )
        for entry in planned.entries
        if entry.action != "alias" and entry.info.role == "model"
    ]


@pytest.mark.parametrize(
    ("preset", "tensors", "expected_bytes"),
    [
        ("kill-the-bits-small", RESNET18, 1_615_904),
        ("kill-the-bits-large", RESNET18, 1_079_328),
        ("kill-the-bits-small", RESNET50, 5_338_144),
        ("kill-the-bits-large", RESNET50, 3_338_784),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.module."])
def test_the_papers_sizes_come_out_to_the_byte(
    preset: str, tensors: list[TensorInfo], expected_bytes: int, prefix: str
) -> None:
    renamed = [TensorInfo(prefix + info.name, info.shape, info.dtype) for info in tensors]
    planned = plan.make(loading.load(preset), renamed)
    assert paper_bytes(paper_items(planned)) == expected_bytes
    kept = [entry for entry in planned.entries if entry.action == "keep" and len(entry.info.shape) > 1]
    assert [entry.info.name for entry in kept] == [f"{prefix}conv1.weight"]
    assert f"rule 1 of {preset}: keep" in kept[0].reason


@pytest.mark.parametrize("configs", ["pqcli/configs", "configs"])
def test_presets_are_found_in_an_installed_package_and_in_a_source_tree(tmp_path: Path, configs: str) -> None:
    shutil.copytree(Path(loading.__file__).parents[1], tmp_path / "pqcli", ignore=shutil.ignore_patterns("configs"))
    shutil.copytree(loading.configs_folder(), tmp_path / configs)
    code = "from pqcli.recipe import loading; print(loading.configs_folder(), loading.load('transformer').name)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str((tmp_path / configs).resolve()), "transformer"]


def test_the_default_preset_names_every_setting() -> None:
    path = loading.configs_folder() / "default.yaml"
    data = strictyaml.read(path)
    assert isinstance(data, dict)
    assert set(data) == set(settings_of(Recipe))
    text = path.read_text(encoding="utf-8")
    assert [name for name in settings_of(Rule) if name not in text] == []


def test_the_default_preset_is_the_default_recipe() -> None:
    assert loading.load("default") == Recipe(name="default")


@pytest.mark.parametrize("name", loading.preset_names())
def test_every_preset_suits_every_model_and_explains_itself(name: str) -> None:
    preset = loading.load(name)
    assert preset.name == name
    assert preset.description
    assert all(rule.optional and rule.why for rule in preset.rules)
    bert = [
        TensorInfo("embeddings.word_embeddings.weight", (3000, 384), "float32"),
        TensorInfo("encoder.layer.0.attention.self.query.weight", (384, 384), "float32"),
        TensorInfo("encoder.layer.0.intermediate.dense.weight", (1536, 384), "float32"),
    ]
    for tensors in (RESNET18, RESNET50, bert):
        assert plan.make(preset, tensors).quantized


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embeddings.word_embeddings.weight", 8),
        ("encoder.layer.0.attention.self.query.weight", 4),
        ("encoder.layer.0.attention.output.dense.weight", 4),
        ("encoder.layer.0.output.dense.weight", 8),
        ("decoder.layers.11.self_attn.q_proj.weight", 4),
        ("decoder.layers.11.fc1.weight", 8),
        ("h.0.attn.c_proj.weight", 4),
        ("h.0.mlp.c_proj.weight", 8),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", 4),
        ("transformer.layer.2.attention.q_lin.weight", 4),
        ("model.layers.0.mlp.down_proj.weight", 8),
        ("lm_head.weight", 8),
    ],
)
def test_the_transformer_preset_tells_attention_from_the_rest(name: str, expected: int) -> None:
    (entry,) = plan.make(loading.load("transformer"), [TensorInfo(name, (512, 512), "float32")]).entries
    assert entry.scheme is not None
    assert entry.scheme.block_size == expected
    assert entry.scheme.n_centroids == 256
