"""Records of a benchmark from a local jsonl file or the Hub, checked line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from rotatekv.errors import UserError
from rotatekv.models.hub import hub_is_offline

Record = TypeVar("Record")


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict]:
    """The records of a jsonl file; blank lines are passed over.

    Raises:
        UserError: no file, a line that is no json object (its number named), a missing field, or no record.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise UserError(f"no data file {path}: pass --data_dir DIR, or leave it out to use the Hub") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair decodes, but is no text
        except ValueError:
            raise UserError(f"{path}, line {number} is no json in UTF-8: fix or drop it") from None
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            raise UserError(f"{path}, line {number} has no field {missing[0]!r}")
        records.append(record)
    if not records:
        raise UserError(f"{path} has no records")
    return records


def read_hub(load: Callable[[], Iterable[Record]], name: str, hint: str) -> list[Record]:
    """The records ``load`` gets from the Hub; with no network, one line that says what to pass instead.

    Args:
        load: imports and calls ``datasets``.
        hint: the local file, as in ``DIR/gsm8k/test.jsonl``.
    """
    hub_is_offline()  # before datasets is imported: without a network, fail at once
    try:
        return list(load())
    except Exception as error:  # datasets and huggingface_hub raise a dozen classes with no network
        raise UserError(
            f"{name} cannot be had from the Hub ({type(error).__name__}): pass --data_dir DIR with {hint}"
        ) from None


def records_sha256(records: Sequence[dict]) -> str:
    """Of the records' canonical json, so that a local copy and the Hub's have one hash."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
