"""Compiles the loops in C: `pip` runs this when it builds or installs the package, and so can you.

    pip install ziglang && python pqcli/core/native/build.py     # beside the sources, for this machine

Every C file here is compiled once for each instruction level of the processor, and each level becomes one shared
library, which `library.py` loads by ctypes. The compiler is the clang that comes as `ziglang` from the package index,
so the machine needs none, and any machine can build for any other: PQCLI_TARGET=aarch64-macos pip wheel .

The libraries know nothing of Python, so one wheel serves all its versions.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where nothing builds a wheel
    BuildHookInterface = object

SOURCES = Path(__file__).parent
TARGET = "PQCLI_TARGET"
FLAGS = (
    "-O3", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC", "-g0",
    "-ffp-contract=off",  # a product and a sum are rounded twice, on every machine
    "-fwrapv", "-fno-strict-aliasing",  # whole numbers wrap, bits are looked at as another type: as in numpy
    "-fno-strict-float-cast-overflow",  # a number too large for the integer gives what the processor makes of it
    "-fno-sanitize=all",  # zig's own default, which costs speed
    "-fno-omit-frame-pointer",  # so that spilled registers can be aligned to whole cache lines
)  # fmt: skip


class Target(NamedTuple):  # hatchling runs this file as no module, which dataclasses need
    """A platform: as zig calls it, as wheels call it, and how its shared libraries end."""

    zig: str
    tag: str
    suffix: str

    @property
    def levels(self) -> dict[str, str]:
        """Names of the instruction levels, and what zig calls these processors."""
        if self.zig.startswith("x86_64"):
            return {"x86-64": "x86_64", "x86-64-v3": "x86_64_v3", "x86-64-v4": "x86_64_v4"}
        return {"native": "baseline"}


TARGETS = {
    "x86_64-linux": Target("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", ".so"),
    "aarch64-linux": Target("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", ".so"),
    "x86_64-linux-musl": Target("x86_64-linux-musl", "musllinux_1_2_x86_64", ".so"),
    "aarch64-linux-musl": Target("aarch64-linux-musl", "musllinux_1_2_aarch64", ".so"),
    "x86_64-macos": Target("x86_64-macos.11.0", "macosx_11_0_x86_64", ".dylib"),
    "aarch64-macos": Target("aarch64-macos.11.0", "macosx_11_0_arm64", ".dylib"),
    "x86_64-windows": Target("x86_64-windows-gnu", "win_amd64", ".dll"),
    "aarch64-windows": Target("aarch64-windows-gnu", "win_arm64", ".dll"),
}


def build(target: Target, folder: Path) -> list[Path]:
    """Compile and link the libraries of all levels into `folder`."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as workers:
        objects: dict[str, list[Path]] = {level: [] for level in target.levels}
        work = []
        for source in sorted(SOURCES.glob("*.c"), key=lambda source: -source.stat().st_size):
            for level, processor in target.levels.items():
                objects[level].append(Path(scratch) / f"{source.stem}-{level}.o")
                command = [*FLAGS, f"-mcpu={processor}", "-c", source, "-o", objects[level][-1]]
                work.append(workers.submit(_zig, scratch, target, command))
        for job in work:
            job.result()
        built = []
        for level in target.levels:
            made = Path(scratch) / f"loops-{level}{target.suffix}"
            # zig compiles what it links with, once for each processor: the lowest one serves all
            lowest = next(iter(target.levels.values()))
            _zig(scratch, target, [f"-mcpu={lowest}", "-O3", "-shared", "-s", *sorted(objects[level]), "-o", made])
            folder.mkdir(parents=True, exist_ok=True)
            arriving = folder / f"{made.name}.new"
            shutil.copy(made, arriving)
            arriving.replace(folder / made.name)  # a process that runs keeps the one it has loaded
            built.append(folder / made.name)
    return built


def _zig(scratch: str, target: Target, arguments: list[Any]) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig, *map(str, arguments)]
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": scratch}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def chosen() -> Target:
    """The target that PQCLI_TARGET names, or this machine."""
    name = os.environ.get(TARGET) or _here()
    if name not in TARGETS:
        raise RuntimeError(
            f"pqcli's loops in C cannot be built for {name}; set {TARGET} to one of {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def _here() -> str:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    musl = "-musl" if system == "linux" and platform.libc_ver()[0] != "glibc" else ""
    return f"{machine}-{system}{musl}"


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc, unused-ignore]
    """What hatchling runs before it packs a wheel."""

    _made: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install gets the libraries beside the sources, a wheel inside."""
        target = chosen()
        if version == "editable":
            build(target, SOURCES)
            return
        self._made = tempfile.mkdtemp()
        for path in build(target, Path(self._made)):
            build_data["force_include"][str(path)] = f"pqcli/core/native/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{target.tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Once the wheel is packed, the libraries are in it."""
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)


if __name__ == "__main__":
    for made in build(chosen(), SOURCES):
        sys.stdout.write(f"{made} ({made.stat().st_size:,} bytes)\n")
