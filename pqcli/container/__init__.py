"""The file format: what `compress` writes and everything else reads. `FORMAT.md` specifies it for other readers.

A container is a plain safetensors file. With plain PQ it holds, per tensor, a codebook and packed assignments
(`pq/NAME/codebook`, `pq/NAME/assignments`), or the tensor itself (`keep/NAME`; small ones lie end to end in
`pqcli.kept`). A codec that takes the whole checkpoint puts all its bytes into `pqcli.coded`. Three more entries say
what it all means:

    pqcli.manifest   zlib-compressed JSON: the source's structure, the recipe, and a `Record` per tensor
    pqcli.hashes     some bytes per record: BLAKE2b of the decoded tensor
    pqcli.errors     4 float32 per quantized record: rms, relative MSE, cosine, largest absolute error

What compression measures (hashes, errors) is kept out of the manifest, so that the size of a plain PQ file is known
before any weight is read: `predict` and `Writer` lay out the same records with the same code.

Every later ability is a new named feature; a reader refuses a file whose features it does not know.

    records   what is known of a tensor, the manifest, errors and hashes
    layout    records -> entries and header of the safetensors file; the predicted size
    writer    encoded tensors -> file
    reader    file -> tensors
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqcli.container.layout import make_manifest, predict
    from pqcli.container.peek import SUFFIX
    from pqcli.container.reader import Container, open_container
    from pqcli.container.records import Manifest, Record, StoredError, tensor_bytes, tensor_hash, with_kept_shares
    from pqcli.container.writer import Writer

__all__ = [
    "SUFFIX", "Container", "Manifest", "Record", "StoredError", "Writer", "make_manifest", "open_container", "predict",
    "tensor_bytes", "tensor_hash", "with_kept_shares",
]  # fmt: skip

_HOMES = ("peek", "records", "layout", "writer", "reader")


def __getattr__(name: str) -> Any:
    """Import a name on first use: `peek` must answer before torch is imported."""
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
