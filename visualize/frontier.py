"""Perplexity lost against bits spent: one point for each finished perplexity run, a line for each method.

python reproduce.py --table ppl --chunk_size 64 …, or runs of PPL_evaluation.py, FP16's among them
python visualize/frontier.py --input results/ppl/smollm2-135m --chunk_size 64 --output frontier.png
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from rotatekv.evals.results import read_metrics
from visualize.common import PALETTE, Drawing, Figure, UserError, figure_script

_MARKERS = "osD^vP*"
_PROTOCOL = ("dataset_sha256", "PPL_seq_length", "model", "dtype")  # what the runs of one figure share, with FP16's
_MOST_BITS = 16.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk_size", type=int, help="draw the runs streamed by so many tokens (default: one-shot)")


@figure_script("folder of perplexity runs, results/ppl/<model>", flags=add_flags)
def main(args: argparse.Namespace) -> Drawing:
    runs = read_runs(Path(args.input), args.chunk_size)
    lines = lines_of(runs)
    if not lines:
        raise UserError(f"no run in {args.input} lies above FP16's perplexity: there is nothing to draw")
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    draw(figure.subplots(), lines)
    first = next(iter(runs))
    how = f"streamed {args.chunk_size} tokens at a time" if args.chunk_size else "one-shot"
    title = f"{first['config']['model']}, {first['config']['dataset']}, {first['n']} windows of "
    print(f"{sum(map(len, lines.values()))} runs of {len(lines)} methods")
    return Drawing(
        figure,
        f"{title}{first['config']['PPL_seq_length']} tokens, {how}: perplexity above FP16's",
        "Perplexity above FP16's against measured bits per key and value number, by method.",
    )


def read_runs(folder: Path, chunk_size: int | None) -> list[dict]:
    """Finished runs of one protocol, FP16's first: those that saw as many windows of the same text.

    Raises:
        UserError: no FP16 run, or nothing beside it.
    """
    found = []
    for path in sorted(folder.glob("*/metrics.json")):
        metrics = read_metrics(path.parent)
        ppl, is_ppl = metrics["metric"].get("ppl"), metrics.get("task") == "ppl"
        if is_ppl and ppl is not None and math.isfinite(ppl) and metrics["config"].get("chunk_size") == chunk_size:
            found.append(metrics)
    exact = max((run for run in found if run["config"]["method"] == "FP16"), key=lambda run: run["n"], default=None)
    if exact is None:
        streamed = f" with --chunk_size {chunk_size}" if chunk_size else ""
        raise UserError(f"no finished FP16 run{streamed} in {folder}: run PPL_evaluation.py --method FP16{streamed}")
    same = [run for run in found if run is not exact and run["n"] == exact["n"] and _alike(run, exact)]
    if not same:
        raise UserError(f"no run in {folder} saw what FP16's {exact['n']} windows show: run other methods alike")
    return [exact, *same]


def lines_of(runs: list[dict]) -> dict[str, list[tuple[float, float, str]]]:
    """Method without its bits → (bits, perplexity above FP16's, label), by bits. Methods in the order of their best."""
    exact, *others = runs
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for run in others:
        name, loss = run["config"]["method"], run["metric"]["ppl"] - exact["metric"]["ppl"]
        if loss > 0 and run["avg_bits"]["total"] < _MOST_BITS:
            family = re.sub(r"\d", "", name.rstrip("*")) + (_window(run) if name.endswith("*") else "")
            lines.setdefault(family, []).append((run["avg_bits"]["total"], loss, name))

    def best(item: tuple[str, list[tuple[float, float, str]]]) -> float:
        return min(loss for _, loss, _ in item[1])

    return {family: sorted(points) for family, points in sorted(lines.items(), key=best)}


def draw(panel, lines: dict[str, list[tuple[float, float, str]]]) -> None:
    for number, (family, points) in enumerate(lines.items()):
        bits, losses, _ = zip(*points, strict=True)
        panel.plot(
            bits,
            losses,
            label=family,
            color=PALETTE[number % len(PALETTE)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="-" if number < len(PALETTE) else "--",
            linewidth=2.4 if family.endswith("+") else 1.2,
        )
    panel.set_yscale("log")
    panel.set_xlabel("bits per key and value number, everything counted")
    panel.set_ylabel("perplexity above FP16's")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=8, ncols=2)


def _alike(run: dict, exact: dict) -> bool:
    weights = {config["weights"] for config in (run["config"], exact["config"]) if "weights" in config}
    return len(weights) < 2 and all(run["config"].get(name) == exact["config"].get(name) for name in _PROTOCOL)


def _window(run: dict) -> str:
    """What a run with flags of its own is called: its recent window, where it has one."""
    window = run["config"]["quant"].get("residual_length", 0)
    return f", window {window}" if window else ", other flags"


if __name__ == "__main__":
    main()
