"""Cases of the Triton kernels under the interpreter; ``test_triton_kernels.py`` runs this file in its own process.

TRITON_INTERPRET must be set before triton is imported and changes it for good, so no other test may share the process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_model
from kernel_cases import Shape, error, random_step, with_options

from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.layout import allocate_blocks, unpack_blocks, write_blocks
from rotatekv.kernels.reference_attention import decode_attention_reference
from rotatekv.kernels.triton.start import unusable
from rotatekv.quantize import quantize_groups
from rotatekv.transforms import channels_to_heads, rotate_channels

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor, *scope) -> None:
    """Up to 3.6, triton's interpreter takes int() of an array of one number, which numpy 2.4 refuses."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_for_numpy
ATTENTION = {
    "one_token": Shape(tokens=1),
    "ragged_last_block": Shape(tokens=37, rotary_dim=64, unrotate_values=True),
    "several_splits": Shape(tokens=300, rotary_dim=64),
    "sinks_window_padding": Shape(
        batch=2, tokens=70, window=5, sinks=3, rotary_dim=64, key_bits=3, value_bits=4, padding=(0, 21),
        query_tokens=3, unrotate_values=True,
    ),
    "all_but_the_window_padded": Shape(batch=3, tokens=40, window=8, padding=(33, 0, 40), rotary_dim=64, repeat=1),
    "window_alone": Shape(batch=2, tokens=33, window=33, rotary_dim=32, exact_dtype=torch.bfloat16, query_tokens=2),
    "four_heads_of_128": Shape(kv_heads=4, head_dim=128, heads_per_group=4, tokens=33, rotary_dim=128, repeat=4),
    "two_groups_of_four": Shape(kv_heads=8, head_dim=64, heads_per_group=4, tokens=20, rotary_dim=64, sinks=20),
    "head_dim_80_paley_20": Shape(kv_heads=4, head_dim=80, heads_per_group=4, tokens=50, rotary_dim=80, key_bits=4),
    "head_dim_80_alone": Shape(kv_heads=2, head_dim=80, heads_per_group=1, tokens=19, rotary_dim=32, window=2,
                               unrotate_values=True),
    "head_dim_96_paley_12": Shape(kv_heads=2, head_dim=96, heads_per_group=1, tokens=35, rotary_dim=96, repeat=7,
                                  query_tokens=5, value_bits=3, unrotate_values=True),
    "heads_of_16": Shape(kv_heads=3, head_dim=16, heads_per_group=3, tokens=50, rotary_dim=8, value_group=16),
    "sixteen_queries": Shape(tokens=45, query_tokens=16, rotary_dim=64, repeat=4, value_group=32, padding=(2,)),
    "not_rotated": Shape(kv_heads=2, head_dim=112, heads_per_group=0, tokens=33, rotary_dim=56, repeat=1),
    "plus": Shape(batch=2, tokens=60, rotary_dim=64, sinks=4, window=11, plus=True, padding=(0, 9), key_bits=3),
    "plus_four_heads_of_128": Shape(kv_heads=8, head_dim=128, heads_per_group=4, tokens=33, rotary_dim=128, repeat=4,
                                    plus=True, unrotate_values=True),
    "plus_head_dim_80": Shape(kv_heads=4, head_dim=80, heads_per_group=4, tokens=50, plus=True, value_bits=3),
    "not_rotated_after_rope": Shape(batch=2, kv_heads=2, head_dim=64, heads_per_group=0, tokens=20, padding=(17, 3)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_kernel_is_refused():
    yield
    assert not unusable  # torch would have done its work


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    step = random_step(ATTENTION[name])
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step)
    out = kernels.decode_attention(**step)
    assert error(out, truth) <= 2 * error(eager, truth) + 1e-7


@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_attention_splits(splits):
    step = random_step(Shape(batch=2, tokens=90, rotary_dim=64, padding=(50, 0), sinks=4))
    truth = decode_attention_reference(**step, dtype=torch.float64)
    assert error(kernels.decode_attention(**step, splits=splits), truth) < 1e-6


def test_attention_far_positions():
    """Packed and exact tokens 5000 positions out, where an angle held in float32 is 2e-4 off."""
    step = random_step(Shape(kv_heads=1, heads_per_group=1, repeat=1, tokens=5_003, rotary_dim=64, window=3, sinks=9))
    step["keys"]["scale"].mul_(0.05)  # flat weights, so that far tokens count
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step)
    assert error(kernels.decode_attention(**step, splits=1), truth) <= 2 * error(eager, truth) + 1e-7


def test_attention_room_for_more_blocks():
    step = random_step(Shape(batch=2, tokens=70, rotary_dim=64, key_bits=3, value_bits=4))
    out = kernels.decode_attention(**step)
    for name in ("keys", "values"):
        step[name] = {k: torch.cat([x, torch.full_like(x[:, :1], 77)], 1) for k, x in step[name].items()}
    assert torch.equal(kernels.decode_attention(**step), out)


@pytest.mark.parametrize(
    ("bits", "channels", "group", "tokens", "start", "clip", "magnitude", "reorder"),
    [
        (2, 192, 64, 21, 7, 0.8, 1.0, True), (2, 128, 128, 1, 31, 0.8, 1.0, False), (3, 160, 80, 33, 0, 1.0, 1.0, True),
        (4, 48, 16, 40, 20, 1.0, 3e4, False), (2, 192, 96, 16, 16, 0.8, 1e-7, True),
        (3, 512, 128, 5, 14, 0.9, 1e-3, True),
        (4, 192, 64, 0, 3, 1.0, 1.0, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fine", [False, True])
def test_quantize(bits, channels, group, tokens, start, clip, magnitude, reorder, fine):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, channels, generator=generator) * magnitude
    if tokens > 4:
        x[:, 0], x[:, 1], x[0, 2], x[:, 3] = 0.0, 5.0, 1e6, torch.arange(channels) * 0.5 * magnitude
        x[1, 2] = torch.randn(channels, generator=generator) + 3e38  # the scale ends at the largest float16
    order = torch.randperm(channels, generator=generator) if reorder else torch.arange(channels)
    codes, scale, zero = quantize_groups(x, bits, group, clip, fine)
    expected = allocate_blocks(2, 5, channels, channels // group, bits, fine=fine)
    for plane in expected.values():
        plane.copy_(torch.randint(-100, 100, plane.shape, generator=generator))
    made = {name: plane.clone() for name, plane in expected.items()}
    write_blocks(expected, start, codes[..., torch.argsort(order)], scale, zero, bits)
    kernels.quantize_into_blocks(x, made, start, bits, group, clip, order.int() if reorder else None)
    for name in expected:
        assert torch.equal(made[name], expected[name]), name


def _dequantized(step: dict, dtype: torch.dtype) -> torch.Tensor:
    """(B, H_kv, T, D) keys in plain torch, turned at positions t − first."""
    options, tokens = step["options"], step["packed_tokens"]
    group = step["group_of_channel"].long()
    codes, scale, zero = unpack_blocks(step["keys"], tokens, options.key_bits)
    if scale.dtype == torch.uint8:  # the fine format
        scale, zero = (scale.short() << 7).view(torch.float16), zero.to(dtype) / 8
    x = (codes.to(dtype) - zero.to(dtype)[..., group]) * scale.to(dtype)[..., group]
    if options.rotation_width:
        x = rotate_channels(x, options.rotation_width, inverse=True)
    if options.key_affine is not None:
        x = x * options.key_affine.factor.to(dtype) + options.key_affine.offset.to(dtype)
    x = channels_to_heads(x, options.head_dim)
    if options.rope is None:
        return x
    positions = (torch.arange(tokens) - step["first"].long()[:, None]).clamp(min=0)
    return options.rope.turn(x, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["ragged_last_block", "sinks_window_padding", "four_heads_of_128", "head_dim_80_paley_20", "head_dim_80_alone",
     "head_dim_96_paley_12", "heads_of_16", "not_rotated", "not_rotated_after_rope", "one_token", "plus",
     "plus_four_heads_of_128", "plus_head_dim_80"],
)  # fmt: skip
def test_dequantize(name, dtype):
    step = random_step(ATTENTION[name])
    if ATTENTION[name].plus:  # factors and offsets come before RoPE
        step = with_options(step, rope=None)
    options, tokens, first = step["options"], step["packed_tokens"], step["first"]
    out = kernels.dequantize_blocks(
        step["keys"], tokens, options.key_bits, step["group_of_channel"], options.head_dim, options.rotation_width,
        options.rope, first, dtype, affine=options.key_affine,
    )  # fmt: skip
    assert out.dtype == dtype
    seen = (torch.arange(tokens) >= first[:, None])[:, None, :, None]
    truth, eager = _dequantized(step, torch.float64) * seen, _dequantized(step, torch.float32).to(dtype) * seen
    assert error(out * seen, truth) <= 2 * error(eager, truth) + 1e-7


def test_damaged_arguments_are_refused():
    step = random_step(Shape(batch=2, tokens=70, window=5, sinks=3, rotary_dim=64, key_bits=3, value_bits=4))
    exact, low = step["exact"], step["keys"]["low"]
    bad = [
        {"queries": step["queries"].double()}, {"queries": torch.zeros(2, 9, 17, 64)}, {"first": step["first"][:1]},
        {"queries": torch.zeros(2, 8, 1, 64)}, {"group_of_channel": step["group_of_channel"].long()},
        {"keys": {**step["keys"], "low": low[:, :-1]}}, {"keys": {**step["keys"], "low": low.transpose(0, 1)}},
        {"packed_tokens": 1000, "total_tokens": 1000}, {"total_tokens": 3}, {"total_tokens": 100_000},
        {"exact": type(exact)(exact.rows.long(), exact.columns, exact.keys, exact.values)},
        {"exact": type(exact)(exact.rows, exact.columns, exact.keys.float(), exact.values)},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            kernels.decode_attention(**{**step, **change})
            pytest.fail(f"accepted {change}")
    for change in ({"rotation_width": 100}, {"rotation_width": 128}, {"head_dim": 32}, {"key_bits": 2}):
        with pytest.raises(ValueError):
            kernels.decode_attention(**with_options(step, **change))
            pytest.fail(f"accepted {change}")
    with pytest.raises(ValueError, match="CPU's kernels only"):
        kernels.decode_attention(**random_step(Shape(tokens_per_scale=32)))
    with pytest.raises(ValueError, match="CPU's kernels only"):
        kernels.dequantize_blocks(step["keys"], 65, 3, step["group_of_channel"], 64, tokens_per_scale=32)
    packed = allocate_blocks(2, 2, 48, 3, 3)
    for change in ({"start": 28}, {"start": -1}, {"bits": 2}, {"group_size": 24}, {"clip_ratio": 0.0},
                   {"x": torch.zeros(2, 5, 47)}, {"order": torch.arange(48)}):  # fmt: skip
        with pytest.raises(ValueError):
            kernels.quantize_into_blocks(
                **{"x": torch.ones(2, 5, 48), "packed": packed, "start": 0, "bits": 3, "group_size": 16, **change}
            )
    assert not any(plane.any() for plane in packed.values())


NOT_FUSED = replace(PRESETS["KIVI2"], k_groupsize=16, v_groupsize=16, residual_length=0)  # its keys are read by torch
MODELS = {
    "rotatekv2": replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False),
    "rotatekv3_unfolded_window": replace(
        PRESETS["RotateKV3"], Outlier_Aware_Key_Rotation=False, fuse_weights=False, residual_length=4
    ),
    "rtn4": PRESETS["RTN4"],
    "kivi2": NOT_FUSED,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_model(name, monkeypatch):
    """Prefill, decode and two tokens at once through the patched model, left-padded, against plain torch."""
    model, results, calls = tiny_model().double(), {}, []
    kernel = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    ids = torch.randint(8, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_model(model, MODELS[name]), torch.no_grad():
            cache, parts = RotateKVCache.for_model(model), []
            for start, end in ((0, 20), (20, 21), (21, 22), (22, 24)):
                here = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                parts.append(model(ids[:, start:end], past_key_values=cache, **here).logits)
        results[backend] = torch.cat(parts, dim=1)
    # Two tokens at once have two recent windows: torch attends.
    fused = 0 if MODELS[name] is NOT_FUSED else 2 if MODELS[name].residual_length else 3
    assert len(calls) == fused * model.config.num_hidden_layers
    difference = (results["triton"] - results["reference"])[mask.bool()].abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * results["reference"].std()


def test_model_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "triton")
    monkeypatch.setattr(kernels, "available", lambda device: False)
    with patch_model(tiny_model(), MODELS["rtn4"]) as handle, pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        handle.model(torch.arange(8, 14).view(1, 6))
