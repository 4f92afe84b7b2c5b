"""Every launch that models of all presets and head shapes make, compiled for GPUs that are not here.

    python tests/gpu_matrix.py --capability 80,89,90    # all of it: about 15 minutes a capability on one core

``test_dry_run.py`` runs a part. A line per case: kernels launched and compiled, the most shared memory and spills, what
failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

import torch

from benchmarks.random_models import patch_random, random_llama
from rotatekv import PRESETS, RotateKVCache
from rotatekv.kernels.triton.dry_run import DryRun

HEADS = {
    "9/3x64": (9, 3, 64),
    "32/8x128": (32, 8, 128),
    "32/32x128": (32, 32, 128),
    "14/2x64": (14, 2, 64),
    "8/1x256": (8, 1, 256),
}
PROMPTS, BATCHES, NEW_TOKENS, DECODE_STEPS = (1, 17, 239, 240, 4097), (1, 3, 160), range(1, 17), 300
FUSED = [name for name in PRESETS if name.startswith(("RTN", "QuaRot", "RotateKV"))]  # the others are read by torch
MOST_SPILLS = 200  # bytes a thread
_MOST_NUMBERS = 52_000_000  # of one layer's keys
# and exact_kernel, with sinks
_KERNELS = {"quantize_kernel", "dequantize_kernel", "split_kernel", "merge_kernel"}
_GROUPED_KERNELS = {*_KERNELS - {"split_kernel"}, "coded_queries_kernel", "grouped_split_kernel"}
_CODED_KERNELS = {f"coded_{name}_kernel" for name in ("map", "quantize", "read", "queries", "split", "merge")}


def run_case(heads: str, preset: str) -> None:
    """Prefill, 1 to 16 new tokens at once and 300 decode steps; attention in torch is left out: no number is read."""
    query_heads, kv_heads, head_dim = HEADS[heads]
    little = {"vocab_size": 64, "hidden_size": 4 * query_heads, "intermediate_size": 16}
    model = random_llama(query_heads, kv_heads, head_dim, layers=1, dtype=torch.bfloat16, **little)
    no_attention = patch("torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: torch.zeros_like(q))
    with torch.no_grad(), no_attention:
        patch_random(model, preset)
        for prompt in PROMPTS:
            for batch in BATCHES:
                if batch * prompt * kv_heads * head_dim <= _MOST_NUMBERS:
                    steps = NEW_TOKENS if (prompt, batch) == (17, 1) else (1,)
                    _run(model, batch, [prompt, *steps])
        _run(model, 1, [1] * DECODE_STEPS)


def _run(model: torch.nn.Module, batch: int, calls: list[int]) -> None:
    cache = RotateKVCache.for_model(model)
    for tokens in calls:
        model(torch.ones(batch, tokens, dtype=torch.long), past_key_values=cache, logits_to_keep=1)


def failures(dry: DryRun, preset: str) -> list[str]:
    """What a GPU would have refused, what was compiled twice or spills much, what was not launched."""
    refused = [f"{kernel}: {reason}" for kernel, reason in dry.refused.items()]
    spilled = [
        f"{kernel.kernel} spills {kernel.spills} bytes" for kernel in dry.compiled if kernel.spills > MOST_SPILLS
    ]
    needed = _CODED_KERNELS if preset.endswith("+") else _KERNELS if preset.startswith("Rotate") else _GROUPED_KERNELS
    return [*refused, *dry.needless(), *spilled, *(f"no {name}" for name in needed - set(dry.launches))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--capability", default="80,89,90")
    parser.add_argument("--methods", default=",".join(FUSED))
    parser.add_argument("--heads", default=",".join(HEADS))
    arguments, failed = parser.parse_args(argv), 0
    warnings.simplefilter("ignore")
    for capability in map(int, arguments.capability.split(",")):
        for heads in arguments.heads.split(","):
            for method in arguments.methods.split(","):
                started = time.time()
                with DryRun(capability, resources=True) as dry:
                    try:
                        run_case(heads, method)
                        wrong = failures(dry, method)
                    except Exception as error:
                        wrong = [f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"]
                shared, spills = (
                    max((getattr(kernel, name) for kernel in dry.compiled), default=0) for name in ("shared", "spills")
                )
                print(
                    f"sm_{capability} {heads:9} {method:10} {dry.launches.total()} launches, {len(dry.compiled)} "
                    f"kernels, {shared} bytes shared, {spills} spilled, {time.time() - started:.0f} s: "
                    f"{'; '.join(wrong) or 'ok'}",
                    flush=True,
                )
                failed += bool(wrong)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
