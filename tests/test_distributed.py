"""One run over many processes: real ones, on the CPU, joined by gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_text
from tqdm import tqdm

import GSM8K_evaluation
import PPL_evaluation
from rotatekv import distributed
from rotatekv.evals.results import Run
from rotatekv.evals.running import score_samples

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"task": "toy", "seed": 0}
QUESTIONS = 11
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives its processes: the numbers are to be equal, not close
    yield
    torch.set_num_threads(before)


def environment(**more) -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def rank_environment(rank: int, size: int, port: int) -> dict:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(size: int, script: str, *flags) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, str(size), str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


def only(output_dir: Path, pattern: str) -> Path:
    (path,) = Path(output_dir).glob(f"*/*/*/{pattern}")
    return path


def metrics_of(output_dir: Path) -> dict:
    """What must not depend on the number of processes."""
    metrics = json.loads(only(output_dir, "metrics.json").read_text())
    return {key: metrics[key] for key in ("metric", "n", "partial", "avg_bits", "cache_bytes_per_token", "config")}


def records_of(output_dir: Path) -> list[dict]:
    """By id, without their times; an id that stands there twice fails."""
    lines = only(output_dir, "samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = sorted(map(json.loads, lines), key=lambda record: record["id"])
    assert len({record["id"] for record in records}) == len(records)
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_shares_are_the_whole_once(monkeypatch, size, count):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    shares = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(distributed.share(range(count)))
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def toy_rank(rank: int, size: int, port: int, output_dir: Path, count: int, results) -> None:
    os.environ.update(rank_environment(rank, size, port))
    run = Run(output_dir, "toy", "tiny", CONFIG, resume=True, overwrite=False)
    scored: list[int] = []

    def score(batch: list[dict]) -> list[dict]:
        scored.extend(sample["id"] for sample in batch)
        return [{"square": sample["id"] ** 2} for sample in batch]

    main = score_samples(run, [{"id": number} for number in range(count)], score, unit="toy", batch_size=2)
    results.put((rank, scored, main, sorted(run.samples)))


def toy_run(size: int, output_dir: Path, count: int) -> dict[int, tuple]:
    """The toy evaluation in ``size`` forked processes → rank → (ids it scored, whether it is to finish, ids it has)."""
    context, port = multiprocessing.get_context("fork"), free_port()
    results = context.Queue()
    ranks = [
        context.Process(target=toy_rank, args=(rank, size, port, output_dir, count, results)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    told = dict((rank, rest) for rank, *rest in (results.get(timeout=60) for _ in ranks))
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return told


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_no_sample_is_lost_or_repeated(tmp_path, size, count):
    told = toy_run(size, tmp_path, count)
    assert sorted(number for scored, _, _ in told.values() for number in scored) == list(range(count))
    assert [rank for rank, (_, main, _) in told.items() if main] == [0]
    assert told[0][2] == list(range(count)), "rank 0 has not got all samples"
    assert records_of(tmp_path) == [{"id": number, "square": number**2} for number in range(count)]
    assert sorted(path.name for path in only(tmp_path, "config.json").parent.iterdir()) == [
        ".lock",
        "config.json",
        "samples.jsonl",
    ]


def test_another_number_of_processes_goes_on(tmp_path):
    for size, count, fresh in ((2, 3, [0, 1, 2]), (3, 8, [3, 4, 5, 6, 7]), (1, 9, [8]), (2, 9, [])):
        told = toy_run(size, tmp_path, count)
        assert sorted(number for scored, _, _ in told.values() for number in scored) == fresh
        assert len(records_of(tmp_path)) == count


# --- the scripts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppl_flags(folder, tmp_path_factory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(tiny_text(32 * 9), encoding="utf-8")
    flags = ["--model", folder, "--dataset", text, "--PPL_seq_length", 32, "--RotateKV2"]
    return [*map(str, flags), "--Outlier_Aware_Key_Rotation", "False", "--output_dir"]


def test_perplexity_of_two_processes_is_that_of_one(ppl_flags, tmp_path):
    PPL_evaluation.main([*ppl_flags, str(tmp_path / "one")])
    done = torchrun(2, "PPL_evaluation.py", *ppl_flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
    assert records_of(tmp_path / "two") == records_of(tmp_path / "one")
    assert json.loads(only(tmp_path / "two", "metrics.json").read_text())["env"]["world_size"] == 2
    assert len(done.stdout.strip().splitlines()) == 2, "more than rank 0 printed"
    assert done.stderr.count("0/5") >= 1 and "0/4" not in done.stderr, "a bar of another rank than 0"
    assert done.stderr.count("Loading weights:   0%") <= 1


@pytest.mark.slow  # one process that refuses and ranks that end together are tested
def test_what_all_ranks_refuse_is_said_once(ppl_flags, tmp_path):
    PPL_evaluation.main([*ppl_flags, str(tmp_path)])
    again = torchrun(2, "PPL_evaluation.py", *ppl_flags, tmp_path)
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert again.returncode != 0 and len(errors) == 1 and "--resume" in errors[0]


@pytest.fixture(scope="module")
def gsm8k_flags(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "gsm8k").mkdir()
    rows = [{"question": f"w{number} w{number + 7}", "answer": f"#### {number}"} for number in range(QUESTIONS)]
    (data / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", folder, "--data_dir", data, "--num_fewshot", 0, "--max_new_tokens", 40, "--RTN4"]
    return [*map(str, flags), "--output_dir"]


def gsm8k_rank(rank: int, size: int, port: int, flags: list[str]) -> None:
    os.environ.update(rank_environment(rank, size, port))
    tqdm.set_lock(threading.RLock())  # the parent's may have been held by its monitor thread at the fork
    GSM8K_evaluation.main(flags)


def start_ranks(size: int, flags: list[str]) -> list:
    """GSM8K_evaluation.py in forked processes: those need no minute of imports, and can be killed one by one."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=gsm8k_rank, args=(rank, size, port, flags)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def kill_two_ranks(flags: list[str], output_dir: Path) -> None:
    """Start two ranks and kill -9 both once each has a sample and four are done."""
    ranks = start_ranks(2, [*flags, str(output_dir)])
    deadline = time.monotonic() + 120
    try:
        while all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            lines = [path.read_bytes().count(b"\n") for path in output_dir.glob("*/*/*/samples.rank*.jsonl")]
            if len(lines) == 2 and sum(lines) >= 4:
                return
            time.sleep(0.002)
        raise AssertionError("the run ended before it could be killed")
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def test_a_killed_run_goes_on_with_one_and_with_three_processes(gsm8k_flags, tmp_path):
    whole, broken, three = tmp_path / "whole", tmp_path / "broken", tmp_path / "three"
    GSM8K_evaluation.main([*gsm8k_flags, str(whole)])
    kill_two_ranks(gsm8k_flags, broken)
    kept = [line for path in broken.glob("*/*/*/samples.rank*.jsonl") for line in path.read_text().splitlines()]
    assert 4 <= len(kept) < QUESTIONS and not list(broken.glob("*/*/*/metrics.json"))
    with open(only(broken, "samples.rank1.jsonl"), "ab") as file:  # a write the kill tore
        file.write(b'{"id": 10, "predic')
    shutil.copytree(broken, three)

    GSM8K_evaluation.main([*gsm8k_flags, str(broken), "--resume"])
    ranks = start_ranks(3, [*gsm8k_flags, str(three), "--resume"])
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    for resumed in (broken, three):
        assert metrics_of(resumed) == metrics_of(whole)
        assert records_of(resumed) == records_of(whole)
        assert set(kept) <= set(only(resumed, "samples.jsonl").read_text().splitlines()), "scored again"
        assert not list(resumed.glob("*/*/*/samples.rank*"))


def test_a_mistake_of_one_rank_alone_ends_all(folder, tmp_path, capfd):
    """Only the question that rank 1 gets is too long: rank 0, which waits for it, ends too, and the reason is told."""
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": "w1", "answer": "#### 1"}, {"question": "w1 " * 600, "answer": "#### 1"}]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", folder, "--data_dir", tmp_path, "--num_fewshot", 0, "--max_new_tokens", 4, "--RTN4"]
    ranks = start_ranks(2, [*map(str, flags), "--output_dir", str(tmp_path / "out")])
    for process in ranks:
        process.join(120)
    said = capfd.readouterr()
    assert [process.exitcode for process in ranks] == [2, 2] and said.out == ""
    assert "exceed the model's context of 512" in said.err
    assert len(list((tmp_path / "out").glob("*/*/*/samples.rank0.jsonl"))) == 1, "rank 0's sample is lost"
