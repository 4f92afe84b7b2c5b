"""Models and calibrated statistics of random numbers: what a check needs where there is no checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rotatekv import QuantConfig, patch_model
from rotatekv.config import resolve_config
from rotatekv.families import find_text_model
from rotatekv.methods import method_class
from rotatekv.patching.handle import PatchHandle
from rotatekv.patching.patch import first_geometry
from rotatekv.statistics import KINDS, CalibrationTarget, save_statistics


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
    text_model = find_text_model(model)
    geometry = first_geometry(text_model)
    target = CalibrationTarget("", len(text_model.layers), geometry.num_key_value_heads, geometry.head_dim)
    with tempfile.TemporaryDirectory() as folder:
        path = save_statistics(Path(folder) / "random.safetensors", kind, random_statistics(kind, target), {})
        return patch_model(model, config, path)


def random_statistics(kind: str, target: CalibrationTarget, seed: int = 0) -> dict[str, torch.Tensor]:
    """A kind's tensors of all layers, as its file has them.

    Permutations, maps that can be undone, scales and costs above zero, ascending levels. The costs differ so much that
    a budget of 2 bits gives some groups none and some 5.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        if name == "indices":
            return x.argsort(dim=-1)
        if "map" in name:
            return torch.linalg.qr(x - 0.5).Q * (0.7 + x[..., :1])
        if "levels" in name:
            return (2 * x - 1).sort(dim=-1).values
        if "cost" in name:
            return torch.exp(6 * x)
        return {"sink_threshold": x + 3, "key_scale": 2 * x + 0.5}.get(name, x - 0.5)  # means and offsets

    return {name: draw(name, target.shape(sizes)).to(dtype) for name, (dtype, sizes) in KINDS[kind].tensors.items()}
