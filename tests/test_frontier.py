"""The figure of bits against perplexity, from finished runs' metrics."""

from __future__ import annotations

import json

import pytest

from visualize import frontier

BASE = {"task": "ppl", "model": "m", "dtype": "float32", "dataset": "d", "dataset_sha256": "x", "PPL_seq_length": 64}


def write_run(folder, method, ppl, bits, n=4, window=0, **changes):
    config = {**BASE, "method": method, "quant": {"residual_length": window}, "chunk_size": 8, **changes}
    path = folder / f"{method}-{len(list(folder.iterdir()))}"
    path.mkdir()
    metrics = {"task": "ppl", "config": config, "metric": {"ppl": ppl}, "avg_bits": {"total": bits}, "n": n}
    (path / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    write_run(folder, "FP16", 20.0, 32.0)
    write_run(folder, "RotateKV2", 30.0, 2.4)
    write_run(folder, "RotateKV4", 20.5, 4.4)
    write_run(folder, "RotateKV2+", 22.0, 2.6)
    write_run(folder, "RotateKV2*", 25.0, 2.7, window=32)
    write_run(folder, "RTN2", 19.0, 2.4)  # better than FP16: not on a logarithmic axis
    write_run(folder, "RTN3", 40.0, 3.4, n=2)  # saw less
    write_run(folder, "RTN4", 21.0, 4.4, dataset_sha256="y")
    write_run(folder, "KIVI2", 21.0, 3.4, chunk_size=None)
    return folder


def test_lines_are_losses_over_fp16_by_bits(runs):
    lines = frontier.lines_of(frontier.read_runs(runs, 8))
    assert lines == {
        "RotateKV": [(2.4, 10.0, "RotateKV2"), (4.4, 0.5, "RotateKV4")],
        "RotateKV+": [(2.6, 2.0, "RotateKV2+")],
        "RotateKV, window 32": [(2.7, 5.0, "RotateKV2*")],
    }
    assert list(lines) == ["RotateKV", "RotateKV+", "RotateKV, window 32"]  # by their best


def test_the_figure_is_written(runs, tmp_path, capsys):
    frontier.main(["--input", str(runs), "--chunk_size", "8", "--output", str(tmp_path / "f.png")])
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert "4 runs of 3 methods" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "3", '{"task": "ppl"}', '{"task": "ppl", "config": null}'])
def test_a_damaged_run_is_one_line(runs, content, capsys):
    next(runs.glob("*/metrics.json")).write_text(content)
    with pytest.raises(SystemExit) as stop:
        frontier.main(["--input", str(runs), "--chunk_size", "8"])
    assert stop.value.code == 2 and "is damaged: the same command with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [([], "no finished FP16 run in"), (["--chunk_size", "9"], "chunk_size 9")])
def test_nothing_to_compare_with_is_one_line(runs, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        frontier.main(["--input", str(runs), *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
