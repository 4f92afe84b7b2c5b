"""Cases of the Triton kernel of keys that meet the query as codes, run as ``interpreted_triton.py`` is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed
sys.path.insert(0, str(Path(__file__).parent))
import triton_interpreter  # noqa: F401  the interpreter as these cases need it
from kernel_cases import Shape, error, random_step

from benchmarks.random_models import patch_random, random_llama
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.triton import grouped_launch
from rotatekv.kernels.triton.start import unusable

HALVES = 2.0**-18  # what products of two halves lose of scores of some log2 units, see grouped_attention.py
ONE_HALF = 2.0**-11  # what they lose with one, for a model in 16 bits


@pytest.fixture(autouse=True)
def no_kernel_is_refused():
    yield
    assert not unusable  # torch would have done its work


@pytest.fixture
def launches(monkeypatch) -> list:
    """A number for each launch."""
    calls, kernel = [], grouped_launch.launch_grouped_decode
    monkeypatch.setattr(grouped_launch, "launch_grouped_decode", lambda *a: calls.append(1) or kernel(*a))
    return calls


def heads(repeat: int = 2, **shape) -> Shape:
    """Keys after RoPE with a scale a head, rotated head by head."""
    form = {"kv_heads": 2, "heads_per_group": 1, "key_group": 64, "unrotate_values": True}
    return Shape(repeat=repeat, **{**form, **shape})


RAW = {"heads_per_group": 0, "unrotate_values": False}
ATTENTION = {
    "one_token": heads(tokens=1),
    "seventeen": heads(tokens=17, repeat=4),
    "a_tile": heads(tokens=128, **RAW),
    "a_tile_and_one": heads(tokens=129, batch=2),
    "heads_of_128": heads(tokens=150, head_dim=128, key_group=128, repeat=5, kv_heads=1),
    "heads_of_256": heads(tokens=100, head_dim=256, key_group=256, kv_heads=1, **RAW),
    "heads_of_80": heads(tokens=40, head_dim=80, key_group=80),
    "heads_of_16": heads(tokens=50, head_dim=16, key_group=16, kv_heads=3),
    "a_scale_for_two_heads": heads(tokens=40, kv_heads=4, key_group=128, value_group=256),
    "three_bits": heads(tokens=50, key_bits=3, value_bits=3),
    "four_bits": heads(tokens=50, key_bits=4, value_bits=4, **RAW),
    "padding": heads(batch=3, tokens=200, padding=(0, 21, 150), window=20, sinks=5, value_bits=4),
    "all_padding": heads(batch=2, tokens=40, padding=(40, 3)),
    "sixteen_queries": heads(tokens=45, query_tokens=16, repeat=4, kv_heads=1, padding=(2,), key_bits=3),
    "sliding": heads(batch=2, tokens=190, sliding_window=60, query_tokens=3, sinks=4, window=5),
    "sliding_past_the_packed": heads(batch=2, tokens=60, window=30, sliding_window=17, exact_dtype=torch.bfloat16),
}


def check(step: dict, lost: float = HALVES, **launch) -> None:
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step).to(step["queries"].dtype)
    out = kernels.decode_attention(**step, **launch)
    assert truth.norm() > 0 and out.dtype == step["queries"].dtype
    assert error(out, truth) <= 2 * error(eager, truth) + lost


@pytest.mark.parametrize("name", ATTENTION)
def test_grouped_attention(name, launches):
    check(random_step(ATTENTION[name]))
    assert launches == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_attention_of_a_model_in_16_bits(dtype, launches):
    step = random_step(ATTENTION["padding"])
    check({**step, "queries": step["queries"].to(dtype)}, lost=ONE_HALF)
    assert launches == [1]


@pytest.mark.parametrize("splits", [1, 5])
def test_grouped_attention_splits(splits):
    check(random_step(heads(batch=2, tokens=400, padding=(150, 0), sinks=4)), splits=splits)


def test_grouped_attention_is_not_for_other_forms(launches):
    for shape in (
        replace(ATTENTION["seventeen"], rotary_dim=64),
        replace(ATTENTION["seventeen"], heads_per_group=2),
        replace(ATTENTION["seventeen"], key_group=32),
        replace(ATTENTION["seventeen"], value_group=32),
        replace(ATTENTION["seventeen"], key_group=0, kv_heads=3),
    ):
        check(random_step(shape))
    assert launches == []


@pytest.mark.parametrize("preset", ["RTN2", "QuaRot3"])
def test_model_grouped(preset, launches, monkeypatch):
    """Greedy tokens of a small model in bfloat16: those of plain torch."""
    model, results = random_llama(4, 2, 64, 1, dtype=torch.bfloat16), []
    prompt = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_random(model, preset), torch.no_grad():
            results.append(model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False))
    assert len(launches) == 3 and torch.equal(*results)
