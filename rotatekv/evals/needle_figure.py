"""Grids and heat maps of needle runs: context lengths × depths, one panel a run, as json and PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rotatekv.errors import UserError
from rotatekv.evals.figures import COLOURS, png_of
from rotatekv.evals.needle import NEEDLE_TYPES, grid_of
from rotatekv.files import write_json, write_output
from rotatekv.statistics import model_slug

_LABELS = {"rouge1": "ROUGE-1 F × 100", "recall": "exact recall (%)"}
_MISSING = "#d9d9d9"
_DPI = 150
_PER_ROW = 3
_MOST_NUMBERED = 12  # columns up to which each cell shows its number


def write_report(records: Sequence[dict], metrics: dict, folder: Path) -> None:
    """``grid.json`` and ``heatmap.png`` in a run's folder."""
    grid = grid_of(records, metrics)
    write_json(folder / "grid.json", grid)
    write_heat_maps(folder / "heatmap.png", [grid], "--output_dir")


def read_grid(folder: str) -> dict:
    """The grid.json of one finished run's folder.

    Raises:
        UserError: it is missing, damaged or of something else.
    """
    path = Path(folder) / "grid.json"
    try:
        grid = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}: pass the folder of a finished needle run, the one with metrics.json") from None
    except (OSError, ValueError):
        grid = None
    if not _is_grid(grid):
        raise UserError(f"{path} is damaged or no needle grid: --rescore {folder} writes it anew")
    return grid


def write_heat_maps(path: Path, grids: Sequence[dict], flag: str = "--output") -> None:
    """Draw grids of one needle type side by side into a PNG; ``flag`` is what named its place.

    Raises:
        UserError: different needle types, or the file cannot be written.
    """
    kinds = sorted({grid["needle_type"] for grid in grids})
    if len(kinds) > 1:
        raise UserError(f"runs of different needle types ({', '.join(kinds)}) do not share a scale: compare one type")
    measure = NEEDLE_TYPES[kinds[0]].measure
    figure = _draw(grids, measure)
    methods = ", ".join(dict.fromkeys(grid["method"] for grid in grids))
    description = f"{kinds[0]} needle in a haystack by context length and depth: {_LABELS[measure]} of {methods}."
    write_output(path, png_of(figure, description, _DPI), flag)


def _is_grid(grid) -> bool:
    try:
        shape = (len(grid["depths"]), len(grid["context_lengths"]))
        tables = [*_LABELS, *(["depth_reached"] if "depth_reached" in grid else [])]  # an older run has none
        numbers = [value for name in tables for row in grid[name] for value in row if value is not None]
        return (
            grid["needle_type"] in NEEDLE_TYPES
            and isinstance(grid["model"] + grid["method"], str)
            and all((len(grid[name]), *{len(row) for row in grid[name]}) == shape for name in tables)
            and all(0 <= value <= 100 for value in [*numbers, *grid["depths"]])
            and all(length >= 1 for length in grid["context_lengths"])
            and grid["bits"] > 0
        )
    except (KeyError, TypeError):
        return False


def _draw(grids: Sequence[dict], measure: str):
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    columns = min(len(grids), _PER_ROW)
    rows = -(-len(grids) // columns)
    wide = max(len(grid["context_lengths"]) for grid in grids)
    high = max(len(grid["depths"]) for grid in grids)
    width, height = max(3.4, 0.55 * min(wide, _MOST_NUMBERED) + 1.2), max(2.6, 0.32 * min(high, 20) + 1.4)
    figure = Figure(figsize=(columns * width + 0.9, rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = colormaps[COLOURS].with_extremes(bad=_MISSING)
    for panel, grid in zip(panels, grids, strict=False):
        _draw_panel(panel, grid, measure, colours)
    for panel in panels[len(grids) :]:
        panel.set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), colours), ax=list(panels), aspect=30, pad=0.02)
    bar.set_label(_LABELS[measure])
    return figure


def _draw_panel(panel, grid: dict, measure: str, colours) -> None:
    """One heat map: context lengths to the right, depths downwards."""
    lengths, depths = grid["context_lengths"], grid["depths"]
    reached = grid.get("depth_reached") or [[None] * len(lengths)] * len(depths)
    values = [[float("nan") if value is None else value for value in row] for row in grid[measure]]
    panel.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
    panel.set_xticks(*_ticks(lengths), rotation=45 if len(lengths) > 5 else 0)
    panel.set_yticks(*_ticks([_depth_label(*row) for row in zip(depths, reached, strict=True)]))
    panel.set_xlabel("context length (tokens)")
    panel.set_ylabel("needle depth (%)")
    panel.set_xticks([number - 0.5 for number in range(1, len(lengths))], minor=True)
    panel.set_yticks([number - 0.5 for number in range(1, len(depths))], minor=True)
    panel.grid(which="minor", color="white", linewidth=0.8)
    panel.tick_params(which="minor", length=0)
    shown = [value for row in values for value in row if value == value]
    mean = f"{sum(shown) / len(shown):.1f}" if shown else "–"
    what = f"{model_slug(grid['model'])}, {grid['needle_type']} needle"
    panel.set_title(f"{grid['method']} ({grid['bits']:.2f} bits), mean {mean}\n{what}", fontsize=10)
    if len(lengths) <= _MOST_NUMBERED:
        for row, numbers in enumerate(values):
            for column, value in enumerate(numbers):
                if value == value:
                    ink = "white" if value < 55 else "black"
                    panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)


def _depth_label(depth: int, reached: Sequence[float | None]) -> str:
    """The depth asked for, and between which ones the needles of that row really are, where that is another one."""
    places = sorted({round(value) for value in reached if value is not None})
    if places in ([], [depth]):
        return str(depth)
    return f"{depth} (at {places[0]})" if len(places) == 1 else f"{depth} (at {places[0]}–{places[-1]})"


def _ticks(numbers: Sequence[int | str]) -> tuple[list[int], list[str]]:
    """Positions and labels; of many numbers, not every one."""
    step = -(-len(numbers) // 20)
    places = list(range(0, len(numbers), step))
    return places, [str(numbers[place]) for place in places]
