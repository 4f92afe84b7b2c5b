"""Run folders: ids, resuming, torn and damaged files, and what metrics.json must hold."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest

from rotatekv.errors import UserError
from rotatekv.evals.results import Run, config_hash, write_json

CONFIG = {"task": "ppl", "method": "RTN2", "seed": 0, "quant": {"k_bits": 2, "k_groupsize": None}}
SAMPLES = [{"id": number, "nll": 1.5 + number, "text": "größe\nline"} for number in range(3)]


def start(folder, config=CONFIG, resume=False, overwrite=False) -> Run:
    return Run(folder, "ppl", "Org/Tiny Model", config, resume, overwrite)


def run_with_samples(folder) -> Run:
    run = start(folder)
    for sample in SAMPLES:
        run.append(sample)
    return run


def names(folder) -> list[str]:
    """The files of a run's folder; its lock is hidden."""
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_is_task_model_and_run_id(tmp_path):
    run = start(tmp_path)
    assert run.folder == tmp_path / "ppl" / "tiny-model" / run.run_id
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG
    assert names(run.folder) == ["config.json"]


def test_run_id_is_the_same_in_every_process_and_key_order():
    assert config_hash({"b": 1, "a": [2, None]}) == config_hash({"a": [2, None], "b": 1}) == "2b837dfef2b4"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"method": "RTN3"}, {"quant": {"k_bits": 2, "k_groupsize": 8}}, {"another": None}]
)
def test_run_id_changes_with_any_part_of_the_config(change):
    assert config_hash({**CONFIG, **change}) != config_hash(CONFIG)


def test_runs_of_two_configs_stand_side_by_side(tmp_path):
    run_with_samples(tmp_path)
    assert start(tmp_path, {**CONFIG, "seed": 1}).samples == {}


def test_an_existing_run_is_neither_touched_nor_reused_by_default(tmp_path):
    run = run_with_samples(tmp_path)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match=r"--resume.*--overwrite") as caught:
        start(tmp_path)
    one_line(caught)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_resume_and_overwrite_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="not both"):
        start(tmp_path, resume=True, overwrite=True)


def test_resume_knows_the_finished_samples_and_appends_behind_them(tmp_path):
    run_with_samples(tmp_path)
    run = start(tmp_path, resume=True)
    assert run.samples == {sample["id"]: sample for sample in SAMPLES}
    run.append({"id": 3, "nll": 9.0})
    assert sorted(start(tmp_path, resume=True).samples) == [0, 1, 2, 3]


def test_resume_of_nothing_starts_a_run(tmp_path):
    run = start(tmp_path, resume=True)
    assert run.samples == {} and (run.folder / "config.json").is_file()


def test_overwrite_drops_samples_and_metrics(tmp_path):
    run_with_samples(tmp_path).finish(metric={"ppl": 1.0})
    run = start(tmp_path, overwrite=True)
    assert run.samples == {} and names(run.folder) == ["config.json"]


def test_a_sample_is_on_disk_when_append_returns(tmp_path):
    run = start(tmp_path)
    for count, sample in enumerate(SAMPLES, 1):
        run.append(sample)
        lines = (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == SAMPLES[:count]
        assert list(run.samples.values()) == SAMPLES[:count]


@pytest.mark.parametrize("cut", [1, 2, 10, 37])
def test_a_torn_last_line_is_dropped_from_file_and_samples(tmp_path, cut):
    run = run_with_samples(tmp_path)
    path = run.folder / "samples.jsonl"
    data = path.read_bytes()
    kept = data[: data[:-1].rindex(b"\n") + 1]
    assert len(kept) < len(data) - cut
    path.write_bytes(data[:-cut])
    resumed = start(tmp_path, resume=True)
    assert sorted(resumed.samples) == [0, 1] and path.read_bytes() == kept
    resumed.append(SAMPLES[2])
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "tail", [b'{"id": 3, "text": "gr\xc3', b"{", b'{"nll": 2}\n', b"7", b"null\n", b"\x00\x00\x00"]
)
def test_a_last_line_of_any_torn_bytes_is_dropped(tmp_path, tail):
    run = run_with_samples(tmp_path)
    path = run.folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert sorted(start(tmp_path, resume=True).samples) == [0, 1, 2]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"{broken\n", b"\n", b"3\n", b'{"nll": 1}\n', b"\xff\xff\n"])
def test_damage_in_the_middle_is_refused_and_the_file_kept(tmp_path, damage):
    run = run_with_samples(tmp_path)
    path = run.folder / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + damage + lines[2]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.*--overwrite") as caught:
        start(tmp_path, resume=True)
    one_line(caught)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [json.dumps({**CONFIG, "seed": 5}), "{torn", "", "[]", "\udcff"])
def test_a_folder_of_another_config_is_refused_and_kept(tmp_path, content):
    run = run_with_samples(tmp_path)
    (run.folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match="--overwrite") as caught:
        start(tmp_path, resume=True)
    one_line(caught)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_samples_without_a_config_are_not_trusted(tmp_path):
    run = run_with_samples(tmp_path)
    (run.folder / "config.json").unlink()
    with pytest.raises(UserError, match="exists"):
        start(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        start(tmp_path, resume=True)


def test_a_config_with_tuples_resumes(tmp_path):
    start(tmp_path, {"depths": (0, 50)})
    start(tmp_path, {"depths": (0, 50)}, resume=True)


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_an_unwritable_output_folder_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir") as caught:
        start(tmp_path / "file" / below)
    one_line(caught)


def test_metrics_hold_what_the_run_knows_and_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["PPL_evaluation.py", "--dataset", "two words.txt"])
    run = start(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    path = run.finish(metric={"ppl": 2.5}, n=4, partial=True, seed=0)
    metrics = json.loads(path.read_text())
    assert path.name == "metrics.json"
    assert set(metrics) == {"schema", "task", "metric", "n", "partial", "seed", "config", "env", "started", "argv"}
    assert metrics["schema"] == 1 and metrics["task"] == "ppl" and metrics["config"] == CONFIG
    assert metrics["argv"] == "PPL_evaluation.py --dataset 'two words.txt'"
    assert metrics["env"]["world_size"] == 3
    assert {"python", "torch", "transformers", "platform", "git_commit"} <= set(metrics["env"])


def test_a_failing_replace_leaves_the_old_file_whole_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]


def hold(folder, is_open) -> None:
    run = start(folder, resume=True)
    is_open.set()
    time.sleep(60)
    run.append(SAMPLES[0])


@pytest.fixture
def holder(tmp_path):
    """Another process that has the run open."""
    context = multiprocessing.get_context("fork")  # no minute of imports
    is_open = context.Event()
    process = context.Process(target=hold, args=(tmp_path, is_open))
    process.start()
    assert is_open.wait(60)
    yield process
    process.kill()
    process.join()


def test_two_processes_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(tmp_path, holder):
    folder = tmp_path / "ppl" / "tiny-model" / config_hash(CONFIG)
    (folder / "samples.jsonl").write_text(json.dumps(SAMPLES[0]) + "\n", encoding="utf-8")
    attempts = (
        lambda: start(tmp_path, resume=True),
        lambda: start(tmp_path, overwrite=True),
        lambda: Run.of_folder(folder, "ppl"),
    )
    for attempt in attempts:
        with pytest.raises(UserError, match=r"another process is at work in .*--output_dir") as caught:
            attempt()
        one_line(caught)
    assert names(folder) == ["config.json", "samples.jsonl"]
    start(tmp_path, {**CONFIG, "seed": 1})  # another run beside it
    holder.kill()
    holder.join()
    assert sorted(start(tmp_path, resume=True).samples) == [0]


def test_one_process_may_open_its_run_again(tmp_path):
    run = start(tmp_path)
    again = start(tmp_path, resume=True)
    assert run.samples == again.samples == {}


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    run = run_with_samples(tmp_path)
    (run.folder / ".metrics.json.4711").write_text("{")
    start(tmp_path, resume=True)
    assert names(run.folder) == ["config.json", "samples.jsonl"]


def strict(path) -> dict:
    """json as other readers take it: no NaN, no Infinity."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_know_are_null_with_a_reason(tmp_path, value):
    run = start(tmp_path)
    run.append({"id": 0, "nll": value, "depths": [1.0, value]})
    path = run.finish(metric={"ppl": value, "fine": 1.0}, n=1, partial=False)
    metrics, (sample,) = strict(path), [strict(run.folder / "samples.jsonl")]
    assert metrics["metric"] == {"ppl": None, "fine": 1.0} and f"metric.ppl is {value}" in metrics["reason"]
    assert sample == {"id": 0, "nll": None, "depths": [1.0, None], "reason": f"nll is {value}, depths.1 is {value}"}
    assert start(tmp_path, resume=True).samples == {0: sample}
    run.finish(metric={"ppl": 2.0}, n=1, partial=False)  # computed after all
    assert strict(path)["metric"] == {"ppl": 2.0, "fine": 1.0} and "reason" not in strict(path)


def test_the_same_samples_again_add_to_what_metrics_say_and_keep_when_it_was(tmp_path):
    run = run_with_samples(tmp_path)
    before = strict(run.finish(metric={"accuracy": 1.0}, n=3, partial=False))
    run.started = "later"
    path = run.finish(metric={"accuracy": 1.0, "agreement": 7.0}, n=3, partial=False)
    assert strict(path) == {**before, "metric": {"accuracy": 1.0, "agreement": 7.0}}
    run.finish(metric={"accuracy": 9.0}, n=2, partial=True)
    assert run.is_shorter and strict(path)["n"] == 3
