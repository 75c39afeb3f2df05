"""Small files inside a container: read by the specification too, and never written where a stranger wants them."""

import json
import re
import zlib
from pathlib import Path

import pytest
from safetensors import safe_open

import pqcli
from pqcli.container.files import is_inner_path
from tests.container.forging import taken_apart
from tests.container.test_format import FORMAT
from tests.container.test_golden import GOLDEN
from tests.container.test_hostile import refused
from tests.golden.make_files_v1 import FILES

FILE = GOLDEN / "files-v1.pq.safetensors"


def test_a_golden_file_gives_its_files(tmp_path):
    with pqcli.open(FILE) as container:
        assert container.files() == FILES
    decoded = pqcli.decode(FILE, tmp_path / "out")
    assert {name: (decoded / name).read_bytes() for name in FILES} == FILES
    assert (decoded / "model.safetensors").is_file()


def test_the_reader_of_the_specification_reads_files():
    blocks = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "def files" in block]
    names = {"zlib": zlib}
    exec(compile(code, str(FORMAT), "exec"), names)
    with safe_open(FILE, "np") as file:
        manifest = json.loads(zlib.decompress(file.get_tensor("pqcli.manifest").tobytes()))
        assert names["files"](file, manifest) == FILES


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a/../../x", "a//b", "", ".", "a/.", "a\\b", "c:x", "a\nb", "x" * 256, "a/" * 32 + "x"]
)
def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path, path):
    assert not is_inner_path(path)
    forgery = taken_apart(FILE)
    forgery.manifest["files"]["files"][0][0] = path
    refused(forgery, tmp_path, "a file called")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files["files"].append(list(files["files"][0])), "two have one path"),
        (lambda files: files["files"].append(["config.json/x", 0]), "two have one path"),
        (lambda files: files.update(n_bytes=files["n_bytes"] + 1), "its record calls for"),
        (lambda files: files.update(n_bytes=-1), "such lengths"),
        (lambda files: files.update(other=1), "files"),
        (lambda files: files["files"].append(["x", 10**13]), "Limits.decoded_bytes"),
        (lambda files: files["files"].append(["x", "1"]), "files"),
    ],
)
def test_a_table_of_files_that_makes_no_sense_is_refused(tmp_path, change, message):
    forgery = taken_apart(FILE)
    change(forgery.manifest["files"])
    refused(forgery, tmp_path, message)


def test_files_without_their_feature_are_refused_and_the_feature_without_them(tmp_path):
    forgery = taken_apart(FILE)
    del forgery.manifest["files"]
    refused(forgery, tmp_path, "does not describe the files")


def contents_of(file: Path, target: Path, data: bytes) -> Path:
    """The file with other bytes in `pqcli.files`, and all checksums true."""
    forgery = taken_apart(file)
    forgery.entries["pqcli.files"][1:] = [[len(data)], data]
    forgery.manifest["files"]["n_bytes"] = len(data)
    target.write_bytes(forgery.bytes())
    return target


@pytest.mark.parametrize("data", [b"", b"no zlib", zlib.compress(bytes(10)), zlib.compress(bytes(10_000_000))])
def test_contents_of_another_length_are_an_error_and_nothing_is_written(tmp_path, data):
    file = contents_of(FILE, tmp_path / "x.pq.safetensors", data)
    with pytest.raises(pqcli.PQError, match=r"pqcli\.files"):
        pqcli.decode(file)
    assert any("pqcli.files" in str(finding) for finding in pqcli.verify(file))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pq.safetensors"]


def test_a_file_is_never_written_over_weights(tmp_path):
    forgery = taken_apart(FILE)
    forgery.manifest["files"]["files"][0][0] = "model.safetensors"
    (tmp_path / "x.pq.safetensors").write_bytes(forgery.bytes())
    with pytest.raises(pqcli.PQError, match="weights that decode to a file of this name"):
        pqcli.decode(tmp_path / "x.pq.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pq.safetensors"]
