"""Builds the page: tables that stand without the script, figures, and the json the script compares runs by."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

from visualize.report_compare import compare_data
from visualize.report_figures import Figure
from visualize.report_runs import RunRecord
from visualize.report_tasks import Metric, main_metrics, number_text, other_metrics, task_of, time_text

_PARTS = Path(__file__).parent / "report"


@dataclass(frozen=True)
class Column:
    """``text`` is escaped here; ``value`` makes a column of numbers; ``markup`` is html already."""

    title: str
    text: Callable[[RunRecord], str] = lambda run: ""
    value: Callable[[RunRecord], float | None] | None = None
    note: str = ""
    markup: Callable[[RunRecord], str] | None = None
    sortable: bool = True


def build_page(
    runs: list[RunRecord], figures: list[Figure], problems: list[str], made: datetime, title: str = "RotateKV results"
) -> str:
    """The whole page. The same arguments give the same text."""
    finished = [run for run in runs if run.metrics is not None]
    unfinished = [run for run in runs if run.metrics is None]
    style, script = (_PARTS / "page.css").read_text("utf-8"), (_PARTS / "page.js").read_text("utf-8")
    numbers = {id(run): place for place, run in enumerate(finished)}
    tasks = list(dict.fromkeys(run.task for run in finished))
    sections = [_task_section(task, [run for run in finished if run.task == task], numbers, figures) for task in tasks]
    return _fill(
        (_PARTS / "page.html").read_text("utf-8"),
        title=escape(title),
        policy=_policy(style, script),
        style=style,
        facts=_facts(finished, unfinished, problems, made),
        links=_links(tasks, unfinished, problems, figures),
        tasks="\n".join(sections),
        unfinished=_unfinished_section(unfinished),
        problems=_problem_section(problems),
        figures=_figure_section(figures),
        data=compare_data(finished),
        script=script,
    )


def _fill(template: str, **parts: str) -> str:
    """Put each part in the place of its ``{{ name }}``; what stands inside a part is left alone."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: parts[found[1]], template)


def _policy(style: str, script: str) -> str:
    """Forbids the browser every request, and every script and style but the page's own."""
    own_style, own_script = (
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src {own_style}; script-src {own_script}; "
        "base-uri 'none'; form-action 'none'"
    )


def _facts(finished: list[RunRecord], unfinished: list[RunRecord], problems: list[str], made: datetime) -> str:
    runs = finished + unfinished
    states = Counter(run.state for run in runs)
    order = ("complete", "partial", "no result", "unfinished")
    counts = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    times = sorted(run.started for run in finished if run.started)
    span = dict.fromkeys(time_text(when) for when in (times[:1] + times[-1:]))
    rows = {
        "Runs": f"{len(runs)}" + (f": {counts}" if counts else ""),
        "Tasks": _tally(task_of(run.task).title for run in runs),
        "Models": _tally(run.model for run in runs),
        "Devices": _tally(run.device() for run in finished),
        "Code": _tally(_commit(run) for run in finished),
        "Runs started": " to ".join(span) + (" UTC" if span else ""),
        "Page made": f"{time_text(made)} UTC",
        "Unreadable": f"{len(problems)} (named below)" if problems else "",
    }
    return "\n".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in rows.items() if text)


def _commit(run: RunRecord) -> str:
    commit = run.environment.get("git_commit")
    return str(commit)[:9] if commit else "unknown commit"


def _tally(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} ({count})" if len(counts) > 1 else name for name, count in counts.items())


def _links(tasks: list[str], unfinished: list, problems: list, figures: list) -> str:
    links = [(_anchor(task), task_of(task).title) for task in tasks]
    links += [("unfinished", "Unfinished")] if unfinished else []
    links += [("problems", "Unreadable")] if problems else []
    links += [("figures", "Figures")] if figures else []
    return "\n".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in links)


def _anchor(task: str) -> str:
    return "task-" + re.sub(r"[^A-Za-z0-9_-]", "-", task)


def _task_section(task: str, runs: list[RunRecord], numbers: dict[int, int], figures: list[Figure]) -> str:
    known, anchor = task_of(task), _anchor(task)
    method = Column("method", lambda run: run.method, markup=lambda run: _method_cell(run, numbers[id(run)]))
    table = _table(f"{known.title}: runs", [method, *_main_columns(task, runs, figures)], runs)
    scores = other_metrics(task, runs)
    if scores:
        plain = Column("method", lambda run: run.method, markup=_method_text)
        own = [Column("model", lambda run: run.model), Column("run", lambda run: run.run_id)]
        columns = [plain, *(_metric_column(name, metric, noted=False) for name, metric in scores.items()), *own]
        better = task_of(task).rest.better
        note = f" <small>{better} is better</small>" if better else ""
        table += f"\n<h3>Scores in detail{note}</h3>\n{_table(f'{known.title}: scores in detail', columns, runs)}"
    about = f"<p>{escape(known.about)}</p>" if known.about else ""
    return (
        f'<section id="{anchor}" class="runs" aria-labelledby="{anchor}-title">\n'
        f'<h2 id="{anchor}-title">{escape(known.title)} <small>{counted(len(runs), "run")}</small></h2>\n'
        f"{about}\n{table}\n</section>"
    )


def _main_columns(task: str, runs: list[RunRecord], figures: list[Figure]) -> list[Column]:
    places = {id(figure.run): place for place, figure in enumerate(figures) if figure.run is not None}
    return [
        *(_metric_column(name, metric) for name, metric in main_metrics(task, runs).items()),
        _number_column("bits", 3, "avg_bits", "total", note="per number"),
        _number_column("key bits", 3, "avg_bits", "k"),
        _number_column("value bits", 3, "avg_bits", "v"),
        _number_column("bytes", 0, "cache_bytes_per_token", note="per token"),
        _number_column("samples", 0, "n"),
        Column("state", lambda run: run.state, markup=_state_cell),
        Column("dataset", lambda run: run.dataset),
        Column("model", lambda run: run.model),
        _number_column("seconds", 1, "seconds"),
        Column("started", lambda run: time_text(run.started), note="UTC"),
        Column("run", lambda run: run.run_id, markup=lambda run: _run_cell(run, places.get(id(run)))),
        Column("command", markup=_command_cell, sortable=False),
    ]


def _metric_column(name: str, metric: Metric, noted: bool = True) -> Column:
    note = f"{metric.better} is better" if metric.better and noted else ""

    def value(run: RunRecord) -> float | None:
        return run.scores.get(name)

    return Column(metric.label, lambda run: number_text(value(run), metric.decimals), value, note)


def _number_column(title: str, decimals: int, *names: str, note: str = "") -> Column:
    def value(run: RunRecord) -> float | None:
        return run.measured(*names)

    return Column(title, lambda run: number_text(value(run), decimals), value, note)


def _method_cell(run: RunRecord, number: int) -> str:
    label = escape(f"compare {run.method}, {run.model}, run {run.run_id}")
    tick = f'<input type="checkbox" class="tick script-only" data-run="{number}" aria-label="{label}">'
    return f"<label>{tick}<span>{_method_text(run)}</span></label>"


def _method_text(run: RunRecord) -> str:
    settings = f"<small>{escape(run.settings)}</small>" if run.settings else ""
    return escape(run.method) + settings


def _state_cell(run: RunRecord) -> str:
    reason = f" <small>{escape(run.reason)}</small>" if run.reason else ""
    return f'<span class="state">{run.state}</span>{reason}'


def _run_cell(run: RunRecord, figure: int | None) -> str:
    link = "" if figure is None else f' <a href="#figure-{figure}">figure</a>'
    return f'<code title="{escape(str(run.folder))}">{escape(run.run_id)}</code>{link}'


def _command_cell(run: RunRecord) -> str:
    if not run.command():
        return "–"
    copy = '<button type="button" class="copy script-only">Copy</button>'
    return f"<details><summary>show</summary><code>{escape(run.command())}</code> {copy}</details>"


def _table(label: str, columns: list[Column], runs: list[RunRecord]) -> str:
    head = "".join(_head_cell(column) for column in columns)
    body = "\n".join(_row(columns, run) for run in runs)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>"
    )


def _head_cell(column: Column) -> str:
    names = ' class="number"' if column.value else ""
    sort = f' data-sort="{escape(column.title)}"' if column.sortable else ""
    note = f" <small>{escape(column.note)}</small>" if column.note else ""
    return f'<th scope="col"{names}{sort}>{escape(column.title)}{note}</th>'


def _row(columns: list[Column], run: RunRecord) -> str:
    first, *others = columns
    words = " ".join([task_of(run.task).title, run.task, run.method, run.model, run.dataset, run.settings, run.run_id])
    cells = "".join(_cell(column, run) for column in others)
    return (
        f'<tr data-words="{escape(words.lower())}"><th scope="row" data-value="{escape(first.text(run))}">'
        f"{_inside(first, run)}</th>{cells}</tr>"
    )


def _cell(column: Column, run: RunRecord) -> str:
    if column.value is None:
        return f"<td>{_inside(column, run)}</td>"
    value = column.value(run)
    data = "" if value is None else f' data-value="{value!r}"'
    return f'<td class="number"{data}>{_inside(column, run)}</td>'


def _inside(column: Column, run: RunRecord) -> str:
    return column.markup(run) if column.markup else escape(column.text(run))


def _unfinished_section(runs: list[RunRecord]) -> str:
    if not runs:
        return ""
    columns = [
        Column("method", lambda run: run.method, markup=_method_text),
        Column("task", lambda run: task_of(run.task).title),
        Column("samples", lambda run: str(len(run.samples)), lambda run: len(run.samples)),
        Column("model", lambda run: run.model),
        Column("dataset", lambda run: run.dataset),
        Column("folder", lambda run: str(run.folder)),
    ]
    return (
        '<section id="unfinished" class="runs" aria-labelledby="unfinished-title">\n'
        f'<h2 id="unfinished-title">Unfinished <small>{counted(len(runs), "run")}</small></h2>\n'
        "<p>Broken off, or still at work: no metrics yet. The same command with <code>--resume</code> goes on from the "
        f"samples that are there.</p>\n{_table('Unfinished runs', columns, runs)}\n</section>"
    )


def _problem_section(problems: list[str]) -> str:
    if not problems:
        return ""
    lines = "\n".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return (
        '<section id="problems" aria-labelledby="problems-title">\n<h2 id="problems-title">Unreadable '
        f"<small>{counted(len(problems), 'file')}</small></h2>\n<ul>\n{lines}\n</ul>\n</section>"
    )


def _figure_section(figures: list[Figure]) -> str:
    if not figures:
        return ""
    items = "\n".join(_figure(figure, number) for number, figure in enumerate(figures))
    return (
        '<section id="figures" aria-labelledby="figures-title">\n<h2 id="figures-title">Figures '
        f'<small>{len(figures)}</small></h2>\n<div class="gallery">\n{items}\n</div>\n</section>'
    )


def _figure(figure: Figure, number: int) -> str:
    words = f"{figure.name} {figure.caption}" + (f" {figure.run.task} {figure.run.model}" if figure.run else "")
    caption = escape(figure.caption)
    return (
        f'<figure id="figure-{number}" data-words="{escape(words.lower())}">\n'
        f'<button type="button" class="enlarge" aria-label="{escape(f"Enlarge: {figure.caption}")}">'
        f'<img src="{figure.source}" alt="{caption}" width="{figure.width}" height="{figure.height}" loading="lazy">'
        f"</button>\n<figcaption>{caption}</figcaption>\n</figure>"
    )


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
