"""RotateKV's forward against an independent one: Hugging Face's own, with fake quantization where RoPE is applied.

Nothing of ``rotatekv`` computes the expected side: dense matrices, plain numpy-like rounding, HF's attention code.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from scipy.linalg import hadamard as sylvester

from rotatekv import PRESETS, patch_model
from rotatekv.calibration import save_reorder_indices

HEADS, DIM = 3, 16
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}


def paley_times_sylvester() -> torch.Tensor:
    """Order 48 = 12 × 4, written out: the quadratic residues mod 11 are 1, 3, 4, 5, 9."""
    twelve = torch.ones(12, 12, dtype=torch.float64)
    for row in range(11):
        twelve[row + 1, 0] = -1
        for column in range(11):
            twelve[row + 1, column + 1] = 1 if (column - row) % 11 in (0, 1, 3, 4, 5, 9) else -1
    return torch.kron(twelve, torch.from_numpy(sylvester(4)).double()) / 48**0.5


def rounded(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """(..., n) in groups of 16: c·max and c·min, float16 scale, integer zero."""
    groups = x.float().reshape(*x.shape[:-1], -1, 16)
    top, bottom = clip * groups.max(-1, keepdim=True).values, clip * groups.min(-1, keepdim=True).values
    scale = torch.maximum((top - bottom) / (2**bits - 1), bottom.abs() / 127).half().float()
    zero = (-bottom / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).reshape(x.shape).to(x.dtype)


def channels(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def heads(x):
    return x.reshape(*x.shape[:2], -1, DIM).transpose(1, 2)


def fake_quantized_forward(attention, config, order, sinks_of):
    """HF's own forward of this layer, bound to copies of its globals in which RoPE quantizes the keys first."""
    original = type(attention).forward
    original = getattr(original, "__wrapped__", original)
    rope = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    big, small = paley_times_sylvester(), torch.from_numpy(sylvester(DIM)).double() / DIM**0.5

    def keep_sinks(fake, exact):
        mask = sinks_of(attention.layer_idx)
        return torch.where(mask[..., None], exact.half().to(exact.dtype), fake) if mask is not None else fake

    def quantize_then_rope(query, key, cos, sin, *args, **kwargs):
        if config.method == "rtn":
            query, key = rope(query, key, cos, sin, *args, **kwargs)
            return query, heads(rounded(channels(key), config.k_bits, config.k_clip_ratio))
        matrix = big.to(key.dtype)
        rotated = (channels(key) @ matrix.T)[..., order]
        rotated = keep_sinks(rounded(rotated, config.k_bits, config.k_clip_ratio), rotated)
        restored = torch.empty_like(rotated)
        restored[..., order] = rotated
        return rope(query, heads(restored @ matrix), cos, sin, *args, **kwargs)

    def quantize_values(module, args, output):
        if config.method == "rtn":
            return rounded(output, config.v_bits, config.v_clip_ratio)
        matrix = torch.block_diag(*[small] * HEADS).to(output.dtype)
        rotated = output @ matrix.T
        return keep_sinks(rounded(rotated, config.v_bits, config.v_clip_ratio), rotated) @ matrix

    names = {**original.__globals__, "apply_rotary_pos_emb": quantize_then_rope}
    copy = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    attention.forward = types.MethodType(copy, attention)
    attention.v_proj.register_forward_hook(quantize_values)


def naive_sinks(hidden_states, entries):
    mask = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    for row, states in enumerate(hidden_states):
        flat = sorted(((abs(v), t) for t, token in enumerate(states.tolist()) for v in token), reverse=True)
        for _, token in flat[:entries]:
            mask[row, token] = True
    return mask


@pytest.mark.parametrize(
    ("preset", "fuse"),
    [(f"RotateKV{bits}", fuse) for bits in (2, 3, 4) for fuse in (True, False)] + [("RTN2", False), ("RTN4", False)],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "yarn"])
def test_logits_equal_hugging_faces_own_forward_with_fake_quantization(family, preset, fuse, tmp_path):
    # float64 weights, so that the two sides quantize the same numbers up to 1e-15; ours decodes in float32. A scale on
    # a float16 boundary may still fall the other way now and then: one group of one token.
    family, changes = ("llama", {"rope_parameters": YARN}) if family == "yarn" else (family, {})
    actual, expected = tiny_model(family, **changes).double(), tiny_model(family, **changes).double()
    config = replace(PRESETS[preset], fuse_weights=fuse, num_sink_entries=5)
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(HEADS * DIM, generator=generator) for _ in range(2)])
    actual.name_or_path = "tiny"
    indices = save_reorder_indices(tmp_path / "tiny.safetensors", order, {"model": "tiny", "head_group_num": HEADS})

    ids = torch.randint(3, 128, (2, 24), generator=generator)
    sinks = {}
    for layer in expected.model.layers:
        fake_quantized_forward(layer.self_attn, config, order[layer.self_attn.layer_idx], sinks.get)
        if config.Attention_Sink_Aware:

            def note(module, args, kwargs):
                sinks[module.self_attn.layer_idx] = naive_sinks(args[0] if args else kwargs["hidden_states"], 5)

            layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        want = expected(ids, use_cache=False).logits
        with patch_model(actual, config, indices):
            got = actual(ids).logits
        stock = actual(ids).logits
    assert (want - stock).abs().mean() > 1e-3, "nothing was quantized"
    difference = (got - want).abs()
    assert difference.median() < 2e-5
    assert difference.max() < 0.01 * (want - stock).abs().max()
