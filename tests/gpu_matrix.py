"""Every launch that models of all presets and head shapes make, compiled for GPUs that are not here.

    python tests/gpu_matrix.py --capability 80,89,90    # all of it: about 15 minutes a capability on one core

``test_dry_run.py`` runs a part. A line per case: kernels launched and compiled, the largest shared memory, what failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rotatekv import PRESETS, QuantConfig, RotateKVCache, patch_model
from rotatekv.calibration import save_statistics
from rotatekv.kernels.triton.dry_run import DryRun
from rotatekv.methods import method_class

HEADS = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128), "32/32x128": (32, 32, 128), "14/2x64": (14, 2, 64),
         "8/1x256": (8, 1, 256)}  # fmt: skip
PROMPTS, BATCHES, NEW_TOKENS, DECODE_STEPS = (1, 17, 239, 240, 4097), (1, 3, 160), range(1, 17), 300
FUSED = [name for name in PRESETS if name.startswith(("RTN", "QuaRot", "RotateKV"))]  # the others are read by torch
_MOST_NUMBERS = 52_000_000  # of one layer's keys
_KERNELS = {"quantize_kernel", "dequantize_kernel", "split_kernel", "merge_kernel"}  # and exact_kernel, with sinks


def model_of(heads: str, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """One random layer of these heads, with little beside them."""
    query, kv, dim = HEADS[heads]
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=4 * query, intermediate_size=16, num_hidden_layers=1, num_attention_heads=query,
        num_key_value_heads=kv, head_dim=dim, max_position_embeddings=8192, attn_implementation="sdpa",
    )).to(dtype).eval()  # fmt: skip


def statistics_of(model: LlamaForCausalLM, config: QuantConfig, folder: str | Path) -> Path | None:
    """A file of statistics that mean nothing, where the method needs one."""
    if (kind := method_class(config).statistics_kind(config)) is None:
        return None
    channels = model.config.num_key_value_heads * model.config.head_dim
    order = torch.randperm(channels).repeat(model.config.num_hidden_layers, 1)
    tensors = {
        "indices": order, "reorder_index": order, "key_mean": 0 * order, "key_scale": 0 * order + 1,
        "extra_bit_rank": torch.tensor([[0.25, 0.75]]).expand(len(order), 2), "sink_threshold": 0 * order[:, :1] + 9,
    }  # fmt: skip
    return save_statistics(Path(folder) / f"{kind}.safetensors", kind, tensors, {})


def run_case(heads: str, preset: str) -> None:
    """Prefill, 1 to 16 new tokens at once and 300 decode steps; attention in torch is left out: no number is read."""
    model, config = model_of(heads), PRESETS[preset]
    channels = model.config.num_key_value_heads * model.config.head_dim
    no_attention = patch("torch.nn.functional.scaled_dot_product_attention", lambda q, *_, **__: torch.zeros_like(q))
    with TemporaryDirectory() as folder, torch.no_grad(), no_attention:
        patch_model(model, config, statistics_of(model, config, folder))
        for prompt in PROMPTS:
            for batch in BATCHES:
                if batch * prompt * channels <= _MOST_NUMBERS:
                    steps = NEW_TOKENS if (prompt, batch) == (17, 1) else (1,)
                    _run(model, batch, [prompt, *steps])
        _run(model, 1, [1] * DECODE_STEPS)


def _run(model: LlamaForCausalLM, batch: int, calls: list[int]) -> None:
    cache = RotateKVCache.for_model(model)
    for tokens in calls:
        model(torch.ones(batch, tokens, dtype=torch.long), past_key_values=cache, logits_to_keep=1)


def failures(dry: DryRun, most_spills: int = 0) -> list[str]:
    """What a GPU would have refused, what was compiled twice, what was not launched."""
    refused = [f"{kernel}: {reason}" for kernel, reason in dry.refused.items()]
    spilled = [f"{kernel.kernel} spills {kernel.spills} bytes" for kernel in dry.compiled
               if kernel.spills > most_spills]  # fmt: skip
    return [*refused, *dry.needless(), *spilled, *(f"no {name}" for name in _KERNELS - set(dry.launches))]


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
                        wrong = failures(dry)
                    except Exception as error:
                        wrong = [f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"]
                shared = max((kernel.shared for kernel in dry.compiled), default=0)
                print(f"sm_{capability} {heads:9} {method:10} {dry.launches.total()} launches, {len(dry.compiled)} "
                      f"kernels, {shared} bytes shared, {time.time() - started:.0f} s: {'; '.join(wrong) or 'ok'}",
                      flush=True)  # fmt: skip
                failed += bool(wrong)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
