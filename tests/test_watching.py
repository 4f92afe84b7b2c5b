"""Calibration and captures in every family: what they watch against the stock cache, eager attention and the oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as cached

import pytest
import torch
from families import FAMILIES, SUPPORTED, find_decoder, token_ids
from oracle import OracleCache
from oracle import watching as told_positions
from torch import nn
from transformers import DynamicCache

from rotatekv import PRESETS, patch_model
from rotatekv.calibration.kvquant import collect_key_ranges, collect_levels
from rotatekv.calibration.plus import collect_sink_thresholds, in_predictions
from rotatekv.calibration.reorder import collect_key_sums, indices_from_key_sums
from rotatekv.calibration.score_errors import describe, presets_for, score_errors
from rotatekv.calibration.transform import collect_transforms
from rotatekv.capture.hooks import CaptureRequest, capture_window
from rotatekv.families import attention_modules
from rotatekv.patching.watching import Attended, stream_attention, watching
from rotatekv.statistics import CalibrationTarget, load_statistics, save_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 40  # longer than the windows
HYBRID = ["qwen3_next", "lfm2"]  # their first layer has no attention


@cached
def built(name: str) -> nn.Module:
    return FAMILIES[name].build()


def watched(model: nn.Module, ids: torch.Tensor) -> dict[int, Attended]:
    found = {}
    stream_attention(model, find_decoder(model), [ids], lambda attended: found.update({attended.layer: attended}))
    return found


class Recorder(OracleCache):
    """Transformers' cache; ``seen`` are each layer's keys before RoPE, by complex numbers, keys and values."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.seen[layer_idx] = self.before_rope(key_states.double(), layer_idx), key_states, value_states
        return DynamicCache.update(self, key_states, value_states, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("name", SUPPORTED)
def test_keys_and_values_are_those_of_the_stock_cache_and_rope_is_undone(name):
    model, ids = built(name), token_ids(1, TOKENS)
    with told_positions(Recorder(model, FAMILIES[name])) as cache, torch.no_grad():
        cache.seen = {}
        model(ids, past_key_values=cache)
    found = watched(model, ids)
    assert found.keys() == cache.seen.keys() and len(found) == 1 + (name not in HYBRID)
    for number, (before, keys, values) in cache.seen.items():
        attended = found[number]
        assert torch.equal(attended.key, keys) and torch.equal(attended.value, values)
        assert (attended.rope is None) == (number in FAMILIES[name].no_rope)
        torch.testing.assert_close(attended.before_rope(keys).double(), before, rtol=1e-4, atol=1e-4)
        x, gradient = torch.randn(2, *keys.shape, generator=torch.Generator().manual_seed(number))
        moved = (attended.after_rope(x) * gradient).sum()
        torch.testing.assert_close((x * attended.gradient_before_rope(gradient)).sum(), moved, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SUPPORTED)
def test_attention_maps_are_the_familys_own(name):
    """Its softcap, its sinks, its scaling and its sliding windows."""
    model, ids = FAMILIES[name].build(), token_ids(1, TOKENS)
    decoder = find_decoder(model)
    numbers = [number for number, attention in enumerate(attention_modules(decoder)) if attention is not None]
    request = CaptureRequest(("attention_scores",), tuple(numbers), (), (0, 1))
    found = capture_window(decoder, ids, request)["attention_scores"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = [weights for weights in model(ids, output_attentions=True).attentions if weights is not None]
    for number, weights in zip(numbers, own, strict=True):
        scores = found[f"layers.{number}.scores"].float()
        torch.testing.assert_close(scores, weights[0, [0, 1]].float(), rtol=2e-3, atol=1e-3)


def test_watching_is_undone_after_an_error():
    model = built("qwen3_next")
    decoder, ids = find_decoder(model), token_ids(1, 8)
    configs = [getattr(attention, "config", None) for attention in attention_modules(decoder)]
    before = model(ids).logits

    def fail(attended: Attended) -> None:
        raise KeyError("the disk is full")

    with pytest.raises(KeyError), watching(decoder, fail):
        model(ids)
    after = [getattr(attention, "config", None) for attention in attention_modules(decoder)]
    assert all(one is other for one, other in zip(configs, after, strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)


def calibrated(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """All kinds of statistics of a short text."""
    decoder, windows = find_decoder(model), [token_ids(1, 120, seed) for seed in (1, 2)]
    sums = collect_key_sums(model, decoder, windows)
    width = sums.shape[1]
    threshold = collect_sink_thresholds(model, decoder, windows)
    plus = collect_transforms(model, windows, threshold) | {"sink_threshold": threshold}
    offset, half = collect_key_ranges(model, decoder, windows, 2 * 119)
    levels = collect_levels(model, decoder, windows, offset, half)
    return {
        "reorder": {"indices": indices_from_key_sums(sums, width)},
        "plus": plus | in_predictions(model, windows[:1], plus),
        "kvquant": {"key_offset": offset, "key_scale": half, **levels},
    }


@pytest.mark.parametrize("name", HYBRID)
def test_a_layer_without_attention_has_a_row_that_says_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    model, ids = built(name), token_ids(1, 120)
    model.name_or_path = name
    found, channels = calibrated(model), torch.arange(32)
    plus, kvquant = found["plus"], found["kvquant"]
    assert torch.equal(found["reorder"]["indices"][0], channels) and not kvquant["key_offset"][0].any()
    assert (
        not any(x[0].any() for x in plus.values())
        and (plus["key_cost"][1] > 0).all()
        and plus["value_cost"][1].min() > 0
    )
    even = (torch.arange(4) + 0.5) / 2 - 1
    torch.testing.assert_close(kvquant["key_levels2"][0], even, rtol=0, atol=1e-3)
    for tensor in (found["reorder"]["indices"], *plus.values(), *kvquant.values()):
        assert not torch.equal(tensor[0], tensor[1])
    for kind, preset in (("reorder", "RotateKV2"), ("plus", "RotateKV2+"), ("kvquant", "KVQuant2")):
        path = save_statistics(tmp_path / f"{kind}.safetensors", kind, found[kind], {})
        load_statistics(kind, CalibrationTarget(name, 2, 2, 16), path)
        with patch_model(model, preset, path), torch.no_grad():
            assert model(ids).logits.isfinite().all()
    codecs, _ = presets_for(model, "plus", tmp_path / "plus.safetensors")
    errors = score_errors(model, [ids], codecs)["RotateKV3+"]
    assert errors[0] == 0 < errors[1] < 0.5
    assert f"{errors[1]:>8.2f}  1: {errors[1]:.2f}, 0: 0.00" in describe({"RotateKV3+": errors})[-1]


def test_scores_outside_a_sliding_window_do_not_count():
    """Layer 0 slides: what codes get wrong in keys that no query sees any more is no error."""
    model, ids = built("gemma3"), token_ids(1, 200)
    attended = watched(model, ids)
    assert [attended[number].sees.sum(1).max().item() for number in (0, 1)] == [24, 200]
    for layer in attended.values():
        asked = range(0, 200, 8)
        query, key = layer.query[0].double(), layer.key[0].double()
        means = layer.after_rope(layer.before_rope(layer.key).mean(2, keepdim=True).expand_as(layer.key))[0].double()
        codec = {"RTN2": presets_for(model)[0]["RTN2"]}
        stored = layer.stored(codec["RTN2"][layer.layer])[0][0].double()
        wrong = whole = 0.0
        for q in asked:
            first = 0 if layer.layer else max(q - 23, 0)
            for head in range(4):
                seen = (head // 2, slice(first, q + 1))
                wrong += ((stored[seen] - key[seen]) @ query[head, q]).square().sum()
                whole += ((key[seen] - means[seen]) @ query[head, q]).square().sum()
        found = score_errors(model, [ids], codec)["RTN2"][layer.layer]
        assert found.item() == pytest.approx((wrong / whole).sqrt().item(), rel=1e-3)


def test_sinks_are_given_as_a_patched_model_gives_them():
    model, ids = built("llama"), token_ids(1, 60)
    config = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)
    with patch_model(model, config) as handle, torch.no_grad():
        method = handle.spec.methods[0]
        cache = model(ids).past_key_values
    keys, values = watched(model, ids)[0].stored(method)
    assert torch.equal(keys, cache.layers[0].keys) and torch.equal(values, cache.layers[0].values)
