"""Models and calibrated statistics of random numbers: what a check needs where there is no checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rotatekv import QuantConfig, patch_model
from rotatekv.config import resolve_config
from rotatekv.families import find_text_model, layer_geometry
from rotatekv.methods import method_class
from rotatekv.patching.handle import PatchHandle
from rotatekv.statistics import KINDS, save_statistics


def random_llama(
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes,
) -> torch.nn.Module:
    """A Llama whose weights are drawn where it is to run. ``changes`` are those of its ``LlamaConfig``."""
    options = {
        "vocab_size": 512,
        "hidden_size": 16 * heads,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "initializer_range": 0.3,  # so that tokens vary
        "max_position_embeddings": 1 << 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**options, **changes}), dtype=dtype).eval()


def patch_random(model: torch.nn.Module, config: str | QuantConfig) -> PatchHandle:
    """``patch_model``, with random statistics where the method needs some."""
    kind = method_class(resolve_config(config)).statistics_kind(resolve_config(config))
    if kind is None:
        return patch_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        path = save_statistics(Path(folder) / "random.safetensors", kind, random_statistics(model, kind), {})
        return patch_model(model, config, path)


def random_statistics(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """A kind's tensors for every layer: permutations, scales above zero and ascending levels."""
    layers = find_text_model(model).layers
    channels, generator = layer_geometry(layers[0].self_attn).channels, torch.Generator().manual_seed(0)

    def draw(name: str, width: int) -> torch.Tensor:
        x = torch.rand(len(layers), width, generator=generator, dtype=torch.float32, device="cpu")
        if "ind" in name:  # indices, reorder_index
            return x.argsort(dim=-1)
        if name == "sink_threshold":
            return x + 3
        return (2 * x - 1).sort(dim=-1).values if "levels" in name else x + 0.5 * ("scale" in name)

    return {name: draw(name, width or channels) for name, (_, width) in KINDS[kind].tensors.items()}
