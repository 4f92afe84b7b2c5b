"""PPL_evaluation.py as its user runs it: on a tiny folder for the mechanics, on the embedded model for the numbers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_text
from runs import metrics_of

import PPL_evaluation
from rotatekv import patch_model

ROOT = Path(__file__).resolve().parents[1]
NO_REORDER = ["--Outlier_Aware_Key_Rotation", "False"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny_text(32 * 60), encoding="utf-8")
    return path


def flags(folder, text_file, output_dir, *more):
    base = ["--model", folder, "--dataset", text_file, "--PPL_seq_length", 32, "--output_dir", output_dir]
    return [str(part) for part in (*base, *more)]


def test_fp16_perplexity_equals_five_lines_on_the_stock_model(folder, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--FP16", "True"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([int(word[1:]) + 8 for word in text_file.read_text().split()])
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in ids.split(32)]
    assert metrics_of(tmp_path)["metric"]["ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert metrics_of(tmp_path)["n"] == 60


@pytest.mark.parametrize("method", ["FP16", "RTN4", "RotateKV2", "RotateKV3"])
def test_one_shot_and_chunks_agree_without_sinks(folder, text_file, tmp_path, method):
    # Sinks are chosen in the first call only, so another first call may choose others.
    more = ["--method", method] if method in ("FP16", "RTN4") else ["--method", method, *NO_REORDER]
    more += ["--Attention_Sink_Aware", "False", "--limit", "8"]
    PPL_evaluation.main(flags(folder, text_file, tmp_path / "one", *more))
    PPL_evaluation.main(flags(folder, text_file, tmp_path / "chunks", *more, "--chunk_size", "7"))
    one, chunks = (metrics_of(tmp_path / name)["metric"]["ppl"] for name in ("one", "chunks"))
    assert chunks == pytest.approx(one, rel=5e-3)


def test_divergence_is_reported_and_is_a_run_of_its_own(folder, text_file, tmp_path, capsys):
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN2", "--limit", "4"))
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN2", "--limit", "4", "--divergence"))
    first, second = (json.loads(path.read_text()) for path in tmp_path.glob("ppl/*/*/metrics.json"))
    without, with_it = (first, second) if "kl" in second["metric"] else (second, first)
    assert without["metric"]["ppl"] == with_it["metric"]["ppl"] and "kl" not in without["metric"]
    assert with_it["metric"]["kl"] > 0
    assert f", divergence {with_it['metric']['kl']:.4f}  (RTN2" in capsys.readouterr().out.splitlines()[-1]


def test_last_line_and_metrics_say_the_same(folder, text_file, tmp_path, capsys):
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN3", "--limit", "4"))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(r"words.txt perplexity: ([\d.]+)  \(RTN3, ([\d.]+) bits, ([\d.]+) bytes/token\)", last)
    metrics = metrics_of(tmp_path)
    assert found and float(found[1]) == pytest.approx(metrics["metric"]["ppl"], abs=1e-4)
    assert float(found[2]) == pytest.approx(metrics["avg_bits"]["total"], abs=1e-3)
    assert float(found[3]) == pytest.approx(metrics["cache_bytes_per_token"], abs=0.1)
    # 2 layers × 2 × 48 channels at 3 bits, a float16 scale and an int8 zero per 16 channels, a 4-byte position
    assert metrics["cache_bytes_per_token"] == pytest.approx(2 * 2 * (48 * 3 / 8 + 3 * 3) + 4)
    assert metrics["partial"] is True


def test_killed_run_resumes_to_the_unbroken_number(folder, text_file, tmp_path):
    more = ["--method", "RotateKV2", *NO_REORDER, "--chunk_size", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    PPL_evaluation.main(flags(folder, text_file, whole, *more))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "PPL_evaluation.py"), *flags(folder, text_file, broken, *more)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        samples = list(broken.glob("ppl/*/*/samples.jsonl"))
        if samples and samples[0].read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    (samples,) = broken.glob("ppl/*/*/samples.jsonl")
    done = samples.read_bytes().count(b"\n")
    assert 3 <= done < 60, "the run ended before it could be killed"
    assert not list(broken.glob("ppl/*/*/metrics.json"))
    with open(samples, "ab") as file:  # a write the kill tore
        file.write(b'{"id": 59, "nll": 0.0')
    kept = samples.read_bytes().splitlines()[:done]
    PPL_evaluation.main(flags(folder, text_file, broken, *more, "--resume"))
    assert samples.read_bytes().splitlines()[:done] == kept, "finished windows were scored again"
    assert metrics_of(broken)["metric"] == metrics_of(whole)["metric"]
    assert metrics_of(broken)["avg_bits"] == metrics_of(whole)["avg_bits"]


def test_a_longer_limit_takes_over_a_shorter_run(folder, text_file, tmp_path):
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN4", "--limit", "2"))
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN4", "--limit", "5", "--resume"))
    assert metrics_of(tmp_path)["n"] == 5


def test_a_shorter_limit_does_not_take_a_longer_runs_place(folder, text_file, tmp_path):
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN4", "--limit", "3"))
    before = metrics_of(tmp_path)
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN4", "--limit", "1", "--resume"))
    assert metrics_of(tmp_path) == before


def test_autocast_leaves_the_cache_alone(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(8, 30).unsqueeze(0)
    for name in ("FP16", "RTN4"):
        with patch_model(model, name), torch.autocast("cpu", torch.bfloat16):
            assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 25)


def test_average_bits_of_unequal_samples_are_all_bytes_over_all_numbers():
    from rotatekv.evals.running import _measures

    short = {"tokens": 10, "cache_bytes": 100, "k_bits": 8.0, "v_bits": 8.0, "total_bits": 8.0, "seconds": 1.0}
    long = {"tokens": 90, "cache_bytes": 450, "k_bits": 4.0, "v_bits": 4.0, "total_bits": 4.0, "seconds": 1.0}
    found = _measures([short, long])
    assert found["avg_bits"]["total"] == pytest.approx(8 * (100 + 450) / 1000)  # 10 numbers a token: 100 + 900
    assert found["cache_bytes_per_token"] == pytest.approx(5.5)


def test_a_limit_beyond_the_text_is_no_partial_run(folder, text_file, tmp_path):
    PPL_evaluation.main(flags(folder, text_file, tmp_path, "--RTN4", "--limit", "99"))
    assert metrics_of(tmp_path)["partial"] is False
