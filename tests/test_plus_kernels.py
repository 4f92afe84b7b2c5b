"""RotateKV+ by the fused kernels is what it is by plain torch, whatever the model and what is done with the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits
from families import token_ids
from test_families import RUNS, TOKENS, built
from transformers import DynamicCache

from benchmarks.random_models import patch_random, random_llama
from rotatekv import PRESETS, RotateKVCache
from rotatekv.kernels import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernels are not built"),
]
PLUS = replace(PRESETS["RotateKV2+"], residual_length=16)  # a shorter window: short texts have packed tokens
LONG = 310  # more than two frames


@pytest.fixture
def both(monkeypatch):
    """The step's logits by the kernels and by torch, the stock model's, and how often the decode kernel ran."""
    calls, kernel = [], cpu.decode_attention
    monkeypatch.setattr(cpu, "decode_attention", lambda *args: calls.append(args) or kernel(*args))

    def run(model, step, ids, mask, config=PLUS):
        stock = step(model, DynamicCache(config=model.config), ids, mask)
        with patch_random(model, config):
            fused = step(model, RotateKVCache.for_model(model), ids, mask)
            count = len(calls)
            with monkeypatch.context() as patch:
                patch.setenv("ROTATEKV_BACKEND", "reference")
                general = step(model, RotateKVCache.for_model(model), ids, mask)
        assert len(calls) == count
        return fused, general, stock, calls

    return run


def assert_alike(fused: torch.Tensor, general: torch.Tensor, stock: torch.Tensor) -> None:
    """They differ by far less than the quantization makes of the logits."""
    cost = (general - stock).norm()
    assert (fused - general).norm() < 0.1 * cost


@pytest.mark.parametrize(
    ("name", "run"),
    [
        *(
            (name, "decode")
            for name in ("llama", "llama, yarn", "phi", "smollm3", "gemma3", "mistral, sliding", "qwen3")
        ),
        *(("llama", run) for run in ("padded chunks", "crop")),
        ("phi", "padded chunks"),
        ("llama, yarn", "padded chunks"),
    ],
)
def test_families(name, run, both):
    model, (step, mask) = built(name, torch.float32), RUNS[run]
    ids = token_ids(len(mask), TOKENS)
    fused, general, stock, calls = both(model, step, ids, mask)
    assert calls
    real = mask.bool()
    assert_alike(fused[real], general[real], stock[real])


def test_beams(both):
    """Two of each row, which change places; generate would choose other ones at a near tie."""

    def step(model, cache, ids, mask):
        with torch.no_grad():
            found = [model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache).logits]
            for at in range(40, TOKENS):
                cache.reorder_cache(torch.tensor([1, 0, 3, 3] if at % 2 else [0, 0, 3, 2]))
                one = ids[:, at : at + 1]
                found.append(model(one, attention_mask=mask[:, : at + 1], past_key_values=cache).logits)
        return torch.cat(found, 1)

    mask = left_padding(TOKENS, 0, 0, 7, 7)
    fused, general, stock, calls = both(built("llama", torch.float32), step, token_ids(4, TOKENS), mask)
    assert calls
    assert_alike(fused[mask.bool()], general[mask.bool()], stock[mask.bool()])


def in_long_chunks(model, cache, ids, mask):
    return logits(model, cache, ids, (200, 1, 1, 60, 3, 16, *[1] * 29), mask)


@pytest.mark.parametrize("padding", [(0,), (0, 7, 150)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 16), (8, 2, 32), (8, 1, 64)])
@pytest.mark.parametrize(
    "config", [PLUS, PRESETS["RotateKV4+"], replace(PLUS, residual_length=0), replace(PLUS, bits=1.5)]
)
def test_several_frames(heads, kv_heads, head_dim, padding, config, both):
    model, mask = random_llama(heads, kv_heads, head_dim, 2), left_padding(LONG, *padding)
    fused, general, stock, calls = both(model, in_long_chunks, token_ids(len(mask), LONG), mask, config)
    assert len(calls) >= 2 * len(mask) * 29 * 15 // 16
    assert_alike(fused[mask.bool()], general[mask.bool()], stock[mask.bool()])


def test_a_sliding_window_that_has_dropped_tokens(both):
    model = built("mistral, sliding", torch.float32)
    model.config.sliding_window, old = 100, model.config.sliding_window
    try:
        mask = left_padding(LONG, 0)
        fused, general, stock, calls = both(model, in_long_chunks, token_ids(1, LONG), mask)
        assert max(args[10] for args in calls) >= 160
        assert_alike(fused, general, stock)
    finally:
        model.config.sliding_window = old


def test_odd_positions_take_the_general_path(both):
    """Padding that has positions of its own: only a mask that comes later says where the text begins."""
    model, mask = random_llama(4, 2, 16, 2), left_padding(LONG, 0, 40)

    def step(model, cache, ids, mask):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        with torch.no_grad():
            model(ids[:, :200], position_ids=positions[:, :200], past_key_values=cache)
            return torch.cat(
                [
                    model(
                        ids[:, at : at + 1],
                        position_ids=positions[:, at : at + 1],
                        attention_mask=mask[:, : at + 1],
                        past_key_values=cache,
                    ).logits
                    for at in range(200, 210)
                ],
                1,
            )

    fused, general, stock, _ = both(model, step, token_ids(2, LONG), mask)
    assert_alike(fused, general, stock)
