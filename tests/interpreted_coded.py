"""Cases of the Triton kernels of transform-coded tokens, run as ``interpreted_triton.py`` is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed
sys.path.insert(0, str(Path(__file__).parent))
import triton_interpreter  # noqa: F401  the interpreter as these cases need it
from frame_cases import FrameShape, FrameWrite, random_frame_write, random_frames_step, written_by_torch
from kernel_cases import Shape, error, with_options

from benchmarks.random_models import patch_random, random_llama
from rotatekv import RotateKVCache
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.frames import quantize_into_frames_reference
from rotatekv.kernels.layout import BLOCK
from rotatekv.kernels.transform_coding import dequantize_components, unpack_components
from rotatekv.kernels.triton.start import unusable

MIXED = (4, 2, 1, 1)  # bits of a head's groups
HALVES = 2.0**-18  # what products of two halves lose of scores of some log2 units, see coded_attention.py
ONE_HALF = 2.0**-11  # what they lose with one, for a model in 16 bits


@pytest.fixture(autouse=True)
def no_kernel_is_refused():
    yield
    assert not unusable  # torch would have done its work


def coded(
    bits: tuple[int, ...] = MIXED, value_bits: tuple[int, ...] = (2,), dropped: int = 0, rotary_dim: int = 64, **shape
) -> FrameShape:
    return FrameShape(bits, Shape(rotary_dim=rotary_dim, **shape), value_bits, dropped)


def check(step: dict, lost: float = HALVES, **launch) -> None:
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step).to(step["queries"].dtype)
    out = kernels.decode_attention(**step, **launch)
    assert truth.norm() > 0 and out.dtype == step["queries"].dtype
    assert error(out, truth) <= 2 * error(eager, truth) + lost


ATTENTION = {
    "one_token": coded(tokens=1),
    "fifteen": coded(tokens=15, repeat=1),
    "a_block": coded(tokens=16, repeat=2),
    "seventeen": coded(tokens=17, rotary_dim=32, repeat=4, head_dim=128, kv_heads=1),
    "all_but_one_of_a_frame": coded(tokens=127, repeat=5, kv_heads=1),
    "a_frame": coded((5, 4, 3, 2, 1, 0, 1, 2), tokens=128, rotary_dim=128, head_dim=128, kv_heads=2, repeat=6),
    "a_frame_and_one": coded(tokens=129, repeat=7, kv_heads=1),
    "two_frames": coded((0, 5), (1, 3), tokens=256, repeat=8, kv_heads=1),
    "heads_of_256": coded((3, 1, 0, 2), (4, 5), tokens=257, rotary_dim=256, head_dim=256, kv_heads=1, repeat=2),
    "heads_of_80": coded((3, 1, 0, 2), (1, 5), tokens=150, rotary_dim=80, head_dim=80, kv_heads=2),
    "heads_of_16": coded((3, 1), (1, 2), tokens=150, rotary_dim=8, head_dim=16, kv_heads=2),
    "no_rope": coded(tokens=200, kv_heads=2, rotary_dim=0),
    "no_bits": coded((0,), (0,), tokens=40, kv_heads=1),
    "padding": coded(batch=3, tokens=200, kv_heads=1, padding=(0, 21, 150), window=20, sinks=5),
    "all_padding": coded(batch=2, tokens=40, kv_heads=1, padding=(40, 3)),
    "sinks_window": coded(batch=2, tokens=170, sinks=9, window=17, query_tokens=3),
    "window_alone": coded(
        batch=2, tokens=33, window=33, rotary_dim=32, exact_dtype=torch.bfloat16, query_tokens=2, repeat=1
    ),
    "sixteen_queries": coded((4, 2), (3, 2), tokens=145, query_tokens=16, repeat=4, kv_heads=1, padding=(2,)),
    "sliding": coded(batch=2, tokens=190, sliding_window=60, query_tokens=3, repeat=2, sinks=4, window=5, dropped=176),
    "sliding_padded": coded(
        batch=3, tokens=150, sliding_window=130, padding=(0, 90, 30), window=3, kv_heads=1, dropped=48
    ),
    "sliding_past_the_packed": coded(batch=2, tokens=60, window=30, sliding_window=17, kv_heads=1, dropped=128),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_coded_attention(name):
    check(random_frames_step(ATTENTION[name]))


@pytest.mark.parametrize("name", ["a_block", "a_frame", "heads_of_256", "padding", "sixteen_queries"])
def test_coded_attention_of_a_model_in_16_bits(name):
    step = random_frames_step(ATTENTION[name])
    check({**step, "queries": step["queries"].half()}, lost=ONE_HALF)


def test_coded_attention_of_a_model_in_bfloat16():
    step = random_frames_step(ATTENTION["sinks_window"])
    check({**step, "queries": step["queries"].bfloat16()}, lost=ONE_HALF)


@pytest.mark.parametrize("splits", [1, 3, 9])
def test_coded_attention_splits(splits):
    shape = coded(batch=2, tokens=400, padding=(150, 0), sinks=4, kv_heads=1, dropped=16)
    check(random_frames_step(shape), splits=splits)


def test_coded_attention_room_for_more_blocks():
    step = random_frames_step(coded(batch=2, tokens=70))
    out = kernels.decode_attention(**step)
    for name in ("keys", "values"):
        step[name] = {k: torch.cat([x, torch.full_like(x[:, :1], 77)], 1) for k, x in step[name].items()}
    assert torch.equal(kernels.decode_attention(**step), out)


def test_coded_attention_far_positions():
    """5000 positions out, where an angle held in float32 is 2e-4 off."""
    check(random_frames_step(coded(kv_heads=1, repeat=1, tokens=50, dropped=5008)))


WRITES = {
    "one_token": FrameWrite(MIXED, tokens=1, start=31, rotary_dim=64),
    "ragged": FrameWrite(MIXED, tokens=37, start=7, batch=2, rotary_dim=64, dtype=torch.bfloat16, tokens_first=True),
    "whole_blocks": FrameWrite((5, 4, 3, 2, 1, 0, 1, 2), tokens=48, start=16, kv_heads=2, head_dim=128, rotary_dim=96),
    "values": FrameWrite((2,), batch=2, tokens=48, start=16, of_values=True, tokens_first=True),
    "ragged_values": FrameWrite((1, 3, 5, 0), batch=2, tokens=37, start=7, of_values=True, dtype=torch.float16),
    "one_value": FrameWrite((4,), tokens=1, start=18, kv_heads=1, head_dim=256, of_values=True),
    "heads_of_256": FrameWrite((4, 2, 0, 1), tokens=20, kv_heads=1, head_dim=256, rotary_dim=256),
    "heads_of_80": FrameWrite((3, 1, 2, 5, 0), tokens=20, kv_heads=2, head_dim=80, rotary_dim=32),
    "heads_of_16": FrameWrite((3, 1), tokens=20, kv_heads=2, head_dim=16, rotary_dim=16),
    "no_rope": FrameWrite(MIXED, tokens=20, batch=2),
    "no_bits": FrameWrite((0,), tokens=20),
    "nothing": FrameWrite(MIXED, tokens=0, start=3),
}


@pytest.mark.parametrize("name", WRITES)
def test_coded_write(name):
    """A sum's order decides ties: one scale in 100 may differ, and one code in 500 by one."""
    write = random_frame_write(WRITES[name])
    made, start, tokens = write["packed"], write["start"], write["heads"].shape[2]
    before, by_torch = ({name: plane.clone() for name, plane in made.items()} for _ in range(2))
    kernels.quantize_into_frames(**write)
    quantize_into_frames_reference(**{**write, "packed": by_torch})
    room = made["scale"].shape[1] * BLOCK
    new = torch.zeros(room, dtype=torch.bool)
    new[start : start + tokens] = True
    unpacked = (unpack_components(x, room, write["transform"]) for x in (made, by_torch, before))
    for found in zip(*unpacked, strict=True):
        assert all(torch.equal(x[:, ~new], found[2][:, ~new]) for x in found)
    true_codes, true_scale = written_by_torch(write)
    for packed, share in ((made, 1), (by_torch, 0)):
        codes, scale = (x[:, new] for x in unpack_components(packed, room, write["transform"]))
        same = scale == true_scale
        assert (~same).sum() <= (2 + same.numel() / 100) * share
        off = (codes[same].int() - true_codes[same].int()).abs()
        assert (off > 0).sum() <= (2 + off.numel() / 500) * share and (off <= 1).all()


def test_coded_write_of_zeros_and_a_huge_key():
    write = random_frame_write(FrameWrite((4, 2, 1, 0), tokens=30))
    write["heads"][:, :, 3], write["heads"][:, :, 5] = 0.0, write["heads"][:, :, 5] * 1e6
    kernels.quantize_into_frames(**write)
    unpacked = unpack_components(write["packed"], 30, write["transform"])
    for made, true in zip(unpacked, written_by_torch(write), strict=True):
        assert torch.equal(made[:, [3, 5]], true[:, [3, 5]])


@pytest.mark.parametrize("name", ["seventeen", "a_frame", "heads_of_256", "heads_of_80", "no_bits", "sinks_window"])
def test_coded_read(name):
    step = random_frames_step(ATTENTION[name])
    options, tokens = step["options"], step["packed_tokens"]
    for of, transform in (("keys", options.key_transform), ("values", options.value_transform)):
        true = dequantize_components(*unpack_components(step[of], tokens, transform), transform).transpose(1, 2)
        out = torch.full((*true.shape[:2], tokens + 3, true.shape[3]), 7.0)
        kernels.read_components(step[of], tokens, transform, out)
        assert (out[:, :, tokens:] == 7).all()
        torch.testing.assert_close(out[:, :, :tokens], true, rtol=1e-6, atol=0)


def test_model_coded(monkeypatch):
    """Prefill past a frame, decode over the end of a block and two tokens at once, against plain torch."""
    model, results, calls = random_llama(2, 1, 64, 1), {}, []
    kernel = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    ids = torch.randint(3, 500, (2, 152), generator=torch.Generator().manual_seed(1))
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_random(model, "RotateKV2+"), torch.no_grad():
            cache, spans = RotateKVCache.for_model(model), (143, *range(144, 151), 152)
            parts = [
                model(ids[:, start:end], past_key_values=cache).logits
                for start, end in zip((0, *spans), spans, strict=False)
            ]
        results[backend] = torch.cat(parts, dim=1)
    assert len(calls) >= 7
    difference = (results["triton"] - results["reference"]).abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * results["reference"].std()


def test_damaged_coded_arguments_are_refused():
    step = random_frames_step(coded(batch=2, tokens=70, window=5, sinks=3))
    keys = step["keys"]
    for change in (
        {"keys": {name: x for name, x in keys.items() if name != "singles"}},
        {"keys": {**keys, "pairs": keys["pairs"][:, :, 1:]}},
        {"keys": {**keys, "scale": keys["scale"].int()}},
        {"keys": step["values"], "values": keys},
        {"packed_tokens": 100, "total_tokens": 110},
        {"dropped": 8},
        {"dropped": -16},
        {"queries": step["queries"][:, :8]},
        {"queries": step["queries"][..., :32]},
    ):
        with pytest.raises(ValueError):
            kernels.decode_attention(**{**step, **change})
            pytest.fail(f"accepted {change}")
    for change in (
        {"value_transform": None},
        {"key_transform": None},
        {"key_transform": replace(step["options"].key_transform, words_of_tokens=False)},
    ):
        with pytest.raises(ValueError):
            kernels.decode_attention(**with_options(step, **change))
            pytest.fail(f"accepted {change}")
    good = random_frame_write(FrameWrite(MIXED, tokens=20, rotary_dim=64))
    before = {name: plane.clone() for name, plane in good["packed"].items()}
    turns = good["turns"]
    for change in (
        {"start": 40},
        {"start": -1},
        {"heads": good["heads"][:, :2]},
        {"heads": good["heads"][..., :48]},
        {"heads": good["heads"].double()},
        {"heads": good["heads"].mT.contiguous().mT},
        {"packed": {"pairs": good["packed"]["pairs"]}},
        {"turns": turns[:3]},
        {"turns": tuple(x[:, 1:] for x in turns)},
        {"turns": tuple(x.repeat(1, 1, 2) for x in turns)},
        {"turns": (*turns[:3], turns[3][..., :8])},
        {"turns": (*turns[:3], turns[3].mT.contiguous().mT)},
    ):
        with pytest.raises(ValueError):
            kernels.quantize_into_frames(**{**good, **change})
            pytest.fail(f"accepted {change}")
    assert all(torch.equal(good["packed"][name], before[name]) for name in before)
    for change in (
        {"tokens": 100},
        {"tokens": -1},
        {"out": torch.zeros(2, 3, 64, 64)},
        {"out": torch.zeros(2, 3, 65, 64).half()},
        {"out": torch.zeros(2, 2, 65, 64)},
        {"packed": step["values"]},
    ):
        good = {"packed": keys, "tokens": 65, "transform": step["options"].key_transform}
        with pytest.raises(ValueError):
            kernels.read_components(**{"out": torch.zeros(2, 3, 65, 64), **good, **change})
            pytest.fail(f"accepted {change}")
