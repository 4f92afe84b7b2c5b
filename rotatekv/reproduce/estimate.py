"""What a missing run will take, and ``reproduce.py --dry_run``: seconds and bytes, and what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rotatekv.families import find_text_model, layer_geometry
from rotatekv.models.text import DTYPES, LOCAL_MODELS
from rotatekv.models.vision import RANDOM_LLAVA
from rotatekv.reproduce.plan import Cell
from rotatekv.reproduce.runs import Runs, preset_bits, shown

# Without a finished run: 2 operations per parameter and token, at what a small CPU and a data-centre GPU sustain.
CPU_RATE, GPU_RATE = 40e9, 50e12  # operations per second
# Rough assumptions, used until a run has finished: tokens of a prompt and its answer where the flags do not say.
_USUAL_TOKENS = {"gsm8k": 1200, "longbench": 8000, "milebench": 3000}
# Samples without --limit: WikiText-2 test in LLaMA-2 tokens, GSM8K's questions; LongBench and MileBench assumed.
_WIKITEXT_TOKENS = 341_469
_USUAL_SAMPLES = {"gsm8k": 1319, "longbench": 1600, "milebench": 6440}
_LIMITED_TASKS = {"longbench": 8, "milebench": 29}  # --limit counts records of each of these
_CALIBRATION_TOKENS = 32768
_SCALE_BITS = 24 / 64  # a float16 scale and an int8 zero point for 64 numbers


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes (None: the model's config is out of reach), and where the seconds come from."""

    seconds: float | None
    memory: float | None
    basis: str


def estimate(cell: Cell, runs: Runs) -> Estimate:
    """Of a cell's run: from the seconds per token of finished runs of its task and model, else by the formula."""
    tokens = tokens_per_sample(cell)
    work = samples_of(cell, runs.limit) * tokens
    memory = _memory(cell, runs, tokens)
    known = [run for run in runs.finished(cell.task, cell.model) if run["n"] and run["seconds"]]
    if known:
        done = sum(run["n"] * _tokens_of_run(run["config"], cell) for run in known)
        seconds = work * sum(run["seconds"] for run in known) / done
        return Estimate(seconds, memory, f"{len(known)} finished runs")
    return _by_formula(cell, runs, work, memory)


def calibration_estimate(cell: Cell, runs: Runs) -> Estimate:
    flags = dict(zip(cell.calibration.flags[::2], cell.calibration.flags[1::2], strict=True))
    tokens = int(flags.get("--calibration_tokens", _CALIBRATION_TOKENS))
    return _by_formula(cell, runs, tokens, _memory(cell, runs, 0))


def _by_formula(cell: Cell, runs: Runs, tokens: float, memory: float | None) -> Estimate:
    skeleton = runs.shape(cell.model)
    if skeleton is None:
        return Estimate(None, None, "unknown: the model's config is out of reach")
    rate = GPU_RATE if torch.cuda.is_available() else CPU_RATE
    seconds = 2 * _parameters(skeleton) * tokens / rate
    return Estimate(seconds, memory, f"2 × parameters × tokens at {rate:.0e} operations/s")


def list_commands(tables: Mapping[str, Sequence[Cell]], runs: Runs) -> None:
    """Print what reproduce.py would start, each command once, with its estimate behind it."""
    seen: set[str] = set()
    total = 0.0
    for table, cells in tables.items():
        outcomes = [(cell, runs.find(cell)) for cell in cells]
        done = sum(outcome.status == "done" for _, outcome in outcomes)
        print(f"# {table}: {len(cells)} cells, {done} finished")
        for cell, outcome in outcomes:
            if outcome.status == "done":
                continue
            steps = ((runs.calibration_command(cell), calibration_estimate), (runs.command(cell), estimate))
            for command, guess in steps:
                if command is None or (line := shown(command)) in seen:
                    continue
                seen.add(line)
                if outcome.reason:
                    print(f"{line}  # cannot run here: {outcome.reason}")
                    continue
                found = guess(cell, runs)
                total += found.seconds or 0.0
                print(f"{line}  # {_time(found.seconds)}, {_size(found.memory)} ({found.basis})")
    print(f"# {len(seen)} commands, about {_time(total)}; memory: the parameters and one sequence's cache")


def _time(seconds: float | None) -> str:
    return "time unknown" if seconds is None else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _size(memory: float | None) -> str:
    return "memory unknown" if memory is None else f"{memory / 1e9:.2f} GB"


def tokens_per_sample(cell: Cell) -> float:
    return _tokens_of_run(dict(cell.protocol), cell)


def _tokens_of_run(config: dict, cell: Cell) -> float:
    if cell.task == "ppl":
        return config["PPL_seq_length"]
    if cell.task == "needle":
        lengths = config["context_lengths"]
        return sum(lengths) / len(lengths) + config["max_new_tokens"]
    return _USUAL_TOKENS[cell.task]


def samples_of(cell: Cell, limit: int | None) -> int:
    protocol = dict(cell.protocol)
    if cell.task == "needle":
        total = len(protocol["context_lengths"]) * len(protocol["depths"])
    elif cell.task == "ppl":
        total = max(1, _WIKITEXT_TOKENS // protocol["PPL_seq_length"])
    else:
        total = _USUAL_SAMPLES[cell.task]
    return total if limit is None else min(total, limit * _LIMITED_TASKS.get(cell.task, 1))


def _memory(cell: Cell, runs: Runs, tokens: float) -> float | None:
    """Bytes of the parameters and of one sequence's cache: 2·L·H_kv·D numbers per token."""
    skeleton = runs.shape(cell.model)
    if skeleton is None:
        return None
    size = _dtype_bytes(cell.model, runs.dtype, skeleton)
    text_model = find_text_model(skeleton)
    channels = layer_geometry(text_model.layers[0].self_attn).channels
    bits = preset_bits(cell.method)
    bits = 8 * size if bits == 16 else bits + _SCALE_BITS
    return _parameters(skeleton) * size + 2 * len(text_model.layers) * channels * tokens * bits / 8


def _parameters(skeleton) -> int:
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _dtype_bytes(model: str, dtype: str, skeleton) -> int:
    if dtype != "auto":
        return DTYPES[dtype].itemsize
    if model in (*LOCAL_MODELS, RANDOM_LLAVA):
        return 2 if torch.cuda.is_available() else 4
    found = skeleton.config.get_text_config().dtype
    return found.itemsize if isinstance(found, torch.dtype) else 4
