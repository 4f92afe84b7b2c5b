"""efficiency_evaluation.py: order of steps, bytes, percentiles, csv, resume, bad flags; nothing here reads a clock."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from PIL import Image
from runs import read, run_folder, samples_of

import efficiency_evaluation
from rotatekv import RotateKVCache, patch_model
from rotatekv.config import PRESETS
from rotatekv.evals import efficiency
from rotatekv.evals.efficiency import (
    WARM_UP_STEPS,
    add_largest_batches,
    alternate,
    baseline_side,
    batch_of_text,
    computed_batch,
    largest_batch,
    measure_cell,
    method_side,
    metric_of,
    percentiles,
    ratios,
    total_steps,
    try_batches,
    twin_of,
)
from rotatekv.evals.efficiency_figure import NOT_MEASURED, line_of, rates, rows_of, write_report
from rotatekv.evals.peak_memory import PeakMemory, measures_peak

CPU = torch.device("cpu")
DECODE, REPEATS = 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-efficiency")
    (path / "text.txt").write_text(tiny_text(300))
    return path


def flags(folder: Path, output_dir: Path, *more) -> list[str]:
    base = ["--model", folder, "--dataset", folder / "text.txt", "--output_dir", output_dir]
    grid = ["--context_lengths", "16,40", "--batch_sizes", "1,2", "--methods", "RTN2,RTN4"]
    return [str(part) for part in (*base, *grid, "--decode_tokens", DECODE, "--prefill_repeats", REPEATS, *more)]


def side(name: str, prefill_ms, decode_ms, **more) -> dict:
    return {
        "side": name,
        "fitted": True,
        "growth": 1000,
        "model_bytes": 5000,
        "cache_bytes": 800,
        "alternated": True,
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        **more,
    }


def cell(hf: dict, own: dict, **more) -> dict:
    return {
        "id": "RTN2/10x2",
        "context_length": 10,
        "batch_size": 2,
        "method": "RTN2",
        "total_bits": 2.0,
        "tokens": 20,
        "hf": hf,
        "quantized": own,
        "device": "cpu",
        "threads": 2,
        "torch": "0",
        "dtype": "float32",
        "backend": "plain torch",
        **more,
    }


CELL = cell(side("HF", [4.0, 6.0], [3.0, 2.0, 8.0]), side("RTN2", [8.0, 6.0], [1.0, 2.0, 2.0], cache_bytes=100))
LOST = {"side": "HF", "fitted": False, "growth": None, "model_bytes": 5000}


# ------------------------------------------------------------------------------------------------------- alternation


def test_the_two_sides_take_turns_and_neither_always_comes_second():
    log, now = [], [0.0]

    def step(name: str, seconds: float):
        def run() -> None:
            log.append(name)
            now[0] += seconds

        return run

    def before(which: int) -> None:
        log.append(which)
        now[0] += 100  # untimed

    times = alternate([step("A", 0.001), step("B", 0.003)], 3, before, clock=lambda: now[0])
    assert log == [0, "A", 1, "B", 1, "B", 0, "A", 0, "A", 1, "B"]
    assert times == [pytest.approx([1, 1, 1]), pytest.approx([3, 3, 3])]


def test_each_time_lands_in_its_own_round():
    ticks = iter([0, 1, 10, 12, 20, 23, 30, 34])  # A 1 s, B 2 s; then B 3 s, A 4 s
    assert alternate([lambda: None, lambda: None], 2, clock=lambda: next(ticks)) == [[1000, 4000], [2000, 3000]]


def test_a_cell_alternates_prefills_then_steps_on_equal_tokens(monkeypatch):
    log = []
    read_tokens = efficiency.Side._read

    def noted(self, count):
        log.append((self.name, count, self.tokens[:, self.seen : self.seen + count].tolist()))
        read_tokens(self, count)

    monkeypatch.setattr(efficiency.Side, "_read", noted)
    model, ids = tiny_model(), torch.arange(8, 108).unsqueeze(0)
    with method_side("RTN2", model, PRESETS["RTN2"], None) as own:
        tokens = batch_of_text(ids, 1, 20 + total_steps(DECODE))
        measure_cell([baseline_side(model), own], tokens, {"context_length": 20, "batch_size": 1}, DECODE, REPEATS)
    timed = log[2 * (1 + WARM_UP_STEPS) :]  # behind each side's own memory pass
    assert [(name, count) for name, count, _ in timed] == [
        ("HF", 20),
        ("RTN2", 20),
        ("RTN2", 20),
        ("HF", 20),
        *[(name, 1) for name in ("HF", "RTN2", "RTN2", "HF")],  # warm-up
        *[(name, 1) for name in ("HF", "RTN2", "RTN2", "HF", "HF", "RTN2")],
    ]
    assert all(
        [read for name, _, read in timed if name == "HF"] == [read for name, _, read in timed if name == other]
        for other in ("HF", "RTN2")
    )


# ------------------------------------------------------------------------------------------------- the twin, the bytes


@pytest.mark.parametrize("name", ["RTN2", "RotateKV4"])
def test_the_twin_shares_weights_and_leaves_the_model_as_it_was(name):
    model, ids = tiny_model(), torch.arange(8, 60).unsqueeze(0)
    config = PRESETS[name] if name == "RTN2" else efficiency.QuantConfig(Outlier_Aware_Key_Rotation=False)
    with torch.no_grad():
        before = model(ids).logits
        with method_side(name, model, config, None) as own:
            mlp = [m.model.layers[1].mlp.up_proj.weight for m in (model, own.model)]
            assert mlp[0] is mlp[1] and own.model is not model
            assert torch.equal(model(ids).logits, before)
            assert not torch.equal(own.model(ids).logits, before)
        assert torch.equal(twin_of(model)(ids).logits, before)


def test_bytes_are_those_of_the_caches():
    model, ids = tiny_model(), torch.arange(8, 108).unsqueeze(0)
    length, batch = 21, 2
    tokens = batch_of_text(ids, batch, length + total_steps(DECODE))
    with method_side("RTN2", model, PRESETS["RTN2"], None) as own:
        record = measure_cell([baseline_side(model), own], tokens, {"context_length": length}, DECODE, REPEATS)
    count = batch * (length + total_steps(DECODE))
    assert record["hf"]["cache_bytes"] == count * 2 * 2 * 3 * 16 * 4  # K and V, layers, heads, channels, float32
    with patch_model(model, "RTN2"), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        model(tokens[:, :length], past_key_values=cache)
        for place in range(length, tokens.shape[1]):
            model(tokens[:, place : place + 1], past_key_values=cache)
    assert record["tokens"] == count == cache.positions.numel()
    assert record["cache_bytes"] == record["quantized"]["cache_bytes"] == cache.nbytes()
    assert record["total_bits"] == cache.avg_bits()["total"]
    assert len(record["hf"]["prefill_ms"]) == REPEATS and len(record["quantized"]["decode_ms"]) == DECODE


@pytest.mark.parametrize("config", [PRESETS["RTN2"], efficiency.QuantConfig(Outlier_Aware_Key_Rotation=False)])
def test_a_patched_model_holds_no_other_weights(config):
    model = tiny_model()
    with method_side("it", model, config, None) as own:
        assert own.model_bytes == baseline_side(model).model_bytes


def test_text_is_cut_into_rows_and_begins_anew():
    rows = batch_of_text(torch.arange(5).unsqueeze(0), 2, 4)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]]


@pytest.mark.skipif(not measures_peak(CPU), reason="this platform measures no peak memory")
def test_a_peak_is_seen_and_forgotten():
    with PeakMemory(CPU) as high:
        block = torch.ones(16 << 20)  # 64 MiB
        del block
    with PeakMemory(CPU) as low:
        pass
    assert high.growth > 60 << 20 and low.growth < 16 << 20


def test_a_mark_that_stays_up_is_no_measurement(monkeypatch, tmp_path):
    monkeypatch.setattr("rotatekv.evals.peak_memory._CLEAR", tmp_path / "clear_refs")  # takes the write, does nothing
    memory = {"VmRSS": 100 << 20, "VmHWM": 164 << 20}
    monkeypatch.setattr("rotatekv.evals.peak_memory._status", memory.__getitem__)
    assert not measures_peak(CPU)
    memory["VmHWM"] = 101 << 20
    assert measures_peak(CPU)


def test_where_no_peak_is_measured_it_says_so(monkeypatch):
    monkeypatch.setattr("rotatekv.evals.peak_memory._CLEAR", Path("/nonexistent/clear_refs"))
    with PeakMemory(CPU) as peak:
        pass
    assert peak.growth is None and not measures_peak(CPU)
    record = cell({**CELL["hf"], "growth": None}, {**CELL["quantized"], "growth": None})
    assert [row["peak_bytes"] for row in rows_of([record])] == [NOT_MEASURED] * 2
    assert ratios(record)["peak_ratio"] is None and NOT_MEASURED in line_of(record)


# ------------------------------------------------------------------------------------------------- ratios, rows, batch


def test_percentiles_are_numpys():
    values = [5.0, 1.0, 9.0, 2.0, 2.5]
    assert percentiles(values) == {f"p{q}": np.percentile(values, q) for q in (20, 50, 80)}
    found = rates({"prefill_ms": [10.0], "decode_ms": values}, 40, 2)
    assert found["prefill_tokens_per_s_p50"] == 4000 and found["decode_ms_p20"] == np.percentile(values, 20)
    assert found["decode_tokens_per_s_p80"] == pytest.approx(np.percentile([2000 / value for value in values], 80))


def test_ratios_pair_the_rounds():
    found = ratios(CELL)
    assert found["decode_speedup"] == 3 and found["prefill_speedup"] == 0.75  # medians of 3, 1, 4 and of 0.5, 1
    assert found["prefill_overhead_percent"] == pytest.approx(100 / 3)
    assert found["cache_ratio"] == 8 and found["cache_ratio_16_bits"] == 8 and found["peak_ratio"] == 1
    metric = metric_of([CELL])
    assert metric["decode_speedup"] == {"RTN2": {"10x2": 3}} and "batch_ratio" not in metric


def test_a_side_without_room_has_no_ratios_and_says_so(tmp_path):
    record = cell(LOST, CELL["quantized"])
    add_largest_batches(record, 10**6)
    assert ratios(record)["decode_speedup"] is None and ratios(record)["cache_ratio_16_bits"] == 8
    hf, own = rows_of([record])
    assert hf["status"] == "out of memory" and hf["decode_ms_p50"] is None and own["decode_ms_p50"] == 2
    assert "HF out of memory" in line_of(record)
    write_report([record], {"config": {"model": "tiny"}}, tmp_path)
    assert (tmp_path / "efficiency.png").is_file()


def test_running_out_of_memory_is_a_result(monkeypatch):
    model, ids = tiny_model(), torch.arange(8, 108).unsqueeze(0)
    hf = baseline_side(model)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hf, "prefill", full)
    with method_side("RTN2", model, PRESETS["RTN2"], None) as own:
        record = measure_cell([hf, own], batch_of_text(ids, 1, 30), {"context_length": 20}, DECODE, REPEATS)
    assert not record["hf"]["fitted"] and "decode_ms" not in record["hf"]
    assert len(record["quantized"]["decode_ms"]) == DECODE and record["quantized"]["alternated"] is False


def test_the_largest_batch_is_computed_from_what_was_measured():
    assert computed_batch(CELL["hf"], 2, 9999) == (9, "computed from peak")  # (9999 − 5000) / 500
    assert computed_batch({**CELL["hf"], "growth": None}, 2, 9999) == (12, "computed from cache bytes")
    assert computed_batch(CELL["hf"], 2, 100)[0] == 0
    record = cell(dict(CELL["hf"]), {**CELL["quantized"], "growth": 100})
    add_largest_batches(record, 9999)
    assert ratios(record)["batch_ratio"] == 99 / 9 and "batch 9 -> 99" in line_of(record)


@pytest.mark.parametrize("guess", [0, 1, 6, 7, 8, 50])
@pytest.mark.parametrize("limit", [0, 1, 7])
def test_the_largest_batch_is_found_by_trying(guess, limit):
    assert largest_batch(lambda batch: batch <= limit, guess) == (limit, True)


def test_a_batch_that_cannot_be_tried_is_not_called_measured():
    assert largest_batch(lambda batch: True if batch <= 7 else None, 4) == (7, False)


def test_a_search_that_free_memory_stops_is_called_computed(monkeypatch):
    side, ids = baseline_side(tiny_model()), torch.arange(8, 108).unsqueeze(0)
    tried: list[int] = []

    def peak(self) -> dict:
        tried.append(self.tokens.shape[0])
        return {"fitted": True, "growth": 100_000 * tried[-1]}

    monkeypatch.setattr(efficiency.Side, "measure_memory", peak)
    monkeypatch.setattr(efficiency, "available_bytes", lambda device: 1_000_000)  # 8 sequences and a reserve
    record, grid = {"growth": 200_000, "model_bytes": side.model_bytes}, {"context_length": 10, "batch_size": 2}
    assert try_batches(side, record, ids, grid, side.model_bytes + 2_000_000) == (20, "computed from peak")
    assert max(tried) == 8


# ---------------------------------------------------------------------------------------------------------- the script


def test_it_writes_csv_figure_and_metrics(folder, tmp_path, capsys):
    efficiency_evaluation.main(flags(folder, tmp_path, "--memory_budget_gb", "0.5", "--batch_sizes", "2"))
    path, printed = run_folder(tmp_path), capsys.readouterr().out
    samples, metrics = samples_of(path), read(path / "metrics.json")
    ids = [f"{method}/{length}x2" for length in (16, 40) for method in ("RTN2", "RTN4")]
    assert [sample["id"] for sample in samples] == ids and metrics["n"] == 4 and not metrics["partial"]
    assert metrics["config"]["method"] == "RTN2,RTN4" and set(metrics["config"]["quant"]) == {"RTN2", "RTN4"}
    assert metrics["metric"] == metric_of(samples) and metrics["env"]["threads"] == torch.get_num_threads()
    assert set(metrics["metric"]["decode_speedup"]["RTN2"]) == {"16x2", "40x2"}
    assert metrics["metric"]["cache_ratio"]["RTN2"]["40x2"] > metrics["metric"]["cache_ratio"]["RTN4"]["40x2"] > 1
    with open(path / "efficiency.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["side"] for row in rows] == ["HF", "RTN2", "HF", "RTN4"] * 2
    last = samples[-1]
    assert float(rows[-1]["decode_ms_p80"]) == np.percentile(last["quantized"]["decode_ms"], 80)
    assert float(rows[-1]["prefill_tokens_per_s_p50"]) == pytest.approx(
        np.percentile([1000 * 80 / time for time in last["quantized"]["prefill_ms"]], 50)
    )
    assert int(rows[-1]["cache_bytes"]) == last["cache_bytes"] and rows[-2]["decode_speedup"] == ""
    assert all("computed" in row["max_batch_how"] and int(row["max_batch"]) > 0 for row in rows)
    assert "RTN4 40 x 2: decode" in printed and "4 cells" in printed
    with Image.open(path / "efficiency.png") as picture:
        assert "beside Hugging Face" in picture.text["Description"]
        assert picture.width > 1000 and len(picture.convert("RGB").resize((200, 200)).getcolors(40000)) > 20


@pytest.mark.skipif(not measures_peak(CPU), reason="this platform measures no peak memory")
def test_batches_are_tried(folder, tmp_path, monkeypatch):
    """Peaks stand at 100 kB a sequence; the model takes what it takes."""

    def peak(self) -> dict:
        return {"fitted": True, "growth": 100_000 * self.tokens.shape[0]}

    monkeypatch.setattr(efficiency.Side, "measure_memory", peak)
    base = flags(folder, tmp_path, "--limit", 1, "--try_batches", "--memory_budget_gb", "0.002")
    efficiency_evaluation.main(base)
    for found in (samples_of(run_folder(tmp_path))[0][key] for key in ("hf", "quantized")):
        assert found["max_batch"] == (2_000_000 - found["model_bytes"]) // 100_000 > 2
        assert found["max_batch_how"] == "measured"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--methods", "RTN2,Nothing"], "Nothing"),
        (["--methods", ","], "--methods"),
        (["--method", "RTN2"], "not both"),
        (["--RTN3"], "two methods"),
        (["--context_lengths", "0"], "context_lengths"),
        (["--context_lengths", "510"], "context of 512"),
        (["--batch_sizes", "x"], "batch_sizes"),
        (["--decode_tokens", "0"], "decode_tokens"),
        (["--prefill_repeats", "0"], "prefill_repeats"),
        (["--memory_budget_gb", "-1"], "memory_budget_gb"),
        (["--memory_budget_gb", "nan"], "memory_budget_gb"),
        (["--try_batches"], "--memory_budget_gb"),
        (["--device_map", "auto"], "one device"),
        (["--dataset", "nowhere.txt"], "nowhere.txt"),
        (["--limit", "0"], "limit"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, more, word):
    with pytest.raises(SystemExit) as end:
        efficiency_evaluation.main(flags(folder, tmp_path, *more))
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error[-1].startswith("error: ") and word in error[-1], error
    assert not list(tmp_path.iterdir())


def test_overrides_change_every_method(folder, tmp_path):
    efficiency_evaluation.main(flags(folder, tmp_path, "--limit", "2", "--residual_length", "8"))
    assert [sample["method"] for sample in samples_of(run_folder(tmp_path))] == ["RTN2*", "RTN4*"]
