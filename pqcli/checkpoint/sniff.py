"""What kind of file is it? Told by the first bytes, never by the extension.

People hand over what the download left behind: a Git LFS pointer, a login page, a half file. Each of those gets its
own message here, so that no reader further in has to guess.
"""

from __future__ import annotations

import re
import stat
import struct
from typing import TYPE_CHECKING, Literal

from pqcli.checkpoint.bytesource import reading
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["zip", "legacy", "safetensors", "folder"]

HEAD_BYTES = 4096
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How every torch.save file before 1.6 begins: a pickle (after its protocol bytes) of one magic number."""

_EXPORT = "export the weights with its own library first (for instance with transformers' save_pretrained)"
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run 'git lfs pull' to fetch the real file"),
    (b"GGUF", f"a GGUF model; {_EXPORT}"),
    (b"ggml", f"a GGML model; {_EXPORT}"),
    (b"lmgg", f"a GGML model; {_EXPORT}"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?); save the weights as .safetensors first"),
    (b"\x93NUMPY", "a numpy array; save a dict of tensors as .pt or .safetensors first"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a PNG picture"),
)


def sniff(path: Path) -> Kind:
    """The kind of checkpoint at `path`; raises `CheckpointError` saying what it is instead."""
    with reading(path):
        try:
            mode = path.stat().st_mode
        except ValueError as error:
            raise CheckpointError("a file name cannot contain a null byte") from error
        if stat.S_ISDIR(mode):
            return "folder"
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"'{path}' is a device, pipe or socket; name an ordinary file or a folder")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        n_bytes = path.stat().st_size
    kind = kind_of(head, n_bytes)
    if kind is None:
        raise CheckpointError(f"'{path}' is {_foreign(head, n_bytes)}")
    return kind


def kind_of(head: bytes, n_bytes: int) -> Literal["zip", "legacy", "safetensors"] | None:
    """The kind of checkpoint that begins with `head`, or None."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head[2:24]:  # protocol 4 puts a frame before it
        return "legacy"
    if len(head) > 9 and head[8:9] == b"{":
        (header_bytes,) = struct.unpack("<Q", head[:8])
        # A length that exceeds the file is a truncated download as long as the length itself is plausible
        if header_bytes <= n_bytes or header_bytes < 1 << 32:
            return "safetensors"
    return None


def _foreign(head: bytes, n_bytes: int) -> str:
    """What a file that is no checkpoint is, and what to do."""
    if not head:
        return "empty (0 bytes); the download or the save did not finish"
    for magic, message in _FOREIGN:
        if head.startswith(magic):
            return message
    if head[257:262] == b"ustar":
        return (
            "a tar archive; unpack it first, or, if torch before 0.1.10 wrote it, load it and save it again with torch"
        )
    text = _text_kind(head.lstrip(b"\xef\xbb\xbf \t\r\n").lower())
    if text:
        return text
    if head.startswith(b"PK"):
        return "a damaged zip archive; fetch it again"
    if b"onnx" in head[:64] or b"pytorch" in head[:64]:
        return f"an ONNX model; {_EXPORT}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return (
            "a plain Python pickle, not written by torch.save; it may run code when opened, so pqcli does not; "
            "if you trust it, load it and save the tensors with torch.save or safetensors"
        )
    if b"TFL3" in head[4:8]:
        return f"a TensorFlow Lite model; {_EXPORT}"
    if not head.strip(b"\x00"):
        return f"full of zeros ({n_bytes:,} bytes); the download did not finish"
    return "not a checkpoint that pqcli knows (.pt/.pth/.bin/.th of torch.save, .safetensors, or a Hugging Face folder)"


def _text_kind(text: bytes) -> str | None:
    """What a file that begins with this text is; None where it is no text."""
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not the weights; the download was answered with a web page (a login or an error?)"
    if re.search(rb"[^\t\r\n\x20-\x7e]", text):
        return None
    if text.startswith(b"<"):
        return "an XML or HTML document, not the weights"
    if text.startswith((b"{", b"[")):
        return "a JSON text, not the weights; name the folder if it is the index of a sharded checkpoint"
    return "a text file, not a checkpoint"
