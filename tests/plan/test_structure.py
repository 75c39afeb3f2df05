"""What a network reads as structure is kept, told by names and siblings alone; what merely looks like it is not."""

import pytest

from pqcli.plan import plan
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.tensors.info import TensorInfo

QUANTIZED = {
    "gptq": {
        "q.qweight": ("int32", 128, 1024), "q.scales": ("float16", 8, 1024), "q.qzeros": ("int32", 8, 128),
        "q.g_idx": ("int32", 1024),
    },
    "awq": {"q.qweight": ("int32", 1024, 128), "q.scales": ("float16", 8, 1024), "q.qzeros": ("int32", 8, 128)},
    "marlin": {"q.B": ("int32", 64, 2048), "q.s": ("float16", 8, 1024)},
    "mlx": {"q.weight": ("uint32", 2048, 256), "q.scales": ("float16", 2048, 32), "q.biases": ("bfloat16", 2048, 32)},
    "compressed-tensors": {
        "q.weight_packed": ("int32", 2048, 256), "q.weight_scale": ("bfloat16", 2048, 16),
        "q.weight_zero_point": ("float32", 2048, 16), "q.weight_shape": ("int64", 2),
    },
    "bitsandbytes 4 bit": {
        "q.weight": ("uint8", 524288, 1), "q.weight.absmax": ("float32", 128, 128),
        "q.weight.nested_absmax": ("float32", 64, 64), "q.weight.nested_quant_map": ("float32", 16, 16),
    },
    "bitsandbytes 8 bit": {"q.weight": ("int8", 512, 512), "q.SCB": ("float32", 512, 64)},
    "fp8": {"q.weight": ("float8_e4m3fn", 1024, 1024), "q.weight_scale_inv": ("float32", 64, 64)},
    "fused experts in fp8": {
        "experts.gate_up_proj": ("float8_e4m3fn", 8, 64, 512), "experts.gate_up_proj_scale": ("float32", 8, 1, 512),
    },
    "torchao": {
        "q.weight.tensor_impl.int_data": ("int8", 512, 512), "q.weight.tensor_impl.scale": ("bfloat16", 512, 64),
        "q.weight.tensor_impl.zero_point": ("bfloat16", 512, 64),
    },
    "quanto": {
        "q.weight._data": ("int8", 512, 512), "q.weight._scale": ("float16", 512, 32),
        "q.weight._shift": ("float16", 512, 32),
    },
    "hqq": {"q.W_q": ("uint8", 256, 512), "q.scale": ("float16", 64, 128), "q.zero": ("float16", 64, 128)},
    "aqlm": {"q.codes": ("int8", 512, 128, 2), "q.codebooks": ("float16", 2, 256, 1, 8)},
    "svdquant": {"q.qweight": ("int8", 512, 256), "q.wscales": ("bfloat16", 8, 512)},
    "no module": {"qweight": ("int32", 128, 1024), "scales": ("float16", 8, 1024)},
}  # fmt: skip


def tensors(described):
    return [TensorInfo(name, tuple(shape), dtype) for name, (dtype, *shape) in described.items()]


def plan_of(described, **settings):
    return {entry.info.name: entry for entry in plan.make(Recipe(**settings), tensors(described)).entries}


@pytest.mark.parametrize("codec", ["pq", "trellis"])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_scales_beside_codes_are_kept(scheme, codec):
    entries = plan_of({**QUANTIZED[scheme], "embed.weight": ("float16", 1000, 64)}, codec=codec)
    assert {entry.action for name, entry in entries.items() if name != "embed.weight"} == {"keep"}
    assert entries["embed.weight"].action == codec


def test_the_reason_names_the_codes():
    reason = plan_of(QUANTIZED["gptq"])["q.scales"].reason
    assert reason == "belongs to the quantized weight 'q.qweight' (int32 codes): kept exactly, like the codes"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("h.0.attn.bias", (1, 1, 256, 256), "a bias"),
        ("h.0.attn.masked_bias", (64, 64), "a mask"),
        ("h.0.attn.causal_mask", (1, 1, 256, 256), "a mask"),
        ("h.0.attn.mask", (256, 256), "a mask"),
        ("attn_mask", (256, 256), "a mask"),
        ("window.attn_mask", (16, 49, 49), "a mask"),
        ("fc.weight_mask", (256, 256), "a mask"),
        ("tril", (256, 256), "a mask"),
        ("decoder.future_mask", (256, 256), "a mask"),
        ("rotary_emb.inv_freq", (16, 64), "a table"),
        ("rotary_emb.cos_cached", (1, 1, 2048, 64), "a table"),
        ("rotary_emb.sin_cached", (1, 1, 2048, 64), "a table"),
        ("freqs_cos", (2048, 64), "a table"),
        ("attn.relative_position_index", (49, 49), "a table"),
        ("attn.relative_coords_table", (1, 64, 64, 2), "a table"),
        ("embeddings.position_ids", (8, 512), "a table"),
        ("model.22.anchors", (64, 64), "a table"),
        ("head.anchor_grid", (3, 1, 64, 64, 2), "a table"),
        ("pos_encoder.pe", (500, 1, 512), "a table"),
        ("mel_basis", (80, 513), "a table"),
        ("experts.gate_up_proj_bias", (16, 512), "a bias"),
        ("experts.down_proj_bias", (16, 256), "a bias"),
        ("mlp.mlp1_bias", (16, 512), "a bias"),
        ("experts.htoh4.bias", (16, 512), "a bias"),
        ("attn.attention_biases", (16, 512), "a bias"),
        ("self_attn.pos_bias_u", (16, 64), "a bias"),
        ("layers.norm.weight", (24, 1024), "a norm"),
        ("layers.input_layernorm.weight", (24, 1024), "a norm"),
        ("layers.ln_1.weight", (24, 1024), "a norm"),
        ("layers.norm1.gamma", (24, 1024), "a norm"),
        ("blocks.attn_norm_weight", (24, 1024), "a norm"),
        ("blocks.ln1_scale", (24, 1024), "scales"),
        ("layers.q_norm.scale", (24, 1024), "scales"),
        ("blocks.layer_scale_1", (24, 1024), "scales"),
        ("blocks.gamma", (24, 1024), "a norm"),
        ("k_proj.weight_scale", (256, 64), "scales"),
        ("k_proj.weight_scale_inv", (256, 64), "scales"),
    ],
)
def test_a_name_that_says_structure_is_kept(name, shape, reason):
    for codec in ("pq", "trellis"):
        entry = plan_of({name: ("float32", *shape)}, codec=codec)[name]
        assert entry.action == "keep"
        assert entry.reason.startswith(reason), entry.reason


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q_proj.lora_A.weight", (16, 512)),
        ("q_proj.lora_B.default.weight", (512, 16)),
        ("attn.relative_position_bias_table", (169, 32)),
        ("attn.relative_attention_bias.weight", (320, 64)),
        ("attn.c_attn.weight", (256, 768)),
        ("norm1.linear.weight", (1536, 512)),
        ("norm_proj.weight", (512, 512)),
        ("mask_head.weight", (256, 256)),
        ("mask_embed.0.weight", (256, 256)),
        ("experts.gate_up_proj", (4, 256, 512)),
        ("pos_embed", (1, 197, 768)),
        ("scale_shift_table", (24, 1152)),
        ("rpn.anchor_conv.weight", (64, 64, 3, 3)),
        ("bias_proj.weight", (256, 256)),
        ("temb.scale_proj.weight", (256, 256)),
        ("mixer.A_log", (1024, 16)),
        ("embeddings.word_embeddings.weight", (1000, 64)),
        ("b1", (256, 256)),
    ],
)
def test_a_weight_stays_a_weight(name, shape):
    for codec in ("pq", "trellis"):
        assert plan_of({name: ("float32", *shape)}, codec=codec)[name].action == codec


@pytest.mark.parametrize(
    ("bias", "weight"),
    [("b1", "w1"), ("fc1_b", "fc1_w"), ("b_in", "w_in"), ("b_Q", "W_Q"), ("bias_hh", "weight_hh"), ("b", "kernel")],
)
def test_the_b_beside_a_w_of_one_more_dimension_is_a_bias(bias, weight):
    beside = {f"experts.{bias}": ("float32", 16, 512), f"experts.{weight}": ("float32", 16, 64, 512)}
    entries = plan_of(beside)
    assert [entry.action for entry in entries.values()] == ["keep", "pq"]
    assert entries[f"experts.{bias}"].reason == "a bias, by its name: kept exactly"


def test_integers_that_are_no_codes_make_no_scales():
    beside = {
        "attn.relative_position_bias_table": ("float32", 169, 32), "attn.relative_position_index": ("int32", 128, 128),
        "embeddings.position_embeddings": ("float32", 1, 197, 768), "embeddings.position_ids": ("int64", 1, 197),
        "net.table": ("float32", 256, 64), "net.version": ("int32", 1), "net.flags": ("uint8", 4, 4),
    }  # fmt: skip
    actions = [entry.action for name, entry in plan_of(beside).items() if "float" in entry.info.dtype]
    assert actions == ["pq", "pq", "pq"]


def test_a_weight_larger_than_the_codes_beside_it_is_a_weight():
    beside = {"experts.up": ("bfloat16", 8, 512, 512), "experts.down_blocks": ("uint8", 8, 64, 64)}
    assert plan_of(beside)["experts.up"].action == "pq"


MASKED = {"h.0.attn.bias": ("float32", 1, 1, 256, 256), "h.0.attn.c_attn.weight": ("float32", 384, 128)}


@pytest.mark.parametrize("pattern", ["h.0.attn.bias", "*.attn.bias", "re:.*bias"])
def test_a_pattern_that_finds_structure_only_asks_for_it_and_the_plan_says_so(pattern):
    entry = plan_of(MASKED, include=(pattern,))["h.0.attn.bias"]
    assert entry.action == "pq"
    assert "asked for by name, although it looks like structure (a bias, by its name: kept exactly)" in entry.reason
    rule = Rule(pattern, action="pq")
    assert plan_of(MASKED, rules=(rule,))["h.0.attn.bias"].action == "pq"


@pytest.mark.parametrize("pattern", ["*", "h.0.attn.*", "*attn*", "re:h.*"])
def test_a_pattern_that_finds_weights_too_means_those(pattern):
    assert [entry.action for entry in plan_of(MASKED, include=(pattern,)).values()] == ["keep", "pq"]


def test_overlapping_views_are_kept_and_name_each_other():
    views = [
        TensorInfo("qkv.weight", (768, 256), "float32", overlaps="qkv.weight"),
        TensorInfo("q.weight", (256, 256), "float32", overlaps="qkv.weight"),
        TensorInfo("fc.weight", (256, 256), "float32"),
    ]
    entries = plan.make(Recipe(), views).entries
    assert [entry.action for entry in entries] == ["keep", "keep", "pq"]
    kept = "shares some of its memory with {!r}: kept exactly, so that they still agree"
    assert [entry.reason for entry in entries[:2]] == [kept.format("q.weight"), kept.format("qkv.weight")]
