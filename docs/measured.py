"""Measured results: docs/results.json, from finished runs, and the tables of the pages, from docs/results.json.

python docs/measured.py results      add the finished runs of a folder, write the pages' tables and docs/frontier.png
python docs/measured.py              write the pages' tables and docs/frontier.png again

results.json has ``protocols``, each with what its runs' configs share, and ``rows``, one for each method; ``label`` is
what a row is called in the tables. A page marks a table by a comment in the line before it: the columns, as
protocol.field, and the rows, or all that the first column's protocol has. Its two header lines are the page's own; the
lines below them are written here.

    <!-- measured: smollm2.perplexity smollm2.bits passkey.found; FP16, RotateKV2, RotateKV2+ -->
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FRONTIER = "smollm2"  # the protocol that docs/frontier.png draws
_TABLE = re.compile(r"(<!-- measured: ([^;\n]*); ([^\n]*) -->\n(?:\|[^\n]*\n){2})((?:\|[^\n]*\n)*)")
_FORMATS = {"perplexity": "{:.2f}", "bits": "{:.3f}", "bytes": "{:.0f}", "agreement": "{:.1f}", "divergence": "{:.4f}"}
_SHARED_FLAGS = (  # do not change a method
    *("model", "method", "device", "dataset", "data_dir", "output_dir", "limit", "resume", "overwrite"),
    *("PPL_seq_length", "chunk_size", "batch_size", "max_new_tokens", "agree_with", "divergence"),
    *("needle_type", "needle_keys", "context_lengths", "depths", "introduction"),
)


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def add_runs(results: dict, folder: Path) -> int:
    """Put the finished runs of ``folder`` in, in place of what a method had in that protocol → how many."""
    count = 0
    for path in sorted(folder.glob("*/*/*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if (protocol := protocol_of(results["protocols"], metrics)) is not None and None not in metrics[
            "metric"
        ].values():
            row = row_of(protocol, metrics)
            rows = {_key(other): other for other in results["rows"]}
            row |= {name: value for name, value in rows.get(_key(row), {}).items() if name == "label"}
            results["rows"] = list({**rows, _key(row): row}.values())
            count += 1
    return count


def protocol_of(protocols: dict, metrics: dict) -> str | None:
    """The one whose ``config`` and number of samples a run's are."""
    run = {**metrics["config"], "n": metrics["n"]}
    matches = (
        name
        for name, protocol in protocols.items()
        if all(run.get(field) == value for field, value in protocol["config"].items())
    )
    return next(matches, None)


def row_of(protocol: str, metrics: dict) -> dict:
    metric, env = metrics["metric"], metrics["env"]
    numbers = {
        "perplexity": metric.get("ppl"),
        "divergence": metric.get("kl"),
        "found": None if "recall" not in metric else round(metric["recall"] * metrics["n"] / 100),
        "agreement": metric.get("agreement"),
        "accuracy": metric.get("accuracy"),
        "bits": metrics["avg_bits"]["total"],
        "bytes": metrics["cache_bytes_per_token"],
    }
    return {
        "protocol": protocol,
        "method": label_of(metrics),
        **{name: round(value, 4) for name, value in numbers.items() if value is not None},
        "commit": (env.get("git_commit") or "")[:7],
        "date": metrics["started"][:10],
    }


def label_of(metrics: dict) -> str:
    """The preset, and the flags that change it as the command had them; of a calibration file its bare name."""
    label, flag = [metrics["config"]["method"].rstrip("*")], ""
    for word in shlex.split(metrics["argv"])[1:]:
        flag = word[2:] if word.startswith("--") else flag
        if flag not in _SHARED_FLAGS:
            label.append(Path(word).stem if flag == "calibration_file" and not word.startswith("--") else word)
    return " ".join(label)


def _key(row: dict) -> tuple[str, str]:
    return row["protocol"], row["method"]


def tables_written(text: str, results: dict) -> str:
    """A page's text with its tables as results.json has them."""
    return _TABLE.sub(lambda found: found[1] + table_body(found[2].split(), found[3], results), text)


def table_body(columns: list[str], methods: str, results: dict) -> str:
    """A row for each of ``methods``: their names, or ``all`` that the first column's protocol has."""
    rows = {_key(row): row for row in results["rows"]}
    first = columns[0].split(".")[0]
    of_first = [method for protocol, method in rows if protocol == first]
    wanted = of_first if methods == "all" else [name.strip() for name in methods.split(",")]
    body = ""
    for method in wanted:
        cells = [_label(rows.get((first, method), {}), method), *(_shown(rows, column, method) for column in columns)]
        body += f"| {' | '.join(cells)} |\n"
    return body


def _label(row: dict, method: str) -> str:
    name, _, flags = method.partition(" ")
    return row.get("label") or (f"{name} `{flags}`" if flags else name)


def _shown(rows: dict, column: str, method: str) -> str:
    protocol, field = column.split(".")
    value = rows.get((protocol, method), {}).get(field)
    return "–" if value is None else _FORMATS.get(field, "{}").format(value)


def draw_frontier(results: dict) -> None:
    """docs/frontier.png, by visualize/frontier.py, of the rows that the tables show."""
    from visualize import frontier
    from visualize.common import save

    rows = [row for row in results["rows"] if row["protocol"] == FRONTIER and " " not in row["method"]]
    runs = [
        {"config": {"method": row["method"]}, "metric": {"ppl": row["perplexity"]}, "avg_bits": {"total": row["bits"]}}
        for row in sorted(rows, key=lambda row: row["method"] != "FP16")
    ]
    figure = frontier.Figure(figsize=(9.5, 5.6), layout="constrained")
    frontier.draw(figure.subplots(), frontier.lines_of(runs))
    title = f"{results['protocols'][FRONTIER]['title']}: perplexity above FP16's"
    caption = "Perplexity above FP16's against measured bits per key and value number, by method."
    save(frontier.Drawing(figure, title, caption), ROOT / "docs" / "frontier.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of finished runs, the scripts' --output_dir")
    args = parser.parse_args(argv)
    results = read_results()
    if args.folder is not None:
        print(f"{add_runs(results, args.folder)} runs of a known protocol")
        RESULTS.write_text(as_text(results), encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(tables_written(text, results), encoding="utf-8")
    draw_frontier(results)


def as_text(results: dict) -> str:
    """JSON with a line for each row."""
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in results["rows"])
    protocols = json.dumps(results["protocols"], indent=2, ensure_ascii=False).replace("\n", "\n  ")
    return f'{{\n  "protocols": {protocols},\n  "rows": [\n{rows}\n  ]\n}}\n'


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
