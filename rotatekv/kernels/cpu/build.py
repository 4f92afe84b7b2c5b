"""Compiles the CPU kernels with g++ at their first use and loads them.

A library is cached under a hash of its sources, flags, compiler and CPU, in ``ROTATEKV_CACHE_DIR`` or
``$XDG_CACHE_HOME/rotatekv`` or ``~/.cache/rotatekv``. ``ROTATEKV_CPU_KERNEL`` names the instruction set (``avx512``,
``avx2``, ``portable``), or switches the kernels off (``off``); by default the widest that the CPU has.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

_SOURCES = Path(__file__).parent
_BASE_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"]
_EXTRA_FLAGS = {
    "attention": [],
    "dequantize": [],
    "quantize": ["-ffp-contract=off"],  # bit-equal to torch: no product may merge with a sum
}
# Widest first: the flags of the compiler, which are what /proc/cpuinfo must list, see _needed.
_INSTRUCTION_SETS = {
    "avx512": "avx512f avx512bw avx512vl avx512dq avx512vnni fma f16c",
    "avx2": "avx2 fma f16c",
    "portable": "",
}
_COMPILE_SECONDS = 300  # give up on a compiler that takes longer


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty where that is not known."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@lru_cache(maxsize=1)
def available_instruction_sets() -> tuple[str, ...]:
    """Those this CPU can run, the widest first."""
    return tuple(name for name, flags in _INSTRUCTION_SETS.items() if _needed(flags) <= cpu_flags())


@lru_cache(maxsize=1)
def chosen_instruction_set() -> str:
    """The widest available, or what ``ROTATEKV_CPU_KERNEL`` asks for; read once."""
    return os.environ.get("ROTATEKV_CPU_KERNEL") or available_instruction_sets()[0]


def load_library(name: str, instruction_set: str | None = None) -> ctypes.CDLL | None:
    """The library made from ``<name>.cpp``, whose ``entry`` takes its arguments and returns an error's text or None.

    None, with one warning, where it cannot be built or run here.
    """
    instruction_set = instruction_set or chosen_instruction_set()
    return None if instruction_set == "off" else _load(name, instruction_set)


@lru_cache(maxsize=32)
def _load(name: str, instruction_set: str) -> ctypes.CDLL | None:
    try:
        if instruction_set not in available_instruction_sets():
            raise RuntimeError(f"this CPU cannot run {instruction_set!r}, it has {available_instruction_sets()}")
        flags = [*_BASE_FLAGS, *_EXTRA_FLAGS[name], *(f"-m{x}" for x in _INSTRUCTION_SETS[instruction_set].split())]
        flags += os.environ.get("ROTATEKV_CPU_FLAGS", "").split()
        library = ctypes.CDLL(str(_build(name, flags, instruction_set)))
        library.entry = getattr(library, f"rotatekv_{name}")
        library.entry.argtypes, library.entry.restype = [ctypes.c_void_p], ctypes.c_char_p
        return library
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"RotateKV's CPU kernel is not used, torch is: {reason}", RuntimeWarning, stacklevel=2)
        return None


def _needed(compiler_flags: str) -> set[str]:
    return {flag.replace("avx512vnni", "avx512_vnni") for flag in compiler_flags.split()}


def cache_directory() -> Path:
    if override := os.environ.get("ROTATEKV_CACHE_DIR"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotatekv"


def _build(name: str, flags: list[str], instruction_set: str) -> Path:
    """Path of the library, compiled unless the cache has it. Two processes may build at once: the last rename wins."""
    compiler = os.environ.get("CXX") or "g++"
    version = _run([compiler, "--version"]).splitlines()[0]
    digest = hashlib.sha256("\0".join([version, platform.machine(), *sorted(cpu_flags()), *flags]).encode())
    for source in sorted(p for p in _SOURCES.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_directory() / f"{name}-{instruction_set}-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        _run([compiler, *flags, str(_SOURCES / f"{name}.cpp"), "-o", str(made)])
        os.replace(made, target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    return done.stdout
