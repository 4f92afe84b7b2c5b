"""Speculative decoding is greedy decoding: the same tokens and logits under every preset, and a cache without a trace
of what was rejected.

The models are float64 and decode in torch, so that rounding, which differs with a call's length, tips no number over.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_generate import generate, patch_calibrated, varied_ids
from test_kvquant import random_statistics as kvquant_statistics
from test_rotatekv_plus import random_statistics as plus_statistics
from test_sinks import naive_sinks

from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.cache.record import MOST_CROPPED
from rotatekv.statistics import save_statistics

NAMES = [
    "FP16",
    "RTN2",
    "KIVI2",
    "KIVI4",
    "QuaRot2",
    "TurboQuant2",
    "KVQuant2",
    "RotateKV2",
    "RotateKV3",
    "RotateKV4",
    "RotateKV2+",
    "RotateKV3+",
    "RotateKV4+",
]
PROMPT, NEW = 152, 14  # a group of KIVI and a block of RotateKV+ are packed at 160 tokens


def patched_with_statistics(model, preset: str, folder, **changes):
    config = replace(PRESETS[preset], **changes)
    if config.method == "kivi":
        config = replace(config, v_groupsize=16)
    if config.method == "rotatekv":
        return patch_calibrated(model, folder, config)
    statistics = {"rotatekv_plus": ("plus", plus_statistics(8.0)), "kvquant": ("kvquant", kvquant_statistics())}
    kind, tensors = statistics.get(config.method, (None, None))
    path = save_statistics(folder / f"{kind}.safetensors", kind, tensors, {}) if kind else None
    return patch_model(model, config, path)


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")


@pytest.fixture
def crops(monkeypatch) -> list[int]:
    """How many tokens each crop of the model's cache took away, in minus."""
    taken, crop = [], RotateKVCache.crop
    monkeypatch.setattr(RotateKVCache, "crop", lambda self, n: (taken.append(int(n)), crop(self, n))[1])
    return taken


def prompt() -> torch.Tensor:
    return torch.cat([varied_ids(), varied_ids()[:, : PROMPT - 125]], dim=1)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant model"])
@pytest.mark.parametrize("preset", NAMES)
def test_speculative_decoding_is_greedy(preset, way, tmp_path, crops):
    model = tiny_model().double()
    options = {"prompt_lookup_num_tokens": 5}
    if way == "assistant model":
        options = {"assistant_model": copy.deepcopy(model)}
    many = {"num_sink_entries": 60} if preset in ("RotateKV2", "RotateKV3", "RotateKV4") else {}  # sinks at the edge
    with patched_with_statistics(model, preset, tmp_path, **many):
        plain = generate(model, prompt(), max_new_tokens=NEW, min_new_tokens=NEW)
        quick = generate(model, prompt(), max_new_tokens=NEW, min_new_tokens=NEW, **options)
    assert min(crops) < 0 or (preset == "FP16" and way == "assistant model")
    assert torch.equal(quick.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(quick.logits), torch.stack(plain.logits), rtol=1e-6, atol=5e-6)
    for ours, theirs in zip(quick.past_key_values.tensors(), plain.past_key_values.tensors(), strict=True):
        assert ours.shape == theirs.shape


def layer_inputs(model, ids) -> tuple[RotateKVCache, list[torch.Tensor]]:
    """A recording cache of one call, and what each layer was given in it."""
    seen, cache = [], RotateKVCache.for_model(model)
    cache.activate_past_recording()
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0])) for layer in model.model.layers]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return cache, seen


@pytest.mark.parametrize("tokens, residual_length", [(12, 0), (12, 7), (90, 0)])
def test_a_crop_into_the_first_call_has_the_sinks_of_the_tokens_that_stayed(tokens, residual_length, tmp_path):
    """Layer 0, whose input is no other layer's output, is to the bit what the shorter prompt alone makes of it."""
    model, came_back = tiny_model().double(), 0
    ids = torch.randint(8, 128, (2, tokens), generator=torch.Generator().manual_seed(5))
    changes = {"num_sink_entries": 9, "residual_length": residual_length}
    with patched_with_statistics(model, "RotateKV2", tmp_path, **changes), torch.no_grad():
        for removed in (0, 1, 5, min(tokens, MOST_CROPPED) - 1):
            cache, seen = layer_inputs(model, ids)
            before = [sinks(layer) for layer in cache.layers]
            cache.crop(-removed)
            short = RotateKVCache.for_model(model)
            model(ids[:, : tokens - removed], past_key_values=short)
            for kind in ("keys", "values"):
                ours, theirs = (list(each.layers[0].tensors(kind)) for each in (cache, short))
                assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
            for layer, hidden, earlier in zip(cache.layers, seen, before, strict=True):
                assert sinks(layer) == naive_sinks(hidden[:, : tokens - removed], 9)
                came_back += len(set(sinks(layer)) - set(earlier))
    assert came_back, "no token was crowded out of the sinks"


@pytest.mark.parametrize("preset", ["KIVI2", "RotateKV2+"])
def test_a_crop_into_a_long_call_gives_its_window_back(preset, tmp_path):
    model, ids = tiny_model().double(), prompt()
    with patched_with_statistics(model, preset, tmp_path, residual_length=16), torch.no_grad():
        for before, removed in ((0, 1), (0, MOST_CROPPED), (2, 48), (70, MOST_CROPPED), (151, 1)):
            cropped, short = RotateKVCache.for_model(model), RotateKVCache.for_model(model)
            for cache, end in ((cropped, PROMPT), (short, PROMPT - removed)):
                if before:
                    model(ids[:, :before], past_key_values=cache)
                cache.activate_past_recording()
                if before < end:
                    model(ids[:, before:end], past_key_values=cache)
            cropped.crop(-removed)
            for ours, theirs in zip(cropped.layers, short.layers, strict=True):
                assert ours.packed.length == theirs.packed.length
                torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(ours.values, theirs.values, rtol=1e-6, atol=1e-6)


def sinks(layer) -> list[tuple[int, int]]:
    return list(zip(layer.sinks.batch_index.tolist(), layer.sinks.token_index.tolist(), strict=True))
