"""Reports add up and serialise."""

import csv
import io
import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.reports.figures import shannon_gap_db, sqnr_db
from tests.reports.minilm_report import minilm_report, quantized, report_of, tensor_report

CONTRACT = {
    "output",
    "original_bytes",
    "compressed_bytes",
    "ratio",
    "relative_mse",
    "bits_per_weight",
    "seconds",
    "tensors",
}
TENSOR_CONTRACT = {
    "name", "shape", "dtype", "action", "reason", "block_size", "n_centroids", "bits_per_weight", "relative_mse",
    "bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def minilm():
    return minilm_report()


def kept(name="norm.bias", n=64):
    return tensor_report(name, (n,), random.Random(0))


def test_the_bytes_of_tensors_and_overhead_add_up_to_the_file(minilm):
    assert minilm.tensor_bytes + minilm.overhead_bytes == minilm.compressed_bytes
    totals = minilm.to_json()["totals"]
    assert totals["quantized_bytes"] + totals["kept_bytes"] + totals["overhead_bytes"] == minilm.compressed_bytes
    assert totals["n_quantized"] + totals["n_kept"] + totals["n_aliases"] == totals["n_tensors"] == 104


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(1e-6, 1e6)), min_size=1, max_size=8))
def test_the_total_error_is_the_sum_of_noises_over_the_sum_of_energies(pairs):
    report = report_of(*(quantized(relative_mse=mse, energy=energy) for mse, energy in pairs))
    slow = sum(mse * energy for mse, energy in pairs) / sum(energy for _, energy in pairs)
    assert report.relative_mse == pytest.approx(slow)


def test_kept_and_tied_tensors_do_not_change_error_or_rate(minilm):
    alias = replace(kept(), action="alias", alias_of="x", bytes=0, n_weights=10**6)
    only = replace(minilm, tensors=minilm.quantized)
    more = replace(minilm, tensors=(*minilm.tensors, alias))
    assert only.relative_mse == minilm.relative_mse == more.relative_mse
    assert only.bits_per_weight == minilm.bits_per_weight == more.bits_per_weight
    assert more.n_weights == minilm.n_weights


def test_unknown_errors_make_the_total_unknown_rather_than_smaller():
    assert report_of(quantized(), quantized(relative_mse=None)).relative_mse is None
    assert report_of(quantized(), quantized(energy=None)).relative_mse is None
    assert report_of(quantized(), quantized(max_abs_error=None)).max_abs_error is None
    assert report_of(kept()).relative_mse is None
    assert report_of(kept()).bits_per_weight is None


def test_lossless_and_all_zero_tensors_have_an_error_of_zero():
    assert report_of(quantized(relative_mse=0.0)).relative_mse == 0
    assert report_of(quantized(relative_mse=0.0, energy=0.0)).relative_mse == 0
    assert report_of(quantized(relative_mse=0.0)).sqnr_db == math.inf


@given(st.floats(0.1, 8))
def test_a_coder_on_the_gaussian_bound_has_no_gap(bits):
    assert shannon_gap_db(2 ** (-2 * bits), bits) == pytest.approx(0, abs=1e-9)
    assert sqnr_db(2 ** (-2 * bits)) == pytest.approx(6.0206 * bits, rel=1e-5)


def test_plain_pq_of_minilm_lies_a_little_more_than_a_decibel_below_the_bound():
    assert shannon_gap_db(0.328, 1.056) == pytest.approx(1.52, abs=0.01)


def test_json_has_every_promised_field_and_survives_a_strict_parser(minilm):
    odd = quantized(relative_mse=math.nan, max_abs_error=math.inf, energy=math.nan)
    report = replace(minilm, tensors=(*minilm.tensors, odd), recipe={"eps": math.inf, "rules": ({"a": (1,)},)})
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert CONTRACT | {"paper_mib", "totals", "warnings"} <= document.keys()
    assert all(tensor.keys() >= TENSOR_CONTRACT for tensor in document["tensors"])
    assert document["relative_mse"] is None
    assert document["tensors"][-1]["sqnr_db"] is None
    assert document["recipe"] == {"eps": None, "rules": [{"a": [1]}]}
    assert document["ratio"] == pytest.approx(report.original_bytes / report.compressed_bytes)


def test_paper_mib_is_in_binary_units():
    assert report_of(quantized(), paper_bytes=1_615_904).paper_mib == pytest.approx(1.541, abs=5e-4)


@pytest.mark.parametrize(("n", "n_bytes"), [(0, 0), (1, 3), (2, 3), (128, 66), (129, 69), (1_000_000, 515_626)])
def test_int4_takes_half_a_byte_a_weight_and_two_bytes_a_group(n, n_bytes):
    assert quantized(n_weights=n).int4_bytes == n_bytes
    assert kept(n=n).int4_bytes is None


def test_assignments_and_int4_add_up_and_are_unknown_where_one_tensor_is():
    known = {"assignment_bytes": 10, "entropy_bytes": 8, "int4_relative_mse": 0.01, "energy": 3.0}
    report = report_of(quantized(**known), kept(), quantized(**{**known, "int4_relative_mse": 0.03, "energy": 1.0}))
    assert (report.assignment_bytes, report.entropy_bytes, report.int4_bytes) == (20, 16, 2 * (2048 + 64))
    assert report.int4_relative_mse == pytest.approx(0.015)
    assert report.to_json()["totals"]["int4_relative_mse"] == report.int4_relative_mse
    more = replace(report, tensors=(*report.tensors, quantized()))
    assert (more.assignment_bytes, more.entropy_bytes, more.int4_relative_mse) == (None, None, None)
    assert report_of(kept()).int4_bytes is None


def test_csv_and_json_hold_the_same_figures(minilm):
    report = replace(minilm, tensors=(*minilm.tensors, quantized('a,"b"\nc', relative_mse=0.0)))
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    tensors = report.to_json()["tensors"]
    assert [row["name"] for row in rows] == [tensor["name"] for tensor in tensors]
    for row, tensor in zip(rows, tensors, strict=True):
        assert row.keys() == tensor.keys()
        assert row["relative_mse"] == ("" if tensor["relative_mse"] is None else repr(tensor["relative_mse"]))
        assert row["shape"] == "x".join(map(str, tensor["shape"]))
    assert rows[-1]["sqnr_db"] == ""


def test_csv_defuses_formulas_and_writes_names_that_utf8_cannot():
    text = report_of(quantized("=HYPERLINK(1)"), quantized("\udc80")).to_csv()
    assert "\n'=HYPERLINK(1)," in text
    assert "\\udc80" in text
    text.encode()
