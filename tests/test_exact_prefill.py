"""quantize_prefill=False: the first call is the stock model's, and what it stores is what would have been stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, token_ids
from transformers import DynamicCache

from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.kernels import cpu

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="no C++ compiler"))]
PADDED = {  # rows in caches of their own, and rows in one
    "KIVI2": replace(PRESETS["KIVI2"], k_groupsize=8, v_groupsize=16, residual_length=6),
    "RotateKV2+": PRESETS["RotateKV2+"],
    "RotateKV2": PRESETS["RotateKV2"],
}


def exact(config):
    return replace(config, quantize_prefill=False)


def logits(model, ids, cache=None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "FP16"])
def test_the_first_call_is_the_stock_models_and_no_later_one(preset, backend, statistics, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    model, config, ids = tiny_model(), PRESETS[preset], token_ids(2, 160)
    if config.method == "kivi":
        config = replace(config, v_groupsize=16)
    stock, short = DynamicCache(config=model.config), logits(model, ids[:, :3])
    expected, caches = [logits(model, part, stock) for part in ids.split((150, 10), 1)], []
    for tried in (exact(config), config):
        with patch_model(model, tried, statistics(config)):
            cache = RotateKVCache.for_model(model)
            got = [logits(model, part, cache) for part in ids.split((150, 10), 1)]
            assert torch.equal(got[0], expected[0]) == (not tried.quantize_prefill)
            # few enough for a fused kernel
            assert torch.equal(logits(model, ids[:, :3]), short) or tried.quantize_prefill
        assert not torch.allclose(got[1], expected[1], rtol=0.01, atol=0.05)
        caches.append(cache)
    one, other = caches
    assert all(map(torch.equal, one.layers[0].tensors("keys"), other.layers[0].tensors("keys")))
    assert all(map(torch.equal, one.layers[0].tensors("values"), other.layers[0].tensors("values")))
    if config.sink_selection == "first" or not config.Attention_Sink_Aware:  # as many sinks
        assert one.nbytes() == other.nbytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_call_sees_what_is_stored(backend, monkeypatch):
    """The stock model over the decoded keys and values; the new token is in the recent window."""
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    model, ids = tiny_model(), token_ids(2, 61)
    config = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, residual_length=4)
    with patch_model(model, exact(config)):
        cache = RotateKVCache.for_model(model)
        logits(model, ids[:, :60], cache)
        decoded = [(keys, values) for keys, values, _ in cache]
        got = logits(model, ids[:, 60:], cache)
    stock, whole = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for number, pair in enumerate(decoded):
        stock.update(*pair, number)
    expected, unquantized = logits(model, ids[:, 60:], stock), logits(model, ids, whole)[:, 60:]
    assert (got - expected).abs().max() < 0.02 < 0.2 < (got - unquantized).abs().max()


@pytest.mark.parametrize("preset", PADDED)
def test_padded_rows_are_the_stock_models(preset, statistics):
    """The first row's real tokens come with the second call alone: that is then its first."""
    model, ids, mask, config = tiny_model(), token_ids(3, 60), torch.ones(3, 60, dtype=torch.int64), PADDED[preset]
    mask[0, :45] = mask[1, :7] = 0
    stock = DynamicCache(config=model.config)
    calls = [{"ids": ids[:, :40], "attention_mask": mask[:, :40]}, {"ids": ids[:, 40:], "attention_mask": mask}]
    expected = [logits(model, cache=stock, **call) for call in calls]
    with patch_model(model, exact(config), statistics(config)):
        cache = RotateKVCache.for_model(model)
        got = [logits(model, cache=cache, **call) for call in calls]
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1][0, 5:], expected[1][0, 5:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[1][1:], expected[1][1:], atol=0.05)


@pytest.mark.parametrize("preset", PADDED)
def test_packed_documents_are_the_stock_models_each_alone(preset, statistics):
    model, documents, config = tiny_model(), (token_ids(1, 50), token_ids(1, 33, 1)), PADDED[preset]
    expected = [logits(model, document) for document in documents]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with patch_model(model, exact(config), statistics(config)):
        got = logits(model, torch.cat(documents, 1), position_ids=positions)
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_a_sliding_window_is_the_stock_models():
    model, ids = tiny_model("mistral", sliding_window=24), token_ids(2, 101)
    config = replace(PRESETS["RotateKV4"], Outlier_Aware_Key_Rotation=False)
    stock = DynamicCache(config=model.config)
    expected = [logits(model, part, stock) for part in ids.split((70, 31), 1)]
    with patch_model(model, exact(config)):
        cache = RotateKVCache.for_model(model)
        got = [logits(model, part, cache) for part in ids.split((70, 31), 1)]
        assert cache.layers[0].keys.shape[2] < 24 + 16
    assert torch.equal(got[0], expected[0])
    assert 0.01 < (got[1] - expected[1]).abs().mean() < 0.5 * expected[1].abs().mean()


def test_generate_begins_as_the_stock_model():
    model, ids = tiny_model(), token_ids(2, 40)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, max_new_tokens=2, min_new_tokens=2, **options).logits
    config = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)
    with patch_model(model, exact(config)):
        got = model.generate(ids, max_new_tokens=2, min_new_tokens=2, **options).logits
    assert torch.equal(got[0], expected[0]) and not torch.allclose(got[1], expected[1], atol=0.05)
