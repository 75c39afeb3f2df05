"""After `import pqcli.integrations.transformers`, `from_pretrained` takes compressed folders.

    import pqcli.integrations.transformers
    from transformers import AutoModel

    model = AutoModel.from_pretrained("all-MiniLM-L6-v2.pq")

transformers looks for the file of a folder's weights, opens it, and takes tensors out of it one by one. Here the first
two of these steps also know containers: each tensor is decoded when transformers asks for it, straight to the device
and dtype that it asks for, and nothing dense is written or held beside the model. All that builds on `from_pretrained`
follows, sentence-transformers for one.

A quantizer, as other formats have, would not do: it takes tensors of its own out of a safetensors file, by names that
say which weight each belongs to; of a container's streams, in which tensors lie together, transformers would make a
thousand unexpected keys. It would also need another `config.json` than the model had, and a compressed folder has all
files beside the weights as they were.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqcli.container.folder import compressed_folder, index_of
from pqcli.container.header import INDEX_SUFFIX, SAFETENSORS_DTYPES, SUFFIX
from pqcli.container.reader import open_container
from pqcli.errors import ContainerError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    import torch

OLDEST = "transformers 5"
_FINDS, _OPENS = "_get_resolved_checkpoint_files", "safe_open"
"""What transformers calls, in `modeling_utils`, to find the file of a folder's weights, and to open one."""


class Tensor:
    """A tensor that has not been decoded yet, as transformers sees one of safetensors."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name
        self._info = weights.container.record(name).info

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """Its dtype, as safetensors calls it."""
        return SAFETENSORS_DTYPES[self._info.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decode it; all of it or a part."""
        return self._weights.get_tensor(self._name)[index]


class Weights:
    """An open container with as much of the interface of `safetensors.safe_open` as transformers uses."""

    def __init__(self, path: Path) -> None:
        self.container = open_container(path)
        self._decoding = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def keys(self) -> list[str]:
        """The names of the model's tensors, without training state."""
        return [record.name for record in self.container.records if record.info.role == "model"]

    def metadata(self) -> dict[str, str]:
        """Like that of a file of PyTorch."""
        return {"format": "pt"}

    def get_slice(self, name: str) -> Tensor:
        """A tensor, not decoded yet."""
        return Tensor(self, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor. Threads of transformers ask at the same time, and decode one after another."""
        with self._decoding:
            return self.container.decode(name)


def container_of(place: Path) -> Path | None:
    """The container of the weights at the top of a folder; None where there is none.

    Raises ContainerError where there are several and none is `model`.
    """
    if not place.is_dir():
        return None
    try:
        folder = compressed_folder(place)
    except ContainerError:
        return None
    found = [place / path for path in folder.containers.values() if "/" not in path]
    named = [path for path in found if path.name in {f"model{SUFFIX}", f"model{INDEX_SUFFIX}"}]
    if len(found) > 1 and not named:
        raise ContainerError(f"'{place}' holds {len(found)} containers; transformers would not know which one is meant")
    return next(iter(named or found), None)


def _finding(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def find(pretrained_model_name_or_path: Any = None, **options: Any) -> Any:
        try:
            return usual(pretrained_model_name_or_path=pretrained_model_name_or_path, **options)
        except OSError:
            if pretrained_model_name_or_path is None:
                raise
            inside = (options.get("download_kwargs") or {}).get("subfolder") or ""
            path = container_of(Path(pretrained_model_name_or_path) / inside)
            if path is None:
                raise
            return [str(_as_safetensors(path))], None

    return find


def _as_safetensors(path: Path) -> Path:
    """The file that a container is opened by; in several files the first one, since an index has another ending."""
    if not path.name.endswith(INDEX_SUFFIX):
        return path
    return min(other for other in path.parent.iterdir() if index_of(other.name) == path.name)


def _opening(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def open_(filename: Any, *arguments: Any, **options: Any) -> Any:
        path = Path(filename)
        if not path.name.endswith(SUFFIX):
            return usual(filename, *arguments, **options)
        index = index_of(path.name)
        return Weights(path.with_name(index) if index else path)

    return open_


def _install() -> None:
    try:
        from transformers import modeling_utils
    except ImportError:
        raise MissingExtraError(
            "pqcli.integrations.transformers needs transformers; pip install 'pqcli[transformers]'"
        ) from None
    for name, around in ((_FINDS, _finding), (_OPENS, _opening)):
        usual = getattr(modeling_utils, name, None)
        if usual is None:
            raise MissingExtraError(
                f"this transformers has no modeling_utils.{name}; pqcli.integrations.transformers needs {OLDEST}: "
                "decode the folder instead (pqcli decode)"
            )
        setattr(modeling_utils, name, around(usual))


_install()
