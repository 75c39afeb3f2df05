"""Reports are put in order and held against limits, and what cannot be meant is refused."""

import math
import random

import pytest

from pqcli.errors import UsageError
from pqcli.reports.checks import SORT_KEYS, check, sort
from tests.reports.minilm_report import minilm_report, quantized, report_of, tensor_report


@pytest.fixture(scope="module")
def minilm():
    return minilm_report()


def kept(name="norm.bias", n=64):
    return tensor_report(name, (n,), random.Random(0))


@pytest.mark.parametrize("key", SORT_KEYS)
def test_sorting_keeps_every_tensor_and_puts_missing_numbers_last(minilm, key):
    ordered = sort(minilm, key).tensors
    assert sorted(tensor.name for tensor in ordered) == sorted(tensor.name for tensor in minilm.tensors)
    missing = [getattr(tensor, key) is None for tensor in ordered]
    assert missing == sorted(missing)


def test_sorting_puts_the_worst_first_and_keeps_the_order_of_equals():
    tensors = [
        quantized("a", relative_mse=0.1),
        quantized("b", relative_mse=math.nan),
        quantized("c", relative_mse=0.3),
    ]
    report = report_of(*tensors, kept("d"))
    assert [tensor.name for tensor in sort(report, "relative_mse").tensors] == ["b", "c", "a", "d"]
    assert [tensor.name for tensor in sort(report, "sqnr_db").tensors] == ["b", "c", "a", "d"]
    assert [tensor.name for tensor in sort(report, "n_centroids").tensors] == ["a", "b", "c", "d"]


def test_an_unknown_sort_key_lists_the_keys_and_suggests_a_close_one(minilm):
    with pytest.raises(UsageError, match=r"'relativ_mse' \(did you mean relative_mse\?\); keys: name, .*entropy"):
        sort(minilm, "relativ_mse")


def test_a_check_holds_exactly_when_no_layer_and_no_total_is_above(minilm):
    worst = max(tensor.relative_mse for tensor in minilm.quantized)
    assert check(minilm, f"relative_mse={worst!r}") is None
    message = check(minilm, f"relative_mse={math.nextafter(worst, 0)!r}")
    assert "1 of 39 quantized tensors" in message
    assert check(minilm, "compressed_bytes=1e9") is None
    assert "compressed_bytes" in check(minilm, "compressed_bytes=1000")


def test_a_failed_check_names_the_worst_layers_first_and_counts_the_rest(minilm):
    message = check(minilm, "relative_mse=0.1")
    first, second = sort(minilm, "relative_mse").tensors[:2]
    assert message.index(first.name) < message.index(second.name)
    assert message.endswith("and 34 more")


def test_what_could_not_be_measured_has_not_been_shown_to_hold():
    assert "unknown for 1 of 2" in check(report_of(quantized("a"), quantized("b", relative_mse=None)), "relative_mse=9")
    assert "b (nan)" in check(report_of(quantized("a"), quantized("b", relative_mse=math.nan)), "relative_mse=9")
    assert check(report_of(kept()), "relative_mse=0") is None


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("relative_mse", "not of the form KEY=X"),
        ("relative_mse=", "is not a number"),
        ("relative_mse=nan", "is not a number"),
        ("relative_mse=1e999", "is not a number"),
        ("relative_mse=1_0", "is not a number"),
        ("relative_mse= 1", "is not a number"),
        ("relative_mse=٣", "is not a number"),
        ("relative_mse=-1", "never negative"),
        ("relative_msa=1", "did you mean relative_mse"),
        ("sqnr_db=20", "use relative_mse=0.01"),
        ("=1", "keys: relative_mse"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_a_usage_error(minilm, condition, message):
    with pytest.raises(UsageError, match=message):
        check(minilm, condition)
