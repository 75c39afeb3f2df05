"""Containers in several files: read by the specification too, and refused where files are missing, wrong or foreign."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pqcli
from pqcli.container.layout import lay_out
from pqcli.container.manifest import CodedStreams
from pqcli.container.shards import cut
from pqcli.errors import ContainerError
from tests.container.forging import taken_apart
from tests.container.small import raw
from tests.container.test_format import FORMAT, same_bits, to_original
from tests.container.test_golden import GOLDEN
from tests.golden.make_plain_v1 import digests
from tests.golden.make_shards_v1 import RECIPES, checkpoint

INDEX = "model.pq.safetensors.index.json"


@pytest.fixture(params=RECIPES)
def golden(request):
    return GOLDEN / request.param


@pytest.fixture
def copy(tmp_path, golden):
    return Path(shutil.copytree(golden, tmp_path / "c"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pq.safetensors"))


def refused(folder: Path, message: str) -> None:
    """Every verb refuses the folder, and the index alone."""
    for source in (folder, folder / INDEX):
        for verb in (pqcli.load, pqcli.report, pqcli.decode):
            with pytest.raises(ContainerError, match=message):
                verb(source)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_golden_folder_decodes_to_the_tensors_it_always_decoded_to(golden):
    expected = json.loads(golden.with_name(golden.name + ".json").read_text(encoding="utf-8"))
    for source in (golden, golden / INDEX):
        assert digests(pqcli.load(source)) == expected
        assert pqcli.verify(source) == []
    assert len(shards(golden)) > 2
    original, decoded = checkpoint(), pqcli.load(golden)
    assert decoded.keys() == original.keys()
    assert torch.equal(decoded["large"], original["large"])


def test_all_that_belongs_to_a_tensor_lies_in_one_file(golden):
    places = json.loads((golden / INDEX).read_text())["weight_map"]
    found: dict[str, set[str]] = {}
    for key, name in places.items():
        if key.startswith(("pq/", "keep/", "zero/")):
            found.setdefault(re.sub(r"^\w+/|/(codebook|assignments)$", "", key), set()).add(name)
    assert found
    assert all(len(names) == 1 for names in found.values())


def test_the_reader_of_the_specification_reads_several_files(monkeypatch):
    monkeypatch.chdir(GOLDEN / "shards-v1")
    blocks = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    (reader,) = [block for block in blocks if "class Shards" in block]
    (decoder,) = [block for block in blocks if "def decode" in block]
    names = {"json": json, "safe_open": safe_open}
    exec(compile(reader, str(FORMAT), "exec"), names)
    decoder = decoder.replace('safe_open("model.pq.safetensors", "numpy")', f'Shards("{INDEX}")')
    exec(compile(decoder.replace("from safetensors import safe_open", ""), str(FORMAT), "exec"), names)
    loaded = pqcli.load(".")
    records = [record for record in names["manifest"]["tensors"] if record["action"] == "pq"]
    assert len(records) == 4
    for record in records:
        assert same_bits(to_original(names["decode"](record), record["dtype"]), loaded[record["name"]])


def test_a_container_in_several_files_gives_what_it_gives_in_one(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    torch.save(checkpoint(), source / "pytorch_model.bin")
    for recipe in RECIPES.values():
        one = pqcli.compress(source, tmp_path / "one", recipe, force=True)
        many = pqcli.compress(source, tmp_path / "many", recipe, force=True, shard_bytes=1500)
        seen = pqcli.preview(source, tmp_path / "many", recipe, shard_bytes=1500)
        size = sum(path.stat().st_size for path in (tmp_path / "many").iterdir())
        assert many.compressed_bytes == size == seen.predicted_bytes == pqcli.report(tmp_path / "many").compressed_bytes
        assert many.relative_mse == one.relative_mse
        a, b = pqcli.load(tmp_path / "one"), pqcli.load(tmp_path / "many")
        assert list(a) == list(b)
        assert all(raw(a[name]) == raw(b[name]) for name in a)
        assert pqcli.verify(tmp_path / "many", source) == []
        back = pqcli.decode(tmp_path / "many", tmp_path / "back", force=True)
        assert [path.name for path in back.iterdir()] == ["pytorch_model.bin"]


def test_no_file_is_larger_than_asked_for_but_for_one_that_one_tensor_fills():
    with pqcli.open(GOLDEN / "shards-v1") as container:
        manifest = replace(container.manifest, shards=None, features=("checksum", "pq"))
    found = cut(manifest, None, 2000, "x")
    sizes = [layout.n_bytes for layout in found.layouts]
    assert [size > 2000 for size in sizes].count(True) == 1  # the large one
    assert cut(manifest, None, None, "x").layouts == (lay_out(manifest),)
    assert cut(manifest, None, 10**6, "x").layouts == (lay_out(manifest),)
    assert cut(manifest, None, 10**6, "x").manifest == manifest


def test_streams_are_spread_and_never_cut():
    with pqcli.open(GOLDEN / "shards-ecpq-v1") as container:
        manifest = replace(container.manifest, shards=None, features=("checksum", "ecpq", "kept-coded"))
    coded = CodedStreams("ecpq", 100, (900, 300, 500, 2500, 10, 700))
    found = cut(replace(manifest, coded=coded), 20, 1500, "x")
    pieces = [
        (entry.key, entry.n_bytes) for layout in found.layouts for entry in layout.entries if "coded" in entry.key
    ]
    assert [key for key, _ in pieces] == ["pqcli.coded", *(f"pqcli.coded/{i}" for i in range(2, len(pieces) + 1))]
    ends = [100 + sum(coded.streams[: i + 1]) for i in range(len(coded.streams))]
    total = 0
    for _, n_bytes in pieces:
        total += n_bytes
        assert total in ends
    assert total == coded.n_bytes
    assert len(pieces) >= 4


# -- from strangers ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_is_told(copy):
    shards(copy)[-1].unlink()
    refused(copy, r"1 of the \d+ files of this container are not there .*did not finish")


def test_a_file_of_another_container_is_refused(copy, golden):
    other = GOLDEN / next(name for name in RECIPES if name != golden.name)
    first, second = shards(copy)[1], shards(other)[1]
    shutil.copy(second, first)
    refused(copy, "do not belong together|of another container|cannot be, or in two")


def test_a_file_with_other_data_is_found_by_verify_and_by_decoding(copy):
    last = shards(copy)[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert pqcli.verify(copy) != []
    with pytest.raises(ContainerError):
        pqcli.load(copy)


def test_a_file_whose_header_was_changed_is_refused_at_once(copy):
    last = shards(copy)[-1]
    data = last.read_bytes()
    last.write_bytes(data.replace(b'"version":"1"', b'"version":"2"', 1))
    refused(copy, "a file of another container, or damaged")


@pytest.mark.parametrize("name", ["../x.pq.safetensors", "/x.pq.safetensors", "sub/x.pq.safetensors", "", None, 3, "x"])
def test_an_index_that_leads_elsewhere_is_refused(copy, name):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["pqcli.manifest"] = name
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, r"no index of a container: it places 'pqcli\.manifest' in")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 100_000, "nul"])
def test_an_index_that_is_none_is_refused(copy, text):
    (copy / INDEX).write_text(text)
    refused(copy, "no index of a container")


@pytest.mark.parametrize("change", ["swap", "drop", "add"])
def test_an_index_that_does_not_fit_is_refused(copy, change):
    index = json.loads((copy / INDEX).read_text())
    places = index["weight_map"]
    keys = list(places)
    if change == "swap":
        places[keys[0]] = next(name for name in places.values() if name != places[keys[0]])
    elif change == "drop":
        del places["pqcli.hashes"]
    else:
        places["more"] = places[keys[0]]
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, "index and files do not belong together")


def test_one_file_alone_says_what_it_is(copy):
    for path in shards(copy):
        for verb in (pqcli.load, pqcli.report, pqcli.verify):
            with pytest.raises(ContainerError, match=r"of several files of one container; name its index"):
                verb(path)


@pytest.mark.parametrize(
    ("shards_told", "message"), [(2, "files"), (99, "files"), (1, "shards"), (None, "shards|tell")]
)
def test_another_number_of_files_than_told_is_refused(copy, shards_told, message):
    first = shards(copy)[0]
    forgery = taken_apart(first)
    forgery.manifest["shards"] = shards_told
    first.write_bytes(forgery.bytes())
    with pytest.raises(ContainerError):
        pqcli.load(copy)
