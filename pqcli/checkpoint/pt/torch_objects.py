"""What the pickles of torch build, as descriptions: a tensor is where it lies, not what it holds.

The tables at the end are the whole vocabulary: `CALLS` says what a known function gives when a pickle calls it,
`UNSUPPORTED` names the tensors that pqcli cannot carry. Every function here takes arguments from a stranger's file and
checks them; what it raises (TypeError, ValueError) the interpreter reports as a damaged pickle.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.pt.numpy_objects import (
    Foreign,
    numpy_array,
    numpy_from_buffer,
    numpy_scalar,
    numpy_type,
)
from pqcli.checkpoint.pt.objects import Global, Instance
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_KEY_PARTS = 64


@dataclass(frozen=True)
class StorageRef:
    """A storage of the file: `key` names the record, `dtype` is None for untyped bytes, `size` counts elements."""

    key: str
    dtype: str | None
    size: int
    device: str
    byte_offset: int = 0


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A dense tensor as the pickle describes it: element offset and strides into a storage."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    parameter: bool = False
    lost: tuple[str, ...] = ()
    """Names of Python attributes the tensor carried; they cannot be kept."""
    subclass: str = ""
    """The class it was of, where that was no ordinary one."""


@dataclass(frozen=True, eq=False)
class Unsupported:
    """A tensor that pqcli cannot carry (sparse, quantized ...); `reason` says what it is."""

    reason: str


@dataclass(frozen=True)
class Constant:
    """A value of torch's own: `kind` is "dtype", "device" or "size"."""

    kind: str
    value: str | tuple[int, ...]


class Attributed(OrderedDict[Any, Any]):
    """An `OrderedDict`; `attributes` are what was set on the object (`_metadata` of a state dict)."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[Any, Any] = {}


@dataclass(eq=False)
class Opaque:
    """Whatever an unknown global would have built."""


DTYPE_OF_STORAGE = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
}  # fmt: skip
"""torch's legacy storage classes: how a pickle says the dtype of a storage."""

QUANTIZED_STORAGES = {"QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"}

DTYPE_NAME = re.compile(
    r"torch\.((?:u?int|float|bfloat|complex|bits|quint|qint)[0-9][0-9a-z_]*|bool|float4_e2m1fn_x2|quint4x2|quint2x4)"
)


# -- what the known globals mean -----------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, size: Any, strides: Any, *rest: Any) -> Any:
    requires_grad = bool(rest[0]) if rest else False
    return _dense(storage, getattr(storage, "dtype", None), offset, size, strides, requires_grad, rest[2:3])


def _tensor_v3(
    storage: Any, offset: Any, size: Any, strides: Any, requires_grad: Any, _: Any, dtype: Any, *rest: Any
) -> Any:
    if not isinstance(dtype, Constant) or dtype.kind != "dtype":
        raise TypeError("a tensor without a dtype")
    return _dense(storage, str(dtype.value), offset, size, strides, bool(requires_grad), rest[:1])


def _dense(
    storage: Any, dtype: str | None, offset: Any, size: Any, strides: Any, requires_grad: bool, bits: tuple[Any, ...]
) -> Any:
    if isinstance(storage, (Unsupported, Opaque)):
        return storage
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor without a storage")
    if storage.device == "meta":
        return Unsupported("a tensor on the 'meta' device, that is, without data")
    shape = _integers(size)
    steps = _integers(strides)
    if len(shape) != len(steps) or type(offset) is not int:
        raise ValueError("a tensor whose shape and strides differ in length")
    flags = bits[0] if bits and isinstance(bits[0], dict) else {}
    return TensorRef(
        storage=storage,
        dtype=dtype or "uint8",
        offset=offset,
        shape=shape,
        strides=steps,
        requires_grad=requires_grad,
        conj=bool(flags.get("conj")),
        neg=bool(flags.get("neg")),
    )


def _parameter(data: Any, requires_grad: Any = True, _: Any = None, state: Any = None) -> Any:
    if not isinstance(data, TensorRef):
        return data
    lost = _attribute_names(state)
    return replace(data, requires_grad=bool(requires_grad), parameter=True, lost=data.lost + lost)


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with Python attributes, or of a subclass; of a subclass it comes back as the plain tensor."""
    if not isinstance(function, Global) or not isinstance(kind, Global) or not isinstance(arguments, tuple):
        return Unsupported("a tensor of an unusual class")
    if function.name == _WRAPPER:
        return _wrapped(kind, arguments, state)
    if function.name not in CALLS or not function.name.startswith("torch._utils._rebuild"):
        return Unsupported(f"a tensor of the class {kind.name[:120]}")
    tensor = CALLS[function.name](*arguments)
    if not isinstance(tensor, TensorRef):
        return tensor
    own_class = kind.name in {"torch.Tensor", "torch.nn.parameter.Parameter"}
    return replace(
        tensor,
        parameter=tensor.parameter or kind.name.endswith("Parameter"),
        lost=tensor.lost + _attribute_names(state),
        subclass="" if own_class else kind.name,
    )


def _wrapped(kind: Global, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor that is a shell around others: a DTensor whose whole is here is its local tensor."""
    parts = state if isinstance(state, tuple) else (state,)  # the attributes, and those that have slots
    local = next((part["_local_tensor"] for part in parts if isinstance(part, dict) and "_local_tensor" in part), None)
    if not kind.name.endswith(".DTensor") or not isinstance(local, TensorRef) or len(arguments) < 3:
        return Unsupported(f"a tensor of the class {kind.name[:120]}")
    if _integers(arguments[2]) != local.shape:
        return Unsupported(
            f"one process's part, of shape {list(local.shape)}, of a DTensor of shape {list(_integers(arguments[2]))}"
        )
    return replace(local, subclass=kind.name)


def _attribute_names(state: Any) -> tuple[str, ...]:
    if isinstance(state, tuple) and state:
        state = state[0]
    return tuple(str(name)[:80] for name in list(state)[:16]) if isinstance(state, dict) else ()


def _ordered_dict(*arguments: Any) -> Attributed:
    result = Attributed()
    for pair in arguments[0] if arguments else ():
        key, value = pair
        result[checked_key(key)] = value
    return result


def _size(values: Any = ()) -> Constant:
    return Constant("size", _integers(values))


def _device(kind: Any, index: Any = None) -> Constant:
    return Constant("device", str(kind) if index is None else f"{kind}:{index}")


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise TypeError("an unusual text encoding")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    """How protocol 2 writes `b""`; with an argument it would be an allocation."""
    return b""


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _counter(counts: Any = ()) -> Instance:
    result = Instance("collections.Counter")
    result.update({checked_key(key): value for key, value in dict(counts).items()})
    return result


def _set_of(name: str) -> Callable[..., Instance]:
    def build(values: Any = ()) -> Instance:
        if not isinstance(values, (list, tuple)):
            raise TypeError("a set of something that is no list")
        result = Instance(name)
        result.elements.extend(values)
        return result

    return build


def _foreign(kind: str) -> Callable[..., Foreign]:
    def build(*_: Any) -> Foreign:
        return Foreign(kind)

    return build


def _bytearray(*arguments: Any) -> bytes:
    """Never `bytearray(n)`: that is how a 40-byte file asks for a terabyte."""
    if not arguments:
        return b""
    if isinstance(arguments[0], bytes):
        return arguments[0]
    return _bytes(*arguments)


def _integers(values: Any) -> tuple[int, ...]:
    if isinstance(values, Constant) and isinstance(values.value, tuple):
        return values.value
    if not isinstance(values, (tuple, list)) or len(values) > 1 << 10 or any(type(v) is not int for v in values):
        raise TypeError("a shape that is no list of integers")
    return tuple(values)


def checked_key(key: Any) -> Any:
    """Dict keys are hashed, and hashing a deeply nested tuple overflows the C stack: only flat ones pass."""
    if isinstance(key, tuple):
        if len(key) > _MAX_KEY_PARTS or any(not _plain(part) for part in key):
            raise CheckpointError("its pickle has a dict key that is a nested tuple; refused")
        return key
    if not _plain(key):
        raise CheckpointError(f"its pickle has a dict key of type {type(key).__name__}; refused")
    return key


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, complex, Constant, Instance, Global))


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "builtins.set": _set_of("builtins.set"),
    "builtins.frozenset": _set_of("builtins.frozenset"),
    "builtins.complex": _complex,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _empty_bytes,
    "_codecs.encode": _bytes,
    "numpy.dtype": numpy_type,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": numpy_array,
    "numpy.core.numeric._frombuffer": numpy_from_buffer,
    "torch.serialization._get_layout": _foreign("torch.layout"),
}

_WRAPPER = "torch._utils._rebuild_wrapper_subclass"

UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the 'meta' device, that is, without data",
    _WRAPPER: "a tensor of an unusual class",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of an accelerator that torch saves through numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of an accelerator with its own format",
}

_NAMES = re.compile(
    r"torch\.(?:cuda\.|storage\.)?(?:[A-Z][A-Za-z0-9]*Storage|Tensor)"
    r"|torch\.per_(?:tensor|channel)_(?:affine|symmetric|affine_float_qparams)"
    r"|numpy\.ndarray|numpy\.dtypes\.(?:Bool|Int(?:8|16|32|64)|UInt(?:8|16|32|64)|Float(?:16|32|64)|Complex(?:64|128))DType"
)


def is_known(name: str) -> bool:
    """Whether a global may occur in a checkpoint."""
    return name in CALLS or name in UNSUPPORTED or _NAMES.fullmatch(name) is not None
