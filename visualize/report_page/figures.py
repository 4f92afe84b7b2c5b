"""Finds the PNG files of the report: the gallery's and those in run folders, with their captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visualize.report_page.runs import RunRecord


@dataclass(frozen=True)
class Figure:
    """One picture, ready to stand in the page."""

    name: str
    caption: str
    width: int
    height: int
    source: str
    run: RunRecord | None = None


def collect_figures(folders: Iterable[Path], runs: Iterable[RunRecord], problems: list[str]) -> list[Figure]:
    """The figures of ``folders`` by name, then those of the runs in the runs' order; none twice."""
    seen = set()
    wanted = [(path, None) for folder in folders for path in sorted(folder.rglob("*.png"))]
    wanted += [(path, run) for run in runs for path in sorted(run.folder.glob("*.png"))]
    figures = []
    for path, run in wanted:
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        figure = _read_figure(path, run, problems)
        if figure is not None:
            figures.append(figure)
    return figures


def _read_figure(path: Path, run: RunRecord | None, problems: list[str]) -> Figure | None:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            described = picture.text.get("Description", "")
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        problems.append(f"{path} is not a readable PNG: the figure is left out")
        return None
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Figure(path.name, " ".join(described.split()) or _own_caption(path, run), width, height, source, run)


def _own_caption(path: Path, run: RunRecord | None) -> str:
    if run is None:
        return path.name
    return f"{path.name} of the {run.task} run {run.run_id}: {run.method}, {run.model}"
