"""Time and memory of a model with HF's own cache beside the same model with a quantized one, in alternation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from rotatekv.cache.cache import RotateKVCache
from rotatekv.compat import CACHE_NAME
from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.evals.peak_memory import PeakMemory, available_bytes
from rotatekv.evals.running import cache_use
from rotatekv.kernels.backend import kernels_on
from rotatekv.patching.patch import patch_model

BASELINE = "HF"  # the unpatched model with transformers' DynamicCache, in the model's dtype
WARM_UP_STEPS = 2
PERCENTILES = (20, 50, 80)
_MOST_TRIES = 24
_DTYPE_BYTES = 2  # of a number "in fp16", whatever the model's dtype


class Side:
    """One of the two that are compared: a model, how it makes its cache, and where it stands in the text.

    Args:
        name: ``HF`` or a method's.
        new_cache: an empty cache.
    """

    def __init__(self, name: str, model: nn.Module, new_cache: Callable[[], object]):
        self.name, self.model, self.new_cache = name, model, new_cache
        self.device = next(model.parameters()).device
        tensors = [*model.parameters(), *model.buffers()]
        self.model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.cache: Any = None
        self.tokens = torch.empty(0, 0, dtype=torch.int64, device=self.device)  # until ``load``
        self.seen = 0

    def load(self, tokens: torch.Tensor, context_length: int) -> None:
        """The (B, T) ids to read: ``context_length`` at once, then one a step."""
        self.tokens, self.context_length = tokens.to(self.device), context_length
        self.reset()

    def reset(self) -> None:
        self.cache, self.seen = None, 0

    def prefill(self) -> None:
        self.cache, self.seen = self.new_cache(), 0
        self._read(self.context_length)

    def decode(self) -> None:
        self._read(1)

    @torch.no_grad()
    def _read(self, count: int) -> None:
        ids = self.tokens[:, self.seen : self.seen + count]
        # As generate does it: the last token's logits alone. The text decides the next token, not the logits, so that
        # both sides read the same.
        self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache})
        self.seen += count
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cache_bytes(self) -> int:
        if isinstance(self.cache, RotateKVCache):
            return self.cache.nbytes()
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def measure_memory(self) -> dict:
        """A prefill and two steps from an empty cache; ``growth`` in bytes (None: not measured), and whether it fitted.

        It warms this shape up as well. The cache is dropped at the end.
        """
        self.reset()
        fitted = True
        with PeakMemory(self.device) as peak:
            try:
                self.prefill()
                for _ in range(WARM_UP_STEPS):
                    self.decode()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fitted = False
        self.reset()
        return {"fitted": fitted, "growth": peak.growth if fitted else None}


def baseline_side(model: nn.Module) -> Side:
    return Side(BASELINE, model, DynamicCache)


@contextmanager
def method_side(name: str, model: nn.Module, config: QuantConfig, calibration_file: str | None) -> Iterator[Side]:
    """A patched twin of ``model`` as a side."""
    # Why a twin and not patch/unpatch around blocks of steps: the sides can then alternate step by step, which cancels
    # the machine's drift best. It costs no weights.
    twin = twin_of(model)
    with patch_model(twin, config, calibration_file):
        yield Side(name, twin, lambda: RotateKVCache.for_model(twin))


def twin_of(model: nn.Module) -> nn.Module:
    """A second instance with the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def alternate(
    steps: Sequence[Callable[[], None]],
    rounds: int,
    before: Callable[[int], None] = lambda which: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time ``rounds`` of all steps in turn: A B, B A, A B, … so that neither always comes second.

    Args:
        before: runs untimed before every step, with the step's number.

    Returns:
        milliseconds of each step, by round.
    """
    times: list[list[float]] = [[0.0] * rounds for _ in steps]
    order = list(range(len(steps)))
    for number in range(rounds):
        for which in order if number % 2 == 0 else order[::-1]:
            before(which)
            begun = clock()
            steps[which]()
            times[which][number] = 1000 * (clock() - begun)
    return times


def measure_cell(
    sides: Sequence[Side], ids: torch.Tensor, cell: dict, decode_tokens: int, prefill_repeats: int
) -> dict:
    """One context length and batch size of ``HF`` and one method, [HF, method].

    Args:
        ids: (B, context_length + at least ``total_steps(decode_tokens)``) token ids.
        cell: ``context_length``, ``batch_size``, ``method``.

    Returns:
        the cell with a record per side (``hf``, ``quantized``): raw milliseconds, bytes, model bytes; and what
        ``cache_use`` measures of the method's cache. A side without room has ``fitted`` false and no times.
    """
    for side in sides:
        side.load(ids, cell["context_length"])
    records = [{"side": side.name, "model_bytes": side.model_bytes, **side.measure_memory()} for side in sides]
    fitting = [(side, record) for side, record in zip(sides, records, strict=True) if record["fitted"]]
    try:
        time_sides(fitting, decode_tokens, prefill_repeats)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        for _, record in fitting:  # each fits alone, both together do not: timed one by one, and it says so
            record["alternated"] = False
        for pair in fitting:
            for side in sides:
                side.reset()
            time_sides([pair], decode_tokens, prefill_repeats)
    use = {"tokens": 0, "cache_bytes": 0, "k_bits": 0.0, "v_bits": 0.0, "total_bits": 0.0}
    if records[1]["fitted"]:
        use = cache_use(sides[1].cache)  # it was timed last
    for side in sides:
        side.reset()
    return {**cell, **use, "hf": records[0], "quantized": records[1]}


def time_sides(pairs: Sequence[tuple[Side, dict]], decode_tokens: int, prefill_repeats: int) -> None:
    """Fill the records' ``prefill_ms``, ``decode_ms``, ``cache_bytes`` and ``alternated``; the caches stay."""
    sides = [side for side, _ in pairs]
    for side in sides:
        side.reset()
    prefill = alternate([side.prefill for side in sides], prefill_repeats, lambda which: sides[which].reset())
    alternate([side.decode for side in sides], WARM_UP_STEPS)
    decode = alternate([side.decode for side in sides], decode_tokens)
    for (side, record), prefill_ms, decode_ms in zip(pairs, prefill, decode, strict=True):
        record |= {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "cache_bytes": side.cache_bytes()}
        record.setdefault("alternated", len(pairs) > 1)


def total_steps(decode_tokens: int) -> int:
    """Decode steps a side makes after its prefill."""
    return WARM_UP_STEPS + decode_tokens


def is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text or "out of memory" in text


def batch_of_text(ids: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """(batch_size, length) ids: consecutive windows of a (1, tokens) text, which begins anew where it ends."""
    if not ids.numel():
        raise UserError("the text has no tokens")
    where = torch.arange(batch_size * length, dtype=torch.int64, device=ids.device) % ids.shape[1]
    return ids[0, where].view(batch_size, length)


def backend_name(model: nn.Module) -> str:
    """What decodes the packed cache on this model's device."""
    kernels = kernels_on(next(model.parameters()).device)
    return f"fused {kernels.__name__.rpartition('.')[2]} kernel" if kernels else "plain torch"


# --------------------------------------------------------------------------------------------- the largest batch


def computed_batch(side: dict, batch_size: int, budget: int) -> tuple[int, str]:
    """The largest batch in ``budget`` bytes from this side's measured bytes, and from which.

    A sequence costs the measured peak growth (its cache and the activations) divided by the batch; where no peak was
    measured, its cache alone.
    """
    growth, source = side["growth"], "peak"
    if growth is None:
        growth, source = side["cache_bytes"], "cache bytes"
    return max(int((budget - side["model_bytes"]) * batch_size // max(growth, 1)), 0), f"computed from {source}"


def largest_batch(fits: Callable[[int], bool | None], guess: int) -> tuple[int, bool]:
    """Search for the largest batch that fits, outward from ``guess`` in growing steps, then between.

    Args:
        fits: True, False, or None where it cannot be tried (then the search ends below it).

    Returns:
        the batch (0: not even one), and whether the one above it was really seen not to fit.
    """
    low, seen = 0, False
    high: int | None = None  # low fits, high does not
    batch, step = max(guess, 1), 1
    for _ in range(_MOST_TRIES):
        answer = fits(batch)
        if answer:
            low = batch
        else:
            high, seen = batch, answer is False
        if high is not None and high - low <= 1:
            break
        if low and high is not None:
            batch = (low + high) // 2
        else:
            batch, step = low + step if high is None else max(high - step, 1), 2 * step
    return low, seen and high is not None and high - low <= 1


def try_batches(side: Side, record: dict, ids: torch.Tensor, cell: dict, budget: int) -> tuple[int, str]:
    """The largest batch in ``budget`` bytes by trying, ``measured``; else computed, where trying is not possible."""
    guess, how = computed_batch(record, cell["batch_size"], budget)
    per_sequence = (record["growth"] or 0) / cell["batch_size"]

    def fits(batch: int) -> bool | None:
        free = available_bytes(side.device)
        if free is not None and side.device.type != "cuda" and batch * per_sequence > 0.8 * free:
            return None  # Linux would kill the process instead of refusing the memory
        length = cell["context_length"] + WARM_UP_STEPS
        side.load(batch_of_text(ids, batch, length), cell["context_length"])
        found = side.measure_memory()
        return found["fitted"] and side.model_bytes + found["growth"] <= budget

    batch, measured = largest_batch(fits, guess)
    return (batch, "measured") if measured else (max(batch, guess), how)


def add_largest_batches(record: dict, budget: int, sides: Sequence[Side] = (), ids: torch.Tensor | None = None) -> None:
    """Give both sides of a cell ``max_batch`` and ``max_batch_how``; tried with ``sides``, computed without."""
    for number, key in enumerate(("hf", "quantized")):
        side = record[key]
        if not side["fitted"]:
            side["max_batch"], side["max_batch_how"] = None, "did not fit at this batch"
        elif sides:
            side["max_batch"], side["max_batch_how"] = try_batches(sides[number], side, ids, record, budget)
        else:
            side["max_batch"], side["max_batch_how"] = computed_batch(side, record["batch_size"], budget)


# ------------------------------------------------------------------------------------------------- ratios and rows


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation."""
    return {f"p{q}": float(value) for q, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def ratios(record: dict) -> dict[str, float | None]:
    """What the method gains over HF in one cell; None where a side is missing.

    ``decode_speedup``, ``prefill_speedup``: the median over rounds of HF's time by the method's in the same round.
    ``prefill_overhead_percent``: the same as extra time. ``cache_ratio``: HF's cache bytes by the method's;
    ``cache_ratio_16_bits``: 16 bits per number by the method's. ``peak_ratio``: model and peak growth;
    ``peak_growth_ratio``: the growth alone. ``batch_ratio``: of the largest batches.
    """
    hf, own = record["hf"], record["quantized"]
    found: dict = dict.fromkeys(RATIOS)
    if own["fitted"]:
        found["cache_ratio_16_bits"] = 8 * _DTYPE_BYTES / record["total_bits"]
    if not (hf["fitted"] and own["fitted"]):
        return found
    for phase in ("prefill", "decode"):
        pairs = np.divide(hf[f"{phase}_ms"], own[f"{phase}_ms"])
        for name, value in percentiles(pairs).items():
            found[f"{phase}_speedup" + ("" if name == "p50" else f"_{name}")] = value
    found["prefill_overhead_percent"] = 100 * (1 / found["prefill_speedup"] - 1)
    found["cache_ratio"] = hf["cache_bytes"] / own["cache_bytes"]
    if hf["growth"] and own["growth"]:
        found["peak_growth_ratio"] = hf["growth"] / own["growth"]
        found["peak_ratio"] = (hf["model_bytes"] + hf["growth"]) / (own["model_bytes"] + own["growth"])
    if hf.get("max_batch") and own.get("max_batch") is not None:
        found["batch_ratio"] = own["max_batch"] / hf["max_batch"]
    return found


RATIOS = (
    "decode_speedup",
    "decode_speedup_p20",
    "decode_speedup_p80",
    "prefill_overhead_percent",
    "prefill_speedup",
    "prefill_speedup_p20",
    "prefill_speedup_p80",
    "cache_ratio",
    "cache_ratio_16_bits",
    "peak_ratio",
    "peak_growth_ratio",
    "batch_ratio",
)


def metric_of(records: Sequence[dict]) -> dict:
    """metrics.json's metric: ``{ratio: {method: {"<context>x<batch>": value}}}``."""
    metric: dict = {}
    for name in (name for name in RATIOS if not name.endswith(("_p20", "_p80"))):
        for record in records:
            if (value := ratios(record)[name]) is not None:
                cell = f"{record['context_length']}x{record['batch_size']}"
                metric.setdefault(name, {}).setdefault(record["method"], {})[cell] = value
    return metric


def last_speedup(records: Sequence[dict]) -> dict[str, str]:
    """What the progress bar shows."""
    speedup = ratios(records[-1])["decode_speedup"]
    return {} if speedup is None else {"decode": f"{speedup:.2f}x"}


def cells_of(methods: Sequence[str], lengths: Sequence[int], batch_sizes: Sequence[int]) -> list[dict]:
    """All cells, small ones first."""
    return [
        {"id": f"{method}/{length}x{batch}", "context_length": length, "batch_size": batch, "method": method}
        for length in lengths
        for batch in batch_sizes
        for method in methods
    ]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def circumstances(side: Side) -> dict:
    """Where a cell was measured: a run may be resumed elsewhere."""
    return {
        "device": device_name(side.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(side.model.dtype).removeprefix("torch."),
        "backend": backend_name(side.model),
    }
