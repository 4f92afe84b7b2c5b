"""--rescore: scores computed again from a run's samples, without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from runs import SCRIPTS, metrics_of, read, refused, run_folder, samples_of, write_data, write_samples

import GSM8K_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
# A completion that scores in full, of a sample's right answer; that score; the metric that is then half of it.
RIGHT = {
    "gsm8k": ("So the sum. The answer is {}.0", 1, "accuracy"),
    "longbench": ("{}", 1, "average"),
    "milebench": ("{}", 1, "average"),
    "needle": ("{}", 100, "rouge1"),
}
DERIVED = ("grid.json", "heatmap.png", "efficiency.csv", "efficiency.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("rescore"))


def run(name: str, output_dir: Path, *more) -> Path:
    script = SCRIPTS[name]
    script.module.main([*script.flags, "--RTN4", "--output_dir", str(output_dir), *more])
    return run_folder(output_dir)


@pytest.mark.parametrize("name", SCRIPTS)
def test_rescoring_needs_no_model_and_follows_an_edited_prediction(name, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    folder, script = run(name, tmp_path), SCRIPTS[name]
    said, before, samples = capsys.readouterr().out.splitlines()[-1], metrics_of(folder), samples_of(folder)
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in DERIVED}
    for derived in made:
        (folder / derived).unlink()
    monkeypatch.setattr(script.module, script.load, None)
    script.module.main(["--rescore", str(folder)])
    after = metrics_of(folder)
    assert after.pop("rescored") and after == before and samples_of(folder) == samples
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert made == {path.name: path.read_bytes() for path in folder.iterdir() if path.name in DERIVED}
    if name in RIGHT:
        answer, full, metric = RIGHT[name]
        predictions = "", answer.format(samples[1]["answers"][0])
        write_samples(folder, [x | {"prediction": y} for x, y in zip(samples, predictions, strict=True)])
        script.module.main(["--rescore", str(folder)])
        assert [sample["score"] for sample in samples_of(folder)] == [0, full]
        assert metrics_of(folder)["metric"][metric] == 50


@pytest.fixture
def finished(data, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(data)
    return run("gsm8k", tmp_path)


def test_a_broken_off_run_is_partial_and_its_ranks_are_merged(finished):
    before = metrics_of(finished)
    (finished / "metrics.json").unlink()
    lines = (finished / "samples.jsonl").read_text().splitlines(keepends=True)
    (finished / "samples.jsonl").write_text("")
    (finished / "samples.rank0.jsonl").write_text(lines[1])
    (finished / "samples.rank1.jsonl").write_text(lines[0] + lines[1][:20])
    GSM8K_evaluation.main(["--rescore", str(finished)])
    after = metrics_of(finished)
    assert sorted(os.listdir(finished)) == [".lock", "config.json", "metrics.json", "samples.jsonl"]
    assert after["partial"] is True and after.keys() == before.keys() | {"rescored"}
    keys = ("metric", "n", "avg_bits", "cache_bytes_per_token", "seconds", "model", "dataset", "seed", "config", "task")
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}


@pytest.mark.parametrize("foreign", ["missing", "empty", "other task", "no samples", "other fields", "damaged"])
def test_what_is_no_such_run_is_refused_and_left_alone(tmp_path, finished, capsys, foreign):
    folder = tmp_path / "elsewhere" if foreign == "missing" else finished
    if foreign == "empty":
        folder = tmp_path / "void"
        folder.mkdir()
    elif foreign == "other task":
        (finished / "config.json").write_text(json.dumps({**read(finished / "config.json"), "task": "ppl"}))
    elif foreign == "no samples":
        (finished / "samples.jsonl").unlink()
    elif foreign == "other fields":
        (finished / "samples.jsonl").write_text('{"id": 0, "nll": 1.0}\n')
    elif foreign == "damaged":
        (finished / "samples.jsonl").write_text('{"id": 0\n{"id": 1}\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None
    refused(capsys, GSM8K_evaluation, "--rescore", folder)
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None)
