"""What kind of file is it? Told by the first bytes, never by the extension.

People hand over what the download left behind: a Git LFS pointer, a login page, a half file. Each of those gets its
own message here, so that no reader further in has to guess.
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING

from pqcli.checkpoint import formats
from pqcli.checkpoint.bytesource import reading
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

HEAD_BYTES = 4096

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


_ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x01-\x40]")
"""The version of its format and the length of its producer's name: how a model in ONNX's protocol buffers begins."""


def sniff(path: Path) -> str:
    """The name of the format of the file at `path`, "folder" for a folder.

    Raises `CheckpointError` where it is neither, saying what it is instead.
    """
    with reading(path):
        try:
            mode = path.stat().st_mode
        except ValueError as error:
            raise CheckpointError("a file name cannot contain a null byte") from error
        if stat.S_ISDIR(mode):
            return formats.FOLDER
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"'{path}' is a device, pipe or socket; name an ordinary file or a folder")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        n_bytes = path.stat().st_size
    found = formats.recognised(head, n_bytes)
    if found is None:
        raise CheckpointError(f"'{path}' is {_foreign(head, n_bytes)}")
    return found.name


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
    if b"onnx" in head[:64] or b"pytorch" in head[:64] or _ONNX.match(head):
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
    known = ", ".join(row.title for row in formats.FORMATS.values())
    return f"not a checkpoint that pqcli knows ({known}, or a Hugging Face folder)"


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
