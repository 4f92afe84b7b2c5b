"""How the CPU kernels are compiled and kept: damaged, foreign and unwritable caches, and compilers of all kinds."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rotatekv.kernels.cpu import build

if build._load("quantize", "portable") is None:
    pytest.skip("no g++", allow_module_level=True)

SOURCE = """
#ifdef _OPENMP
#define THREADS "many"
#else
#define THREADS "one"
#endif
extern "C" __attribute__((visibility("default"))) const char* rotatekv_quantize(const void*) { return THREADS WORD; }
"""
ANOTHER_USER = 12345


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a source that compiles at once."""
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "quantize.cpp").write_text(SOURCE.replace(" WORD", ""))
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setattr(build, "_warned", set())
    monkeypatch.setenv("ROTATEKV_CACHE_DIR", str(cache))
    build._load.cache_clear()
    yield cache
    build._load.cache_clear()


def loaded() -> str | None:
    """What the library says, in a process that has not loaded it yet."""
    build._load.cache_clear()
    library = build.load_library("quantize", "portable")
    return None if library is None else library.entry(None).decode()


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The names compiled so far."""
    names, compile_ = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda name, *rest: names.append(name) or compile_(name, *rest))
    return names


def test_a_library_is_compiled_once_and_is_its_users_alone(folder, compiled):
    assert loaded() == "many" and loaded() == "many"
    (library,) = libraries(folder)
    assert compiled == ["quantize"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(library.stat().st_mode) == 0o600


def test_a_changed_source_is_another_library(folder):
    assert loaded() == "many"
    (build._SOURCES / "new.h").write_text("\n")
    assert loaded() == "many" and len(libraries(folder)) == 2


def replaced(library: Path, content: bytes) -> None:
    """By another file: this process has the first one in its memory."""
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o600)


def truncated(library: Path) -> None:
    replaced(library, library.read_bytes()[:5000])


def emptied(library: Path) -> None:
    replaced(library, b"")


def changed(library: Path) -> None:
    replaced(library, library.read_bytes().replace(b"many", b"evil"))


def linked(library: Path) -> None:
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def writable(library: Path) -> None:
    library.chmod(0o666)


@pytest.mark.parametrize("damage", [truncated, emptied, changed, linked, writable])
def test_a_damaged_library_is_built_again(damage, folder, compiled):
    assert loaded() == "many"
    (library,) = libraries(folder)
    damage(library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded() == "many" and compiled == ["quantize"] * 2
        assert loaded() == "many" and compiled == ["quantize"] * 2
    assert library.is_file() and not library.is_symlink() and stat.S_IMODE(library.stat().st_mode) == 0o600


def test_another_users_library_is_never_loaded(folder, compiled, monkeypatch):
    """Here all files belong to another user but the folder, as in a folder of /tmp's kind."""
    assert loaded() == "many"
    lstat = Path.lstat

    def owned_by_another(path: Path):
        state = lstat(path)
        return os.stat_result([*state[:4], ANOTHER_USER, *state[5:]]) if path.suffix == ".so" else state

    monkeypatch.setattr(Path, "lstat", owned_by_another)
    assert loaded() == "many" and compiled == ["quantize"] * 2


def test_another_users_folder_is_left_alone(folder, compiled, monkeypatch):
    folder.mkdir(mode=0o777)
    monkeypatch.setattr(build, "_trusted_owners", lambda: {ANOTHER_USER})
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*it belongs to user .*name another one") as caught:
        assert loaded() == "many" and loaded() == "many"
    assert len(caught) == 1 and not libraries(folder) and compiled == ["quantize"] * 2


def test_a_folder_of_ours_that_others_may_write_to_is_closed(folder):
    folder.mkdir()
    folder.chmod(0o777)
    assert loaded() == "many"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and len(libraries(folder)) == 1


def test_a_folder_of_roots_that_all_may_write_to_serves_if_nobody_can_exchange_files(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: ANOTHER_USER)
    monkeypatch.setattr(build, "_trusted_owners", lambda: {folder.stat().st_uid, ANOTHER_USER})
    folder.chmod(0o1777)
    assert loaded() == "many" and len(libraries(folder)) == 1
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="any user can write to it"):
        assert loaded() == "many"


@pytest.mark.parametrize("place", ["read-only", "no home", "a file", "full", "noexec"])
def test_a_cache_that_cannot_be_used_warns_once_and_the_kernel_serves(place, folder, monkeypatch, tmp_path):
    if place == "read-only":
        monkeypatch.setenv("ROTATEKV_CACHE_DIR", "/proc/rotatekv")
    if place == "no home":
        monkeypatch.delenv("ROTATEKV_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    if place == "a file":
        folder.write_text("")
    if place == "full":
        replace = os.replace
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(
            os, "replace", lambda a, b: (_ for _ in ()).throw(full) if Path(b).parent == folder else replace(a, b)
        )
    if place == "noexec":
        monkeypatch.setattr(build.ctypes, "CDLL", refuse_to_map(folder))
    with pytest.warns(RuntimeWarning, match="serve this process alone") as caught:
        assert loaded() == "many" and loaded() == "many"
    assert len(caught) == 1
    assert place == "noexec" or place == "a file" or not libraries(folder), "nothing half-written is left"


def refuse_to_map(folder: Path):
    load = ctypes.CDLL

    def cdll(name: str, *args):
        if Path(name).parent == folder:
            raise OSError(f"{name}: failed to map segment from shared object: Operation not permitted")
        return load(name, *args)

    return cdll


def program(*lines: str) -> list[str]:
    """A process of its own that uses the cache and the source of this test, with build.py alone."""
    load = (
        "import importlib.util, pathlib",
        f"spec = importlib.util.spec_from_file_location('build', {build.__file__!r})",
        "build = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(build)",
        f"build._SOURCES = pathlib.Path({str(build._SOURCES)!r})",
    )
    say = "print(build.load_library('quantize', 'portable').entry(None).decode())"
    return [sys.executable, "-c", "\n".join([*load, *lines, say])]


def test_processes_that_build_at_once_and_one_that_is_killed_at_it(folder):
    died = subprocess.run(
        program("build.os.replace = lambda *a: build.os.kill(build.os.getpid(), 9)"), capture_output=True, timeout=100
    )
    assert died.returncode == -9 and not list(folder.glob("*.so"))
    running = [subprocess.Popen(program(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        out, errors = process.communicate(timeout=100)
        assert out.strip() == "many", errors
        assert "Warning" not in errors
    assert loaded() == "many" and len(list(folder.glob("*.so"))) == 1


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


GXX = [
    ("a launcher, flags", ['exec "$@"'], " g++ -O1 '-DWORD=\" and more\"'", "many and more"),
    ("no version", ['[ "$1" = --version ] || exec g++ "$@"'], "", "many"),
    ("an empty line first", ['[ "$1" = --version ] && printf "\\nNew\\nCompiler 3\\n" || exec g++ "$@"'], "", "many"),
    ("no --version", ['[ "$1" = --version ] && exit 1 || exec g++ "$@"'], "", "many"),
    ("bytes that are no text", ['[ "$1" = --version ] && printf "\\377\\376" || exec g++ "$@"'], "", "many"),
]


@pytest.mark.parametrize(("lines", "more", "says"), [case[1:] for case in GXX], ids=[case[0] for case in GXX])
def test_compilers_of_all_kinds(lines, more, says, folder, tmp_path, monkeypatch):
    (build._SOURCES / "quantize.cpp").write_text(SOURCE if "WORD" in more else SOURCE.replace(" WORD", ""))
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", *lines) + more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded() == says


def test_another_compiler_or_another_flag_is_another_library(folder, tmp_path, monkeypatch):
    for command in ("g++", "g++ -O1", script(tmp_path / "compiler", 'exec g++ "$@"')):
        monkeypatch.setenv("CXX", command)
        assert loaded() == "many"
    assert len(libraries(folder)) == 3


def test_a_compiler_without_openmp_builds_for_one_thread_and_says_so(folder, tmp_path, monkeypatch):
    refuses = 'for x in "$@"; do [ "$x" = -fopenmp ] && echo "no -fopenmp here" >&2 && exit 1; done; exec g++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", refuses))
    with pytest.warns(RuntimeWarning, match="no OpenMP.*one thread") as caught:
        assert loaded() == "one"
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("/nonexistent/g++", "cannot be run"),
        ("/bin/false", "exit status 1"),
        ("'g++", "is no command"),
        (". -O3", "cannot be run"),
        (["echo", "out of space: no space left on device", ">&2; exit 1"], "no space left"),
        (["exit", "0"], "made no library"),
        (["head", "-c", "100", "/dev/zero", '> "$out"'], "ELF|short"),
    ],
)
def test_a_failing_compiler_warns_once_and_gives_none(command, says, folder, tmp_path, monkeypatch):
    if isinstance(command, list):
        out = 'while [ $# -gt 1 ]; do shift; done; out="$1"'
        command = script(tmp_path / "compiler", '[ "$1" = --version ] && exit 0', out, " ".join(command))
    monkeypatch.setenv("CXX", command)
    with pytest.warns(RuntimeWarning, match=f"CPU kernel is not used, torch is: .*{says}") as caught:
        assert loaded() is None
    assert len(caught) == (2 if "ELF" in says else 1)  # a library that is none is tried outside the cache as well
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load_library("quantize", "portable") is None, "asked for again without another build"
