"""Recipes: valid or refused with a message that names the place, and the same after a round trip."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.errors import RecipeError, UsageError
from pqcli.recipe import documents, fairseq, loading, patterns, strictyaml
from pqcli.recipe.flags import override
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.recipe.settings import settings_of
from pqcli.tensors.kinds import KINDS

PATTERNS = st.sampled_from(["*", "fc*", "re:layer[0-9]+\\.fc", "a.b.weight", "[ab]*"])
SETTINGS = {
    "block_size": st.one_of(st.just("auto"), st.integers(1, 1000)),
    "n_centroids": st.integers(1, 65_536),
    "n_iter": st.integers(1, 100),
    "codebook_dtype": st.sampled_from(["fp16", "fp32"]),
}
RULES = st.builds(
    Rule,
    match=PATTERNS,
    kind=st.none() | st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(",".join),
    columns=st.none() | st.integers(1, 4096),
    if_present=st.none() | PATTERNS,
    action=st.sampled_from(["pq", None]),
    optional=st.booleans(),
    why=st.none() | st.text(max_size=9),
    block_size=SETTINGS["block_size"],
) | st.builds(Rule, match=PATTERNS, action=st.just("keep"))
RECIPES = st.builds(
    Recipe,
    **SETTINGS,
    seed=st.integers(0, 2**63 - 1),
    clamp=st.sampled_from(["dense", "quarter"]),
    sample=st.sampled_from(["auto", "all"]) | st.integers(1, 10**9),
    restarts=st.integers(1, 9),
    eps=st.floats(1e-30, 1.0),
    max_tentatives=st.integers(1, 99),
    include=st.lists(PATTERNS, max_size=3).map(tuple),
    exclude=st.lists(PATTERNS, max_size=3).map(tuple),
    rules=st.lists(RULES, max_size=3).map(tuple),
    name=st.text(max_size=9),
)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------- dataclasses and JSON


@given(RECIPES)
def test_a_recipe_survives_the_trip_through_json_data(wish: Recipe) -> None:
    assert documents.from_json(documents.to_json(wish)) == wish


def test_json_says_only_what_differs_from_the_defaults() -> None:
    assert documents.to_json(Recipe()) == {}
    wish = Recipe(block_size=4, rules=(Rule("fc*", action="keep"),), description="not kept")
    assert documents.to_json(wish) == {"block_size": 4, "rules": [{"match": "fc*", "action": "keep"}]}


def test_every_field_has_a_check() -> None:
    for made in (Recipe, Rule):
        assert [entry.name for entry in fields(made)] == list(settings_of(made))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size: must be a whole number of at least 1 or 'auto'; got 0"),
        ({"block_size": "8x"}, "block_size: must be a whole number of at least 1 or 'auto'; got the text '8x'"),
        ({"block_size": True}, "block_size: .*got the boolean true"),
        ({"n_centroids": 65_537}, "n_centroids: must be a whole number from 1 to 65,536; got 65537"),
        ({"n_centroids": 1.0}, "n_centroids: .*got 1.0"),
        ({"n_iter": 0}, "n_iter: must be a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"eps": 0}, "eps: must be a number above 0"),
        ({"eps": float("nan")}, "eps: must be a number above 0"),
        (
            {"codebook_dtype": "fp61"},
            "codebook_dtype: must be 'fp16' or 'fp32'; got 'fp61' .did you mean 'fp16'",
        ),
        ({"clamp": 3}, "clamp: must be 'dense' or 'quarter'; got 3"),
        ({"include": ["re:("]}, r"include: 're:\(' is no regular expression"),
        ({"exclude": [""]}, "exclude: a pattern may not be empty"),
        ({"rules": [{}]}, "rules: must be a tuple of Rule"),
    ],
)
def test_a_recipe_with_an_impossible_value_cannot_be_made(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**settings)  # type: ignore[arg-type]


def test_a_rule_that_sets_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="it sets nothing; give it one of block_size"):
        Rule("fc*")


def test_a_rule_that_keeps_has_no_use_for_settings() -> None:
    with pytest.raises(RecipeError, match="block_size: means nothing beside 'action: keep'"):
        Rule("fc*", action="keep", block_size=4)


# ------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc", "fc.weight", True),
        ("fc", "fc.bias", False),
        ("fc.*", "fc.bias", True),
        ("fc1", "fc10.weight", False),
        ("*.fc", "layers.3.fc.weight", True),
        ("FC", "fc.weight", False),
        ("re:fc[12]", "fc2.weight", True),
        ("re:fc", "fc2.weight", False),
        ("re:a|ab", "ab", True),
        ("*conv3.weight", "layer1.0.conv3.weight", True),
        ("*", "", True),
    ],
)
def test_patterns_match_the_whole_name_of_a_tensor_or_its_module(pattern: str, name: str, expected: bool) -> None:
    assert patterns.matches(pattern, name) is expected


# ------------------------------------------------------------------------------------------------- flags


def test_a_flag_that_is_none_or_empty_changes_nothing() -> None:
    wish = Recipe(block_size=4, include=("a",))
    assert override(wish, block_size=None, n_iter=None, include=[], exclude=()) == wish


def test_flags_have_the_last_word_over_rules_as_well() -> None:
    wish = Recipe(rules=(Rule("a", block_size=4), Rule("b", n_centroids=16), Rule("c", action="keep")))
    changed = override(wish, block_size="6")
    assert changed.block_size == 6
    assert changed.rules == (Rule("a", block_size=6), Rule("b", n_centroids=16), Rule("c", action="keep"))


def test_patterns_from_flags_add_to_those_of_the_recipe() -> None:
    wish = override(Recipe(exclude=("head",)), exclude=["emb*", "head"], include=["*.weight"])
    assert (wish.include, wish.exclude) == (("*.weight",), ("head", "emb*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"block_size": "0"}, "--block-size: must be a whole number of at least 1 or 'auto'; got 0"),
        ({"block_size": "big"}, "--block-size: .*got the text 'big'"),
        ({"n_centroids": 70_000}, "--n-centroids: must be a whole number from 1 to 65,536; got 70000"),
        ({"n_iter": -1}, "--n-iter: .*got -1"),
        ({"exclude": ["re:["]}, r"--exclude: 're:\[' is no regular expression"),
        ({"n_iters": 3}, "--n-iters: a recipe has no such field .did you mean 'n_iter'"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_a_usage_error_with_its_name(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(Recipe(), **flags)


# ------------------------------------------------------------------------------------------------- YAML files


def test_a_yaml_file_becomes_a_recipe_named_after_the_file(tmp_path: Path) -> None:
    text = """
        block_size: 4
        eps: 1e-5
        exclude: "head.*"
        rules:
          - {match: "*attn*", kind: [linear, conv], block_size: auto}
          - {match: no, action: keep}
    """
    assert loading.load(write(tmp_path, text)) == Recipe(
        block_size=4,
        eps=1e-5,
        exclude=("head.*",),
        rules=(Rule("*attn*", kind="linear,conv", block_size="auto"), Rule("no", action="keep")),
        name="mine.yaml",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of settings, not nothing"),
        ("- 1", r"a recipe is a mapping of settings, not the list \[1\]"),
        ("blok_size: 8", "blok_size: no such key .did you mean 'block_size'.*; known: block_size, n_centroids"),
        ("1: 8", "1: no such key; known: "),
        ("n_iter: 5\nn_iter: 6", "line 2, column 1: the key 'n_iter' is given twice"),
        ("n_iter: [", "line 1, column 10"),
        ("n_iter: yes", "n_iter: must be a whole number of at least 1; got the text 'yes'"),
        ("n_iter: true", "n_iter: .*got the boolean true"),
        ("n_centroids: 1e3", "n_centroids: .*got 1000.0"),
        ("include: 3", "include: must be a list of patterns; got 3"),
        ("include: [3]", "include: must be text; got 3"),
        ("rules: {match: a}", "rules: must be a list, each entry starting with a dash"),
        ("rules: [fc]", "rule 1: must be a mapping, such as {match: 'fc\\*', block_size: 4}; got the text 'fc'"),
        (
            "rules:\n- action: pq\n- {match: b, blocksize: 4}",
            "rule 2: blocksize: no such key .did you mean 'block_size'",
        ),
        ("rules: [{action: kep}]", "rule 1: action: must be 'pq' or 'keep'; got 'kep' .did you mean 'keep'"),
        ("rules: [{kind: lineal, block_size: 4}]", "rule 1: kind: there is no kind 'lineal' .did you mean 'linear'"),
        (
            "rules: [{match: no, optional: yes, action: pq}]",
            "rule 1: optional: must be true or false; got the text 'yes'",
        ),
        ("rules: [{match: *fc*, action: pq}]", "a pattern that starts with a star needs quotes"),
        ("include: *fc", "a pattern that starts with a star needs quotes"),
        ("a: &x [1]\nb: *x", "anchors .* are not supported"),
        ("a: !!python/object/apply:os.system [ls]", "tags .* are not supported"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_a_faulty_file_is_refused_with_the_file_and_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as caught:
        loading.load(path)
    assert str(caught.value).startswith(f"recipe {path!r}: ")


def test_a_file_that_is_no_text_or_far_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\x80\x02}q")
    with pytest.raises(RecipeError, match=r"is not text in UTF-8 \(byte 0\)"):
        loading.load(str(path))
    path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(RecipeError, match="is larger than 1,000,000 bytes"):
        loading.load(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "transfomer",
            "no preset is called 'transfomer', and no file either .did you mean 'transformer'.*presets: def",
        ),
        ("missing.yaml", "recipe 'missing.yaml': no such file"),
        ("x" * 5000, "File name too long"),
        ("", "recipe ''|no preset is called ''"),
        ("a\0b", "no preset is called"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_presets_there_are(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loading.load(source)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        loading.load(str(tmp_path))


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_as_a_recipe_error(text: str) -> None:
    with contextlib.suppress(RecipeError):
        assert isinstance(documents.from_json(strictyaml.parse(text)), Recipe)


def test_numbers_and_words_are_read_as_people_mean_them() -> None:
    text = "a: no\nb: 1e-6\nc: 010\nd: 1:30\ne: true\nf: 2024-01-01\ng: ~\nh: 0x10\ni: .5\nj: -3\nk: .inf\nl: '1'"
    expected = {"a": "no", "b": 1e-6, "c": 10, "d": "1:30", "e": True, "f": "2024-01-01"}
    expected |= {"g": None, "h": 16, "i": 0.5, "j": -3, "k": float("inf"), "l": "1"}
    assert strictyaml.parse(text) == expected


def test_recipes_and_plans_never_import_torch() -> None:
    code = "import sys, pqcli.plan.plan, pqcli.recipe.loading as r; r.load('default'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------- fairseq's YAML


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layers_to_quantize": []}, "layers_to_quantize: lists no layer"),
        ({"layers_to_quantize": ["("]}, r"layers_to_quantize: '\(' is no regular expression"),
        ({"layers_to_quantize": [3]}, "layers_to_quantize: must be a list of regular expressions; got 3"),
        ({"block_sizes": {"Liner": {}}}, "block_sizes.Liner: no such layer type; known: Linear, Embedding, Conv2d"),
        ({"block_sizes": {"Linear": 8}}, "block_sizes.Linear: must have a key and a value"),
        (
            {"block_sizes": {"Linear": {"key": "kernel_size", "value": {"*": 8}}}},
            "block_sizes.Linear.key: must be one of in_features, fuzzy_name; got 'kernel_size'",
        ),
        (
            {"block_sizes": {"Conv2d": {"key": "kernel_size", "value": {"3x3": 8}}}},
            r"block_sizes.Conv2d.value\[3x3\]: must be a kernel size such as",
        ),
        (
            {"n_centroids": {"Linear": {"key": "in_features", "value": {"*": "many"}}}},
            r"n_centroids.Linear.value\[\*\]: must be a whole number of at least 1; got 'many'",
        ),
        ({"block_sizes": {}, "n_iter": 3}, "n_iter: no such key in fairseq's vocabulary"),
    ],
)
def test_a_fault_in_fairseqs_vocabulary_is_named_with_its_key(data: dict[str, object], message: str) -> None:
    assert fairseq.is_fairseq(data)
    with pytest.raises(RecipeError, match=message):
        fairseq.translate(data)


def test_sections_missing_from_fairseqs_yaml_take_its_defaults() -> None:
    wish = documents.from_json(fairseq.translate({"layers_to_quantize": [["encoder\\.fc"]]}))
    blocks = [(rule.kind, rule.block_size, rule.n_centroids) for rule in wish.rules if rule.action == "pq"]
    assert blocks == [("linear", 8, 256), ("linear", 4, 256), ("linear", 4, 256), ("embedding", 8, 256)]
