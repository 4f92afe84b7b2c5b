"""Fills page.html: what stands in the tables, the facts above them, and the policy that keeps the page to itself."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from visualize.report_page.compare import compare_data
from visualize.report_page.figures import Figure
from visualize.report_page.runs import RunRecord
from visualize.report_page.tasks import Metric, main_metrics, number_text, other_metrics, task_of, time_text

PARTS = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """A column of a table of runs. ``value`` makes it one of numbers; ``kind`` names its cell in page.html."""

    title: str
    text: Callable[[RunRecord], str] = lambda run: ""
    value: Callable[[RunRecord], float | None] | None = None
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Section:
    """The runs of one task; ``scores`` are the columns of its second table, empty where there is none."""

    task: str
    runs: list[RunRecord]
    columns: list[Column]
    scores: list[Column]

    @property
    def anchor(self) -> str:
        return "task-" + re.sub(r"[^A-Za-z0-9_-]", "-", self.task)


def build_page(
    runs: list[RunRecord], figures: list[Figure], problems: list[str], made: datetime, title: str = "RotateKV results"
) -> str:
    """The whole page. The same arguments give the same text."""
    style, script = (PARTS / "page.css").read_text("utf-8"), (PARTS / "page.js").read_text("utf-8")
    finished = [run for run in runs if run.metrics is not None]
    tasks = dict.fromkeys(run.task for run in finished)
    environment = Environment(
        loader=FileSystemLoader(PARTS), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["counted"] = counted
    return environment.get_template("page.html").render(
        title=title,
        policy=_policy(style, script),
        style=style,
        script=script,
        facts=_facts(runs, problems, made),
        sections=[_section(task, [run for run in finished if run.task == task]) for task in tasks],
        task_of=task_of,
        unfinished=[run for run in runs if run.metrics is None],
        unfinished_columns=_UNFINISHED,
        problems=problems,
        figures=figures,
        ticks={run.folder: place for place, run in enumerate(finished)},
        pictures={figure.run.folder: place for place, figure in enumerate(figures) if figure.run is not None},
        data=compare_data(finished),
    )


def counted(items: list, noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def _policy(style: str, script: str) -> str:
    """Forbids the browser every request, and every script and style but the page's own."""
    own_style, own_script = (
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src {own_style}; script-src {own_script}; "
        "base-uri 'none'; form-action 'none'"
    )


def _facts(runs: list[RunRecord], problems: list[str], made: datetime) -> dict[str, str]:
    finished = [run for run in runs if run.metrics is not None]
    states = Counter(run.state for run in runs)
    order = ("complete", "partial", "no result", "unfinished")
    counts = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    times = sorted(run.started for run in finished if run.started)
    span = dict.fromkeys(time_text(when) for when in (times[:1] + times[-1:]))
    return {
        "Runs": f"{len(runs)}" + (f": {counts}" if counts else ""),
        "Tasks": _tally(task_of(run.task).title for run in runs),
        "Models": _tally(run.model for run in runs),
        "Devices": _tally(run.device() for run in finished),
        "Code": _tally(str(run.environment.get("git_commit") or "")[:9] or "unknown commit" for run in finished),
        "Runs started": " to ".join(span) + (" UTC" if span else ""),
        "Page made": f"{time_text(made)} UTC",
        "Unreadable": f"{len(problems)} (named below)" if problems else "",
    }


def _tally(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} ({count})" if len(counts) > 1 else name for name, count in counts.items())


def _section(task: str, runs: list[RunRecord]) -> Section:
    columns = [
        Column("method", lambda run: run.method, kind="tick"),
        *(_metric_column(name, metric) for name, metric in main_metrics(task, runs).items()),
        _number_column("bits", 3, "avg_bits", "total", note="per number"),
        _number_column("key bits", 3, "avg_bits", "k"),
        _number_column("value bits", 3, "avg_bits", "v"),
        _number_column("bytes", 0, "cache_bytes_per_token", note="per token"),
        _number_column("samples", 0, "n"),
        Column("state", lambda run: run.state, kind="state"),
        Column("dataset", lambda run: run.dataset),
        Column("model", lambda run: run.model),
        _number_column("seconds", 1, "seconds"),
        Column("started", lambda run: time_text(run.started), note="UTC"),
        Column("run", lambda run: run.run_id, kind="run"),
        Column("command", kind="command"),
    ]
    others = [_metric_column(name, metric, noted=False) for name, metric in other_metrics(task, runs).items()]
    own = [Column("model", lambda run: run.model), Column("run", lambda run: run.run_id)]
    return Section(task, runs, columns, [_METHOD, *others, *own] if others else [])


def _metric_column(name: str, metric: Metric, noted: bool = True) -> Column:
    note = f"{metric.better} is better" if metric.better and noted else ""
    return Column(
        metric.label,
        lambda run: number_text(run.scores.get(name), metric.decimals),
        lambda run: run.scores.get(name),
        note,
    )


def _number_column(title: str, decimals: int, *names: str, note: str = "") -> Column:
    return Column(
        title, lambda run: number_text(run.measured(*names), decimals), lambda run: run.measured(*names), note
    )


_METHOD = Column("method", lambda run: run.method, kind="method")
_UNFINISHED = [
    _METHOD,
    Column("task", lambda run: task_of(run.task).title),
    Column("samples", lambda run: str(len(run.samples)), lambda run: len(run.samples)),
    Column("model", lambda run: run.model),
    Column("dataset", lambda run: run.dataset),
    Column("folder", lambda run: str(run.folder)),
]
