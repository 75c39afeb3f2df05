"""Importance matrices as llama-imatrix writes them, under the names of checkpoints."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.errors import MissingExtraError, StatsError
from pqcli.recipe.recipe import Recipe
from pqcli.stats import open as open_stats

gguf = pytest.importorskip("gguf")


def squares(seed, *shape):
    return np.random.default_rng(seed).uniform(0.1, 9, shape).astype(np.float32)


def write(path, tensors):
    """`tensors`: name of llama.cpp's -> (sums of squares, counts), as `llama-imatrix` lays them out."""
    writer = gguf.GGUFWriter(path, arch="", use_temp_file=False)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in tensors.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.asarray(counts, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    """A checkpoint with the names of a Llama of two layers, and an importance matrix of it."""
    generator = torch.Generator().manual_seed(0)
    state, matrices = {"model.embed_tokens.weight": torch.randn(50, 32, generator=generator)}, {}
    for layer in range(2):
        for i, (theirs, ours) in enumerate(LLAMA.items()):
            width = 48 if theirs == "ffn_down" else 32
            state[f"model.layers.{layer}.{ours}.weight"] = torch.randn(40, width, generator=generator)
            matrices[f"blk.{layer}.{theirs}.weight"] = (squares(10 * layer + i, 1, width), [[2048.0]])
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", write(tmp_path / "imatrix.gguf", matrices), matrices


def test_every_layer_of_a_llama_has_its_diagonal(llama):
    _, file, matrices = llama
    stats = open_stats(file)
    for layer in range(2):
        for theirs, ours in LLAMA.items():
            m = stats.moments(f"model.layers.{layer}.{ours}.weight")
            sums, _ = matrices[f"blk.{layer}.{theirs}.weight"]
            assert m.diagonal == pytest.approx(sums[0] / 2048)
            assert (m.axis, m.n_samples, m.second, m.gradient) == (1, 2048, None, None)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.layers.3.attention.query_key_value.weight",
        "model.layers.3.self_attn.qkv_proj.weight",
        "transformer.h.3.self_attention.query_key_value.weight",
    ],
)
def test_one_name_of_llama_cpp_stands_for_what_families_call_differently(tmp_path, name):
    stats = open_stats(write(tmp_path / "i.gguf", {"blk.3.attn_qkv.weight": (squares(0, 8), [10.0])}))
    assert stats.moments(name).n_samples == 10
    assert stats.moments(name.replace("3", "2")) is None
    assert stats.moments("transformer.h.3.attn.c_attn.weight") is None  # kept transposed


def test_experts_are_told_apart_by_their_numbers(tmp_path):
    sums = squares(0, 3, 8)
    file = write(tmp_path / "i.gguf", {"blk.1.ffn_gate_exps.weight": (sums, [[5.0], [0.0], [7.0]])})
    stats = open_stats(file)
    for e, count in enumerate((5, 0, 7)):
        for name in ("block_sparse_moe.experts.{}.w1", "mlp.experts.{}.gate_proj"):
            m = stats.moments(f"model.layers.1.{name.format(e)}.weight")
            assert m.n_samples == count
            assert not count or m.diagonal == pytest.approx(sums[e] / count)


def test_compress_and_plan_take_an_importance_matrix(llama, tmp_path):
    """Columns that meet large inputs come back with less error."""
    checkpoint, file, matrices = llama
    recipe = Recipe(codec="trellis", target_bits=3.0, stats=str(file))
    preview = pqcli.preview(checkpoint, recipe=recipe)
    report = pqcli.compress(checkpoint, tmp_path / "with.pq.safetensors", recipe)
    assert preview.predicted_bytes == report.compressed_bytes
    dense, decoded = load_file(checkpoint), pqcli.load(tmp_path / "with.pq.safetensors")
    for layer in range(2):
        for theirs, ours in LLAMA.items():
            name = f"model.layers.{layer}.{ours}.weight"
            order = np.argsort(matrices[f"blk.{layer}.{theirs}.weight"][0][0])
            error = (decoded[name] - dense[name]).square().mean(0).numpy()[order]
            half = len(order) // 2
            assert error[half:].mean() < 0.7 * error[:half].mean(), name


def test_damaged_files_are_told(tmp_path, monkeypatch):
    for sums, counts, said in (
        (-squares(0, 8), [1.0], "negative"),
        (squares(0, 3, 8), [[1.0], [2.0]], "3 matrices and 2 counts"),
    ):
        file = write(tmp_path / "bad.gguf", {"blk.0.attn_q.weight": (sums, counts)})
        with pytest.raises(StatsError, match=said):
            open_stats(file)
    file = write(tmp_path / "other.gguf", {"what.weight": (squares(0, 8), [1.0])})
    with pytest.raises(StatsError, match="no importance matrix whose names are known"):
        open_stats(file)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:60])
    with pytest.raises(StatsError, match=r"cut\.gguf"):
        open_stats(tmp_path / "cut.gguf")
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pqcli\[transformers\]'"):
        open_stats(file)
