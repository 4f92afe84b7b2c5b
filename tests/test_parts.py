"""Caches whose rows are kept each alone, and those with layers of transformers' own: what fails changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits
from families import FAMILIES, token_ids
from families import find_decoder as decoder_of

from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.cache.spec import is_patched
from rotatekv.compat import CACHE_NAME

KIVI = replace(PRESETS["KIVI2"], k_groupsize=16, v_groupsize=16, residual_length=5)
MASK = left_padding(70, 0, 5)
IDS = token_ids(2, 70)


@pytest.fixture
def gemma():
    model = FAMILIES["gemma3"].build()
    with patch_model(model, KIVI):
        yield model


@pytest.fixture
def lfm2():
    """Its first layer is transformers' own."""
    model = FAMILIES["lfm2"].build()
    with patch_model(model, "RTN4"):
        yield model


def filled(model, tokens: int = 50, records: bool = False) -> RotateKVCache:
    cache = RotateKVCache.for_model(model)
    if records:
        cache.activate_past_recording()
    logits(model, cache, IDS, (tokens - 10, 10), MASK)
    return cache


def after(model, cache) -> torch.Tensor:
    return logits(model, cache, IDS, (4, 1), MASK)


def test_autocast(gemma):
    cache = filled(gemma)
    want = after(gemma, filled(gemma))
    with torch.autocast("cpu", torch.bfloat16):
        got = after(gemma, cache)
    assert 0 < (got - want).abs().max() < 0.2 * want.abs().max()


def test_offload_and_prefetch(gemma):
    cache = filled(gemma)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(after(gemma, cache), after(gemma, filled(gemma)))


@pytest.mark.parametrize("removed", [30, -1])
def test_a_refused_crop_changes_nothing(removed, gemma):
    cache = filled(gemma)
    with pytest.raises((RuntimeError, ValueError), match="crop"):
        cache.crop(-removed)  # the sliding layer has dropped what it would need
    assert cache.get_seq_length() == 50
    assert torch.equal(after(gemma, cache), after(gemma, filled(gemma)))


def test_a_refused_crop_of_a_later_layer_leaves_the_first_ones():
    gemma3 = FAMILIES["gemma3"]
    full_first = replace(gemma3, options={**gemma3.options, "layer_types": ["full_attention", "sliding_attention"]})
    model = full_first.build()
    with patch_model(model, "RTN4"):
        cache = RotateKVCache.for_model(model)
        logits(model, cache, IDS, (50,))
        with pytest.raises(RuntimeError, match="cannot be cropped"):
            cache.crop(-30)
        assert [layer.get_seq_length() for layer in cache.layers] == [50, 50]


def test_an_emptied_cache_records_as_before(gemma):
    cache = filled(gemma, 20, records=True)
    cache.crop(-20)
    logits(gemma, cache, IDS, (40, 10), MASK)
    assert all(layer.record_past for layer in cache.layers)
    cache.crop(-6)
    again = filled(gemma, records=True)
    again.crop(-6)
    assert torch.equal(after(gemma, cache), after(gemma, again))


def test_a_layer_that_stores_nothing_is_named_and_the_call_taken_back(gemma):
    cache, layer = filled(gemma), decoder_of(gemma).layers[1]
    layer.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(RuntimeError, match=r"layers \[1\] attended without the cache"):
        after(gemma, cache)
    del layer.forward
    assert cache.get_seq_length() == 50
    assert torch.equal(after(gemma, cache), after(gemma, filled(gemma)))


def test_a_batch_without_a_mask_in_a_model_with_layers_of_transformers_own(lfm2):
    with torch.no_grad():
        batch = lfm2(IDS).logits
        torch.testing.assert_close(batch[:1], lfm2(IDS[:1]).logits)


@pytest.mark.parametrize("done", [0, 50])
def test_a_failed_call_is_made_again_or_refused_where_layers_cannot_be_taken_back(done, lfm2):
    cache = filled(lfm2) if done else RotateKVCache.for_model(lfm2)

    def fail(*_):
        raise InterruptedError

    hook = decoder_of(lfm2).layers[1].register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        logits(lfm2, cache, IDS, (10,), MASK)
    hook.remove()
    if not done:
        logits(lfm2, cache, IDS, (40, 10), MASK)
    else:
        with pytest.raises(RuntimeError, match="start with a new cache"):
            after(lfm2, cache)
        cache.reset()
        logits(lfm2, cache, IDS, (40, 10), MASK)
    assert torch.equal(after(lfm2, cache), after(lfm2, filled(lfm2)))


def test_kernels_count_padding_between_tokens_in_a_sliding_window_as_transformers_does(gemma, monkeypatch):
    mask, found = MASK.clone(), []
    mask[1, 30:38] = 0
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        found.append(logits(gemma, RotateKVCache.for_model(gemma), IDS, (38, 4, 1, 1), mask)[mask[:, :44] == 1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("first, last", [(40, 50), (10, 14)], ids=["at the right", "in the middle"])
def test_a_recent_window_counts_no_padding(first, last):
    model, mask = FAMILIES["llama"].build(torch.float64), torch.ones_like(IDS)
    mask[1, first:last] = 0
    with patch_model(model, replace(PRESETS["RTN2"], residual_length=6)):
        batch = logits(model, RotateKVCache.for_model(model), IDS, (50, 4, 1), mask)[1, mask[1, :55] == 1]
        alone = IDS[1:, mask[1] == 1]
        want = logits(model, RotateKVCache.for_model(model), alone, (50 - last + first, 4, 1))[0]
    torch.testing.assert_close(batch, want, rtol=0, atol=1e-6)


def test_attention_that_gets_other_keys_than_the_caches_is_refused_by_name():
    model = FAMILIES["llama"].build()
    attention = decoder_of(model).layers[1].self_attn
    forward = attention.forward

    class Copying:
        def __init__(self, cache):
            self.cache = cache

        def update(self, *args, **kwargs):
            return tuple(x.clone() for x in self.cache.update(*args, **kwargs))

    def copying(*args, **kwargs):
        return forward(*args, **{**kwargs, CACHE_NAME: Copying(kwargs[CACHE_NAME])})

    attention.forward = copying
    with pytest.raises(UserError, match=r"^layers\.1\.self_attn attends to other keys than its cache gives it"):
        patch_model(model, "RTN2")
    assert attention.forward is copying and not is_patched(model)
