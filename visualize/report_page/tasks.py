"""What the report knows of each evaluation: title, metrics, which way is better. Unknown tasks get on without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from visualize.report_page.runs import RunRecord

_MOST_METRICS = 6  # of an unknown task in its main table; the others go to the table of scores below it


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. ``better`` is ``lower``, ``higher`` or empty where that is not known."""

    label: str
    better: str = ""
    decimals: int | None = None


@dataclass(frozen=True)
class Task:
    """``metrics`` are the main table's; all others are shown as scores, in ``rest``'s way."""

    title: str
    about: str = ""
    metrics: dict[str, Metric] = field(default_factory=dict)
    rest: Metric = Metric("")


TASKS = {
    "ppl": Task(
        "Perplexity",
        "How well the model predicts text with this cache, in windows of equal length.",
        {"ppl": Metric("perplexity", "lower", 2)},
    ),
    "gsm8k": Task(
        "GSM8K",
        "Grade-school mathematics, eight worked examples in the prompt, exact match of the final number.",
        {"accuracy": Metric("accuracy %", "higher", 2)},
    ),
    "longbench": Task(
        "LongBench",
        "Long-context tasks, each by its own metric, 0 to 100.",
        {"average": Metric("average", "higher", 2)},
        Metric("", "higher", 2),
    ),
    "needle": Task(
        "Needle in a haystack",
        "One sentence or number hidden in a long text and asked for, over context lengths and depths.",
        {"rouge1": Metric("ROUGE-1 F × 100", "higher", 1), "recall": Metric("recall %", "higher", 1)},
    ),
    "milebench": Task(
        "MileBench",
        "Questions about many pictures, 0 to 100; also by number of images and by category.",
        {"average": Metric("average", "higher", 2)},
        Metric("", "higher", 2),
    ),
}


def task_of(name: str) -> Task:
    return TASKS.get(name) or Task(name[:1].upper() + name[1:])


def main_metrics(name: str, runs: list[RunRecord]) -> dict[str, Metric]:
    """The metrics of the task's main table, by their names in metrics.json."""
    known = task_of(name)
    return known.metrics or {key: Metric(_spoken(key)) for key in _names(runs)[:_MOST_METRICS]}


def other_metrics(name: str, runs: list[RunRecord]) -> dict[str, Metric]:
    """All the others, such as a benchmark's single tasks."""
    main, rest = main_metrics(name, runs), task_of(name).rest
    return {key: Metric(_spoken(key), rest.better, rest.decimals) for key in _names(runs) if key not in main}


def number_text(value: float | None, decimals: int | None = None) -> str:
    """A number for the eye; without ``decimals``, about four digits."""
    if value is None:
        return "–"
    if decimals is None:
        size = abs(value)
        decimals = 0 if value.is_integer() or size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 4
    return f"{value:,.{decimals}f}"


def time_text(when: datetime | None) -> str:
    return when.strftime("%Y-%m-%d %H:%M") if when else "–"


def _names(runs: list[RunRecord]) -> list[str]:
    """All metrics of the runs, in the order the runs name them."""
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def _spoken(name: str) -> str:
    return name.replace("_", " ")
