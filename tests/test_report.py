"""visualize/report.py: every run and figure is in the page, as text, in order, with nothing from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from rotatekv.config import PRESETS
from rotatekv.evals.results import Run
from visualize import report
from visualize.report_page.compare import MOST_LETTERS, MOST_SAMPLES
from visualize.report_page.figures import collect_figures
from visualize.report_page.page import build_page
from visualize.report_page.runs import collect_runs

ROOT = Path(__file__).resolve().parents[1]
MADE = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
EVIL = '</script><img src="http://evil.example/x.png" onerror="alert(1)"><!--<script>'
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """The page's elements, its tables as rows of cell texts, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "div" and attributes.get("class") == "scroll":
            self.rows = self.tables.setdefault(attributes["aria-label"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "script" in self.open:
            self.scripts[-1] += text
        elif "style" not in self.open:
            self.text += text
            if {"th", "td"} & set(self.open):
                self.rows[-1][-1] += text

    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def column(self, table: str, heading: str) -> list[str]:
        head, *rows = self.tables[table]
        (place,) = (number for number, text in enumerate(head) if text.split(" (")[0].startswith(heading))
        return [row[place].strip() for row in rows]


def add_run(
    root, task="ppl", method="RotateKV2", metric=None, samples=2, finish=True, partial=False, **changes
) -> Path:
    quant = PRESETS.get(method.removesuffix("*"), PRESETS["RotateKV2"]).to_dict() | changes.pop("quant", {})
    config = {"task": task, "model": "Org/tiny", "method": method, "dataset": "essays", "seed": 0, "quant": quant}
    run = Run(root, task, "Org/tiny", {**config, **changes}, resume=False, overwrite=True)
    for number in range(samples):
        run.append({"id": number, "nll": 1.0 + number, "seconds": 1.0})
    if finish:
        bits = {"k": 2.25, "v": 2.5, "total": 2.375}
        metric = {"ppl": 12.3456} if metric is None else metric
        run.finish(metric=metric, partial=partial, n=samples, avg_bits=bits, cache_bytes_per_token=3424.4, seconds=2.0)
    return run.folder


def add_generation(root, predictions, **changes) -> Path:
    folder = add_run(root, task="gsm8k", metric={"accuracy": 50.0}, samples=0, **changes)
    lines = [
        json.dumps({"id": number, "prediction": text, "answers": ["3"], "score": number % 2})
        for number, text in enumerate(predictions)
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def add_png(path: Path, description: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = PngImagePlugin.PngInfo()
    if description is not None:
        notes.add_text("Description", description)
    Image.new("RGB", (7, 5)).save(path, pnginfo=notes)


def page_of(*roots, figures=()) -> Page:
    runs, problems = collect_runs(roots)
    found = collect_figures(figures, runs, problems)
    return Page(build_page(runs, found, problems, MADE))


def test_every_run_is_there_with_its_values(tmp_path):
    add_run(tmp_path, method="FP16", metric={"ppl": 9.876})
    folder = add_run(tmp_path, partial=True)
    page = page_of(tmp_path)
    table = "Perplexity: runs"
    assert page.column(table, "method") == ["FP16", "RotateKV2"]
    assert page.column(table, "perplexity") == ["9.88", "12.35"]
    assert page.column(table, "bits") == ["2.375"] * 2
    assert page.column(table, "key bits") == ["2.250"] * 2
    assert page.column(table, "value bits") == ["2.500"] * 2
    assert page.column(table, "bytes") == ["3,424"] * 2
    assert page.column(table, "samples") == ["2", "2"]
    assert page.column(table, "state") == ["complete", "partial"]
    assert page.column(table, "run")[1] == folder.name
    assert page.column(table, "dataset") == ["essays"] * 2
    assert "python " in page.column(table, "command")[0]
    assert "2: 1 complete, 1 partial" in page.text
    assert "lower is better" in page.tables[table][0][1]


def test_numbers_carry_their_value_for_sorting(tmp_path):
    add_run(tmp_path, metric={"ppl": 1234.5})
    values = [attributes["data-value"] for tag, attributes in page_of(tmp_path).elements if "data-value" in attributes]
    assert {"1234.5", "3424.4", "2.375"} <= set(values)


def test_single_tasks_have_a_table_of_their_own(tmp_path):
    metric = {"qasper": 1.0, "hotpotqa/0-4k": 2.5, "average": 1.75}
    add_run(tmp_path, task="longbench", metric=metric)
    add_run(
        tmp_path, task="milebench", metric={"NLVR": 40.0, "average": 40.0, "images": {"few": 41.0}, "categories": {}}
    )
    page = page_of(tmp_path)
    assert page.column("LongBench: runs", "average") == ["1.75"]
    assert page.column("LongBench: scores in detail", "hotpotqa/0-4k") == ["2.50"]
    assert page.column("MileBench: scores in detail", "images/few") == ["41.00"]


def test_an_unknown_task_shows_all_its_numbers(tmp_path):
    add_run(
        tmp_path, task="efficiency", metric={"tokens_per_second": 12.3456, "note": "text", "memory": {"peak": 10**400}}
    )
    page = page_of(tmp_path)
    assert page.column("Efficiency: runs", "tokens per second") == ["12.35"]
    assert page.column("Efficiency: runs", "memory/peak") == ["–"]


def test_settings_say_what_the_method_name_does_not(tmp_path):
    add_run(tmp_path, method="RotateKV2*", quant={"k_bits": 3})
    add_run(tmp_path, chunk_size=64)
    add_run(tmp_path, chunk_size=None, fingerprint="aaaaaaaabbbb")
    add_run(tmp_path, chunk_size=None, fingerprint="ccccccccdddd")
    runs, _ = collect_runs([tmp_path])
    assert sorted(run.settings for run in runs) == [
        "chunk_size 64",
        "fingerprint aaaaaaaa",
        "fingerprint cccccccc",
        "k_bits 3",
    ]


def test_comparison_data_hold_config_and_samples(tmp_path):
    add_run(tmp_path, chunk_size=None)
    (run,) = page_of(tmp_path).data()["runs"]
    groups = dict(run["groups"])
    assert ["quant.k_bits", "2"] in groups["Configuration"]
    assert ["chunk_size", "null"] in groups["Configuration"]
    assert ["bytes per token", "3,424.4"] in groups["Cache"]
    assert [(sample["id"], sample["value"]) for sample in run["samples"]] == [("0", 1.0), ("1", 2.0)]


def test_samples_and_texts_are_capped(tmp_path):
    add_generation(tmp_path, ["x" * (MOST_LETTERS + 1)] + ["y"] * MOST_SAMPLES)
    (run,) = page_of(tmp_path).data()["runs"]
    assert (len(run["samples"]), run["sampleCount"], run["cut"]) == (MOST_SAMPLES, MOST_SAMPLES + 1, True)
    assert len(run["samples"][0]["prediction"]) == MOST_LETTERS


def test_samples_pair_by_id_in_natural_order(tmp_path):
    folder = add_run(tmp_path, samples=0)
    lines = [json.dumps({"id": f"t/{number}", "nll": 1.0}) for number in (10, 9, 1)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (run,) = page_of(tmp_path).data()["runs"]
    assert [sample["id"] for sample in run["samples"]] == ["t/1", "t/9", "t/10"]


def test_nan_does_not_break_the_json(tmp_path):
    folder = add_run(tmp_path, metric={"ppl": 4711.5})
    metrics = folder / "metrics.json"  # as versions wrote it that put NaN there
    metrics.write_text(metrics.read_text().replace("4711.5", "NaN"))
    (folder / "samples.jsonl").write_text('{"id": 0, "nll": NaN}\n{"id": 1, "nll": Infinity}\n')
    page = page_of(tmp_path)
    assert "NaN" not in page.scripts[0]
    assert [sample["value"] for sample in page.data()["runs"][0]["samples"]] == [None, None]
    assert page.column("Perplexity: runs", "perplexity") == ["nan"]


def test_hostile_text_stays_text(tmp_path):
    folder = add_generation(tmp_path, [EVIL], method=EVIL, dataset=EVIL, **{EVIL: EVIL})
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"metric": {EVIL: 1.0}, "argv": EVIL, "env": {"git_commit": EVIL, "gpu": EVIL}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    add_png(tmp_path / "figures" / "evil.png", EVIL)
    add_run(tmp_path, task=f"new {EVIL[2:8]}", method=EVIL, finish=False)
    page = page_of(tmp_path, figures=[tmp_path / "figures"])
    assert not [tag for tag, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert [attributes["src"][:5] for tag, attributes in page.elements if tag == "img" and "src" in attributes] == [
        "data:"
    ]
    assert len(page.scripts) == 2
    assert page.data()["runs"][0]["samples"][0]["prediction"] == EVIL
    assert EVIL in page.text


def test_no_resource_comes_from_outside(tmp_path):
    add_png(add_run(tmp_path) / "heatmap.png")
    page = page_of(tmp_path)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "video", "audio")
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    style = (ROOT / "visualize" / "report_page" / "page.css").read_text()
    script = (ROOT / "visualize" / "report_page" / "page.js").read_text()
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|outerHTML|insertAdjacentHTML|http", script)
    (policy,) = (attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_links_inside_the_page_have_a_target(tmp_path):
    add_png(add_run(tmp_path, task="odd task/name", metric={"x": 1}) / "heatmap.png")
    add_run(tmp_path, finish=False)
    (tmp_path / "ppl" / "tiny" / "x").mkdir()
    (tmp_path / "ppl" / "tiny" / "x" / "metrics.json").write_text("[")
    page = page_of(tmp_path)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert len(names) == len(set(names))
    assert {"#figure-0", "#unfinished", "#unreadable", "#figures"} <= links <= {f"#{name}" for name in names}


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    folder = add_run(tmp_path, finish=False, samples=3)
    with open(folder / "samples.jsonl", "a") as file:
        file.write('{"id": 3, "nl')  # torn by a kill: no damage
    (folder / "samples.rank1.jsonl").write_text('{"id": 7, "nll": 1.0}\n')
    page = page_of(tmp_path)
    assert page.column("Unfinished runs", "samples") == ["4"]
    assert "--resume" in page.text
    assert "Unreadable" not in page.text


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("metrics.json", b'{"metric": ', "--resume"),
        ("metrics.json", b"\xff\xfe", "--resume"),
        ("metrics.json", b'{"n": 1}', "--resume"),
        ("metrics.json", b"[" * 100_000, "--resume"),
        ("config.json", b"[]", "--overwrite"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path, capsys, name, content, cure):
    add_run(tmp_path / "in", method="FP16")
    damaged = add_run(tmp_path / "in")
    (damaged / name).write_bytes(content)
    report.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "r.html")])
    (warning,) = capsys.readouterr().err.splitlines()
    page = Page((tmp_path / "r.html").read_text())
    assert warning.startswith("warning: ") and str(damaged / name) in warning and cure in warning
    assert str(damaged / name) in page.text
    assert page.column("Perplexity: runs", "method") == ["FP16"]


def test_damaged_samples_leave_the_run(tmp_path):
    folder = add_run(tmp_path)
    (folder / "samples.jsonl").write_text('{"id": 0, "nll": 1.0}\nbroken\n{"id": 2, "nll": 1.0}\n')
    page = page_of(tmp_path)
    assert "line 2 is damaged" in page.text
    assert page.data()["runs"][0]["sampleCount"] == 2


def test_fields_of_the_wrong_kind_are_dashes(tmp_path):
    folder = add_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"avg_bits": "x", "n": [1], "env": 3, "started": 5, "argv": None, "metric": {"ppl": True}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = page_of(tmp_path)
    for heading in ("perplexity", "bits", "samples", "started", "command"):
        assert page.column("Perplexity: runs", heading) == ["–"]


def test_other_folders_are_not_runs(tmp_path):
    add_run(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    runs, problems = collect_runs([tmp_path])
    assert (len(runs), problems) == (1, [])


def test_figures_have_captions_and_sizes(tmp_path):
    add_png(tmp_path / "gallery" / "b.png")
    add_png(tmp_path / "gallery" / "a.png", "Keys before\nand after <rotation>")
    add_png(add_run(tmp_path / "in", task="needle", metric={"recall": 1.0}) / "heatmap.png")
    (tmp_path / "gallery" / "c.png").write_bytes(b"no png")
    page = page_of(tmp_path / "in", figures=[tmp_path / "gallery", tmp_path / "gallery"])
    pictures = [attributes for tag, attributes in page.elements if tag == "img" and "src" in attributes]
    captions = [attributes["alt"] for attributes in pictures]
    assert captions[:2] == ["Keys before and after <rotation>", "b.png"]
    assert captions[2].startswith("heatmap.png of the needle run") and len(captions) == 3
    assert {(attributes["width"], attributes["height"], attributes["loading"]) for attributes in pictures} == {
        ("7", "5", "lazy")
    }
    assert "c.png is not a readable PNG" in page.text


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for method in ("RotateKV4", "FP16", "RTN2", "RotateKV2"):
        for task in ("needle", "ppl"):
            add_run(tmp_path, task=task, method=method, metric={"ppl": 1.0})
            add_run(tmp_path, task=task, method=method, metric={"ppl": 1.0}, seed=1)
    first = build_page(*_collected(tmp_path), MADE)
    true_rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(true_rglob(self, pattern))))
    assert build_page(*_collected(tmp_path), MADE) == first
    assert Page(first).column("Perplexity: runs", "method")[0].startswith("FP16")


def _collected(root):
    runs, problems = collect_runs([root])
    return runs, collect_figures([], runs, problems), problems


def test_a_run_found_twice_is_there_once(tmp_path):
    add_run(tmp_path)
    assert len(collect_runs([tmp_path, tmp_path / "ppl" / ".." / "ppl"])[0]) == 1


def test_nothing_found_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        report.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "run an evaluation first" in line and "--input" in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("flag", ["--input", "--figures"])
def test_a_folder_that_is_not_there_is_named(tmp_path, capsys, flag):
    add_run(tmp_path / "in")
    with pytest.raises(SystemExit) as ended:
        report.main(["--input", str(tmp_path / "in"), flag, str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert f"{flag}: {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_the_page_is_written_at_once(tmp_path, monkeypatch, capsys):
    add_run(tmp_path / "in")
    output = tmp_path / "out" / "report.html"
    flags = ["--input", str(tmp_path / "in"), "--output", str(output)]
    report.main(flags)
    old = output.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(SystemExit) as ended:
        report.main(flags)
    assert ended.value.code == 2
    assert "No space left" in capsys.readouterr().err
    assert output.read_bytes() == old
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_a_large_page_is_warned_of(tmp_path, monkeypatch, capsys):
    add_run(tmp_path / "in")
    monkeypatch.setattr(report, "LARGE_MEGABYTES", 0.001)
    report.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "r.html")])
    assert "warning: the page has" in capsys.readouterr().err


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    folder = add_generation(tmp_path / "in", ["x"])
    (folder / "samples.jsonl").write_text('{"id": 0, "score": 1, "prediction": "\\ud800 torn"}\n')
    report.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "r.html")])
    assert "torn" in (tmp_path / "r.html").read_text()


@pytest.mark.slow  # test_figures.py starts another of the folder's scripts
def test_it_starts_as_a_script_from_another_folder(tmp_path):
    add_run(tmp_path / "results")
    call = [sys.executable, str(ROOT / "visualize" / "report.py")]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 run, 0 figures") and (tmp_path / "report.html").is_file()
