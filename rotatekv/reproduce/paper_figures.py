"""The paper's published figures, from ``rotatekv/reproduce/paper_figures.json``, each with where it stands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rotatekv.errors import UserError

PAPER_FIGURES = Path(__file__).with_name("paper_figures.json")
VERSION = 1
_METRICS = {"ppl": "ppl", "ablation": "ppl", "gsm8k": "accuracy", "needle": "rouge1"}


@dataclass(frozen=True)
class PaperFigure:
    """One published number.

    Args:
        task: of a table of reproduce.py. model: as ``--model`` names it. method: a preset, or an ablation's row.
        metric: its key in metrics.json. protocol: what a run must share for the two to be set beside each other.
        arxiv, table: where it stands. grade: P, read in the source; S, from a reader's notes of it.
        bits: the average bits the paper states with it.

    Raises:
        UserError: a field out of range.
    """

    task: str
    model: str
    method: str
    metric: str
    value: float
    protocol: Mapping
    arxiv: str
    table: str
    grade: str
    bits: float | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        for right, what in (
            (self.task in _METRICS and _METRICS[self.task] == self.metric, f"{self.task}'s metric {self.metric}"),
            (bool(self.model and self.method and self.table), "an empty model, method or table"),
            (is_number and math.isfinite(self.value) and self.value > 0, f"the value {self.value!r}"),
            (isinstance(self.protocol, Mapping), f"the protocol {self.protocol!r}"),
            (re.fullmatch(r"\d{4}\.\d{5}", self.arxiv) is not None, f"the arXiv id {self.arxiv!r}"),
            (self.grade in ("P", "S"), f"the grade {self.grade!r}"),
        ):
            if not right:
                raise UserError(f"paper figure of {self.model}, {self.method}: not possible is {what}")

    @property
    def source(self) -> str:
        return f"arXiv:{self.arxiv}, {self.table} ({self.grade})"


def load_paper_figures(path: Path = PAPER_FIGURES) -> dict[tuple[str, str, str], PaperFigure]:
    """The figures by (task, model, method).

    Raises:
        UserError: not this version's file, a bad figure, or one given twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        figures = [PaperFigure(**entry) for entry in content["figures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of paper figures ({error})") from None
    found: dict[tuple[str, str, str], PaperFigure] = {}
    for figure in figures:
        key = (figure.task, figure.model, figure.method)
        if key in found:
            raise UserError(f"{path} gives {', '.join(key)} twice")
        found[key] = figure
    return found
