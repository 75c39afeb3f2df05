"""Kernels written as LLVM IR: a small text emitter, and its just-in-time compiler.

Why not numba: `import numba` takes 0.7 s, the first compilation 2 to 3 s, its cache needs a writable home, and its
vectorizer cannot be told which values stay in registers. llvmlite, which numba stands on, imports in 0.1 s and
compiles a kernel in less, so there is nothing to cache; and a call through ctypes releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm


@dataclass
class Loop:
    """A loop being emitted: its index, the values carried into this turn, and (to be set) those carried out of it."""

    index: str
    carried: list[str]
    following: list[str] = field(default_factory=list)


@dataclass
class Code:
    """The body of one function, growing line by line; methods emit instructions and return the name of the value."""

    lanes: int
    lines: list[str] = field(default_factory=list)
    n_names: int = 0

    def name(self, prefix: str = "v") -> str:
        """A name no other value has."""
        self.n_names += 1
        return f"{prefix}{self.n_names}"

    def do(self, text: str) -> None:
        """An instruction without a value."""
        self.lines.append(f"  {text}")

    def let(self, text: str) -> str:
        """An instruction with a value."""
        value = f"%{self.name()}"
        self.do(f"{value} = {text}")
        return value

    def label(self, label: str) -> None:
        """Start of a block, entered from the one before."""
        self.do(f"br label %{label}")
        self.lines.append(f"{label}:")

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any, carried: Sequence[tuple[str, str]] = ()) -> Iterator[Loop]:
        """`for index in range(start, stop, step)`, run at least once; carried: (type, first value) of each phi."""
        before, top, bottom, after = (self.name(prefix) for prefix in ("before", "top", "bottom", "after"))
        self.label(before)
        self.label(top)
        head = len(self.lines)
        loop = Loop(f"%{self.name('i')}", [f"%{self.name('phi')}" for _ in carried])
        yield loop
        self.label(bottom)
        following = self.let(f"add i64 {loop.index}, {step}")
        again = self.let(f"icmp slt i64 {following}, {stop}")
        self.do(f"br i1 {again}, label %{top}, label %{after}")
        self.lines.append(f"{after}:")
        phis = [f"  {loop.index} = phi i64 [{start}, %{before}], [{following}, %{bottom}]"]
        for (kind, first), value, last in zip(carried, loop.carried, loop.following, strict=True):
            phis.append(f"  {value} = phi {kind} [{first}, %{before}], [{last}, %{bottom}]")
        self.lines[head:head] = phis

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Run the body only if condition (an i1) holds; it carries no value out."""
        yes, after = self.name("yes"), self.name("after")
        self.do(f"br i1 {condition}, label %{yes}, label %{after}")
        self.lines.append(f"{yes}:")
        yield
        self.label(after)

    def at(self, kind: str, pointer: str, offset: Any) -> str:
        """The address of element `offset` in an array of `kind`."""
        return self.let(f"getelementptr inbounds {kind}, ptr {pointer}, i64 {offset}")

    def load(self, kind: str, address: str, align: int = 4) -> str:
        """The value at an address."""
        return self.let(f"load {kind}, ptr {address}, align {align}")

    def store(self, kind: str, value: str, address: str, align: int = 4) -> None:
        """Write a value to an address."""
        self.do(f"store {kind} {value}, ptr {address}, align {align}")

    def shuffle(self, a: str, b: str, width: int, indices: Sequence[int], kind: str = "float") -> str:
        """A vector picked from the elements of two vectors of `width`, counted through both."""
        mask = ", ".join(f"i32 {index}" for index in indices)
        return self.let(
            f"shufflevector <{width} x {kind}> {a}, <{width} x {kind}> {b}, <{len(indices)} x i32> <{mask}>"
        )

    def splat(self, kind: str, value: str, lanes: int | None = None) -> str:
        """A vector of equal values."""
        n = lanes or self.lanes
        one = self.let(f"insertelement <{n} x {kind}> poison, {kind} {value}, i32 0")
        return self.let(f"shufflevector <{n} x {kind}> {one}, <{n} x {kind}> poison, <{n} x i32> zeroinitializer")

    def fma(self, a: str, b: str, c: str) -> str:
        """`a * b + c`, rounded once."""
        v = f"<{self.lanes} x float>"
        return self.let(f"call {v} @llvm.fma.v{self.lanes}f32({v} {a}, {v} {b}, {v} {c})")

    def select_greater(self, a: str, b: str, *choices: tuple[str, str, str]) -> list[str]:
        """For each choice (type, yes, no): lane by lane `yes` where a > b, else `no`; a NaN is never greater."""
        mask = self.let(f"fcmp ogt <{self.lanes} x float> {a}, {b}")
        m = f"<{self.lanes} x i1> {mask}"
        return [self.let(f"select {m}, {kind} {yes}, {kind} {no}") for kind, yes, no in choices]

    def least(self, a: str, b: str) -> str:
        """The smaller of two i64."""
        return self.let(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")


@functools.cache
def host_lanes() -> int:
    """How many float32 the widest vector register of this machine holds."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


@dataclass(frozen=True)
class Compiled:
    """A function in machine code; the engine owns the memory it lives in."""

    call: Any
    engine: Any


def compile_function(module: str, name: str, argtypes: Sequence[Any]) -> Compiled:
    """Machine code of the function `name` (returning nothing) of an LLVM IR module, for the processor we run on."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parsed = llvm.parse_assembly(module)
    parsed.verify()
    # LLVM avoids 512-bit registers on processors that once slowed down when using them; a kernel that does nothing
    # but multiply-adds gains from them all the same.
    features = llvm.get_host_cpu_features().flatten() + (",-prefer-256-bit" if host_lanes() == 16 else "")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return Compiled(ctypes.CFUNCTYPE(None, *argtypes)(engine.get_function_address(name)), engine)
