"""`kernel`: loops that numba compiles once, kept on disk as machine code that is loaded without numba.

To import numba and have it look at its own cache takes more than a second of every process; to load an object file
with llvmlite takes milliseconds. So what numba makes of a kernel is stored as an object file, in the first of these
folders that can be written to: `__pycache__` beside the kernel's module, `~/.cache/pqcli`. Where neither can, each
process compiles anew. A file is found by the types of the arguments, the processor and the versions of the compilers,
and believed if its kernel, with all it calls and all constants it names, is the one it was made of. Should some version
of numba make code that cannot leave its process, numba runs it.

A kernel takes arrays and numbers (bool, int, float, np.float32) and returns nothing, a number, or a tuple of equal
ones. It may call kernels, and by `call_at` functions of `ir`; and allocate arrays, which it may not return. Running out
of memory is the only error it may end in.

Threads run kernels side by side (ctypes releases the interpreter lock). Never `fastmath`: what a decoder computes must
be the same number on every machine, and without it the compiler may neither reorder sums nor fuse a product into an
addition.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import llvmlite
import llvmlite.binding as llvm
import numpy as np

_SCALARS = {bool: ctypes.c_int8, int: ctypes.c_int64, float: ctypes.c_double, np.float32: ctypes.c_float}
_RETURNS: dict[str, Any] = {
    "none": ctypes.c_int8,
    "bool": ctypes.c_int8,
    "int64": ctypes.c_int64,
    "float64": ctypes.c_double,
}
_OPTIONS: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_LIBRARY = frozenset({"malloc", "free", "memset", "memcpy", "memmove", "sqrt", "floor"})
"""What machine code on disk may ask of the process that loads it: LLVM ends a process that lacks a symbol."""
_ALLOCATOR = """
declare ptr @malloc(i64)
declare void @free(ptr)
define ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %align) {
  %wide = zext i32 %align to i64
  %extra = add i64 %wide, 48
  %total = add i64 %size, %extra
  %info = call ptr @malloc(i64 %total)
  %failed = icmp eq ptr %info, null
  br i1 %failed, label %end, label %fill
fill:
  %address = ptrtoint ptr %info to i64
  %above = add i64 %address, %extra
  %mask = sub i64 0, %wide
  %data = and i64 %above, %mask
  %start = inttoptr i64 %data to ptr
  store {i64, ptr, ptr, ptr, i64, ptr} {i64 1, ptr null, ptr null, ptr null, i64 0, ptr null}, ptr %info, align 8
  %at = getelementptr {i64, ptr, ptr, ptr, i64, ptr}, ptr %info, i32 0, i32 3
  store ptr %start, ptr %at, align 8
  br label %end
end:
  ret ptr %info
}
define void @NRT_MemInfo_call_dtor(ptr %info) {
  call void @free(ptr %info)
  ret void
}
"""
"""numba's runtime for arrays inside a kernel: 48 bytes (count of references, -, -, data, -, -), then the data."""

_Kinds = tuple[Any, ...]
_lock = threading.RLock()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled (or loaded) when it is first called with arguments of these types."""
    return Kernel(cast("FunctionType", function))


class NeedsNumbaError(Exception):
    """Machine code that only a process with numba can run, as another version of numba might make it."""


class Kernel:
    """A function and its machine code, by the kinds of its arguments."""

    def __init__(self, function: FunctionType) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._natives: dict[_Kinds, Callable[[tuple[Any, ...]], Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        kinds = tuple([_kind(argument) for argument in arguments])
        native = self._natives.get(kinds)
        if native is None:
            with _lock:
                native = self._natives.get(kinds) or self._found(kinds)
                self._natives[kinds] = native
        return native(arguments)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells one kernel from another: its code, its constants, and the kernels that it calls."""
        code = self.function.__code__
        parts = [code.co_code.hex(), repr((code.co_consts, code.co_names, code.co_varnames))]
        for name in sorted({*code.co_names} & self.function.__globals__.keys()):
            value = self.function.__globals__[name]
            if isinstance(value, ModuleType):
                continue
            parts.append(f"{name}={value.fingerprint if isinstance(value, _CALLED) else repr(value)}")
        return _digest("\n".join(parts))

    @functools.cached_property
    def dispatcher(self) -> Any:
        """The function as numba takes it, the kernels that it calls likewise; not to be called from Python."""
        return self._dispatcher(_OPTIONS)

    def _dispatcher(self, options: dict[str, Any]) -> Any:
        from numba import njit

        names = {*self.function.__code__.co_names, "__name__", "__builtins__"}
        known = {
            name: value.dispatcher if isinstance(value, _CALLED) else value
            for name, value in self.function.__globals__.items()
            if name in names
        }
        function = FunctionType(self.function.__code__, known, self.function.__name__)
        return njit(**options)(function)

    def _found(self, kinds: _Kinds) -> Callable[[tuple[Any, ...]], Any]:
        name = f"{self.function.__module__}.{self.function.__name__}-{_digest(_host() + repr(kinds))}.pqk"
        folders = list(_folders(self.function.__code__.co_filename))
        for folder in folders:
            stored = _Machine.read(folder / name, self.fingerprint)
            if stored is not None:
                return _Native.of(stored, kinds)
        try:
            machine = _compiled(self, kinds)
        except NeedsNumbaError:
            plain = self._dispatcher({"nogil": True})
            return lambda arguments: plain(*arguments)
        for folder in folders:
            if machine.write(folder / name, self.fingerprint):
                break
        return _Native.of(machine, kinds)


class CallAt:
    """`call_at(address, a, b, c, d, e)`, in kernels: a call of the function at an address with five 64-bit integers.

    It returns nothing. Where the function takes pointers, these are addresses.
    """

    fingerprint = "call_at: 5"

    def __call__(self, address: int, *arguments: int) -> None:
        """For kernels alone, which numba compiles."""
        raise NotImplementedError

    @functools.cached_property
    def dispatcher(self) -> Any:
        """What numba takes it for."""
        from llvmlite import ir
        from numba import types
        from numba.extending import intrinsic

        def emit(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
            builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
            return context.get_dummy_value()

        def typed(_: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:  # noqa: ARG001
            return types.void(*[types.int64] * 6), emit

        return intrinsic(typed)


call_at = CallAt()
_CALLED = (Kernel, CallAt)


def _digest(text: str | bytes) -> str:
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=16).hexdigest()


@functools.cache
def _host() -> str:
    """All that machine code depends on beside its source."""
    versions = importlib.metadata.version("numba"), llvmlite.__version__, np.__version__, sys.version
    processor = llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return repr((versions, processor, _OPTIONS))


def _folders(source: str) -> Iterator[Path]:
    with contextlib.suppress(NotImplementedError):  # an interpreter that caches nothing
        yield Path(importlib.util.cache_from_source(source)).parent
    with contextlib.suppress(RuntimeError):  # nobody's home
        yield Path.home() / ".cache" / "pqcli"


# --- calling ----------------------------------------------------------------------------------------------------------


def _kind(argument: Any) -> Any:
    """What machine code must know of an argument: a number's type; an array's (dtype, dimensions, contiguous)."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.str, argument.ndim, argument.flags.c_contiguous
    kind = _NUMBERS.get(type(argument))
    if kind is None:
        raise TypeError(f"a kernel takes arrays and numbers, no {type(argument).__name__}")
    return kind


_NUMBERS = {bool: bool, int: int, float: float, np.float32: np.float32}
_NUMBERS |= {np.bool_: bool, np.int64: int, np.float64: float}


@dataclass(frozen=True)
class _Native:
    """Machine code in memory, called as numba calls it: the result and an error go where two pointers say."""

    call: Any
    result: Any
    returns: str
    engine: Any
    """Owns the memory that the code lies in."""

    @staticmethod
    def of(machine: _Machine, kinds: _Kinds) -> _Native:
        types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
        for kind in kinds:
            if isinstance(kind, tuple):
                types += [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_void_p]
                types += [ctypes.c_int64] * (2 * kind[1])
            else:
                types.append(_SCALARS[kind])
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        engine.add_object_file(llvm.ObjectFileRef.from_data(machine.code))
        engine.finalize_object()
        call = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(engine.get_function_address(machine.entry))
        return _Native(call, _RETURNS[machine.returns] * machine.count, machine.returns, engine)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """What the function returns."""
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                flat += (None, None, argument.size, argument.itemsize, argument.ctypes.data)
                flat += (*argument.shape, *argument.strides)
            else:
                flat.append(argument)
        result, error = self.result(), ctypes.c_void_p()
        if self.call(ctypes.byref(result), ctypes.byref(error), *flat):
            raise MemoryError("a kernel could not allocate its scratch")
        if self.returns == "none":
            return None
        values = [bool(value) for value in result] if self.returns == "bool" else list(result)
        return values[0] if len(values) == 1 else tuple(values)


# --- machine code -----------------------------------------------------------------------------------------------------


def _target() -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


@dataclass(frozen=True)
class _Machine:
    """An object file; the function in it that is called; the `count` numbers of type `returns` that it gives."""

    code: bytes
    entry: str
    returns: str
    count: int

    @staticmethod
    def read(path: Path, fingerprint: str) -> _Machine | None:
        """What `write` wrote for this kernel; None where it did not, or something is left of it only."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            head, _, code = path.read_bytes().partition(b"\n")
            about = json.loads(head)
            if about["kernel"] == fingerprint and about["code"] == _digest(code) and about["returns"] in _RETURNS:
                return _Machine(code, about["entry"], about["returns"], about["count"])
        return None

    def write(self, path: Path, fingerprint: str) -> bool:
        """Whether it could be stored. The file appears whole or not at all."""
        about = {"kernel": fingerprint, "code": _digest(self.code), "entry": self.entry}
        head = json.dumps({**about, "returns": self.returns, "count": self.count}).encode()
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(head + b"\n" + self.code)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return False
        return True


def _compiled(kernel: Kernel, kinds: _Kinds) -> _Machine:
    """What numba makes of a kernel for arguments of these kinds, with nothing left in it that needs numba."""
    from numba import types

    signature = tuple(_numba_type(kind) for kind in kinds)
    dispatcher = kernel.dispatcher
    dispatcher.compile(signature)
    made = dispatcher.overloads[signature]
    returned = made.signature.return_type
    count = 1
    if isinstance(returned, types.UniTuple):
        returned, count = returned.dtype, returned.count
    if str(returned) not in _RETURNS:
        raise TypeError(f"kernel {kernel.function.__name__} returns {returned}")
    entry = made.fndesc.llvm_func_name
    code = _object_code(dispatcher.inspect_llvm(signature), entry)
    return _Machine(code, entry, str(returned), count)


def _numba_type(kind: Any) -> Any:
    from numba import from_dtype, types

    if isinstance(kind, tuple):
        dtype, n_dimensions, is_contiguous = kind
        return types.Array(from_dtype(np.dtype(dtype)), n_dimensions, "C" if is_contiguous else "A")
    return {bool: types.boolean, int: types.int64, float: types.float64, np.float32: types.float32}[kind]


def _object_code(ir: str, entry: str) -> bytes:
    """Machine code of the function `entry` of optimized LLVM IR and of what it calls."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(ir)
    module.link_in(llvm.parse_assembly(_ALLOCATOR))
    for function in module.functions:
        if not function.is_declaration and function.name != entry:
            function.linkage = "internal"
    target = _target()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
    unknown = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - _LIBRARY
    if unknown:
        raise NeedsNumbaError(f"a kernel needs {', '.join(sorted(unknown))}, which a process without numba lacks")
    code: bytes = target.emit_object(module)
    return code
