"""The CPU kernels of transform-coded keys against plain torch: every instruction set this CPU has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from frame_cases import FrameShape, random_frames_step, rounding_error, value_rounding_error
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Shape, error, with_options

from rotatekv.kernels import cpu
from rotatekv.kernels.cpu import build
from rotatekv.kernels.cpu.coded_tables import frame_tables_of
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.transform_coding import FRAME

if build._load("attention", "portable") is None:
    pytest.skip("no g++", allow_module_level=True)

INSTRUCTION_SETS = cpu.available_instruction_sets()
TWO_BYTES = (3, 0, 5, 4, 3, 0, 0)  # bits whose weights are rounded to 16


@st.composite
def shapes(draw) -> FrameShape:
    head_dim = draw(st.sampled_from([64, 128, 256, 48, 16]))
    batch = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 700))
    window = draw(st.sampled_from([0, 1, 5, min(40, tokens)])) if tokens > 5 else 0
    step = Shape(
        batch=batch,
        repeat=draw(st.sampled_from([1, 2, 3, 4, 8])),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        query_tokens=min(draw(st.sampled_from([1, 1, 2, 5, 16])), tokens),
        tokens=tokens,
        window=window,
        sinks=draw(st.sampled_from([0, 0, 3, 20])),
        value_bits=draw(st.integers(2, 4)),
        rotary_dim=draw(st.sampled_from([0, head_dim, head_dim // 2, 8])),
        unrotate_values=head_dim != 48 and draw(st.booleans()),
        padding=tuple(draw(st.integers(0, tokens)) for _ in range(batch)),
        sliding_window=draw(st.sampled_from([0, 0, 1, 17, 256, 300])),
        exact_dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 10**6)),
    )
    bits = st.one_of(st.just((2,)), st.just((0,)), st.lists(st.integers(0, 5), min_size=1, max_size=9))
    value_bits = draw(st.one_of(st.none(), st.integers(1, 5).map(lambda b: (b,)), bits.map(tuple)))
    return FrameShape(tuple(draw(bits)), step, value_bits, draw(st.sampled_from([0, 0, 16, 112, FRAME, 1008])))


def with_mean(step: dict, factor: float) -> dict:
    """The step of keys whose mean is ``factor`` times as large."""
    old = step["options"].key_transform
    return with_options(step, key_transform=replace(old, mean=old.mean * factor))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes(), instruction_set=st.sampled_from(INSTRUCTION_SETS), threads=st.integers(1, 3))
def test_the_error_is_far_below_what_rounding_keys_costs(shape, instruction_set, threads):
    step = random_frames_step(shape)
    truth = decode_attention_reference(**step, dtype=torch.float64)
    out = cpu.decode_attention(**step, threads=threads, instruction_set=instruction_set)
    assert error(out, truth) < rounding_error(step, truth, 4) / 15 + 1e-3


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("bits", [(2,), (4, 2, 1, 1), (1,), (5, 3), (0,)])
@pytest.mark.parametrize(("head_dim", "repeat"), [(64, 3), (128, 4), (256, 8), (64, 1)])
def test_the_error_is_a_twentieth_of_what_rounding_keys_costs(head_dim, repeat, bits, instruction_set):
    shape = Shape(repeat=repeat, head_dim=head_dim, tokens=600, rotary_dim=head_dim, unrotate_values=True)
    step = random_frames_step(FrameShape(bits, shape))
    truth = decode_attention_reference(**step, dtype=torch.float64)
    out = cpu.decode_attention(**step, instruction_set=instruction_set)
    assert error(out, truth) < rounding_error(step, truth) / 20


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("head_dim", "repeat", "query_tokens"), [(64, 3, 1), (128, 4, 2), (256, 1, 16), (64, 8, 3)])
def test_weights_of_two_bytes_are_as_exact_as_the_values(head_dim, repeat, query_tokens, instruction_set):
    """Without a mean, which is read back to a fiftieth of the noise."""
    step = Shape(
        batch=2,
        repeat=repeat,
        head_dim=head_dim,
        query_tokens=query_tokens,
        tokens=600,
        window=9,
        sinks=4,
        rotary_dim=head_dim,
        unrotate_values=True,
        padding=(0, 21),
    )
    made = with_mean(random_frames_step(FrameShape(TWO_BYTES, step, None, 48)), 0.0)
    truth = decode_attention_reference(**made, dtype=torch.float64)
    assert error(cpu.decode_attention(**made, instruction_set=instruction_set), truth) < 1e-3


@pytest.mark.parametrize("bits", [(2,), (4, 2, 1, 1), (5, 0, 3)])
def test_instruction_sets_agree(bits):
    """Integers add up to the same everywhere: only where float32 rounds may a weight fall to another one."""
    step = random_frames_step(FrameShape(bits, Shape(batch=2, tokens=500, rotary_dim=64, query_tokens=2), dropped=32))
    outs = [cpu.decode_attention(**step, instruction_set=name) for name in INSTRUCTION_SETS]
    assert all(error(out, outs[0].double()) < 1e-3 for out in outs)


def test_far_positions_do_not_drift():
    step = random_frames_step(FrameShape(TWO_BYTES, Shape(tokens=40_003, rotary_dim=64, query_tokens=2), None))
    truth = decode_attention_reference(**step, dtype=torch.float64)
    assert error(cpu.decode_attention(**step), truth) < 1e-3


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("rotary_dim", [64, 24])
def test_the_first_frame_may_begin_with_padding(rotary_dim, instruction_set):
    """Its first position is below 0: by a few, by nearly a frame, and by more, where a whole frame is padding."""
    shape = Shape(batch=4, tokens=400, rotary_dim=rotary_dim, query_tokens=2, padding=(3, 16, 127, 300))
    made = with_mean(random_frames_step(FrameShape(TWO_BYTES, shape, None)), 0.3)
    truth = decode_attention_reference(**made, dtype=torch.float64)
    assert error(cpu.decode_attention(**made, instruction_set=instruction_set), truth) < 1e-3


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("value_bits", [(1,), (2,), (4,), (5, 3)])
def test_few_tokens_with_all_the_weight(value_bits, instruction_set):
    """Rounding the others' weights to bytes adds up; the bar is what rounding values costs."""
    step = random_frames_step(FrameShape(TWO_BYTES, Shape(tokens=256, rotary_dim=64), value_bits))
    step["queries"] *= 3
    truth = decode_attention_reference(**step, dtype=torch.float64)
    found = cpu.decode_attention(**step, instruction_set=instruction_set)
    assert error(found, truth) < value_rounding_error(step, truth) / 20


def test_room_for_more_blocks_changes_nothing():
    step = random_frames_step(FrameShape((4, 2, 1), Shape(batch=2, tokens=70, rotary_dim=64), (3, 1)))
    out = cpu.decode_attention(**step)
    for name in ("keys", "values"):
        step[name] = {k: torch.cat([x, torch.full_like(x[:, :1], 77)], 1) for k, x in step[name].items()}
    assert torch.equal(cpu.decode_attention(**step), out)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_sliding_window_reads_no_block_that_no_query_sees(instruction_set):
    shape = Shape(batch=2, tokens=700, query_tokens=3, rotary_dim=64, sliding_window=300, window=2)
    step = random_frames_step(FrameShape((4, 2, 1, 1), shape, dropped=80))
    out = cpu.decode_attention(**step, instruction_set=instruction_set)
    unseen = (700 - 3 - 300 + 1) // 16
    for block in (unseen - 1, unseen):
        for plane in (*step["keys"].values(), *step["values"].values()):
            plane[:, block] = 99
        same = torch.equal(cpu.decode_attention(**step, instruction_set=instruction_set), out)
        assert same == (block < unseen)


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("bits", [(0,), (2,), (5,)])
def test_the_mean_is_read_back_to_far_below_the_noise(bits, size):
    step = with_mean(random_frames_step(FrameShape(bits, Shape(tokens=300, rotary_dim=64))), size)
    truth = decode_attention_reference(**step, dtype=torch.float64)
    assert error(cpu.decode_attention(**step), truth) < rounding_error(step, truth) / 20


def test_a_mean_takes_no_more_position_numbers_than_its_frequencies_need():
    step = random_frames_step(FrameShape((2,), Shape(tokens=300, rotary_dim=64)))
    options = step["options"]
    old = options.key_transform
    assert 8 <= 2 * frame_tables_of(old, options.rope).positions.shape[1] <= 40
    assert 2 * frame_tables_of(old, None).positions.shape[1] == 2  # it is the same everywhere
    without = with_mean(step, 0.0)["options"].key_transform
    assert frame_tables_of(without, options.rope).positions.shape[1] == 0
    assert frame_tables_of(old, options.rope) is not frame_tables_of(old, replace(options.rope))


GOOD_STEP = Shape(batch=2, tokens=70, window=5, sinks=3, rotary_dim=64, padding=(0, 57))
GOOD = FrameShape((4, 2, 1, 0), GOOD_STEP, (1, 2, 3), dropped=48)


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("name", ["pairs", "singles", "scale"])
def test_damaged_planes_are_refused(name, of):
    step = random_frames_step(GOOD)
    plane = step[of][name]
    stretched = torch.stack([plane, plane], -1)[..., 0]  # the same numbers, every second in memory
    for bad in (plane.float(), plane[:-1], plane[:, :, :-1], plane.unsqueeze(0), stretched, None):
        with pytest.raises(ValueError):
            cpu.decode_attention(**{**step, of: {**step[of], name: bad}})
    with pytest.raises(ValueError):
        cpu.decode_attention(**{**step, of: {k: x for k, x in step[of].items() if k != name}})


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("packed tokens", lambda s: {**s, "packed_tokens": 10_000, "total_tokens": 10_000}),
        ("multiple of 16", lambda s: {**s, "dropped": 8}),
        ("multiple of 16", lambda s: {**s, "dropped": -16}),
        ("not rotated", lambda s: {**s, "group_of_channel": torch.zeros(192, dtype=torch.int32)}),
        ("not rotated", lambda s: with_options(s, rotation_width=64)),
        ("fit head_dim", lambda s: with_options(s, head_dim=32)),
        ("too short", lambda s: {**s, "origin": torch.tensor([0, 1 << 20], dtype=torch.int32)}),
    ],
)
def test_wrong_arguments_are_refused(message, change):
    with pytest.raises(ValueError, match=message):
        cpu.decode_attention(**change(random_frames_step(GOOD)))
