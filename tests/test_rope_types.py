"""RoPE types whose frequencies stay: Hugging Face's own numbers, in torch and in the fused kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, token_ids

from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.kernels import cpu

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


FIXED = [
    *((family, rope("yarn", **YARN)) for family in ("llama", "mistral", "qwen2", "qwen3")),
    ("llama", rope("yarn", **YARN, beta_fast=16, mscale=1.5, mscale_all_dim=0.5, truncate=False)),
    ("qwen2", rope("yarn", **YARN, attention_factor=0.7)),
    ("phi3", rope("default", partial_rotary_factor=0.5)),
    ("llama", rope("proportional", partial_rotary_factor=0.5)),
]


def decoded(model, **options) -> torch.Tensor:
    """Logits of a prefill of 80 tokens and of ten decoded ones, past YaRN's original length, (2, 90, V)."""
    ids, parts = token_ids(2, 90), []
    with torch.no_grad():
        for chunk in ids.split([80] + [1] * 10, dim=1):
            output = model(chunk, use_cache=True, **options)
            options = {"past_key_values": output.past_key_values}
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("family", "changes"), FIXED)
def test_the_fp16_preset_gives_the_stock_logits(family, changes):
    model = tiny_model(family, **changes)
    stock = decoded(model)
    assert not torch.allclose(stock, decoded(tiny_model(family)), atol=1e-2), "the scaling does nothing"
    with patch_model(model, "FP16"):
        assert torch.equal(decoded(model), stock)


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")
@pytest.mark.parametrize("preset", ["RotateKV4", "RTN4"])  # RoPE in the kernel, and before it
def test_yarn_is_decoded_by_the_kernel_as_by_torch(preset, monkeypatch):
    """In float64, so that hardly a number sits on a rounding tie; attention_scaling multiplies queries and keys."""
    model, results, calls, kernel = tiny_model("llama", **rope("yarn", **YARN)).double(), {}, [], cpu.decode_attention
    assert model.model.rotary_emb.attention_scaling > 1.1
    config = replace(PRESETS[preset], Outlier_Aware_Key_Rotation=False)
    monkeypatch.setattr(cpu, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_model(model, config):
            results[backend] = decoded(model, past_key_values=RotateKVCache.for_model(model))
    assert len(calls) == 2 * 10
    difference = (results["cpu"] - results["reference"]).abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * results["reference"].std()


def test_what_dynamic_rope_is_told_to_do_gives_the_stock_logits_up_to_its_length():
    model = tiny_model("llama", **rope("dynamic", factor=2.0))
    stock = decoded(model)
    with pytest.raises(UserError, match=r"= 'default' before loading if no text exceeds 512"):
        patch_model(model, "FP16")
    told = tiny_model("llama", **rope("default"))
    with patch_model(told, "FP16"):
        assert torch.equal(decoded(told), stock)
