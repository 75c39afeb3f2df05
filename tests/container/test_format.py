"""`FORMAT.md` is the specification: its own decoder, run as printed, reads what pqcli writes."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import pqcli
from pqcli import container
from pqcli.container.manifest import StoredRecord

FORMAT = Path(container.__file__).parents[1] / "FORMAT.md"


def printed_decoder() -> str:
    """The Python of FORMAT.md that decodes a container."""
    found = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in found if "def decode" in block]
    return code


def decode_as_printed(path: Path) -> dict[str, torch.Tensor]:
    """All plainly quantized tensors of the container at `path`, by FORMAT.md's decoder."""
    code = printed_decoder()
    assert '"model.pq.safetensors"' in code
    names: dict = {}
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        exec(compile(code.replace("model.pq.safetensors", path.name), str(FORMAT), "exec"), names)
        records = [record for record in names["manifest"]["tensors"] if record["action"] == "pq"]
        return {record["name"]: to_original(names["decode"](record), record["dtype"]) for record in records}
    finally:
        os.chdir(here)


def to_original(values: np.ndarray, dtype: str) -> torch.Tensor:
    """The last sentence of the specification: converted to the original dtype, saturating."""
    wanted = getattr(torch, dtype)
    limit = torch.finfo(wanted).max
    return torch.from_numpy(values.astype(np.float64)).clamp(-limit, limit).to(wanted)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def checked(path: Path) -> int:
    """Compare the printed decoder with pqcli.load for every quantized tensor; returns their number."""
    printed, loaded = decode_as_printed(path), pqcli.load(path)
    for name, tensor in printed.items():
        assert same_bits(tensor.contiguous(), loaded[name].contiguous()), name
    return len(printed)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    (64, 64), (97, 30), (40, 7), (3, 4096), (1, 2048), (2048, 1), (16, 8, 3, 3), (96, 1, 3, 3), (48, 32, 1, 1),
    (24, 16, 5), (16, 8, 3, 3, 3), (4, 12, 40), (1, 50, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_decoder_of_the_specification_reads_every_shape_and_dtype(tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    state = {f"{i}/w": torch.randn(*shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
    torch.save(state, tmp_path / "model.pt")
    found = 0
    for n_centroids, block_size in ((1, "auto"), (2, 2), (13, 3), (32, 8), (300, "auto"), (1024, 1)):
        recipe = pqcli.Recipe(n_centroids=n_centroids, block_size=block_size, n_iter=2)
        pqcli.compress(tmp_path / "model.pt", tmp_path / "model.pq.safetensors", recipe, force=True)
        found += checked(tmp_path / "model.pq.safetensors")
    assert found >= 4 * len(SHAPES)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    block_size=st.integers(1, 12),
    n_centroids=st.integers(1, 70),
    scale=st.sampled_from([1.0, 1e-9, 1e9]),
    data=st.data(),
)
def test_any_matrix_reads_alike_by_the_specification_and_by_pqcli(
    tmp_path_factory, rows, columns, block_size, n_centroids, scale, data
):
    seed = data.draw(st.integers(0, 100))
    folder = tmp_path_factory.mktemp("any")
    weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    save_file({"w": weight.repeat(8, 4)}, folder / "m.safetensors")
    recipe = pqcli.Recipe(block_size=block_size, n_centroids=n_centroids, n_iter=2)
    pqcli.compress(folder / "m.safetensors", folder / "m.pq.safetensors", recipe)
    checked(folder / "m.pq.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_the_decoder_reads_files_that_keep_large_tensors_of_dtypes_numpy_does_not_have(tmp_path, dtype):
    state = {"kept": torch.ones(80_000).to(dtype), "w": torch.randn(64, 64)}
    torch.save(state, tmp_path / "model.pt")
    pqcli.compress(tmp_path / "model.pt", tmp_path / "model.pq.safetensors")
    assert checked(tmp_path / "model.pq.safetensors") == 1


def test_the_table_of_entries_names_exactly_what_a_file_holds(tmp_path):
    state = {"w": torch.randn(64, 64), "b": torch.randn(8), "kept": torch.arange(40_000)}
    torch.save(state, tmp_path / "model.pt")
    pqcli.compress(tmp_path / "model.pt")
    with safe_open(tmp_path / "model.pq.safetensors", "np") as file:
        found = {re.sub(r"/(w|kept)(?=/|$)", "/NAME", key) for key in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata()
    described = set(re.findall(r"^\| `([^`]+)` \|", FORMAT.read_text(encoding="utf-8"), re.MULTILINE))
    assert found <= described
    assert metadata == {"format": "pqcli", "version": "1", "features": "checksum,pq"}


def test_every_field_of_a_record_is_described_with_its_default(tmp_path):
    text = FORMAT.read_text(encoding="utf-8")
    for field in dataclasses.fields(StoredRecord):
        assert f"`{field.name}`" in text, field.name
