"""The CPU kernel that reads blocks back as heads, against float64: every instruction set, over odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import pack_blocks, random_planes

from rotatekv.kernels import cpu
from rotatekv.kernels.hadamard import hadamard_matrix
from rotatekv.kernels.layout import allocate_blocks, unpack_codes

if not cpu.available("portable"):
    pytest.skip("no g++", allow_module_level=True)

# head_dim, key/value heads, order of the rotation: 0, 2^n, 12·2^n and 20·2^n
GEOMETRIES = [
    (8, 3, 0),
    (8, 3, 8),
    (8, 4, 32),
    (16, 3, 48),
    (24, 2, 24),
    (24, 4, 96),
    (32, 8, 256),
    (40, 2, 40),
    (40, 3, 0),
    (48, 2, 48),
    (64, 3, 192),
    (64, 3, 64),
    (64, 3, 0),
    (72, 2, 0),
    (80, 4, 320),
    (80, 3, 80),
    (96, 4, 384),
    (112, 2, 0),
    (128, 8, 512),
    (128, 2, 128),
    (160, 4, 640),
    (256, 4, 1024),
]


def random_tokens(batch: int, tokens: int, channels: int, groups: int, bits: int, generator) -> tuple:
    codes = torch.randint(0, 2**bits, (batch, tokens, channels), generator=generator, dtype=torch.uint8)
    scale = torch.rand(batch, tokens, groups, generator=generator).mul(3).exp().half()
    zero = torch.randint(-127, 128, (batch, tokens, groups), generator=generator, dtype=torch.int8)
    return codes, scale, zero


def exact_heads(codes, scale, zero, group_of_channel, head_dim: int, width: int) -> torch.Tensor:
    """(B, H_kv, T, D) float64, a channel's scale and zero looked up one by one."""
    group = group_of_channel.long()
    x = (codes.double() - zero.double()[..., group]) * scale.double()[..., group]  # (B, T, C)
    if width:
        x = (x.unflatten(-1, (-1, width)) @ hadamard_matrix(width)).flatten(-2)
    return torch.stack(x.split(head_dim, dim=-1), dim=1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    bits=st.integers(2, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(0, 70),
    groups=st.sampled_from([1, 3, 7]),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(cpu.available_instruction_sets()),
    seed=st.integers(0, 10**6),
)
@example((64, 3, 192), 2, 2, 0, 3, 0, 2, "portable", 0)
@example((24, 4, 96), 3, 2, 1, 3, 1, 2, cpu.available_instruction_sets()[0], 0)
def test_heads_are_those_of_float64(geometry, bits, batch, tokens, groups, spare, threads, instruction_set, seed):
    """Exact without a rotation; with one, within a few units in the last place of the channels that are summed."""
    head_dim, heads, width = geometry
    generator = torch.Generator().manual_seed(seed)
    stored = random_tokens(batch, tokens + 20 * spare, heads * head_dim, groups, bits, generator)
    group_of_channel = torch.randint(0, groups, (heads * head_dim,), generator=generator, dtype=torch.int32)
    out = cpu.dequantize_blocks(
        pack_blocks(*stored, bits), tokens, bits, group_of_channel, head_dim, width, threads, instruction_set
    )
    truth = exact_heads(*(x[:, :tokens] for x in stored), group_of_channel, head_dim, width)
    assert out.shape == truth.shape and out.dtype == torch.float32 and out.is_contiguous()
    if not width:
        assert torch.equal(out.double(), truth)
    runs = truth.transpose(1, 2).flatten(2).unflatten(-1, (-1, width or head_dim))  # (B, T, runs, W)
    largest = runs.norm(dim=-1, keepdim=True).expand_as(runs).flatten(-2)  # what any channel of a run can be
    largest = torch.stack(largest.split(head_dim, dim=-1), dim=1)
    eps = torch.finfo(torch.float32).eps
    assert ((out.double() - truth).abs() <= 4 * eps * largest).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    geometry=st.sampled_from([g for g in GEOMETRIES if g[0] * g[1] % 16 == 0]),
    bits=st.integers(2, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 150),
    group=st.sampled_from([16, 32, 80]),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(cpu.available_instruction_sets()),
    seed=st.integers(0, 10**6),
)
def test_scales_per_channel_are_those_of_the_tokens_group(
    geometry, bits, batch, tokens, group, spare, threads, instruction_set, seed
):
    head_dim, heads, width = geometry
    generator = torch.Generator().manual_seed(seed)
    held = random_planes(batch, tokens + 20 * spare, heads * head_dim, bits, group, generator)
    out = cpu.dequantize_blocks(
        held, tokens, bits, None, head_dim, width, threads, instruction_set, tokens_per_scale=group
    )
    row = torch.arange(tokens) // group
    stored = unpack_codes(held, tokens, bits), held["scale"][:, row], held["zero"][:, row]  # (B, T, C)
    truth = exact_heads(*stored, torch.arange(heads * head_dim), head_dim, width)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item() if width else 0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("tokens_per_scale", {"tokens_per_scale": 8}),
        ("tokens_per_scale", {"tokens_per_scale": -16}),
        ("no scales", {"tokens_per_scale": 16}),
        ("16 channels", {"head_dim": 24, "channels": 24}),
        ("only there", {"group_of_channel": torch.zeros(48, dtype=torch.int32)}),
        ("4 dim", {"tokens_per_scale": 0}),
    ],
)
def test_wrong_scales_per_channel_are_refused(message, change):
    packed = random_planes(2, 40, change.pop("channels", 48), 3, 32, torch.Generator().manual_seed(0))
    arguments = {"tokens": 40, "bits": 3, "group_of_channel": None, "head_dim": 48, "tokens_per_scale": 32}
    with pytest.raises(ValueError, match=message):
        cpu.dequantize_blocks(packed, **{**arguments, **change})


@pytest.mark.parametrize("instruction_set", cpu.available_instruction_sets())
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 19), (24, 33), (8, 16)])
def test_a_given_output_keeps_its_later_tokens(head_dim, tokens, instruction_set):
    generator = torch.Generator().manual_seed(0)
    stored = random_tokens(2, tokens, 2 * head_dim, 2, 3, generator)
    groups = torch.arange(2 * head_dim, dtype=torch.int32) // head_dim
    out = torch.full((2, 2, tokens + 21, head_dim), torch.pi)
    made = cpu.dequantize_blocks(
        pack_blocks(*stored, 3), tokens, 3, groups, head_dim, instruction_set=instruction_set, out=out
    )
    assert made is out
    assert torch.equal(out[:, :, :tokens].double(), exact_heads(*stored, groups, head_dim, 0))
    assert (out[:, :, tokens:] == torch.tensor(torch.pi)).all()


GROUPS = torch.arange(96, dtype=torch.int32) // 48


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 33},
        {"tokens": -1},
        {"tokens": 21},
        {"bits": 2},
        {"bits": 4},
        {"bits": 5},
        {"head_dim": 0},
        {"head_dim": -48},
        {"head_dim": 12},
        {"head_dim": 36},
        {"head_dim": 64},
        {"rotation_width": 24},
        {"rotation_width": -48},
        {"rotation_width": 36},
        {"rotation_width": 144},
        {"rotation_width": 192},
        {"rotation_width": 2**40},
        {"threads": -1},
        {"threads": 5000},
        {"group_of_channel": None},
        {"group_of_channel": GROUPS.long()},
        {"group_of_channel": GROUPS[1:]},
        {"group_of_channel": GROUPS + 1},
        {"group_of_channel": GROUPS - 1},
        {"group_of_channel": torch.stack([GROUPS, GROUPS], -1)[..., 0]},
        {"out": torch.zeros(2, 2, 20, 48, dtype=torch.float64)},
        {"out": torch.zeros(2, 2, 48, 20)},
        {"out": torch.zeros(1, 2, 20, 48)},
        {"out": torch.zeros(2, 20, 2, 48).transpose(1, 2)},
        {"out": torch.zeros(2, 20, 96)},
        {"packed": {}},
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(change):
    arguments = {
        "packed": allocate_blocks(2, 2, 96, 2, 3),
        "tokens": 20,
        "bits": 3,
        "group_of_channel": GROUPS,
        "head_dim": 48,
        "rotation_width": 96,
        "out": torch.ones(2, 2, 20, 48),
    }
    with pytest.raises(ValueError):
        cpu.dequantize_blocks(**{**arguments, **change})
    assert (arguments["out"] == 1).all()
    assert not cpu.dequantize_blocks(**arguments).any()


@pytest.mark.parametrize("plane", ["low", "high", "scale", "zero"])
def test_damaged_planes_are_refused(plane):
    packed = allocate_blocks(2, 2, 96, 2, 3)
    x = packed[plane]
    other = torch.float64 if x.is_floating_point() else torch.int64
    for bad in (x.to(other), x[:-1], x[:, :-1], x.unsqueeze(0), torch.stack([x, x], -1)[..., 0], None):
        with pytest.raises(ValueError):
            cpu.dequantize_blocks({**packed, plane: bad}, 20, 3, GROUPS, 48)
