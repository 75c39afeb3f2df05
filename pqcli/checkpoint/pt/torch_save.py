"""The format of torch.save, as the table of formats wants it: a zip since torch 1.6, pickles in a row before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.pt.reader import read_legacy, read_zip
from pqcli.checkpoint.pt.rebuilding import TensorSlot, rebuild
from pqcli.checkpoint.pt.writer import write_pt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO

    from pqcli.checkpoint.bytesource import ByteSource
    from pqcli.checkpoint.opened import Layout
    from pqcli.checkpoint.pt.tree import Json
    from pqcli.checkpoint.rawbytes import Read
    from pqcli.tensors.info import TensorInfo

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How every torch.save file before 1.6 begins: a pickle (after its protocol bytes) of one magic number."""


def begins(head: bytes, _: int) -> bool:
    """Whether a file begins as a zip, or as the pickles of an old torch."""
    return head.startswith(_ZIP_MAGIC) or (
        head[:1] == b"\x80" and _LEGACY_MAGIC in head[2:24]  # protocol 4 puts a frame before it
    )


def read(source: ByteSource) -> Layout:
    """The layout of either kind; the skeleton is `{"tree": ...}`."""
    zipped = source.n_bytes >= len(_ZIP_MAGIC) and source.bytes_at(0, len(_ZIP_MAGIC)) == _ZIP_MAGIC
    return read_zip(source) if zipped else read_legacy(source)


def prepare(tensors: Sequence[TensorInfo], read: Read, skeleton: dict[str, Json]) -> Callable[[BinaryIO], int]:
    """Writes a zip: with the nesting of the skeleton where there is one, else a flat dict. Tied tensors stay tied."""
    value: Any = {info.name: TensorSlot(info) for info in tensors}
    if "tree" in skeleton:
        value = rebuild(skeleton["tree"], tensors)
    return lambda file: write_pt(file, value, tensors, read)
