"""Tensors as places in a file: where the bytes lie, and how to fetch one tensor without the rest.

Every input format, once its header is understood, comes down to the same thing: a `Region` (a run of bytes: a zip
record, a safetensors payload, a storage of an old pickle) and, inside it, a `Strided` view. Reading goes through
`pread`, never `mmap`: pages of a mapped file count as our memory, and a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.asked import Asked
from pqcli.checkpoint.limits import Budget
from pqcli.checkpoint.stamps import Stamp
from pqcli.errors import CheckpointError
from pqcli.limits import Limits, hint
from pqcli.recipe.suggestions import close_files
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pqcli.core.dtypes import Array

_CHUNK = 8 << 20
_MAX_RANK = 64  # what numpy and torch can hold


@dataclass(frozen=True)
class Region:
    """A run of bytes of a file. `crc` is the CRC-32 the archive promises, or None where it promises none.

    Of an array that stands in the header itself, encoded, `data` are the decoded bytes; `start` is then 0.
    """

    start: int
    n_bytes: int
    crc: int | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Strided:
    """A dense tensor inside a region. `offset` and `strides` count elements; `strides` None means contiguous.

    `conj` and `neg` are torch's lazy bits: the stored bytes are to be conjugated or negated.
    """

    region: Region
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    conj: bool = False
    neg: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in the region in row-major order without gaps."""
        if self.strides is None or self.numel == 0:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def span(self) -> int:
        """Elements from the first to the last that the tensor touches, both included."""
        if self.strides is None or self.numel == 0:
            return self.numel
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def check_fits(view: Strided, file_bytes: int, limits: Limits) -> None:
    """Raise `CheckpointError` unless an array can hold the tensor and its bytes are in its region.

    The bare fact only; the caller adds the tensor's name. Guards the allocation too: an expanded tensor (stride 0)
    may claim terabytes from one stored element.
    """
    numbers = (*view.shape, *(view.strides or ()), view.offset)
    if len(view.shape) > _MAX_RANK or any(not 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(f"impossible shape {_shape(view)}")
    item = ITEM_BYTES[view.dtype]
    needed = (view.offset + view.span) * item if view.numel else 0
    if needed > view.region.n_bytes:
        raise CheckpointError(
            f"shape {_shape(view)} of {view.dtype} needs {needed:,} bytes, its storage has {view.region.n_bytes:,}; "
            "the file is damaged"
        )
    if view.numel * item > max(file_bytes, limits.view_bytes):
        raise CheckpointError(
            f"shape {_shape(view)} of {view.dtype} expands to {view.numel * item:,} bytes, "
            f"more than the whole file ({file_bytes:,}), as a decompression bomb would; {hint('view_bytes')}"
        )


class ByteSource:
    """One open file, read by position.

    `path` is what messages name, `asked` how it is to be understood, `budget` what that may still cost.
    """

    def __init__(self, path: Path, asked: Asked | None = None) -> None:
        self.path = path
        self.asked = asked or Asked()
        self.budget = Budget(self.asked.limits)
        self._descriptor: int | None = None
        with reading(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
        self.n_bytes = status.st_size
        self.stamps = (Stamp(str(path.absolute()), status.st_size, status.st_mtime_ns),)
        self._checked: set[Region] = set()
        self._running: dict[Region, tuple[int, int]] = {}  # of regions read piece by piece: where it stands, CRC so far

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def bytes_at(self, start: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes` bytes from `start`; for headers."""
        buffer = bytearray(n_bytes)
        self._fill(memoryview(buffer), start)
        return bytes(buffer)

    def array(self, view: Strided) -> Array:
        """The tensor, contiguous, in memory of its own. `check_fits` must have passed.

        Where the archive has a checksum of the region it is verified: on the fly when the tensor is the whole region,
        else in one extra pass over the region, the first time it is touched.
        """
        import numpy as np  # which headers do without

        item = ITEM_BYTES[view.dtype]
        if not view.numel:
            return _dense(np.empty(0, np.uint8), view)
        raw = np.empty(view.span * item, np.uint8)
        whole = len(raw) == view.region.n_bytes
        if not whole:
            self.check_region(view.region)
        crc = self._fetch(raw.data, view.region, view.offset * item)
        if whole:
            self._compare(view.region, crc)
        return _dense(raw, view)

    def flat(self, view: Strided, start: int, stop: int) -> Array:
        """Elements [start, stop) of the tensor in row-major order, of shape (stop - start,), in memory of its own.

        Reads these elements alone where the tensor is contiguous, else the whole tensor. A checksum is verified as
        `array` does it; pieces that follow each other from the region's first byte to its last need no extra pass.
        """
        import numpy as np

        if not view.contiguous or (start, stop) == (0, view.numel):
            return self.array(view).reshape(-1)[start:stop].copy()
        piece = replace(view, shape=(stop - start,), offset=view.offset + start, strides=None)
        if view.region.crc is None or view.region in self._checked:
            return self.array(piece)
        item = ITEM_BYTES[view.dtype]
        begin, end = piece.offset * item, (piece.offset + piece.numel) * item
        reached, crc = self._running.pop(view.region, (0, 0))
        if begin != reached:
            return self.array(piece)  # which makes the pass over the whole region
        raw = np.empty(end - begin, np.uint8)
        crc = self._fetch(raw.data, view.region, begin, crc)
        if end == view.region.n_bytes:
            self._compare(view.region, crc)
        else:
            self._running[view.region] = (end, crc)
        return _dense(raw, piece)

    def check_region(self, region: Region) -> None:
        """Read the region once and raise `CheckpointError` where its checksum does not hold."""
        if region.crc is None or region in self._checked:
            return
        buffer = memoryview(bytearray(min(_CHUNK, region.n_bytes)))
        crc, done = 0, 0
        while done < region.n_bytes:
            part = buffer[: region.n_bytes - done]
            crc = self._fetch(part, region, done, crc)
            done += len(part)
        self._compare(region, crc)

    def _compare(self, region: Region, crc: int) -> None:
        if region.crc is not None and crc != region.crc:
            raise CheckpointError(
                f"the checksum of its {region.n_bytes:,} bytes does not match (CRC-32 {crc:08x}, the archive says "
                f"{region.crc:08x}); the file is damaged, fetch it again"
            )
        self._checked.add(region)

    def _fetch(self, buffer: memoryview, region: Region, start: int, crc: int = 0) -> int:
        """Fill the buffer from position `start` of the region; returns the running CRC-32."""
        if region.data is None:
            return self._fill(buffer, region.start + start, crc)
        buffer[:] = region.data[start : start + len(buffer)]
        return crc

    def _fill(self, buffer: memoryview, start: int, crc: int = 0) -> int:
        """Fill the buffer from position `start`; returns the running CRC-32."""
        if self._descriptor is None:
            raise CheckpointError(f"'{self.path}' is closed already")
        done = 0
        with reading(self.path):
            while done < len(buffer):
                part = buffer[done : done + _CHUNK]
                n_read = os.preadv(self._descriptor, [part], start + done)
                if n_read == 0:
                    raise CheckpointError(
                        f"'{self.path}' ends at byte {start + done:,} where {len(buffer) - done:,} more are needed; "
                        "it is truncated, or was changed while being read"
                    )
                crc = zlib.crc32(part[:n_read], crc)
                done += n_read
        return crc


def _dense(raw: NDArray[np.uint8], view: Strided) -> Array:
    """The tensor whose span `raw` holds, as bytes."""
    import numpy as np

    from pqcli.core.dtypes import dtype_of

    flat = raw.view(dtype_of(view.dtype))
    if view.contiguous:
        dense = flat[: view.numel].reshape(view.shape)
    else:
        strides = tuple(stride * flat.itemsize for stride in view.strides or ())
        dense = np.array(np.lib.stride_tricks.as_strided(flat, view.shape, strides), order="C")
    if view.conj and dense.dtype.kind == "c":
        dense = dense.conj()
    elif view.conj and dense.dtype.names:
        dense["imag"] = -dense["imag"]
    if view.neg:
        dense = (-dense.view(np.float16)).view(dense.dtype) if dense.dtype.names else -dense
    return dense


class Window:
    """A part of a file as if it were a file of its own: what understands a header can read it there."""

    def __init__(self, source: ByteSource, start: int, n_bytes: int) -> None:
        if start + n_bytes > source.n_bytes:
            raise CheckpointError(
                f"'{source.path}' has {source.n_bytes:,} bytes where {start + n_bytes:,} are needed; it is truncated"
            )
        self.path = source.path
        self.asked = source.asked
        self.budget = source.budget
        self.n_bytes = n_bytes
        self._source = source
        self._start = start

    def bytes_at(self, start: int, n_bytes: int) -> bytes:
        """Exactly `n_bytes` bytes from `start` of the window."""
        if start + n_bytes > self.n_bytes:
            raise CheckpointError(f"an archive inside '{self.path}' ends too early; the file is damaged")
        return self._source.bytes_at(self._start + start, n_bytes)

    def check_region(self, region: Region) -> None:
        """As `ByteSource.check_region`; the region counts from the window's start."""
        self._source.check_region(replace(region, start=region.start + self._start))


class AsFile(io.RawIOBase):
    """A source as the seekable binary file that some readers want."""

    def __init__(self, source: ByteSource | Window) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file; a position before the start is an OSError."""
        base = (0, self._position, self._source.n_bytes)[whence]
        if base + offset < 0:
            raise OSError("a position before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes left."""
        n_bytes = max(0, min(len(buffer), self._source.n_bytes - self._position))
        buffer[:n_bytes] = self._source.bytes_at(self._position, n_bytes)
        self._position += n_bytes
        return n_bytes


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `CheckpointError` that names `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' does not exist{close_files(path)}") from error
    except PermissionError as error:
        raise CheckpointError(f"'{path}' cannot be read: permission denied") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _shape(view: Strided) -> str:
    text = "x".join(str(size) for size in view.shape[:8]) or "scalar"
    return text + ("..." if len(view.shape) > 8 else "")
