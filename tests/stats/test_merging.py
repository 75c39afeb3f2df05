"""Statistics added up, shown, and refused where they are not of one kind."""

import io
import json

import pytest
import torch
from torch import nn

import pqcli
from pqcli.cli.console import Console
from pqcli.errors import OutputError, StatsError, UsageError
from pqcli.jobs import statistics
from pqcli.stats import open as open_stats


def collected(file, model, *batches, **options):
    with pqcli.collect(model, gradients=True, **options) as stats:
        for batch in batches:
            stats.backward(model(batch))
    stats.save(file, dtype="float32")
    return file


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 8), nn.Linear(8, 3))


def ids(seed, n=5):
    return torch.randint(30, (n, 6), generator=torch.Generator().manual_seed(seed))


def test_sums_and_counts_add_up_exactly(tmp_path, network):
    files = [collected(tmp_path / f"{i}", network, ids(i)) for i in range(3)]
    assert statistics.merge(files, tmp_path / "sum") == 3
    found, parts = open_stats(tmp_path / "sum"), [open_stats(file) for file in files]
    for name in found.names:
        weight, others = found.weights[name], [part.weights[name] for part in parts]
        assert weight.n_gradient == sum(other.n_gradient for other in others)
        for part in ("gradient", "lookups"):
            if getattr(weight, part) is not None:
                expected = sum(getattr(other, part) for other in others)
                assert torch.equal(getattr(weight, part), expected)
        if weight.site is not None:
            sites = [part.site(other.site) for part, other in zip(parts, others, strict=True)]
            assert torch.equal(found.site(weight.site).diagonal, sum(site.diagonal for site in sites))
            assert torch.equal(found.site(weight.site).total, sum(site.total for site in sites))
            assert found.outline(weight.site).counts == tuple(
                sum(site.counts[half] for site in sites) for half in (0, 1)
            )


def test_unlike_files_are_refused_with_what_differs(tmp_path, network):
    first = collected(tmp_path / "first", network, ids(0))
    wider = collected(tmp_path / "wider", nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 9)), ids(0))
    inputs = collected(tmp_path / "inputs", nn.Sequential(nn.Embedding(30, 10), nn.Linear(10, 8)), ids(0))
    words = collected(tmp_path / "words", nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 8)), ids(0))
    blocks = collected(tmp_path / "blocks", network, ids(0), full_width=6, block_width=4)
    for file, said in (
        (wider, "rows of its gradient differs: 8 in .*first, 9 in .*wider"),
        (inputs, "'1.weight': the number of its inputs differs: 12 in .*first, 10 in .*inputs"),
        (words, "'0.weight': the number of rows of its lookups differs: 30 in .*first, 40 in .*words"),
        (blocks, r"form of its moments differs: full \(width 12\) in .*first, blocks \(width 4\) in .*blocks"),
    ):
        with pytest.raises(StatsError, match=said):
            statistics.merge([first, file], tmp_path / "sum")
    single = nn.ModuleDict({"x": nn.Linear(12, 8)})
    with pqcli.collect(single) as stats:
        single["x"](torch.ones(2, 12))
    stats.save(tmp_path / "x")
    with pytest.raises(StatsError, match=r"x \(1 weights: x.weight, ...\) and .*first .* no weight in common"):
        statistics.merge([first, tmp_path / "x"], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    with pytest.raises(UsageError, match="two files or more"):
        statistics.merge([first], tmp_path / "sum")
    with pytest.raises(OutputError, match="exists"):
        statistics.merge([first, first], first)


def test_a_table_shows_what_is_known_of_each_weight_and_json_the_same(tmp_path, network):
    file = collected(tmp_path / "a", network, ids(0))
    rows = statistics.show(file)
    assert [(row.name, row.form, row.width, row.n_samples) for row in rows] == [
        ("0.weight", "rows", None, 30),
        ("1.weight", "full", 12, 30),
        ("2.weight", "full", 8, 30),
    ]
    assert all(row.gradient > 0 for row in rows)
    size = file.stat().st_size
    assert 0.4 * size < sum(row.bytes for row in rows) <= 1.5 * size
    plain, document = io.StringIO(), io.StringIO()
    Console(stdout=plain, width=100).statistics(rows)
    assert "1.weight" in plain.getvalue()
    assert "3 weights" in plain.getvalue()
    Console(stdout=document, json=True).statistics(rows)
    assert [row["name"] for row in json.loads(document.getvalue())] == ["0.weight", "1.weight", "2.weight"]


def test_weights_that_share_their_inputs_say_so(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in "qk"})
    x = torch.ones(3, 6)
    with pqcli.collect(model) as stats:
        model["q"](x), model["k"](x)
    stats.save(tmp_path / "a")
    q, k = statistics.show(tmp_path / "a")
    assert (q.shares, k.shares, k.bytes) == (None, "q.weight", 0)
