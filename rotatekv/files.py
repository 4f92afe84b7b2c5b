"""Atomic writes: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from rotatekv.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def cache_directory() -> Path:
    """Where compiled kernels and converted models are kept (OSError: there is no home to keep them in)."""
    if override := os.environ.get("ROTATEKV_CACHE_DIR"):
        return Path(override)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotatekv"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside ``path``, then replace; nothing is left behind on failure (OSError)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, KeyboardInterrupt):
        temporary.unlink(missing_ok=True)
        raise


def write_output(path: Path, data: bytes, flag: str = "--output") -> None:
    """Write what a flag named, atomically, with the folders it needs.

    Raises:
        UserError: it cannot be written; the line names ``flag``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise write_error(path, error, f"choose another {flag}") from None


def write_error(path: Path, error: OSError, fix: str) -> UserError:
    """The line for a write that failed; a full disk has a fix of its own."""
    if error.errno in FULL_DISK:
        fix = "make room, then start the same command again, with --resume where it has that flag"
    return UserError(f"cannot write {path} ({error.strerror}): {fix}")


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (to_json(content, indent=2) + "\n").encode())


def to_json(content, **options) -> str:
    """``json.dumps`` of what every reader of json takes: no NaN, no infinity (ValueError)."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
