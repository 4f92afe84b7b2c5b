"""A metric that cannot be computed: one line, status 2, null with a reason in metrics.json, and who reads it copes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from runs import refused
from test_efficiency import LOST, cell

import efficiency_evaluation
import needle_evaluation
import PPL_evaluation
import reproduce
from rotatekv.evals.perplexity import perplexity
from rotatekv.reproduce import runs as reproduce_runs
from visualize import frontier, report


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory) -> Path:
    """A tiny model with one weight that is not a number, and a text."""
    path = save_tiny_folder(tmp_path_factory.mktemp("nan") / "tiny-nan")
    model = tiny_model()
    model.lm_head.weight.data[5, 0] = torch.nan
    model.save_pretrained(path)
    (path / "words.txt").write_text(tiny_text(64))
    return path


def strict(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def test_a_perplexity_that_is_no_number(broken_model, tmp_path, capsys, monkeypatch):
    flags = ["--model", broken_model, "--dataset", broken_model / "words.txt", "--PPL_seq_length", 32]
    flags += ["--RTN2", "--output_dir", tmp_path]
    line = refused(capsys, PPL_evaluation, *flags)
    assert "metric.ppl is nan" in line and "--dtype" in line and "metrics.json" in line
    (path,) = tmp_path.glob("ppl/*/*/metrics.json")
    metrics, samples = strict(path), path.with_name("samples.jsonl").read_text()
    assert metrics["metric"] == {"ppl": None} and metrics["n"] == 2 and "metric.ppl is nan" in metrics["reason"]
    assert "NaN" not in samples and samples.count("nll is nan") == 2
    assert refused(capsys, PPL_evaluation, *flags, "--resume") == line
    assert refused(capsys, PPL_evaluation, "--rescore", path.parent) == line
    assert strict(path)["metric"] == {"ppl": None}

    # reproduce.py takes the run for what it is, and does not start it again.
    monkeypatch.setattr(reproduce_runs, "_start", lambda *_: "not started here")
    with pytest.raises(SystemExit) as stopped:
        table = ["--models", broken_model, "--dataset", broken_model / "words.txt", "--PPL_seq_length", 32]
        reproduce.main([str(x) for x in (*table, "--methods", "RTN2", "--output_dir", tmp_path)])
    assert stopped.value.code == 1 and "metric.ppl is nan" in (tmp_path / "tables" / "ppl.md").read_text()

    report.main(["--input", str(tmp_path / "ppl"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "1 no result" in page and "metric.ppl is nan" in page
    assert "no finished FP16 run" in refused(capsys, frontier, "--input", path.parents[1])


def test_an_answer_of_logits_that_are_no_numbers_is_not_scored(broken_model, tmp_path, capsys):
    flags = ["--model", broken_model, "--haystack", broken_model / "words.txt", "--needle_type", "passkey"]
    flags += ["--context_lengths", 60, "--depths", 50, "--max_new_tokens", 4, "--RTN4", "--output_dir", tmp_path]
    line = refused(capsys, needle_evaluation, *flags)
    assert "logits are no finite numbers" in line and "--dtype" in line
    assert not [*tmp_path.rglob("metrics.json")] and not [*tmp_path.rglob("samples.jsonl")]
    assert refused(capsys, needle_evaluation, *flags, "--resume") == line


def test_an_old_record_with_nan_is_no_result(broken_model, tmp_path, capsys):
    flags = ["--model", broken_model, "--dataset", broken_model / "words.txt", "--PPL_seq_length", 32]
    refused(capsys, PPL_evaluation, *flags, "--RTN2", "--output_dir", tmp_path)
    (path,) = tmp_path.glob("ppl/*/*/metrics.json")
    metrics = strict(path)
    del metrics["reason"]
    path.write_text(json.dumps(metrics | {"metric": {"ppl": float("nan")}}))
    runs = reproduce_runs.Runs(tmp_path)
    args = reproduce.parse_args([str(x) for x in ["--models", broken_model, "--methods", "RTN2", *flags[2:]]])
    outcome = runs.find(reproduce.cells_of("ppl", args, runs)[0])
    assert outcome.status == "failed" and outcome.reason == "ppl is nan"


def test_perplexities_that_overflow_or_are_missing():
    assert perplexity([800.0]) == float("inf")
    assert perplexity([1.0, None]) != perplexity([1.0, None])


def test_efficiency_where_nothing_fits_is_drawn_and_one_line(folder, tmp_path, capsys, monkeypatch):
    lost = cell(LOST, {**LOST, "side": "RTN2"}, tokens=0, total_bits=0.0, k_bits=0.0, v_bits=0.0, cache_bytes=0)
    monkeypatch.setattr(efficiency_evaluation, "measure", lambda args, sides, ids, cell: {**lost, **cell})
    (tmp_path / "words.txt").write_text(tiny_text(64))
    flags = ["--model", folder, "--dataset", tmp_path / "words.txt", "--context_lengths", 10, "--RTN2"]
    line = refused(capsys, efficiency_evaluation, *flags, "--output_dir", tmp_path)
    assert "no sample left a cache to measure" in line
    (path,) = tmp_path.glob("efficiency/*/*/metrics.json")
    assert strict(path)["avg_bits"] == {"k": None, "v": None, "total": None}
    assert "out of memory" in path.with_name("efficiency.csv").read_text()
    assert path.with_name("efficiency.png").is_file()
