"""efficiency.csv and efficiency.png of one run: a row per cell and side, and bars by context length."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from rotatekv.evals.efficiency import BASELINE, RATIOS, percentiles, ratios
from rotatekv.evals.figures import PALETTE, png_of
from rotatekv.files import write_atomically
from rotatekv.statistics import model_slug

NOT_MEASURED = "not measured"
_METHOD_COLOURS = PALETTE[:6]
_BASELINE_COLOUR = "#7f7f7f"  # HF in grey
_DPI = 150


def rows_of(records: Sequence[dict]) -> list[dict]:
    """Two rows a cell, HF's and the method's; times in ms, sizes in bytes, rates in tokens/s of the whole batch."""
    rows = []
    for record in records:
        for side in (record["hf"], record["quantized"]):
            own_ratios = ratios(record) if side is record["quantized"] else dict.fromkeys(RATIOS)
            rows.append(_row(record, side) | own_ratios)
    return rows


def write_report(records: Sequence[dict], metrics: dict, folder: Path) -> None:
    """``efficiency.csv`` and ``efficiency.png`` in a run's folder."""
    rows = rows_of(records)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    methods = ", ".join(dict.fromkeys(record["method"] for record in records))
    description = f"Speed, cache and peak memory of {methods} beside Hugging Face's own cache."
    picture = png_of(draw(records, metrics["config"]), description, _DPI)
    write_atomically(folder / "efficiency.csv", text.getvalue().encode())
    write_atomically(folder / "efficiency.png", picture)


def _row(record: dict, side: dict) -> dict:
    """One side of a cell; a number that is missing says why, where there is a reason."""
    quantized = side is record["quantized"]
    row = {
        "context_length": record["context_length"],
        "batch_size": record["batch_size"],
        "method": record["method"],
        "side": side["side"],
        "status": "ok" if side["fitted"] else "out of memory",
    }
    row |= rates(side, record["context_length"] * record["batch_size"], record["batch_size"])
    growth = side["growth"] if side["fitted"] else None
    unmeasured = NOT_MEASURED if side["fitted"] else None
    return row | {
        "cache_bytes": side.get("cache_bytes"),
        "avg_bits": record["total_bits"] if quantized else None,
        "model_bytes": side["model_bytes"],
        "peak_growth_bytes": unmeasured if growth is None else growth,
        "peak_bytes": unmeasured if growth is None else side["model_bytes"] + growth,
        "max_batch": side.get("max_batch"),
        "max_batch_how": side.get("max_batch_how"),
        "alternated": side.get("alternated"),
        **{name: record[name] for name in _CIRCUMSTANCES},
    }


_CIRCUMSTANCES = ("device", "threads", "torch", "dtype", "backend")


def rates(side: dict, prefill_tokens: int, decode_tokens: int) -> dict:
    """p20, p50 and p80 of a side's milliseconds and of its tokens/s; None where it has no times.

    Args:
        prefill_tokens, decode_tokens: of all sequences, in one prefill and in one decode step.
    """
    found: dict = {}
    for phase, tokens in (("prefill", prefill_tokens), ("decode", decode_tokens)):
        times = side.get(f"{phase}_ms")
        measures = {"ms": times, "tokens_per_s": [1000 * tokens / time for time in times] if times else None}
        for unit, values in measures.items():
            spread = percentiles(values) if values else dict.fromkeys(("p20", "p50", "p80"))
            found |= {f"{phase}_{unit}_{name}": value for name, value in spread.items()}
    return found


def draw(records: Sequence[dict], config: dict):
    """A row of panels per batch size: prefill and decode speed, cache, and peak over the idle model."""
    from matplotlib.figure import Figure

    batches = sorted({record["batch_size"] for record in records})
    lengths = sorted({record["context_length"] for record in records})
    methods = list(dict.fromkeys(record["method"] for record in records))
    width = max(3.2, 0.5 + 0.34 * len(lengths) * (2 * len(methods) + 1))
    figure = Figure(figsize=(4 * width, 2.9 * len(batches) + 0.9), layout="constrained")
    grid = figure.subplots(len(batches), len(_PANELS), squeeze=False)
    for panels, batch in zip(grid, batches, strict=True):
        of_batch = [record for record in records if record["batch_size"] == batch]
        for panel, (title, value, ratio) in zip(panels, _PANELS, strict=True):
            _draw_panel(panel, of_batch, lengths, methods, value, ratio)
            panel.set_title(title if len(batches) == 1 and batch == 1 else f"{title}, batch {batch}", fontsize=10)
    first = records[0]
    machine = first["device"] if first["device"] != "cpu" else f"CPU, {first['threads']} threads"
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{model_slug(config['model'])}, {first['dtype']}, {machine}, {first['backend']}. "
        "Bars: p50, whiskers: p20 to p80; × is the gain over HF in the same rounds",
        fontsize=10,
    )
    return figure


def _draw_panel(panel, records: Sequence[dict], lengths, methods, value: Callable, ratio: str) -> None:
    """Pairs of bars over context lengths: each method beside HF in the same cell, its gain written above."""
    # HF's bar is drawn anew for every method: the machine may have drifted from one cell to the next.
    bar = 0.84 / (2 * len(methods))
    for number, method in enumerate(methods):
        of_method = [record for record in records if record["method"] == method]
        colours = (("hf", _BASELINE_COLOUR), ("quantized", _METHOD_COLOURS[number % len(_METHOD_COLOURS)]))
        for second, (key, colour) in enumerate(colours):
            bars = []
            for record in of_method:
                if (found := value(record, record[key])) is not None:
                    low, middle, high = found
                    x = lengths.index(record["context_length"]) + (2 * number + second - len(methods) + 0.5) * bar
                    bars.append((x, middle, middle - low, high - middle))
                    gain = ratios(record)[ratio] if key == "quantized" else None
                    if gain is not None:
                        _write_gain(panel, gain, x, high)
            if not bars:
                continue
            places, heights, below, above = zip(*bars, strict=True)
            whiskers = (below, above) if any(below + above) else None
            label = method if second else BASELINE if number == 0 else None
            panel.bar(
                places, heights, bar * 0.94, color=colour, label=label, yerr=whiskers, capsize=2, ecolor="#333333"
            )
    panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45 if len(lengths) > 5 else 0)
    panel.set_xlabel("context length (tokens)")
    panel.set_xlim(-0.6, len(lengths) - 0.4)
    panel.margins(y=0.14)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.patches:
        panel.set_ylim(bottom=0)
    else:
        panel.text(0.5, 0.5, NOT_MEASURED, transform=panel.transAxes, ha="center")


def _write_gain(panel, gain: float, x: float, y: float) -> None:
    panel.annotate(f"{gain:.2f}×", (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=8)


def _speed(phase: str) -> Callable:
    def value(record: dict, side: dict):
        found = rates(side, record["context_length"] * record["batch_size"], record["batch_size"])
        spread = tuple(found[f"{phase}_tokens_per_s_{name}"] for name in ("p20", "p50", "p80"))
        return None if spread[1] is None else spread

    return value


def _megabytes(name: str) -> Callable:
    def value(record: dict, side: dict):
        size = side.get(name)
        return None if size is None else (size / 1e6,) * 3

    return value


_PANELS = (
    ("prefill (tokens/s)", _speed("prefill"), "prefill_speedup"),
    ("decode (tokens/s)", _speed("decode"), "decode_speedup"),
    ("cache (MB)", _megabytes("cache_bytes"), "cache_ratio"),
    ("peak over the idle model (MB)", _megabytes("growth"), "peak_growth_ratio"),
)


def line_of(record: dict) -> str:
    """One cell for the terminal."""
    found = ratios(record)
    where = f"{record['method']} {record['context_length']} x {record['batch_size']}"
    if found["decode_speedup"] is None:
        short = " and ".join(side["side"] for side in (record["hf"], record["quantized"]) if not side["fitted"])
        return f"{where}: {short} out of memory"
    step = percentiles(record["quantized"]["decode_ms"])["p50"]
    peak = NOT_MEASURED
    if found["peak_ratio"] is not None:
        sizes = (side["model_bytes"] + side["growth"] for side in (record["hf"], record["quantized"]))
        peak = " -> ".join(f"{size / 1e6:.0f}" for size in sizes) + " MB"
    prefill, cache = found["prefill_overhead_percent"], found["cache_ratio"]
    line = (
        f"{where}: decode {found['decode_speedup']:.2f}x HF ({step:.1f} ms a step), prefill {prefill:+.1f} % time, "
        f"cache {cache:.1f}x smaller, peak memory {peak}"
    )
    if "max_batch" in record["hf"]:
        hf, own = record["hf"], record["quantized"]
        line += f", batch {hf['max_batch']} -> {own['max_batch']} ({own['max_batch_how']})"
    return line
