"""The evaluation scripts on tiny models: data and flags of each, and how a run's files are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from conftest import save_tiny_folder, tiny_text

import efficiency_evaluation
import GSM8K_evaluation
import LongBench_evaluation
import MileBench_evaluation
import needle_evaluation
import PPL_evaluation


def run_folder(place: str | Path) -> Path:
    """The folder of the one run below ``place``."""
    (path,) = Path(place).rglob("samples.jsonl")
    return path.parent


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(place: str | Path) -> dict:
    return read(run_folder(place) / "metrics.json")


def samples_of(place: str | Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder(place) / "samples.jsonl").read_text("utf-8").splitlines()]


def write_samples(place: str | Path, samples: list[dict]) -> None:
    (run_folder(place) / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples), encoding="utf-8")


def error_line(capture) -> str:
    """The one error that a script ends with, after its progress bars; ``capture``: capsys or capfd."""
    said = capture.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert "Traceback" not in "".join(said)
    (line,) = [line for line in said if line.startswith("error: ")]
    assert line == said[-1]
    return line


def refused(capture, script: ModuleType, *flags) -> str:
    """The line with which a script refuses its flags or data."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        script.main([str(flag) for flag in flags])
    assert ended.value.code == 2
    return error_line(capture)


@dataclass(frozen=True)
class Script:
    """An evaluation, with flags for the folder that ``write_data`` fills.

    Attributes:
        writes: the steps by which its run gets onto the disk. load: the name it knows ``load_model`` by.
    """

    module: ModuleType
    flags: tuple[str, ...]
    writes: int
    load: str = "load_model"


SCRIPTS = {
    "ppl": Script(PPL_evaluation, ("--model", "tiny", "--dataset", "words.txt", "--PPL_seq_length", "32"), 7),
    "gsm8k": Script(
        GSM8K_evaluation, ("--model", "tiny", "--data_dir", ".", "--num_fewshot", "0", "--max_new_tokens", "2"), 6
    ),
    "longbench": Script(
        LongBench_evaluation, ("--model", "tiny", "--data_dir", ".", "--tasks", "qasper", "--max_new_tokens", "2"), 6
    ),
    "milebench": Script(
        MileBench_evaluation,
        ("--model", "llava", "--data_dir", ".", "--datasets", "TQA", "--max_new_tokens", "2"),
        6,
        "load_vision_model",
    ),
    "needle": Script(
        needle_evaluation,
        (
            *("--model", "bytes", "--haystack", "rain.txt"),
            *("--context_lengths", "300", "--depths", "0,100", "--max_new_tokens", "2"),
        ),
        10,
    ),
    "efficiency": Script(
        efficiency_evaluation,
        ("--model", "tiny", "--dataset", "words.txt", "--context_lengths", "16,24", "--batch_sizes", "2"),
        10,
    ),
}


def write_data(path: Path) -> Path:
    """Tiny models and every script's data, in one folder."""
    from test_milebench import tiny_llava, write_dataset
    from test_needle import HAYSTACK, byte_tokenizer

    save_tiny_folder(path / "tiny", vocab_size=260)
    byte_tokenizer().save_pretrained(save_tiny_folder(path / "bytes", vocab_size=260))
    tiny_llava(path / "llava")
    write_dataset(path / "milebench", "TQA", records=2)
    (path / "words.txt").write_text(tiny_text(96))
    (path / "rain.txt").write_text(HAYSTACK)
    questions = [{"question": f"w{number}", "answer": f"#### {number}"} for number in range(2)]
    record = {"input": "w1 w2", "context": "w9 w8 w7", "answers": ["w1 w3"], "all_classes": None, "length": 3}
    for name, rows in {"gsm8k/test": questions, "longbench/qasper": [record, record]}.items():
        (path / name).parent.mkdir()
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path
