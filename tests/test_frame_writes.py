"""The CPU kernel that writes transform-coded keys against plain torch."""

from __future__ import annotations

import pytest
import torch
from frame_cases import FrameWrite, random_frame_write, read_by_torch, written_by_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatekv.kernels import cpu
from rotatekv.kernels.cpu import build
from rotatekv.kernels.layout import BLOCK
from rotatekv.kernels.transform_coding import dequantize_components, unpack_components

if build._load("frames", "portable") is None:
    pytest.skip("no g++", allow_module_level=True)

INSTRUCTION_SETS = cpu.available_instruction_sets()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 128, 256]),
    tokens=st.integers(0, 70),
    start=st.integers(0, 40),
    rotary=st.sampled_from([0, 1, 2]),
    of_values=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tokens_first=st.booleans(),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 10**6),
)
def test_writes_are_those_of_torch(rotary, of_values, head_dim, threads, instruction_set, **options):
    """A sum's order decides ties: one scale in 100 may differ, and one code in 500 by one."""
    rotary_dim = 0 if of_values else head_dim // 4 * 2 * rotary
    write = random_frame_write(FrameWrite(rotary_dim=rotary_dim, of_values=of_values, head_dim=head_dim, **options))
    packed, start, tokens = write["packed"], write["start"], write["heads"].shape[2]
    before = {name: plane.clone() for name, plane in packed.items()}
    cpu.quantize_into_frames(**write, threads=threads, instruction_set=instruction_set)
    new = torch.zeros(packed["scale"].shape[1] * BLOCK, dtype=torch.bool)
    new[start : start + tokens] = True
    old, found = (unpack_components(planes, len(new), write["transform"]) for planes in (before, packed))
    assert all(torch.equal(x[:, ~new], y[:, ~new]) for x, y in zip(old, found, strict=True))
    codes, scale = (x[:, start:] for x in unpack_components(packed, start + tokens, write["transform"]))
    true_codes, true_scale = written_by_torch(write)
    same = scale == true_scale
    assert (~same).sum() <= 2 + same.numel() / 100
    off = (codes[same].int() - true_codes[same].int()).abs()
    assert (off > 0).sum() <= 2 + off.numel() / 500 and (off <= 1).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    tokens=st.integers(0, 70),
    spare=st.integers(0, 20),
    of_values=st.booleans(),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 10**6),
)
def test_reads_are_those_of_torch(tokens, spare, threads, instruction_set, **options):
    write = random_frame_write(FrameWrite(tokens=tokens, **options))  # the planes hold any codes
    packed, transform = write["packed"], write["transform"]
    out = torch.full((options["batch"], options["kv_heads"], tokens + spare, options["head_dim"]), 7.0)
    cpu.read_components(packed, tokens, transform, out, threads=threads, instruction_set=instruction_set)
    want = dequantize_components(*unpack_components(packed, tokens, transform), transform).transpose(1, 2)
    torch.testing.assert_close(out[:, :, :tokens], want, rtol=1e-6, atol=0)
    assert (out[:, :, tokens:] == 7).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 5), min_size=1, max_size=9).map(tuple),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    tokens=st.integers(0, 70),
    spare=st.integers(0, 20),
    rotary=st.sampled_from([0, 1, 2]),
    of_values=st.booleans(),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 10**6),
)
def test_heads_are_those_of_torch(tokens, spare, rotary, of_values, head_dim, threads, instruction_set, **options):
    rotary_dim = 0 if of_values else head_dim // 4 * 2 * rotary
    write = random_frame_write(
        FrameWrite(tokens=tokens, of_values=of_values, head_dim=head_dim, rotary_dim=rotary_dim, **options)
    )
    out = torch.full((options["batch"], options["kv_heads"], tokens + spare, head_dim), 7.0)
    given = write["packed"], tokens, write["transform"], out, write["turns"]
    cpu.read_heads(*given, threads=threads, instruction_set=instruction_set)
    want = read_by_torch(write, tokens)
    torch.testing.assert_close(
        out[:, :, :tokens], want, rtol=1e-5, atol=1e-5 * want.abs().amax().item() if tokens else 0
    )
    assert (out[:, :, tokens:] == 7).all()


@pytest.mark.parametrize("tokens", [-1, 50, 10_000])
def test_reads_that_do_not_fit_are_refused(tokens):
    write = random_frame_write(FrameWrite((2, 1), tokens=40))
    with pytest.raises(ValueError):
        cpu.read_components(write["packed"], tokens, write["transform"], torch.empty(1, 3, 45, 64))
    with pytest.raises(ValueError):
        cpu.read_heads(write["packed"], tokens, write["transform"], torch.empty(1, 3, 45, 64))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("of_values", [False, True])
def test_zeros_and_huge_numbers_are_written(instruction_set, of_values):
    write = random_frame_write(FrameWrite((4, 2, 1, 0), tokens=40, of_values=of_values))
    write["transform"].mean.zero_()
    write["heads"][:, :, 3], write["heads"][:, :, 5] = 0.0, write["heads"][:, :, 5] * 1e6
    cpu.quantize_into_frames(**write, instruction_set=instruction_set)
    codes, scale = unpack_components(write["packed"], 40, write["transform"])
    true_codes, true_scale = written_by_torch(write)
    assert torch.equal(scale[:, [3, 5]], true_scale[:, [3, 5]])
    assert torch.equal(codes[:, [3, 5]], true_codes[:, [3, 5]])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("do not fit in the blocks", lambda w: {**w, "start": 50}),
        ("do not fit in the blocks", lambda w: {**w, "start": -1}),
        ("do not fit maps", lambda w: {**w, "heads": w["heads"][:, :2]}),
        ("do not fit maps", lambda w: {**w, "heads": w["heads"][..., :48]}),
        ("dense", lambda w: {**w, "heads": w["heads"].mT.contiguous().mT}),
        ("float32 or", lambda w: {**w, "heads": w["heads"].double()}),
        ("needs pairs", lambda w: {**w, "packed": {"pairs": w["packed"]["pairs"]}}),
        ("cos and sin", lambda w: {**w, "turns": tuple(x[:, 1:] for x in w["turns"])}),
        ("strides of the others", lambda w: {**w, "turns": (*w["turns"][:3], w["turns"][3][..., :8])}),
        ("rotary_dim", lambda w: {**w, "turns": tuple(x.repeat(1, 1, 3) for x in w["turns"])}),
    ],
)
def test_wrong_arguments_are_refused(message, change):
    write = random_frame_write(FrameWrite((4, 2, 1, 0), rotary_dim=64))
    with pytest.raises(ValueError, match=message):
        cpu.quantize_into_frames(**change(write))
