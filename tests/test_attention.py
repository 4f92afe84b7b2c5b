"""The patched attention: stock logits under FP16, and an independent oracle for what 2 bits do to them.

``test_oracle.py`` checks one call; here the same oracle runs over Hugging Face's own DynamicCache, so that chunks,
decoded tokens, left padding, and phi3's fused projection with its partial RoPE are compared as well.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_oracle import channels, heads, paley_times_sylvester, rounded
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.calibration import save_reorder_indices

KEYS = slice(96, 144)  # phi3's qkv_proj yields 6 · 16 query channels, then 3 · 16 keys, then 3 · 16 values
VALUES = slice(144, 192)
PHI3 = {"partial_rotary_factor": 0.5}


def token_ids(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits_in_chunks(model, ids, chunks, cache, **inputs) -> torch.Tensor:
    parts, start = [], 0
    with torch.no_grad():
        for length in chunks:
            now = slice(start, start + length)
            inputs_now = {name: x[:, : start + length] for name, x in inputs.items() if name == "attention_mask"}
            if "position_ids" in inputs:
                inputs_now["position_ids"] = inputs["position_ids"][:, now]
            parts.append(model(ids[:, now], past_key_values=cache, **inputs_now).logits)
            start += length
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_fp16_gives_the_stock_logits_at_once_and_in_chunks(family, attention):
    model = tiny_model(family, attn_implementation=attention, **(PHI3 if family == "phi3" else {}))
    ids, chunks = token_ids(2, 21), (1, 9, 1, 1, 5, 4)
    with torch.no_grad():
        stock = model(ids).logits
        with patch_model(model, "FP16"):
            assert torch.equal(model(ids).logits, stock)
            assert torch.equal(model(ids, use_cache=False).logits, stock)
            cache = RotateKVCache.for_model(model)
            torch.testing.assert_close(logits_in_chunks(model, ids, chunks, cache), stock, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fp16_gives_the_stock_logits_of_a_left_padded_batch_with_its_own_positions(any_family, attention):
    any_family.set_attn_implementation(attention)
    ids, mask = token_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    chunks = (8, 3, 1, 1, 1)
    stock = logits_in_chunks(any_family, ids, chunks, DynamicCache(config=any_family.config), **inputs)
    with patch_model(any_family, "FP16"):
        ours = logits_in_chunks(any_family, ids, chunks, RotateKVCache.for_model(any_family), **inputs)
    real = mask.bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=1e-4, atol=2e-4)


def test_eager_attention_returns_the_stock_attention_weights(any_family):
    any_family.set_attn_implementation("eager")
    ids = token_ids(1, 9)
    with torch.no_grad():
        stock = any_family(ids, output_attentions=True, output_hidden_states=True)
        with patch_model(any_family, "FP16"):
            ours = any_family(ids, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == len(stock.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, stock.attentions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True))


def test_a_key_is_given_rope_at_its_own_position_on_every_read():
    """What attention sees of layer 0: the stored keys, transformed back, with RoPE at each row's positions."""
    model = tiny_model("llama").double()
    ids, positions = token_ids(2, 7), torch.tensor([[0, 0, 0, 0, 1, 2, 3], [50, 51, 52, 53, 90, 91, 92]])
    seen = {}

    def note(module, query, key, value, *args, **kwargs):
        seen.setdefault(module.layer_idx, []).append(key)
        return query.transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = replace(PRESETS["RotateKV4"], Outlier_Aware_Key_Rotation=False, Attention_Sink_Aware=False)
    with patch_model(model, config), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", note)
        cache = RotateKVCache.for_model(model)
        model(ids[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        model(ids[:, 4:], position_ids=positions[:, 4:], past_key_values=cache)
        assert torch.equal(cache.positions, positions.int())
        method, packed = cache.layers[0].method, cache.layers[0].packed_keys
        keys = method.keys_out(method.decode_keys(packed.tokens())).double()
        cos, sin = model.model.rotary_emb(torch.empty(0, dtype=torch.double), position_ids=positions)
        want = apply_rotary_pos_emb(keys, keys, cos, sin)[0]
    assert seen[0][0].shape[2] == 4 and seen[0][1].shape[2] == 7
    torch.testing.assert_close(seen[0][1], want, rtol=1e-6, atol=1e-6)


def fake_quantize_where_rope_is_applied(model, config, order) -> None:
    """Make the stock model quantize: keys in a rebound ``apply_rotary_pos_emb``, values behind their projection."""
    matrix = paley_times_sylvester()
    small = torch.kron(torch.eye(3, dtype=torch.float64), _sylvester16())
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        original = type(attention).forward
        original = getattr(original, "__wrapped__", original)
        rope = sys.modules[type(attention).__module__].apply_rotary_pos_emb

        def quantized_rope(query, key, cos, sin, *args, rope=rope, row=order[number], **kwargs):
            rotated = rounded((channels(key) @ matrix.T)[..., row], config.k_bits, config.k_clip_ratio)
            restored = torch.zeros_like(rotated)
            restored[..., row] = rotated
            return rope(query, heads(restored @ matrix), cos, sin, *args, **kwargs)

        def quantized_values(module, args, output):
            fused = output.shape[-1] == 192
            values = output[..., VALUES] if fused else output
            values = rounded(values @ small.T, config.v_bits, config.v_clip_ratio) @ small
            return torch.cat([output[..., : VALUES.start], values], dim=-1) if fused else values

        names = {**original.__globals__, "apply_rotary_pos_emb": quantized_rope}
        copy = types.FunctionType(original.__code__, names, "forward", original.__defaults__, original.__closure__)
        attention.forward = types.MethodType(copy, attention)
        projection = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.v_proj
        projection.register_forward_hook(quantized_values)


def _sylvester16() -> torch.Tensor:
    two = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    return torch.kron(torch.kron(two, two), torch.kron(two, two)) / 4


def oracle_pair(family, preset, folder, **changes):
    """The patched model and the stock one with fake quantization; float64, so that hardly a number sits on a tie."""
    config = replace(PRESETS[preset], Attention_Sink_Aware=False)
    generator = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(48, generator=generator) for _ in range(2)])
    ours, oracle, stock = (tiny_model(family, **changes).double() for _ in range(3))
    ours.name_or_path = f"org/Tiny-{family}"
    metadata = {"model": ours.name_or_path, "head_group_num": 3}
    patch_model(ours, config, save_reorder_indices(folder / "indices.safetensors", order, metadata))
    fake_quantize_where_rope_is_applied(oracle, config, order)
    return ours, oracle, stock


def assert_equal_but_for_a_tie(got, want, stock, typical=2e-5):
    """Ours decodes in float32 and the oracle in float64; a scale on a float16 boundary may fall the other way."""
    effect = (want - stock).abs()
    assert effect.mean() > 1e-2, "the oracle quantized nothing"
    difference = (got - want).abs()
    assert difference.median() < typical
    assert difference.max() < (0.02 if typical < 1e-4 else 0.05) * effect.max()


@pytest.mark.parametrize("preset", ["RotateKV2", "RotateKV4"])
def test_phi3_with_fused_projection_and_partial_rope_equals_the_oracle(preset, tmp_path):
    ours, oracle, stock = oracle_pair("phi3", preset, tmp_path, **PHI3)
    ids = token_ids(2, 24)
    with torch.no_grad():
        assert_equal_but_for_a_tie(ours(ids).logits, oracle(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("backend, typical", [("reference", 2e-5), ("cpu", 2e-4)])
def test_chunks_and_decoded_tokens_of_a_left_padded_batch_equal_the_oracle(
    backend, typical, family, tmp_path, monkeypatch
):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    ours, oracle, stock = oracle_pair(family, "RotateKV2", tmp_path)
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    chunks = (9, 6, 1, 1, 1, 1, 1)
    got = logits_in_chunks(ours, ids, chunks, RotateKVCache.for_model(ours), **inputs)
    want = logits_in_chunks(oracle, ids, chunks, DynamicCache(config=oracle.config), **inputs)
    exact = logits_in_chunks(stock, ids, chunks, DynamicCache(config=stock.config), **inputs)
    real = mask.bool()
    assert_equal_but_for_a_tie(got[real], want[real], exact[real], typical)


def test_gradient_checkpointing_is_refused_where_it_would_attend_without_the_cache():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    with patch_model(model, "FP16"), pytest.raises(RuntimeError, match="switch gradient checkpointing off"):
        model(torch.randint(3, 128, (1, 9)))
