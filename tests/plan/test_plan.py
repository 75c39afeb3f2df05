"""Plans: every tensor has an action and a reason that a person understands, and sizes that can be relied on."""

from __future__ import annotations

from math import ceil, log2, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.errors import RecipeError
from pqcli.plan import plan
from pqcli.plan.paper import paper_bytes
from pqcli.plan.scheme import Scheme
from pqcli.recipe import documents, fairseq, strictyaml
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.kinds import auto_block_size, belongs, is_kind, kind_of, rows_and_columns

SIZES = st.integers(0, 70) | st.sampled_from([1, 2, 3, 7, 16, 128])
TENSORS = st.builds(
    TensorInfo,
    name=st.sampled_from(["fc.weight", "emb.weight", "conv.weight", "x"]),
    shape=st.lists(SIZES, max_size=6).map(tuple),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16", "int64", "float8_e5m2"]),
)


def tensor(*shape: int, name: str = "fc.weight", dtype: str = "float32", **more: str) -> TensorInfo:
    return TensorInfo(name, shape, dtype, **more)


def entry_of(info: TensorInfo, wish: Recipe | None = None) -> plan.PlanEntry:
    (entry,) = plan.make(wish or Recipe(), [info]).entries
    return entry


def scheme_of(info: TensorInfo, wish: Recipe | None = None) -> Scheme:
    scheme = entry_of(info, wish).scheme
    assert scheme is not None
    return scheme


MODEL = [
    tensor(1000, 64, name="embed.weight"),
    tensor(256, 64, name="layers.0.fc1.weight"),
    tensor(256, name="layers.0.fc1.bias"),
    tensor(64, 256, name="layers.0.fc2.weight"),
    tensor(256, 64, name="layers.0.fc10.weight"),
    tensor(1000, 64, name="head.weight", alias_of="embed.weight"),
]


def actions(wish: Recipe, tensors: list[TensorInfo] = MODEL) -> dict[str, str]:
    return {entry.info.name: entry.action for entry in plan.make(wish, tensors).entries}


# ------------------------------------------------------------------------------------------------- kinds and layout


@pytest.mark.parametrize(
    ("info", "kind", "layout", "block_size"),
    [
        (tensor(10, 64), "linear", (10, 64), 8),
        (tensor(10, 30), "linear", (10, 30), 6),
        (tensor(10, 31), "linear", (10, 31), 8),
        (tensor(10, 17), "linear", (10, 17), 9),
        (tensor(10, 300), "linear", (10, 300), 8),
        (tensor(10, 5), "linear", (10, 5), 5),
        (tensor(10, 64, name="tok_embeddings.weight"), "embedding", (10, 64), 8),
        (tensor(10, 64, name="transformer.wte.weight"), "embedding", (10, 64), 8),
        (tensor(10, 64, name="memory.weight"), "linear", (10, 64), 8),
        (tensor(64, 32, name="embed_tokens.embeddings.2.1.weight"), "linear", (64, 32), 8),
        (tensor(1, 197, 768, name="pos_embed"), "embedding", (197, 768), 8),
        (tensor(1, 1, 768, name="cls_token"), "vector", (1, 768), 8),
        (tensor(8, 16, 1, 1), "conv1x1", (8, 16), 4),
        (tensor(8, 10, 1, 1), "conv1x1", (8, 10), 5),
        (tensor(8, 3, 3, 3), "conv3x3", (8, 27), 9),
        (tensor(8, 16, 5, 5), "conv5x5", (8, 400), 5),
        (tensor(64, 3, 7, 7), "conv7x7", (64, 147), 7),
        (tensor(64, 3, 16, 16, name="patch_embed.proj.weight"), "conv16x16", (64, 768), 8),
        (tensor(8, 4, 2, 2), "conv2x2", (8, 16), 8),
        (tensor(8, 4, 1, 3), "conv1x3", (8, 12), 6),
        (tensor(8, 1, 3, 3), "depthwise", (8, 9), 9),
        (tensor(8, 6, 3), "conv1d3", (8, 18), 9),
        (tensor(8, 6, 1), "conv1d1", (8, 6), 3),
        (tensor(8, 6, 128, name="pos_conv.weight"), "conv1d128", (8, 768), 8),
        (tensor(4, 6, 128, name="mlp.experts.gate_up_proj"), "experts", (24, 128), 8),
        (tensor(8, 4, 3, 3, 3), "conv3x3x3", (8, 108), 9),
        (tensor(8), "vector", (1, 8), 8),
        (tensor(), "vector", (1, 1), 1),
        (tensor(2, 2, 2, 2, 2, 2), "other", (2, 32), 8),
    ],
    ids=str,
)
def test_shape_and_name_tell_kind_layout_and_automatic_block_size(
    info: TensorInfo, kind: str, layout: tuple[int, int], block_size: int
) -> None:
    assert kind_of(info) == kind
    assert rows_and_columns(info) == layout
    assert auto_block_size(info) == block_size


@given(TENSORS)
def test_layout_covers_every_element_and_the_automatic_size_fits(info: TensorInfo) -> None:
    rows, columns = rows_and_columns(info)
    assert rows * columns == prod(info.shape)
    assert 1 <= auto_block_size(info) <= 12
    kind = kind_of(info)
    assert is_kind(kind) or 0 in info.shape
    assert belongs(kind, kind)


# ------------------------------------------------------------------------------------------------- sizes


@given(
    TENSORS,
    st.integers(1, 65_536),
    st.just("auto") | st.integers(1, 40),
    st.sampled_from(["dense", "quarter"]),
    st.sampled_from(["fp16", "fp32"]),
)
def test_what_is_quantized_gets_smaller_and_what_is_not_says_why(
    info: TensorInfo, n_centroids: int, block_size: int, clamp: str, codebook_dtype: str
) -> None:
    wish = Recipe(block_size=block_size, n_centroids=n_centroids, clamp=clamp, codebook_dtype=codebook_dtype)
    entry = entry_of(info, wish)
    assert entry.reason
    if entry.action == "keep":
        assert entry.scheme is None
        assert (entry.predicted_bytes, entry.n_vectors) == (info.n_bytes, 0)
        return
    scheme = entry.scheme
    assert scheme is not None
    assert 1 <= scheme.n_centroids <= min(n_centroids, entry.n_vectors)
    assert entry.n_vectors == entry.rows * ceil(entry.columns / scheme.block_size)
    item_bytes = 2 if codebook_dtype == "fp16" else 4
    n_bits = ceil(log2(scheme.n_centroids))
    codebook_bytes = scheme.n_centroids * scheme.block_size * item_bytes
    assert entry.predicted_bytes == codebook_bytes + ceil(entry.n_vectors * n_bits / 8)
    assert entry.predicted_bytes + plan.BOOKKEEPING_BYTES < info.n_bytes
    assert ("->" in entry.reason) == (scheme.n_centroids < n_centroids or block_size not in ("auto", scheme.block_size))


def test_the_strict_clamp_is_the_largest_power_of_two_below_a_quarter() -> None:
    for n_vectors, expected in ((4096, 512), (4097, 1024), (100, 16), (2048, 256)):
        info = tensor(n_vectors, 8)
        assert scheme_of(info, Recipe(n_centroids=65_536, clamp="quarter")).n_centroids == expected


def test_centroids_are_no_more_than_vectors() -> None:
    entry = entry_of(tensor(10, 64))
    assert entry.scheme is not None
    assert entry.scheme.n_centroids == 80
    assert "n_centroids 256 -> 80: there are only 80 vectors" in entry.reason


def test_centroids_are_halved_until_the_tensor_gets_smaller() -> None:
    entry = entry_of(tensor(32, 64, dtype="float16"), Recipe(block_size=8))
    assert entry.scheme is not None
    assert (entry.n_vectors, entry.scheme.n_centroids) == (256, 128)
    assert "n_centroids 256 -> 128: codebook plus assignments must stay below the dense 4,096 B" in entry.reason


def test_a_block_is_no_longer_than_a_row() -> None:
    entry = entry_of(tensor(1000, 3), Recipe(block_size=8))
    assert entry.scheme is not None
    assert entry.scheme.block_size == 3
    assert "block_size 8 -> 3: a row has no more columns" in entry.reason


def test_a_padded_row_counts_its_last_block() -> None:
    entry = entry_of(tensor(100, 30), Recipe(block_size=8))
    assert entry.n_vectors == 400
    assert "30 columns: the last block of each row is padded by 2" in entry.reason


def test_the_plans_total_is_the_sum_of_its_tensors() -> None:
    planned = plan.make(Recipe(), MODEL)
    assert planned.predicted_bytes == sum(entry.predicted_bytes for entry in planned.entries)
    assert [entry.info.name for entry in planned.quantized] == [MODEL[i].name for i in (0, 1, 3, 4)]


# ------------------------------------------------------------------------------------------------- reasons to keep


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (tensor(64), "1-D: norms and biases are kept exactly"),
        (tensor(), "a single number is kept exactly"),
        (tensor(1, 1, 768), "a single vector: kept exactly, like norms and biases"),
        (tensor(64, 64, dtype="int64"), "int64 is kept bit-exact"),
        (tensor(64, 64, dtype="float8_e4m3fn"), "float8_e4m3fn is kept bit-exact"),
        (tensor(0, 64), "empty: nothing to quantize"),
        (tensor(4, 4, 4, 4, 4, 4), "more than 5 dimensions: PQ does not know their meaning"),
        (tensor(64, 64, role="other"), "belongs to the training run (optimizer state and the like), not to the model"),
        (tensor(4, 24), "would not get smaller: 398 B as PQ with its bookkeeping, 384 B dense"),
    ],
)
def test_a_kept_tensor_says_why(info: TensorInfo, reason: str) -> None:
    entry = entry_of(info)
    assert (entry.action, entry.reason) == ("keep", reason)


def test_a_tied_tensor_is_an_alias_that_costs_nothing() -> None:
    alias = plan.make(Recipe(), MODEL).entries[-1]
    assert (alias.action, alias.predicted_bytes) == ("alias", 0)
    assert alias.reason == "shares its memory with 'embed.weight'"


def test_nothing_to_quantize_is_a_legal_plan() -> None:
    assert plan.make(Recipe(), [tensor(3)]).quantized == ()
    assert plan.make(Recipe(), []).entries == ()


# ------------------------------------------------------------------------------------------------- choosing tensors


def test_include_quantizes_only_what_it_matches() -> None:
    planned = plan.make(Recipe(include=("layers.0.fc1",)), MODEL)
    assert [entry.info.name for entry in planned.quantized] == ["layers.0.fc1.weight"]
    assert planned.entries[0].reason == "not included"


def test_exclude_keeps_what_it_matches_even_if_included() -> None:
    planned = plan.make(Recipe(include=("*fc*",), exclude=("re:layers\\.0\\.fc1",)), MODEL)
    assert [entry.info.name for entry in planned.quantized] == ["layers.0.fc2.weight", "layers.0.fc10.weight"]
    assert planned.entries[1].reason == "excluded by 're:layers\\\\.0\\\\.fc1'"


def test_a_tied_tensor_answers_to_all_of_its_names() -> None:
    kept = plan.make(Recipe(exclude=("head",)), MODEL).entries[0]
    assert (kept.action, kept.reason) == ("keep", "excluded by 'head', as 'head.weight'")
    assert actions(Recipe(include=("head",)))["embed.weight"] == "pq"
    assert actions(Recipe(rules=(Rule("head", action="keep"),)))["embed.weight"] == "keep"


def test_training_state_is_quantized_only_when_asked_for_by_name() -> None:
    moment = tensor(64, 64, name="optimizer.exp_avg", role="other")
    assert entry_of(moment, Recipe(include=("optimizer.*",))).action == "pq"
    assert entry_of(moment, Recipe(rules=(Rule("optimizer.*", action="pq"),))).action == "pq"
    assert entry_of(moment, Recipe(include=("*",))).action == "keep"
    assert entry_of(moment, Recipe(rules=(Rule("optimizer.*", block_size=4),))).action == "keep"


def test_an_included_vector_is_kept_all_the_same() -> None:
    assert set(actions(Recipe(include=("*.bias",))).values()) == {"keep", "alias"}


# ------------------------------------------------------------------------------------------------- rules


def test_the_first_rule_that_applies_wins() -> None:
    rules = (Rule("*fc1", block_size=2), Rule("*fc*", block_size=4, n_centroids=16, n_iter=3), Rule(block_size=16))
    planned = plan.make(Recipe(rules=rules, name="mine.yaml"), MODEL)
    assert [entry.scheme and entry.scheme.block_size for entry in planned.entries] == [16, 2, None, 4, 4, None]
    assert planned.entries[3].scheme == Scheme(4, 16, 3, "float16")
    assert planned.entries[3].reason == "linear, rule 2 of mine.yaml"


def test_a_rule_that_keeps_gives_its_reason() -> None:
    entry = entry_of(tensor(64, 64), Recipe(rules=(Rule("fc*", action="keep", why="too sensitive"),), name="x"))
    assert (entry.action, entry.reason) == ("keep", "rule 1 of x: keep (too sensitive)")


def test_rules_choose_by_kind_group_and_columns() -> None:
    tensors = [tensor(64, 64, 1, 1, name="a"), tensor(64, 64, 3, 3, name="b"), tensor(64, 64, name="c")]
    rules = (Rule(kind="pointwise", block_size=2), Rule(kind="conv", block_size=3), Rule(columns=64, block_size=5))
    planned = plan.make(Recipe(rules=rules), tensors)
    assert [entry.scheme and entry.scheme.block_size for entry in planned.entries] == [2, 3, 5]


def test_a_rule_may_depend_on_what_else_the_checkpoint_has() -> None:
    rules = (
        Rule("fc*", if_present="*conv3.weight", n_centroids=16),
        Rule("fc*", if_absent="*conv3.weight", n_centroids=32),
    )
    assert scheme_of(tensor(64, 64), Recipe(rules=rules)).n_centroids == 32
    tensors = [tensor(64, 64), tensor(8, 8, 1, 1, name="layer1.conv3.weight")]
    scheme = plan.make(Recipe(rules=rules), tensors).entries[0].scheme
    assert scheme is not None
    assert scheme.n_centroids == 16


# ------------------------------------------------------------------------------------------------- idle patterns


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            Recipe(include=("layers.*.fc3",)),
            "include 'layers.*.fc3' matches none of the 6 tensors; close names: 'layers",
        ),
        (Recipe(exclude=("haed*",)), "exclude 'haed*' matches none of the 6 tensors; close names: 'head.weight'"),
        (Recipe(exclude=("zzzz",)), "exclude 'zzzz' matches none of the 6 tensors; `pqcli plan SRC` lists all names"),
        (Recipe(exclude=("re:Embed.*",)), "'re:Embed.*' matches none of the 6 tensors; close names: 'embed.weight'"),
        (Recipe(rules=(Rule("*fc7*", block_size=4),), name="m.yaml"), "rule 1 of m.yaml: match '*fc7*' matches none"),
        (
            Recipe(rules=(Rule(kind="conv", block_size=4),), name="m.yaml"),
            "rule 1 of m.yaml: match '*' finds no tensor of kind conv (it finds 4 linear, 1 embedding, 1 vector); corr",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_close_names(wish: Recipe, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan.make(wish, MODEL)
    assert message in str(caught.value)


def test_an_optional_rule_or_one_whose_condition_fails_may_match_nothing() -> None:
    rules = (Rule("zzz", block_size=4, optional=True), Rule("zzz", block_size=4, if_present="zzz"))
    assert plan.make(Recipe(rules=rules), MODEL).quantized


def test_a_rule_shadowed_by_earlier_rules_is_no_error() -> None:
    assert plan.make(Recipe(rules=(Rule(block_size=4), Rule("embed*", block_size=8))), MODEL).quantized


# ------------------------------------------------------------------------------------------------- fairseq's YAML

FAIRSEQ_YAML = r"""
n_centroids:
    Linear:
        key: in_features
        value: {"*": 256, 64: 16}
    Embedding:
        key: embedding_dim
        value: {"*": 256}
block_sizes:
    Linear:
        key: fuzzy_name
        value: {fc: 8, attn: 4, emb: 4}
    Embedding:
        key: fuzzy_name
        value: {emb: 8}
layers_to_quantize:
    - decoder\\.layers\\.\d+\\.fc[12]
    - - decoder\\.embed_tokens\\.embeddings\\.[012]\\.[01]
      - decoder\.layers\.\d+\.self_attn\.(k_proj|v_proj|q_proj|out_proj)
"""


@pytest.mark.parametrize("prefix", ["", "model.", "model.module."])
def test_fairseqs_own_yaml_means_what_it_means_there(prefix: str) -> None:
    wish = documents.from_json(fairseq.translate(strictyaml.parse(FAIRSEQ_YAML)))
    expected = {
        "decoder.embed_tokens.embeddings.0.0.weight": (8, 256),
        "decoder.embed_tokens.embeddings.0.1.weight": (4, 256),
        "decoder.layers.0.fc1.weight": (8, 256),
        "decoder.layers.0.fc10.weight": None,
        "decoder.layers.0.self_attn.q_proj.weight": (4, 256),
        "decoder.layers.1.fc2.weight": (8, 16),
        "decoder.output.weight": None,
    }
    tensors = [tensor(512, 64 if "fc2" in name else 128, name=prefix + name) for name in expected]
    entries = plan.make(wish, tensors).entries
    got = {
        entry.info.name.removeprefix(prefix): entry.scheme and (entry.scheme.block_size, entry.scheme.n_centroids)
        for entry in entries
    }
    assert got == expected
    assert entries[-1].reason.endswith("keep (not listed in layers_to_quantize)")


def test_fairseqs_convolutions_are_chosen_by_kernel_size() -> None:
    sizes = {"key": "kernel_size", "value": {"*": 4, "(3, 3)": 9}}
    centroids = {"key": "fuzzy_name", "value": {"expand": 64, "*": 128}}
    data = {
        "n_centroids": {"Conv2d": centroids},
        "block_sizes": {"Conv2d": sizes},
        "layers_to_quantize": [".*conv.*", "linear"],
    }
    tensors = [
        tensor(64, 64, 3, 3, name="conv1.weight"),
        tensor(64, 1, 3, 3, name="conv2.weight", dtype="float64"),
        tensor(64, 64, 1, 1, name="conv.expand.weight"),
        tensor(64, 64, name="linear.weight"),
    ]
    entries = plan.make(documents.from_json(fairseq.translate(data)), tensors).entries
    schemes = [entry.scheme and (entry.scheme.block_size, entry.scheme.n_centroids) for entry in entries]
    assert schemes == [(9, 128), (9, 64), (4, 64), None]
    assert "no entry that fits" in entries[3].reason


def test_a_fairseq_pattern_that_matches_nothing_is_an_error() -> None:
    wish = documents.from_json(fairseq.translate({"layers_to_quantize": ["encoder\\.fc9"]}))
    with pytest.raises(RecipeError, match=r"encoder.*matches none of the 6 tensors"):
        plan.make(wish, MODEL)


# ------------------------------------------------------------------------------------------- the papers' accounting


def test_the_papers_count_bits_fp16_codebooks_and_fp32_for_the_rest() -> None:
    tensors = [
        ("conv.weight", 999, (100, 256, 9)),
        ("fc.bias", 10, None),
        ("bn.running_mean", 64, None),
        ("bn.num_batches_tracked", 1, None),
    ]
    assert paper_bytes(tensors) == 100 * 8 // 8 + 256 * 9 * 2 + 10 * 4


def test_long_blocks_start_on_samples_and_short_ones_do_not():
    tensors = [TensorInfo("a.weight", (4096, 384), "float32")]
    stages = {size: plan.make(Recipe(block_size=size), tensors).entries[0].scheme.stages for size in (2, 4, 8)}
    assert stages[2] == ()
    assert [n_iter for _, n_iter in stages[4]] == [6, 6, 5]
    assert stages[8] == ((24_576, 5), (49_152, 5), (98_304, 5))
    assert plan.make(Recipe(block_size=8, sample="all"), tensors).entries[0].scheme.stages == ()
