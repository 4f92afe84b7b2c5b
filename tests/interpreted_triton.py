"""Cases of the Triton kernels under the interpreter; ``test_triton_kernels.py`` runs this file in its own process.

TRITON_INTERPRET must be set before triton is imported and changes it for good, so no other test may share the process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import triton_interpreter  # noqa: F401  the interpreter as these cases need it
from conftest import tiny_model
from kernel_cases import Shape, Write, assert_written, error, random_step, random_write, with_options

from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.blocks import dequantize_blocks_reference, quantize_into_blocks_reference
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.layout import allocate_blocks
from rotatekv.kernels.triton.start import unusable

ONE_HALF = 2.0**-10  # what products of one half lose, of a model in 16 bits
HALVES = 2.0**-21  # what dots of two halves lose, see attention.py
ATTENTION = {
    "one_token": Shape(tokens=1),
    "ragged_last_block": Shape(tokens=37, rotary_dim=64, unrotate_values=True),
    "several_splits": Shape(tokens=300, rotary_dim=64),
    "sinks_window_padding": Shape(
        batch=2,
        tokens=70,
        window=5,
        sinks=3,
        rotary_dim=64,
        key_bits=3,
        value_bits=4,
        padding=(0, 21),
        query_tokens=3,
        unrotate_values=True,
    ),
    "all_but_the_window_padded": Shape(batch=3, tokens=40, window=8, padding=(33, 0, 40), rotary_dim=64, repeat=1),
    "window_alone": Shape(batch=2, tokens=33, window=33, rotary_dim=32, exact_dtype=torch.bfloat16, query_tokens=2),
    "four_heads_of_128": Shape(kv_heads=4, head_dim=128, heads_per_group=4, tokens=33, rotary_dim=128, repeat=4),
    "two_groups_of_four": Shape(kv_heads=8, head_dim=64, heads_per_group=4, tokens=20, rotary_dim=64, sinks=20),
    "head_dim_80_paley_20": Shape(kv_heads=4, head_dim=80, heads_per_group=4, tokens=50, rotary_dim=80, key_bits=4),
    "head_dim_80_alone": Shape(
        kv_heads=2, head_dim=80, heads_per_group=1, tokens=19, rotary_dim=32, window=2, unrotate_values=True
    ),
    "head_dim_96_paley_12": Shape(
        kv_heads=2,
        head_dim=96,
        heads_per_group=1,
        tokens=35,
        rotary_dim=96,
        repeat=7,
        query_tokens=5,
        value_bits=3,
        unrotate_values=True,
    ),
    "heads_of_16": Shape(kv_heads=3, head_dim=16, heads_per_group=3, tokens=50, rotary_dim=8, value_group=16),
    "sixteen_queries": Shape(tokens=45, query_tokens=16, rotary_dim=64, repeat=4, value_group=32, padding=(2,)),
    "not_rotated": Shape(kv_heads=2, head_dim=112, heads_per_group=0, tokens=33, rotary_dim=56, repeat=1),
    "not_rotated_after_rope": Shape(batch=2, kv_heads=2, head_dim=64, heads_per_group=0, tokens=20, padding=(17, 3)),
    "sinks_beside_rotated_values": Shape(batch=2, tokens=40, sinks=5, unrotate_values=True, exact_dtype=torch.bfloat16),
    "sliding": Shape(
        batch=2,
        tokens=90,
        sliding_window=33,
        dropped=(40, 7),
        padding=(0, 70),
        rotary_dim=64,
        sinks=9,
        window=4,
        query_tokens=5,
        repeat=2,
        unrotate_values=True,
    ),
    "sliding_past_tiles": Shape(
        tokens=120,
        sliding_window=20,
        dropped=(48,),
        rotary_dim=32,
        query_tokens=16,
        repeat=8,
        kv_heads=1,
        heads_per_group=1,
    ),
    "sliding_past_the_packed": Shape(batch=2, tokens=60, window=30, sliding_window=17, kv_heads=2, heads_per_group=2),
}


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
    assert error(out, truth) <= 2 * error(eager, truth) + HALVES


@pytest.mark.parametrize(
    "name", ["four_heads_of_128", "head_dim_96_paley_12", "sinks_beside_rotated_values", "sliding"]
)
def test_attention_of_a_model_in_16_bits(name):
    step = random_step(ATTENTION[name])
    step["queries"] = step["queries"].half()
    truth = decode_attention_reference(**step, dtype=torch.float64)
    out = kernels.decode_attention(**step)
    assert out.dtype == torch.float16 and error(out, truth) <= 2 * error(truth.half(), truth) + ONE_HALF


@pytest.mark.parametrize("splits", [1, 5])
def test_attention_splits(splits):
    step = random_step(Shape(batch=2, tokens=90, rotary_dim=64, padding=(50, 0), sinks=4))
    truth = decode_attention_reference(**step, dtype=torch.float64)
    assert error(kernels.decode_attention(**step, splits=splits), truth) < 1e-6


def test_attention_far_positions():
    """Packed tokens 5000 positions out, where an angle held in float32 is 2e-4 off."""
    step = random_step(Shape(kv_heads=1, heads_per_group=1, repeat=1, tokens=50, rotary_dim=64, dropped=(5_000,)))
    step["keys"]["scale"].mul_(0.05)  # flat weights, so that far tokens count
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step)
    assert error(kernels.decode_attention(**step, splits=1), truth) <= 2 * error(eager, truth) + HALVES


def test_attention_room_for_more_blocks():
    step = random_step(Shape(batch=2, tokens=70, rotary_dim=64, key_bits=3, value_bits=4))
    out = kernels.decode_attention(**step)
    for name in ("keys", "values"):
        step[name] = {k: torch.cat([x, torch.full_like(x[:, :1], 77)], 1) for k, x in step[name].items()}
    assert torch.equal(kernels.decode_attention(**step), out)


def test_attention_reads_no_block_that_the_window_does_not_see():
    """Blocks before it hold what would give NaN, were it multiplied by a weight of 0."""
    step = random_step(Shape(tokens=100, sliding_window=20, query_tokens=4, kv_heads=1, heads_per_group=1))
    out = kernels.decode_attention(**step)
    for name in ("keys", "values"):  # the first query sees the tokens from 77 on
        step[name]["scale"][:, :4] = torch.nan
    assert torch.equal(kernels.decode_attention(**step), out) and out.isfinite().all()


PLAIN = {
    "one_token": Write(start=31, clip_ratio=0.8),
    "ragged": Write(batch=2, tokens=21, start=7, clip_ratio=0.8, reorder=True, layout="tokens"),
    "three_bits_of_80": Write(kv_heads=2, head_dim=80, tokens=33, bits=3, group_size=80, reorder=True, layout="slice"),
    "large": Write(batch=2, head_dim=16, tokens=40, start=20, bits=4, group_size=16, magnitude=3e4),
    "small_groups_across_heads": Write(tokens=16, start=16, group_size=96, magnitude=1e-7, reorder=True),
    "bfloat16": Write(
        batch=2,
        kv_heads=4,
        head_dim=128,
        tokens=5,
        start=14,
        bits=3,
        group_size=128,
        reorder=True,
        dtype=torch.bfloat16,
        layout="tokens",
    ),
    "nothing": Write(tokens=0, start=3, bits=4),
    "unrope": Write(batch=2, tokens=20, start=5, rotary_dim=32, dtype=torch.float16, layout="tokens"),
    "unrope_of_80": Write(batch=2, head_dim=80, tokens=18, group_size=80, rotary_dim=80, reorder=True),
}
ROTATED = {
    "three_heads": Write(batch=2, tokens=21, start=7, heads_per_group=3, reorder=True, clip_ratio=0.9),
    "one_token_of_four_heads": Write(
        kv_heads=8,
        head_dim=128,
        start=18,
        group_size=128,
        heads_per_group=4,
        reorder=True,
        rotary_dim=128,
        dtype=torch.bfloat16,
        layout="tokens",
    ),
    "paley_20": Write(
        kv_heads=4,
        head_dim=80,
        tokens=40,
        bits=4,
        group_size=80,
        heads_per_group=4,
        rotary_dim=32,
        layout="slice",
        dtype=torch.float16,
    ),
    "paley_12_alone": Write(batch=2, kv_heads=2, head_dim=96, tokens=33, bits=3, group_size=96, heads_per_group=1),
    "unrope_and_reorder": Write(batch=2, tokens=37, start=3, bits=3, heads_per_group=3, rotary_dim=64, reorder=True),
}


def _written(write: Write, damage=lambda heads: None) -> tuple[dict, dict, dict]:
    """The blocks of the kernel and of the reference, and the call's arguments."""
    arguments = random_write(write)
    damage(arguments["heads"])
    expected, made = ({name: x.clone() for name, x in arguments["packed"].items()} for _ in range(2))
    quantize_into_blocks_reference(**{**arguments, "packed": expected})
    kernels.quantize_into_blocks(**{**arguments, "packed": made})
    return made, expected, arguments


@pytest.mark.parametrize("name", PLAIN)
def test_quantize(name):
    def add_extremes(heads: torch.Tensor) -> None:
        if heads.dtype != torch.float32 or heads.shape[2] < 5:
            return
        heads[:, :, 0], heads[:, :, 1], heads[0, :, 2] = 0.0, 5.0, 1e6
        heads[:, :, 3] = torch.arange(heads.shape[3]) * 0.5 * PLAIN[name].magnitude
        heads[-1, :, 4] += 3e38  # the scale ends at the largest float16

    assert_written(*_written(PLAIN[name], add_extremes), exactly=True)


@pytest.mark.parametrize("name", ROTATED)
def test_quantize_rotated(name):
    assert_written(*_written(ROTATED[name]), exactly=False)


def test_quantize_rotated_costs_a_large_token_nothing_to_its_neighbours():
    """A massive token beside others in one tile: halves of float16 hold both."""

    def enlarge(heads: torch.Tensor) -> None:
        heads[:, :, 3] *= 1e4

    assert_written(*_written(replace(ROTATED["three_heads"], tokens=16, bits=4), enlarge), exactly=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "ragged_last_block",
        "sinks_window_padding",
        "four_heads_of_128",
        "head_dim_80_paley_20",
        "head_dim_80_alone",
        "head_dim_96_paley_12",
        "heads_of_16",
        "not_rotated",
        "one_token",
    ],
)
def test_dequantize(name, dtype):
    step, shape = random_step(ATTENTION[name]), ATTENTION[name]
    options, tokens = step["options"], step["packed_tokens"]
    form = (step["keys"], tokens, options.key_bits, step["group_of_channel"], options.head_dim, options.rotation_width)
    out = torch.full((shape.batch, shape.kv_heads, tokens + 3, shape.head_dim), 7.0, dtype=dtype)
    assert kernels.dequantize_blocks(*form, out) is out
    assert (out[:, :, tokens:] == 7).all()
    truth = dequantize_blocks_reference(*form, dtype=torch.float64)
    eager = dequantize_blocks_reference(*form).to(dtype)
    assert error(out[:, :, :tokens], truth) <= 2 * error(eager, truth) + 1e-7
    new = kernels.dequantize_blocks(*form)
    assert new.dtype == torch.float32 and torch.equal(new.to(dtype), out[:, :, :tokens])


def test_damaged_arguments_are_refused():
    step = random_step(Shape(batch=2, tokens=70, window=5, sinks=3, rotary_dim=64, key_bits=3, value_bits=4))
    exact, low = step["exact"], step["keys"]["low"]
    bad = [
        {"queries": step["queries"].double()},
        {"queries": torch.zeros(2, 9, 17, 64)},
        {"first_seen": step["first_seen"][:1]},
        {"queries": torch.zeros(2, 8, 1, 64)},
        {"group_of_channel": step["group_of_channel"].long()},
        {"keys": {**step["keys"], "low": low[:, :-1]}},
        {"keys": {**step["keys"], "low": low.transpose(0, 1)}},
        {"packed_tokens": 1000, "total_tokens": 1000},
        {"total_tokens": 3},
        {"origin": step["origin"][:1]},
        {"exact": type(exact)(exact.batch_index.long(), exact.token_index, exact.keys, exact.values)},
        {"exact": type(exact)(exact.batch_index, exact.token_index, exact.keys.float(), exact.values)},
        {"exact": type(exact)(exact.batch_index, exact.token_index, exact.keys.flatten(1), exact.values.flatten(1))},
    ]
    for change in bad:
        with pytest.raises(ValueError):
            kernels.decode_attention(**{**step, **change})
            pytest.fail(f"accepted {change}")
    for change in (
        {"rotation_width": 100},
        {"rotation_width": 128},
        {"head_dim": 32},
        {"key_bits": 2},
        {"sliding_window": -1},
    ):
        with pytest.raises(ValueError):
            kernels.decode_attention(**with_options(step, **change))
            pytest.fail(f"accepted {change}")
    with pytest.raises(ValueError, match="CPU's kernels only"):
        kernels.decode_attention(**random_step(Shape(tokens_per_scale=32)))
    with pytest.raises(ValueError, match="CPU's kernels only"):
        kernels.dequantize_blocks(step["keys"], 65, 3, step["group_of_channel"], 64, tokens_per_scale=32)
    keys = (step["keys"], 65, 3, step["group_of_channel"], 64)
    room = torch.empty(2, 3, 65, 64)
    for out in (room[:, :, :64].clone(), room.double(), room.repeat_interleave(2, 3)[..., ::2]):
        with pytest.raises(ValueError, match="out"):
            kernels.dequantize_blocks(*keys, out=out)
    packed, cos = allocate_blocks(2, 2, 48, 3, 3), torch.ones(2, 5, 4)
    good = {"heads": torch.ones(2, 3, 5, 16), "packed": packed, "start": 0, "bits": 3, "group_size": 16}
    for change in (
        {"start": 28},
        {"start": -1},
        {"bits": 2},
        {"group_size": 24},
        {"clip_ratio": 0.0},
        {"heads": torch.zeros(2, 5, 48)},
        {"heads": torch.ones(2, 3, 5, 15)},
        {"order": torch.arange(48)},
        {"heads": torch.ones(2, 3, 16, 5).transpose(2, 3)},
        {"heads": torch.ones(2, 3, 5, 16).double()},
        {"rotation_width": 24},
        {"rotation_width": -16},
        *(
            {"unrope": pair}
            for pair in ((cos, cos[:1]), (cos.half(),) * 2, (cos, cos.mT.contiguous().mT), (torch.ones(2, 5, 9),) * 2)
        ),
    ):
        with pytest.raises(ValueError):
            kernels.quantize_into_blocks(**{**good, **change})
            pytest.fail(f"accepted {change}")
    assert not any(plane.any() for plane in packed.values())


NOT_FUSED = replace(PRESETS["KIVI2"], k_groupsize=16, v_groupsize=16, residual_length=0)  # its keys are read by torch
MODELS = {
    "rotatekv2": replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False),
    "rotatekv3_window": replace(PRESETS["RotateKV3"], Outlier_Aware_Key_Rotation=False, residual_length=4),
    "rtn4": PRESETS["RTN4"],
    "kivi2": NOT_FUSED,
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name, monkeypatch):
    """Prefill, decode and two tokens at once through the patched model, left-padded, against plain torch."""
    model, results, calls = tiny_model(num_hidden_layers=1).double(), {}, []
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
    # Two tokens at once have two recent windows: torch attends. With a window, the rows attend each alone.
    fused = 0 if MODELS[name] is NOT_FUSED else 2 * 2 if MODELS[name].residual_length else 3
    assert len(calls) == fused * model.config.num_hidden_layers
    difference = (results["triton"] - results["reference"])[mask.bool()].abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * results["reference"].std()


def test_model_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "triton")
    monkeypatch.setattr(kernels, "available", lambda device: False)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"), patch_model(tiny_model(), MODELS["rtn4"]) as handle:
        handle.model(torch.arange(8, 14).view(1, 6))
