"""Atomic writes: a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rotatekv.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside ``path``, then replace; nothing is left behind on failure (OSError)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
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
        raise UserError(f"cannot write {path} ({error.strerror}): choose another {flag}") from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
