"""Compiles the CPU kernels with a C++ compiler at their first use and loads them.

``CXX`` names the compiler and, after it, its flags or a launcher before it (``ccache g++``); by default g++.
``ROTATEKV_CPU_KERNEL`` names the instruction set (``avx512``, ``avx512bw`` without VNNI, ``avx2``, ``portable``), or
switches the kernels off (``off``); by default the widest that the CPU has.

A library is kept in ``ROTATEKV_CACHE_DIR`` or ``$XDG_CACHE_HOME/rotatekv`` or ``~/.cache/rotatekv``, as
``<name>-<instruction set>-<key>.<digest>.so``: the key is a hash of its sources, flags, compiler and CPU, the digest
one of its own bytes. It is loaded if its bytes have that digest and nobody but this user and root can change it or the
folder; otherwise it is built again. Where the folder cannot be used, a library serves one process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

from rotatekv.files import cache_directory

_SOURCES = Path(__file__).parent
_OPENMP = "-fopenmp"
_BASE_FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", _OPENMP, "-fvisibility=hidden", "-Wno-psabi"]
_EXTRA_FLAGS = {
    "attention": [],
    "dequantize": [],
    "frames": [],
    "components": [],
    "bands": [],
    "quantize": ["-ffp-contract=off"],  # bit-equal to torch: no product may merge with a sum
}
# Widest first: the flags of the compiler, which are what /proc/cpuinfo must list, see _needed.
_INSTRUCTION_SETS = {
    "avx512": "avx512f avx512bw avx512vl avx512dq avx512vnni fma f16c",
    "avx512bw": "avx512f avx512bw avx512vl avx512dq fma f16c",
    "avx2": "avx2 fma f16c",
    "portable": "",
}
_COMPILE_SECONDS = 300  # give up on a compiler that takes longer
_warned: set[str] = set()


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
        library = _cached_or_built(name, flags, instruction_set)
        entry = getattr(library, f"rotatekv_{name}")
        entry.argtypes, entry.restype = [ctypes.c_void_p], ctypes.c_char_p
        library.entry = entry  # type: ignore[attr-defined] # a library takes attributes, its stub does not say so
        return library
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"RotateKV's CPU kernel is not used, torch is: {reason}", RuntimeWarning, stacklevel=2)
        return None


def _needed(compiler_flags: str) -> set[str]:
    return {flag.replace("avx512vnni", "avx512_vnni") for flag in compiler_flags.split()}


def _cached_or_built(name: str, flags: list[str], instruction_set: str) -> ctypes.CDLL:
    """The library from the cache, compiled into it if need be.

    Raises:
        RuntimeError: it cannot be compiled. OSError: it cannot be loaded, from the cache or from a private folder.
    """
    compiler = _compiler()
    key = f"{name}-{instruction_set}-{_key(compiler, flags)}"
    binary = None
    try:
        folder = _trusted_folder()
        path = _find(folder, key)
        if path is None:
            binary = _compile(name, compiler, flags)
            path = _keep(folder, key, binary)
        binary = binary or path.read_bytes()
        return ctypes.CDLL(str(path))
    except OSError as error:  # read-only, full, mounted noexec, another user's
        _warn_of_cache(error.strerror or str(error))
        with tempfile.TemporaryDirectory(prefix="rotatekv-") as private:
            path = _keep(Path(private), key, binary or _compile(name, compiler, flags))
            return ctypes.CDLL(str(path))  # stays loaded without its file


def _compiler() -> list[str]:
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as error:
        raise RuntimeError(f"CXX={os.environ['CXX']} is no command ({error})") from None


def _key(compiler: list[str], flags: list[str]) -> str:
    """A hash of all that decides what the compiler makes."""
    version = _run([*compiler, "--version"]).stdout
    parts = [*compiler, version, platform.machine(), *sorted(cpu_flags()), *flags]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(p for p in _SOURCES.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _trusted_owners() -> set[int]:
    if not hasattr(os, "getuid"):
        raise OSError("this system does not say who owns a file")
    return {0, os.getuid()}


def _trusted_folder() -> Path:
    """The cache folder, made if need be (OSError: another user owns it or could exchange its files)."""
    folder = cache_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()  # a link is followed just once
    state = folder.stat()
    others_may_write = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX
    if state.st_uid not in _trusted_owners():
        raise PermissionError(f"it belongs to user {state.st_uid}")
    if others_may_write and state.st_uid != os.getuid():
        raise PermissionError("any user can write to it")
    if others_may_write:
        folder.chmod(state.st_mode & 0o755)
    return folder


def _find(folder: Path, key: str) -> Path | None:
    """The key's library, whole and not another user's; a damaged one is removed."""
    for path in folder.glob(f"{key}.*.so"):
        content = _read_trusted(path)
        if content is not None and path.name == _file_name(key, content):
            return path
        path.unlink(missing_ok=True)
    return None


def _read_trusted(path: Path) -> bytes | None:
    """The bytes of a plain file that just this user or root can write; None: it is something else."""
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_uid not in _trusted_owners() or state.st_mode & 0o022:
        return None
    return path.read_bytes()


def _keep(folder: Path, key: str, binary: bytes) -> Path:
    """Write a library in one step: whole or not at all, whatever other processes do."""
    path = folder / _file_name(key, binary)
    handle, temporary = tempfile.mkstemp(dir=folder)  # nobody else may write it
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _file_name(key: str, binary: bytes) -> str:
    return f"{key}.{hashlib.sha256(binary).hexdigest()}.so"


def _compile(name: str, compiler: list[str], flags: list[str]) -> bytes:
    """The library's bytes; without OpenMP, for one thread, where the compiler has none.

    Raises:
        RuntimeError: the compiler fails; the first line of what it says.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="rotatekv-") as folder:
            made = Path(folder) / "library.so"
            command = [*compiler, *flags, str(_SOURCES / f"{name}.cpp"), "-o", str(made)]
            first = done = _run(command)
            if done.returncode and _OPENMP in command:
                done = _run([part for part in command if part != _OPENMP])
                if not done.returncode:
                    _warn(f"{shlex.join(compiler)} has no OpenMP: RotateKV's CPU kernels run on one thread")
            if done.returncode:
                message = first.stderr.strip() or first.stdout.strip() or f"exit status {first.returncode}"
                raise RuntimeError(f"{shlex.join(compiler)} failed: {message.splitlines()[0]}")
            return made.read_bytes()
    except OSError as error:
        raise RuntimeError(f"{shlex.join(compiler)} made no library ({error.strerror or error})") from None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    """RuntimeError where the command cannot be run; it may fail."""
    options: dict = {"capture_output": True, "text": True, "errors": "replace", "timeout": _COMPILE_SECONDS}
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} was not done after {_COMPILE_SECONDS} seconds") from None
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error.strerror or error}") from None


def _warn_of_cache(reason: str) -> None:
    try:
        folder = str(cache_directory())
    except OSError:
        folder = "a home"
    _warn(
        f"RotateKV's kernels cannot be kept in {folder} ({reason}) and serve this process alone: "
        "make it a folder of yours, or name another one in ROTATEKV_CACHE_DIR"
    )


def _warn(message: str) -> None:
    """Once for each message: the libraries share their problems."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
