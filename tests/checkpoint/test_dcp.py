"""Folders of torch.distributed.checkpoint: read whole, or refused with the line that converts them."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from pqcli import checkpoint
from pqcli.errors import CheckpointError
from tests.checkpoint.checkpoint_cases import assert_same, round_trip, small_model

pytestmark = pytest.mark.filterwarnings("ignore")

WHOLE = torch.arange(60.0).reshape(6, 10)


def value():
    torch.manual_seed(0)
    return {
        "model": small_model().state_dict(),
        "half": torch.randn(3, 4).bfloat16(),
        "empty": torch.ones(0, 3),
        "step": 5,
        "optimizer": {"lr": 0.1, "groups": [1, torch.ones(3), {"name": "x"}], "none": None},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp") / "step-5"
    dcp.save(value(), checkpoint_id=folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "step-5")
    return tmp_path / "step-5"


def test_it_is_read_whole_and_comes_back_as_torchs_own_conversion(folder, tmp_path):
    (folder / "config.json").write_text("{}")
    opened = round_trip(folder, tmp_path / "b.pt")
    assert opened.format == "pt"
    assert opened.n_bytes == sum((folder / name).stat().st_size for name in (".metadata", "__0_0.distcp"))
    assert opened.side_files == ("config.json",)
    assert [item.reason for item in opened.dropped] == ["a torch distributed checkpoint: comes back as one .pt"]
    dcp_to_torch_save(folder, tmp_path / "torch.pt")
    expected, got = (torch.load(tmp_path / name, weights_only=False) for name in ("torch.pt", "b.pt"))
    assert_same(sorted_keys(got), sorted_keys(expected))
    names = {info.name: info.role for info in opened.tensors}
    assert names["model.0.weight"] == names["half"] == "model"
    assert names["optimizer.groups.1"] == "other"


def sorted_keys(item):
    if isinstance(item, dict):
        return {key: sorted_keys(item[key]) for key in sorted(item)}
    return [sorted_keys(part) for part in item] if isinstance(item, list) else item


def test_it_opens_again_in_another_process_and_reads_pieces(folder):
    with checkpoint.open(folder) as opened:
        again = pickle.loads(pickle.dumps(opened))
        assert torch.equal(again.read("half"), value()["half"])
        assert torch.equal(again.read_flat("half", 3, 9), value()["half"].reshape(-1)[3:9])
        message = pickle.dumps(opened)
        model = opened.model_only()
        assert "optimizer.groups.1" not in {info.name for info in model.tensors}
        assert torch.equal(model.read("half"), value()["half"])
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    (folder / "__0_0.distcp").write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp' has changed"):
        pickle.loads(message)


def edit(folder, change):
    """Change the metadata, with torch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def cut(folder, boxes):
    """A folder in which the tensor `w` is in pieces, each saved by itself: [(offsets, sizes)]."""
    parts = {
        f"part{number}": WHOLE[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))].contiguous()
        for number, box in enumerate(boxes)
    }
    dcp.save({**parts, "other": torch.ones(2)}, checkpoint_id=folder)

    def join(metadata):
        entry = metadata.state_dict_metadata["part0"]
        entry.size = torch.Size([6, 10])
        entry.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(n)) for at, n in boxes]
        for number, (at, _) in enumerate(boxes):
            place = next(key for key in metadata.storage_data if key.fqn == f"part{number}")
            metadata.storage_data[MetadataIndex("w", torch.Size(at), number)] = metadata.storage_data.pop(place)
            metadata.state_dict_metadata.pop(f"part{number}")
        metadata.state_dict_metadata["w"] = entry
        metadata.planner_data = {"w": ("w",), "other": ("other",)}

    edit(folder, join)
    return folder


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 10)), ((4, 0), (2, 10))],
        [((0, 5), (6, 5)), ((0, 0), (6, 5))],
        [((0, 0), (3, 5)), ((3, 0), (3, 5)), ((0, 5), (3, 5)), ((3, 5), (3, 5))],
    ],
)
def test_a_tensor_in_pieces_is_put_together(tmp_path, boxes):
    with checkpoint.open(cut(tmp_path / "a", boxes)) as opened:
        assert torch.equal(opened.read("w"), WHOLE)
        assert torch.equal(opened.read_flat("w", 7, 43), WHOLE.reshape(-1)[7:43])


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 10))],
        [((0, 0), (4, 10)), ((3, 0), (2, 10))],
        [((0, 0), (4, 10)), ((2, 0), (2, 10))],
        [((0, 0), (3, 10)), ((3, 0), (2, 10))],
    ],
)
def test_pieces_that_do_not_fill_the_tensor_are_refused(tmp_path, boxes):
    refused(cut(tmp_path / "a", boxes), "chunks of 'w' do not fill its shape")


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(folder)
    assert f"dcp_to_torch {folder} out.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def first_place(metadata, name="half"):
    return next(key for key in metadata.storage_data if key.fqn == name)


def set_place(metadata, **fields):
    for name, content in fields.items():
        setattr(metadata.storage_data[first_place(metadata)], name, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: set_place(m, relative_path="../x.distcp"), "damaged"),
        (lambda m: set_place(m, relative_path="/etc/passwd"), "damaged"),
        (lambda m: set_place(m, relative_path=7), "damaged"),
        (lambda m: set_place(m, relative_path="__9_0.distcp"), r"file __9_0\.distcp is missing"),
        (lambda m: set_place(m, offset=-1), "damaged"),
        (lambda m: set_place(m, offset=2**62), "truncated"),
        (lambda m: set_place(m, offset="0"), "damaged"),
        (lambda m: set_place(m, length=20), "zip directory"),
        (lambda m: set_place(m, offset=7), "zip directory|does not begin where"),
        (lambda m: set_place(m, transform_descriptors=["zstd"]), "data are transformed"),
        (lambda m: m.storage_data.pop(first_place(m)), "damaged"),
        (lambda m: m.storage_data.update({MetadataIndex("x"): m.storage_data[first_place(m)]}), "belong to nothing"),
        (lambda m: m.state_dict_metadata.pop("half"), "belong to nothing"),
        (lambda m: m.state_dict_metadata.update(half=3), "damaged"),
        (lambda m: setattr(m.state_dict_metadata["half"], "size", torch.Size([4, 3])), "do not fill"),
        (lambda m: setattr(m.state_dict_metadata["half"], "size", torch.Size([2**40, 3])), "do not fill"),
        (lambda m: setattr(m.state_dict_metadata["half"], "size", 5), "damaged"),
        (lambda m: setattr(m.state_dict_metadata["half"], "chunks", []), "damaged|chunks"),
        (lambda m: m.planner_data.update(half=("optimizer", "groups", 10**9)), "damaged"),
        (lambda m: m.planner_data.update(half=("step", "x")), "damaged"),
        (lambda m: m.planner_data.update(half=()), "damaged"),
        (lambda m: m.planner_data.update(half=7), "damaged"),
        (lambda m: setattr(m, "storage_data", None), "damaged"),
        (lambda m: setattr(m, "state_dict_metadata", {}), "belong to nothing"),
    ],
)
def test_metadata_that_cannot_be_right_are_refused(folder, change, message):
    edit(folder, change)
    refused(folder, message)


def test_a_folder_of_which_something_is_missing_is_refused(folder):
    (folder / "__1_0.distcp").write_bytes(b"x")
    refused(folder, r"file __1_0\.distcp is mentioned nowhere")
    (folder / "__1_0.distcp").unlink()
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-100])
    refused(folder, "truncated")
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="without weights"):
        checkpoint.open(folder)
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / ".metadata").unlink()
    refused(folder, r"has no \.metadata")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}.", b"\x80\x02N.", pickle.dumps(pickle.loads), b"\x80\x02]q\x00h\x00a."]
)
def test_metadata_that_are_something_else_are_refused(folder, content):
    (folder / ".metadata").write_bytes(content)
    refused(folder, "cannot read")


def test_a_flipped_bit_in_a_piece_is_found(folder):
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    raw = value()["half"].view(torch.uint8).numpy().tobytes()
    data[data.index(raw)] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    with checkpoint.open(folder) as opened, pytest.raises(CheckpointError, match=r"'half'.*checksum"):
        opened.read("half")


def test_one_file_of_it_is_not_taken_for_a_checkpoint(folder):
    with pytest.raises(CheckpointError, match=r"several archives in a row.*distributed checkpoint.*name its folder"):
        checkpoint.open(folder / "__0_0.distcp")
