"""The tables of reproduce.py as markdown and csv: the paper's figure, ours, the difference, bits, bytes, command."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rotatekv.external import EXTERNAL
from rotatekv.files import write_output
from rotatekv.reproduce.plan import STREAMED, Cell
from rotatekv.reproduce.runs import Outcome, Runs, shown

FIELDS = (
    "table",
    "group",
    "model",
    "row",
    "external",
    "view",
    "metric",
    "paper",
    "paper_source",
    "ours",
    "difference",
    "bits",
    "bytes_per_token",
    "n",
    "partial",
    "status",
    "reason",
    "command",
    "run",
    "started",
    "git_commit",
)
_DIGITS = 4


def write_tables(folder: Path, table: str, outcomes: Mapping[Cell, Outcome], runs: Runs, made_by: str) -> None:
    """Write ``<table>.csv`` (one line per cell) and ``<table>.md`` (one per row), each at once."""
    records = [record_of(cell, outcome, runs) for cell, outcome in outcomes.items()]
    write_output(folder / f"{table}.csv", as_csv(records).encode(), "--output_dir")
    write_output(folder / f"{table}.md", as_markdown(table, records, made_by).encode(), "--output_dir")


def record_of(cell: Cell, outcome: Outcome, runs: Runs) -> dict:
    """One cell's line of the csv; numbers as they stand in metrics.json, empty where there is none."""
    record: dict = dict.fromkeys(FIELDS, "")
    record |= {
        "table": cell.table,
        "group": cell.group,
        "model": cell.model,
        "row": cell.label,
        "view": cell.view,
        "external": cell.method in EXTERNAL,
        "metric": cell.metric,
        "status": outcome.status,
        "reason": outcome.reason,
        "command": shown(runs.command(cell)),
    }
    if cell.paper is not None:
        record |= {"paper": cell.paper.value, "paper_source": cell.paper.source}
    if (metrics := outcome.metrics) is not None:
        record |= {
            "ours": metrics["metric"][cell.metric],
            "bits": metrics["avg_bits"]["total"],
            "bytes_per_token": metrics["cache_bytes_per_token"],
            "n": metrics["n"],
            "partial": metrics["partial"],
            "run": outcome.folder,
            "started": metrics.get("started", ""),
            "git_commit": (metrics.get("env") or {}).get("git_commit") or "",
        }
        if cell.paper is not None and cell.comparable and cell.view != STREAMED:
            record["difference"] = record["ours"] - cell.paper.value
    return record


def as_csv(records: Sequence[dict]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def as_markdown(table: str, records: Sequence[dict], made_by: str) -> str:
    views = list(dict.fromkeys(record["view"] for record in records))
    lines = [f"# {table}", "", f"Made by `{made_by}`. Bits and bytes are measured.", ""]
    for group in dict.fromkeys(record["group"] for record in records):
        lines += [f"## {group}", ""] if group else []
        lines += _header(views)
        rows: dict[tuple, dict[str, dict]] = {}
        for record in records:
            if record["group"] == group:
                rows.setdefault((record["model"], record["row"]), {})[record["view"]] = record
        lines += [_row(cells, views) for cells in rows.values()]
        lines.append("")
    return "\n".join([*lines, *_notes(records), *_commands(records)]) + "\n"


def _header(views: Sequence[str]) -> list[str]:
    names = ["model", "row", "paper", "difference"]
    for view in views:
        names += [view, "bits", "bytes/token", "n"]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _row(cells: Mapping[str, dict], views: Sequence[str]) -> str:
    first = next(iter(cells.values()))
    mark = " (external)" if first["external"] else ""
    parts = [first["model"], first["row"] + mark, number(first["paper"], 2), number(first["difference"], 2)]
    for view in views:
        record = cells.get(view)
        if record is None:
            parts += ["", "", "", ""]
        elif record["status"] != "done":
            parts += [record["status"], "", "", ""]
        else:
            parts += [number(record["ours"], _DIGITS), number(record["bits"], 3), number(record["bytes_per_token"], 1)]
            parts.append(f"{record['n']} (partial)" if record["partial"] else str(record["n"]))
    return f"| {' | '.join(parts)} |"


def number(value, digits: int) -> str:
    return "" if value == "" else f"{value:.{digits}f}"


def _notes(records: Sequence[dict]) -> list[str]:
    notes = []
    if sources := list(dict.fromkeys(record["paper_source"] for record in records if record["paper_source"])):
        notes.append(f"paper: {'; '.join(sources)}. A difference stands where the protocol is the same.")
    if any(record["external"] for record in records):
        notes.append(
            "external: the unpatched model with transformers' QuantizedCache, which hands the first call's tokens back "
            "unquantized, so that a one-shot perplexity shows nothing of it: compare it streamed."
        )
    for view in dict.fromkeys(record["view"] for record in records):
        counts = {record["n"] for record in records if record["view"] == view and record["n"] != ""}
        if len(counts) > 1:
            notes.append(f"{view}: the rows differ in n and are not to be compared.")
    for record in records:
        if record["reason"]:
            where = ", ".join((record["model"], record["row"], record["view"]))
            notes.append(f"{where}: {record['status']}, {record['reason']}")
    return [*(f"* {note}" for note in notes), ""] if notes else []


def _commands(records: Iterable[dict]) -> list[str]:
    commands = list(dict.fromkeys(record["command"] for record in records))
    return ["## Commands", "", "```bash", *commands, "```"]
