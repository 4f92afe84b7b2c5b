"""reproduce.py: what it would run, what it reuses, what its tables say; on a tiny folder model."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from conftest import save_reorder_indices, tiny_text

import PPL_evaluation
import reproduce
from rotatekv import external
from rotatekv.cli import method_from_args
from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.external import EXTERNAL
from rotatekv.methods import LayerGeometry
from rotatekv.reproduce import paper_figures
from rotatekv.reproduce import plan as reproduce_plan
from rotatekv.reproduce import runs as reproduce_runs
from rotatekv.reproduce import tables as reproduce_tables
from rotatekv.reproduce.ablation import ablation_cells
from rotatekv.reproduce.paper_figures import PaperFigure, load_paper_figures
from rotatekv.reproduce.plan import STREAMED, Calibration, Options, default_methods, method_cells, ppl_cell
from rotatekv.reproduce.runs import Outcome, Runs

WINDOW, WINDOWS = 32, 6


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny_text(WINDOW * WINDOWS), encoding="utf-8")
    return path


@pytest.fixture
def flags(folder, text_file, tmp_path):
    base = ["--table", "ppl", "--models", folder, "--dataset", text_file, "--PPL_seq_length", WINDOW]
    return [str(part) for part in (*base, "--chunk_size", 8, "--output_dir", tmp_path)]


@pytest.fixture
def started(monkeypatch):
    """Scripts run in this process, and what was started is listed."""
    commands = []

    def start(command, log):
        commands.append(list(command))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", list(command))
            try:
                importlib.import_module(command[0].removesuffix(".py")).main(list(command[1:]))
            except SystemExit as end:
                return f"exit status {end.code}"
        return ""

    monkeypatch.setattr(reproduce_runs, "_start", start)
    return commands


def options_of(text_file, **changes) -> Options:
    return Options(**{"dataset": str(text_file), "PPL_seq_length": WINDOW, "chunk_size": 8, **changes})


def read_csv(folder: Path, table: str = "ppl") -> list[dict]:
    return list(csv.DictReader(open(folder / "tables" / f"{table}.csv", encoding="utf-8", newline="")))


def read_rows(folder: Path, table: str = "ppl") -> list[list[str]]:
    """The markdown table's rows, cells stripped, header and rule left out."""
    lines = (folder / "tables" / f"{table}.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "model"]


REAL_START = reproduce_runs._start


def test_processes_tables_and_reuse(flags, tmp_path, monkeypatch, started):
    """The first script runs in a process of its own."""
    in_this_process = reproduce_runs._start
    starts = iter([REAL_START])
    monkeypatch.setattr(reproduce_runs, "_start", lambda *args: next(starts, in_this_process)(*args))
    reproduce.main([*flags, "--methods", "FP16,RTN4", "--limit", "3"])
    records, runs = read_csv(tmp_path), sorted(tmp_path.glob("ppl/*/*/metrics.json"))
    assert len(records) == len(runs) == 4
    for record in records:
        metrics = json.loads((Path(record["run"]) / "metrics.json").read_text())
        config = metrics["config"]
        assert record["row"] == config["method"] and (record["view"] == STREAMED) == (config["chunk_size"] == 8)
        assert float(record["ours"]) == metrics["metric"]["ppl"] and int(record["n"]) == metrics["n"] == 3
        assert float(record["bits"]) == metrics["avg_bits"]["total"]
        assert float(record["bytes_per_token"]) == metrics["cache_bytes_per_token"]
        assert metrics["argv"].split(".py ")[1] == record["command"].split(".py ")[1]
    for row in read_rows(tmp_path):
        one, streamed = (record for record in records if record["row"] == row[1])
        for record, shown in ((one, row[4:8]), (streamed, row[8:12])):
            assert shown[0] == f"{float(record['ours']):.4f}" and shown[1] == f"{float(record['bits']):.3f}"
            assert shown[2] == f"{float(record['bytes_per_token']):.1f}" and shown[3] == "3 (partial)"
    # All is there: nothing may start, and the tables stay.
    before = {path: path.read_bytes() for path in tmp_path.glob("tables/ppl.*")}
    monkeypatch.setattr(reproduce_runs, "_start", lambda *_: pytest.fail("a finished run was started again"))
    reproduce.main([*flags, "--methods", "FP16,RTN4", "--limit", "3"])
    reproduce.main([*flags, "--methods", "FP16,RTN4", "--limit", "2"])
    made_by = re.compile(rb"Made by .*|--limit \d")
    for path, content in before.items():
        assert made_by.sub(b"", path.read_bytes()) == made_by.sub(b"", content)


def test_a_longer_limit_runs_again_and_takes_over_the_samples(flags, tmp_path, started):
    for limit, n in (("2", 2), ("4", 4)):
        reproduce.main([*flags, "--methods", "RTN3", "--limit", limit])
        assert [record["n"] for record in read_csv(tmp_path)] == [str(n)] * 2
    assert len(started) == 4 and len(list(tmp_path.glob("ppl/*/*"))) == 2
    reproduce.main([*flags, "--methods", "RTN3"])
    assert [record["partial"] for record in read_csv(tmp_path)] == ["False"] * 2 and len(started) == 6
    reproduce.main([*flags, "--methods", "RTN3", "--limit", "5"])  # a complete run holds more than any limit
    assert len(started) == 6


def test_a_failed_cell_is_one_line_and_the_others_go_on(flags, tmp_path, monkeypatch, started, capsys):
    start = reproduce_runs._start
    monkeypatch.setattr(
        reproduce_runs, "_start", lambda command, log: "no luck" if "RTN2" in command else start(command, log)
    )
    with pytest.raises(SystemExit) as end:
        reproduce.main([*flags, "--methods", "RTN2,RTN4", "--limit", "1"])
    assert end.value.code == 1
    assert [(record["row"], record["status"]) for record in read_csv(tmp_path)] == [
        ("RTN2", "failed"),
        ("RTN2", "failed"),
        ("RTN4", "done"),
        ("RTN4", "done"),
    ]
    assert read_rows(tmp_path)[0][4:] == ["failed", "", "", "", "failed", "", "", ""]
    assert len(re.findall("RTN2, one-shot: failed, no luck", capsys.readouterr().err)) == 1


def test_after_an_interruption_the_rest_is_run(flags, tmp_path, monkeypatch, started):
    start = reproduce_runs._start

    def stop_at_third(command, log):
        if len(started) == 2:
            raise KeyboardInterrupt
        return start(command, log)

    monkeypatch.setattr(reproduce_runs, "_start", stop_at_third)
    with pytest.raises(SystemExit) as end:
        reproduce.main([*flags, "--methods", "FP16,RTN2", "--limit", "1"])
    assert end.value.code == 130
    assert [record["status"] for record in read_csv(tmp_path)] == ["done", "done", "not run", "not run"]
    assert read_rows(tmp_path)[1][4:] == ["not run", "", "", "", "not run", "", "", ""]
    monkeypatch.setattr(reproduce_runs, "_start", start)
    started.clear()
    reproduce.main([*flags, "--methods", "FP16,RTN2", "--limit", "1"])
    assert [record["status"] for record in read_csv(tmp_path)] == ["done"] * 4
    assert [command[command.index("--method") + 1] for command in started] == ["RTN2", "RTN2"]
    assert all("--resume" in command for command in started)


def test_dry_run_lists_commands_and_runs_nothing(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce_runs, "_start", lambda *_: pytest.fail("a dry run started something"))
    reproduce.main([*flags, "--methods", "RotateKV2,RotateKV3", "--limit", "2", "--dry_run"])
    first, calibration, *commands = capsys.readouterr().out.splitlines()
    assert first == "# ppl: 4 cells, 0 finished" and not any(tmp_path.iterdir())
    assert calibration.startswith("python calibrate_reorder.py ")  # once, for all four
    assert len(commands) == 4 and all(re.fullmatch("python PPL_evaluation.py .*--resume", x) for x in commands)


def test_a_run_under_other_indices_limit_text_or_a_touched_config_is_not_reused(folder, text_file, tmp_path, started):
    runs = Runs(tmp_path, limit=1)

    def cell(name: str, **changes):
        calibration = Calibration(name, ("--dataset", name))
        plain = ppl_cell(str(folder), "RotateKV2", options_of(text_file, limit=1, **changes))
        return replace(plain, calibration=calibration)

    for name, seed in (("a", 1), ("b", 2), ("a-again", 1)):
        order = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(seed)) for _ in range(2)])
        save_reorder_indices(runs.calibration_file(cell(name)), order, {"model": str(folder), "head_group_num": 3})
    assert runs.find(cell("a")).status == "not run"
    done = runs.run(cell("a"), tmp_path / "log")
    assert done.status == "done" and runs.find(cell("a")) == done
    assert runs.find(cell("a-again")) == done  # the same indices under another name
    assert runs.find(cell("b")).status == "not run"
    assert runs.find(cell("a", PPL_seq_length=16)).status == "not run"
    assert Runs(tmp_path, limit=2).find(cell("a")).status == "not run"
    assert Runs(tmp_path, limit=1, dtype="bfloat16").find(cell("a")).status == "not run"
    path = Path(done.folder) / "metrics.json"
    path.write_text(path.read_text().replace('"PPL_seq_length": 32', '"PPL_seq_length": 16'))
    assert runs.find(cell("a", PPL_seq_length=16)).status == "not run"  # the folder is another config's


def test_the_newest_of_several_dtypes(folder, text_file, tmp_path, started):
    cell = ppl_cell(str(folder), "RTN2", options_of(text_file, limit=1))
    runs = Runs(tmp_path, limit=1)
    first = runs.run(cell, tmp_path / "log")
    PPL_evaluation.main([*cell.flags, "--dtype", "bfloat16", "--output_dir", str(tmp_path)])
    (other,) = (path for path in Path(first.folder).parent.iterdir() if path != Path(first.folder))
    for folder_, moment in ((other, "2030-01-01"), (Path(first.folder), "2020-01-01")):
        metrics = json.loads((folder_ / "metrics.json").read_text())
        (folder_ / "metrics.json").write_text(json.dumps({**metrics, "started": moment}))
    assert runs.find(cell).folder == str(other)
    assert Runs(tmp_path, limit=1, dtype="float32").find(cell).folder == first.folder


def test_a_model_without_indices_is_calibrated_first(flags, tmp_path, started):
    reproduce.main([*flags, "--methods", "RTN4,RotateKV2,RotateKV3", "--limit", "1"])
    assert {record["status"] for record in read_csv(tmp_path)} == {"done"}
    assert [command[0] for command in started].count("calibrate_reorder.py") == 1
    assert all(
        ("--calibration_file" in record["command"]) == (record["row"] != "RTN4") for record in read_csv(tmp_path)
    )
    runs, options = Runs(tmp_path), Options()
    for method, model, kind in (
        ("RotateKV2", "smollm2-135m", None),
        ("KVQuant2", "smollm2-135m", None),
        ("RTN2", "m", None),
        ("RotateKV2", "m", "reorder"),
        ("KVQuant2", "m", "kvquant"),
    ):
        calibration = runs.calibrated(ppl_cell(model, method, options), ("--data_dir", "x")).calibration
        assert (None if calibration is None else calibration.flags) == (
            None if kind is None else ("--model", "m", "--statistics", kind, "--data_dir", "x")
        )


def test_calibrations_are_made_once_and_handed_over(folder, text_file, tmp_path, started):
    runs = Runs(tmp_path, limit=1)
    flags = ("--model", str(folder), "--dataset", str(text_file), "--calibration_tokens", "64", "--seq_length", "32")
    calibration = Calibration("words-64", flags)
    for method in ("RotateKV2", "RotateKV4"):
        cell = replace(ppl_cell(str(folder), method, options_of(text_file, limit=1)), calibration=calibration)
        assert runs.run(cell, tmp_path / "log").status == "done"
    assert [command[0] for command in started] == ["calibrate_reorder.py", "PPL_evaluation.py", "PPL_evaluation.py"]
    assert runs.calibration_file(cell).is_file() and runs.calibration_command(cell) is None


@pytest.mark.parametrize(
    "body, reason",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("import sys; print('error: no such model', file=sys.stderr); sys.exit(2)", "no such model"),
        ("print('begun'); 1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "no output"),
        ("print('well')", ""),
    ],
)
def test_why_a_process_failed_in_one_line(tmp_path, body, reason):
    script = tmp_path / "script.py"
    script.write_text(body)
    assert reproduce_runs._start([str(script)], tmp_path / "logs" / "x.log") == reason


def test_external_methods_without_their_package_are_not_run(flags, tmp_path, started, monkeypatch, capsys):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(external, "version", missing)
    reproduce.main([*flags, "--methods", "RTN4,HF-hqq4", "--limit", "1"])
    last = read_csv(tmp_path)[-1]
    assert (last["row"], last["external"], last["status"]) == ("HF-hqq4", "True", "not run")
    assert "pip install hqq" in last["reason"] and "pip install hqq" in capsys.readouterr().err
    assert len(started) == 2 and read_rows(tmp_path)[1][1] == "HF-hqq4 (external)"


def test_methods_come_from_what_is_registered(monkeypatch):
    assert set(default_methods()) == {*PRESETS, *EXTERNAL} and default_methods()[0] == "FP16"
    monkeypatch.setattr(reproduce_plan, "METHOD_NAMES", ("FP16", "RTN2", "Zip4", "RTN3", "Zip2", "HF-hqq2"))
    assert default_methods() == ["FP16", "RTN2", "RTN3", "Zip2", "Zip4", "HF-hqq2"]
    with pytest.raises(UserError, match="unknown method RotateKV9"):
        reproduce.cells_of("gsm8k", reproduce.parse_args(["--methods", "RotateKV9"]), Runs("results"))


@pytest.mark.parametrize("table", ["gsm8k", "longbench", "needle", "milebench"])
def test_the_scripts_take_every_flag_of_a_cell(table):
    (cell,) = method_cells(table, ["smollm2-135m"], ["RTN2"], Options(limit=2, shared=("--data_dir", "x")), {})
    args = importlib.import_module(cell.script.removesuffix(".py")).parse_args(list(cell.flags))
    assert {cell: "found by"}[cell]  # a table looks its runs up by cell
    assert args.limit == 2 and args.data_dir == "x" and method_from_args(args)[0] == "RTN2"
    for name, value in cell.protocol:
        if name not in ("dataset", "context_lengths", "depths"):
            assert getattr(args, name) == value
    assert args.max_new_tokens == {"gsm8k": 256, "needle": 50, "milebench": 512, "longbench": None}[table]


@pytest.mark.parametrize("table", ["ppl", "needle"])
def test_without_flags_the_options_are_the_default_ones(table):
    cells = method_cells(table, ["smollm2-135m"], default_methods(), Options(), load_paper_figures())
    assert reproduce.cells_of(table, reproduce.parse_args([]), Runs("results")) == cells


def test_ablation_rows_are_legal_distinct_and_cover_the_issue():
    geometry = LayerGeometry(0, 3, 64)
    cells = ablation_cells("smollm2-135m", Options(), {}, geometry, ())
    configs = {}
    for cell in cells:
        args = PPL_evaluation.parse_args(list(cell.flags))
        configs[cell.group, cell.label] = method_from_args(args)[1]
    assert len(configs) == len(cells)
    rows = {group: [label for found, label in configs if found == group] for group, _ in configs}
    assert rows["group size"] == ["32 channels", "64 channels", "96 channels (keys alone)"]
    assert [label[0] for label in rows["heads per group"]] == ["1", "1", "3", "3"]
    assert rows["sinks"] == [f"{n} entries" for n in (0, 5, 20, 40)] + ["first 5 tokens", "first 20 tokens"]
    assert rows["clip ratio"] == ["0.7", "0.8", "0.9", "1.0"] and len(rows["calibration"]) == 8
    steps = [configs["steps", label] for label in rows["steps"]]
    names = ("Grouped_Head_Key_Rotation", "Attention_Sink_Aware", "Outlier_Aware_Key_Rotation")
    on = [[getattr(config, name) for name in names] for config in steps[1:]]
    assert on == [[False] * 3, [True, False, False], [True, True, False], [True] * 3, [True] * 3]
    assert [config.k_clip_ratio for config in steps[1:]] == [1.0] * 4 + [0.8] and steps[-1] == PRESETS["RotateKV2"]
    assert configs["bits", "keys 4, values 2"].k_clip_ratio == 1.0
    assert configs["bits", "keys 4, values 2"].v_clip_ratio == 0.8
    assert configs["sinks", "first 5 tokens"].sink_selection == "first"
    calibrations = {cell.calibration.name: cell.calibration.flags for cell in cells if cell.calibration}
    assert calibrations["wikitext2-8192"][2:] == ("--dataset", "wikitext2", "--calibration_tokens", "8192")
    four = ablation_cells("m", Options(), {}, LayerGeometry(0, 8, 128), ())
    assert {cell.label for cell in four if cell.group == "group size"} == {
        "32 channels",
        "64 channels",
        "96 channels (keys alone)",
        "128 channels",
    } - {"96 channels (keys alone)"}


def test_the_papers_figures_are_the_papers():
    figures = load_paper_figures()
    for key, value in {
        ("ppl", "llama2_7b", "RotateKV2"): 5.50,
        ("ppl", "llama3_8b", "QuaRot2"): 21.43,
        ("gsm8k", "mistral_7b", "RotateKV2"): 42.99,
        ("needle", "llama2_7b_80K", "FP16"): 86.44,
        ("ablation", "llama2_13b", "grouped heads"): 5.67,
    }.items():
        assert figures[key].value == value and figures[key].arxiv == "2501.16383" and figures[key].table
    assert len(figures) == 16 + 12 + 2 + 5
    rows = ablation_cells("llama2_13b", Options(), figures, None, ())
    found = {cell.label: cell.paper.value for cell in rows if cell.paper}
    assert found == {
        "rotation, per head after RoPE": 6.96,
        "+ grouped heads before RoPE": 5.67,
        "+ sinks": 5.52,
        "+ reordering": 4.84,
        "32 channels": 4.75,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"value": "5.5"},
        {"value": float("nan")},
        {"value": -1},
        {"task": "speed"},
        {"metric": "accuracy"},
        {"arxiv": "the paper"},
        {"grade": "I"},
        {"table": ""},
        {"page": 3},
        {"protocol": None},
    ],
)
def test_a_bad_paper_figure_is_refused(tmp_path, change):
    content = json.loads(paper_figures.PAPER_FIGURES.read_text(encoding="utf-8"))
    content["figures"][0] |= change
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError):
        load_paper_figures(path)


def test_a_figure_given_twice_is_refused(tmp_path):
    content = json.loads(paper_figures.PAPER_FIGURES.read_text(encoding="utf-8"))
    content["figures"].append(content["figures"][0])
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="twice"):
        load_paper_figures(path)


def test_a_difference_needs_the_papers_protocol(tmp_path):
    metrics = {
        "metric": {"ppl": 6.0},
        "avg_bits": {"total": 2.4},
        "cache_bytes_per_token": 9.0,
        "n": 1,
        "partial": False,
    }
    figures = {
        ("ppl", "llama2_7b", "RotateKV2"): PaperFigure(
            "ppl", "llama2_7b", "RotateKV2", "ppl", 5.5, {"PPL_seq_length": 4096}, "2501.16383", "a table", "S"
        )
    }
    for length, expected in ((None, 0.5), (2048, "")):
        cells = method_cells("ppl", ["llama2_7b"], ["RotateKV2"], Options(PPL_seq_length=length), figures)
        records = [reproduce_tables.record_of(c, Outcome("done", metrics, "x"), Runs(tmp_path)) for c in cells]
        assert [record["paper"] for record in records] == [5.5, 5.5]
        assert [record["difference"] for record in records] == [expected, ""]  # the paper streams nothing
    text = reproduce_tables.as_markdown("ppl", records, "a command")
    assert "arXiv:2501.16383, a table (S)" in text and "| 5.50 |" in text


def test_user_mistakes_are_one_line(capsys):
    for flags, message in (
        (["--table", "speed"], "no table speed"),
        (["--methods", "KV9"], "unknown method KV9"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--models", ","], "--models needs names"),
    ):
        with pytest.raises(SystemExit) as end:
            reproduce.main(flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_make_tables_flags_are_reproduces_own():
    makefile = (Path(reproduce.__file__).parent / "Makefile").read_text()
    (line,) = re.findall(r"reproduce.py (.*) \$\(PASSKEY\)", makefile)
    (passkey,) = re.findall(r"PASSKEY := (.*)", makefile)
    args = reproduce.parse_args([*line.split(), *passkey.split()])
    assert args.table == "ppl,needle" and args.limit >= 16 and args.needle_type == "passkey"
