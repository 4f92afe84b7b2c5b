"""What the page's script needs to set runs side by side: facts as text, and a capped number of samples."""

from __future__ import annotations

import json
import math

from visualize.report_page.runs import RunRecord, flat, number
from visualize.report_page.tasks import main_metrics, number_text, other_metrics, task_of, time_text

MOST_SAMPLES = 50
MOST_LETTERS = 300
_MEASURES = ("nll", "score")
# Two runs that differ in these still answer the same samples.
_SAME_SAMPLES = ("quant.", "method", "fingerprint", "weights", "dtype", "attn_implementation", "batch_size")


def compare_data(runs: list[RunRecord]) -> dict:
    """The runs as json, for the page's script."""
    return {"mostSamples": MOST_SAMPLES, "mostLetters": MOST_LETTERS, "runs": [_run_data(run) for run in runs]}


def _run_data(run: RunRecord) -> dict:
    rows = [_sample_data(sample) for sample in run.samples[:MOST_SAMPLES]]
    return {
        "task": run.task,
        "title": task_of(run.task).title,
        "method": run.method,
        "model": run.model,
        "id": run.run_id,
        "groups": [[name, [list(row) for row in rows]] for name, rows in _facts(run).items() if rows],
        "protocol": _protocol(run),
        "samples": rows,
        "sampleCount": len(run.samples),
        "cut": any(row.pop("cut") for row in rows),
    }


def _facts(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Groups of (field, text)."""
    return {
        "Scores": _scores(run),
        "Cache": [
            ("bits per number", number_text(run.measured("avg_bits", "total"), 3)),
            ("bits per key number", number_text(run.measured("avg_bits", "k"), 3)),
            ("bits per value number", number_text(run.measured("avg_bits", "v"), 3)),
            ("bytes per token", number_text(run.measured("cache_bytes_per_token"), 1)),
        ],
        "Run": [
            ("samples", number_text(run.measured("n"), 0)),
            ("state", f"{run.state}: {run.reason}" if run.reason else run.state),
            ("seconds", number_text(run.measured("seconds"), 1)),
            ("started (UTC)", time_text(run.started)),
            ("command", run.command() or "–"),
            ("folder", str(run.folder)),
        ],
        "Configuration": [(name, _plain(value)) for name, value in flat(run.config, joint=".").items()],
        "Environment": [(name, _plain(value)) for name, value in flat(run.environment, joint=".").items()],
    }


def _scores(run: RunRecord) -> list[tuple[str, str]]:
    known = main_metrics(run.task, [run]) | other_metrics(run.task, [run])
    found = []
    for name, metric in known.items():
        label = f"{metric.label} ({metric.better} is better)" if metric.better else metric.label
        found.append((label, number_text(run.scores.get(name), metric.decimals)))
    return found


def _protocol(run: RunRecord) -> str:
    """Equal for two runs whose samples of one id are the same task set to them."""
    config = flat(run.config, joint=".")
    return json.dumps(
        {key: value for key, value in config.items() if not key.startswith(_SAME_SAMPLES)}, sort_keys=True
    )


def _sample_data(sample: dict) -> dict:
    measure = next((name for name in _MEASURES if number(sample.get(name)) is not None), None)
    value = None if measure is None else number(sample[measure])
    prediction, cut = _capped(sample.get("prediction"))
    answers, answers_cut = _capped(sample.get("answers"))
    return {
        "id": str(sample["id"]),
        "measure": measure,
        "shown": number_text(value, 4 if measure == "nll" else None),
        "value": value if value is not None and math.isfinite(value) else None,
        "prediction": prediction,
        "answers": answers,
        "cut": cut or answers_cut,
    }


def _capped(value) -> tuple[str | None, bool]:
    if value is None:
        return None, False
    text = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
    return (text, False) if len(text) <= MOST_LETTERS else (text[: MOST_LETTERS - 1] + "…", True)


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
