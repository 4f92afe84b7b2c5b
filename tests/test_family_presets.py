"""The other methods in a few families: their codecs around Hugging Face's own cache and attention, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits
from families import FAMILIES, find_decoder, token_ids
from oracle import OracleCache, watching
from torch import nn
from transformers import DynamicCache

from benchmarks.random_models import random_statistics
from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.cache.layer import RotateKVLayer
from rotatekv.methods import rotatekv_plus
from rotatekv.patching.patch import first_geometry
from rotatekv.statistics import CalibrationTarget, save_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
KIVI = {"k_groupsize": 16, "v_groupsize": 16, "residual_length": 8}
CONFIGS = {
    "RTN2": PRESETS["RTN2"],
    "QuaRot2": PRESETS["QuaRot2"],
    "TurboQuant2": PRESETS["TurboQuant2"],
    "KVQuant2": PRESETS["KVQuant2"],
    "KIVI2": replace(PRESETS["KIVI2"], **KIVI),
    "RotateKV2+": replace(PRESETS["RotateKV2+"], residual_length=16, residual_bits=16),
}
NAMES = ("llama, yarn", "mistral, sliding", "gemma3, one head of 256", "smollm3", "glm", "gpt_neox")
TOKENS = 56


class CodecCache(OracleCache):
    """Every token's keys and values as a codec of the package gives them back, once they have left the window.

    A call has one token where a window keeps some.
    """

    def __init__(self, model: nn.Module, name: str, methods):
        super().__init__(model, FAMILIES[name])
        self.methods, self.history = methods, {}
        layers = DynamicCache(config=model.config).layers
        self.sliding_windows = [getattr(layer, "sliding_window", None) for layer in layers]
        self.keeps = methods[0].config.residual_length > 0 or methods[0].tokens_per_flush > 1

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        method = self.methods[layer_idx]
        recent, group = method.residual_length(self.sliding_windows[layer_idx]), method.tokens_per_flush
        positions = self.position_ids.expand(len(key_states), -1)
        new = [key_states, value_states, positions, self.exact_of(method, layer_idx)]
        if self.keeps:
            new[:2] = [x.half().to(x.dtype) for x in new[:2]]
        axes = 2, 2, 1, 1
        old = self.history.get(layer_idx, [x.narrow(axis, 0, 0) for x, axis in zip(new, axes, strict=True)])
        held = [torch.cat(pair, axis) for pair, axis in zip(zip(old, new, strict=True), axes, strict=True)]
        self.history[layer_idx] = held
        keys, values, positions, exact = held
        packed = max(keys.shape[2] - recent, 0) // group * group
        fake = self.decoded(method, layer_idx, keys[:, :, :packed], values[:, :, :packed], positions[:, :packed])
        kept = exact[:, None, :packed, None]
        whole = []
        for x, y in zip((keys, values), fake, strict=True):
            whole.append(torch.cat([torch.where(kept, x[:, :, :packed].half().to(x.dtype), y), x[:, :, packed:]], 2))
        seen = DynamicCache.update(self, key_states, value_states, layer_idx)[0].shape[2]
        return tuple(x[:, :, -seen:] for x in whole)

    def decoded(self, method, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor):
        if not keys.shape[2]:
            return keys, values
        now, self.position_ids = self.position_ids, positions
        back, forth, mean = None, None, 0.0
        if method.keys_before_rope:
            angles, scaling = self.angles(layer)
            back, forth = (
                (angles.cos() / scaling, -angles.sin() / scaling),
                (angles.cos() * scaling, angles.sin() * scaling),
            )
        elif method.key_frames is not None:
            back, forth, mean = self.frames(method, layer, positions)
        plain = keys.double() if back is None else self.turned(keys.double(), *back)
        plain = plain - mean
        fake = method.keys_out(method.decode_keys(method.encode_keys(method.keys_in(plain.float())))).double() + mean
        fake = fake if forth is None else self.turned(fake, *forth)
        self.position_ids = now
        of_values = method.values_out(method.decode_values(method.encode_values(method.values_in(values.float()))))
        return fake.to(keys.dtype), of_values.to(values.dtype)

    def frames(self, method, layer: int, positions: torch.Tensor):
        """cos and sin to turn keys back by the position of their frame's first token, and forth, and the keys' mean
        turned to the place of each in the frame."""
        size, mean = method.key_frames.size, method.key_frames.mean.double()[None, :, None]
        first = positions[:, torch.arange(positions.shape[1]) // size * size]
        self.position_ids = first
        of_frame, _ = self.angles(layer)
        self.position_ids = positions - first
        angles, _ = self.angles(layer)
        mean = mean.expand(len(positions), -1, positions.shape[1], -1)
        forth = of_frame.cos(), of_frame.sin()
        return (forth[0], -forth[1]), forth, self.turned(mean, angles.cos(), angles.sin())

    def exact_of(self, method, layer: int) -> torch.Tensor:
        """(B, T) bool of the call's tokens: those that stay in float16."""
        states, config = self.states[layer], method.config
        if config.sink_selection == "massive":
            return states.abs().amax(-1) > method.sink_threshold
        first = self.position_ids.expand(len(states), -1) == 0
        return first & (config.Attention_Sink_Aware and config.sink_selection == "first")


def statistics_of(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    geometry = first_geometry(find_decoder(model))
    target = CalibrationTarget("", len(find_decoder(model).layers), geometry.num_key_value_heads, geometry.head_dim)
    found = random_statistics(kind, target)
    if kind == "plus":
        found["sink_threshold"] = massive_thresholds(model)
    return found


def massive_thresholds(model: nn.Module) -> torch.Tensor:
    """(L, 1), of which one token in ten lies above."""
    thresholds = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: thresholds.append(args[0].abs().amax(-1).quantile(0.9)))
        for layer in find_decoder(model).layers
    ]
    logits(model, DynamicCache(config=model.config), token_ids(2, TOKENS), (TOKENS,))
    for hook in hooks:
        hook.remove()
    return torch.stack(thresholds).float()[:, None]


@pytest.fixture
def patched(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    monkeypatch.setattr(rotatekv_plus, "FRAME", 24)  # several frames in a text

    def patch(model: nn.Module, config):
        kind = {"kvquant": "kvquant", "rotatekv_plus": "plus"}.get(config.method)
        path = kind and save_statistics(tmp_path / "statistics.safetensors", kind, statistics_of(model, kind), {})
        return patch_model(model, config, path)

    return patch


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_its_codec_around_hugging_faces_cache(name, preset, patched):
    model, ids, config = FAMILIES[name].build(torch.float64), token_ids(2, TOKENS), CONFIGS[preset]
    stock = logits(model, DynamicCache(config=model.config), ids, (TOKENS,))
    with patched(model, config) as handle:
        got = logits(model, RotateKVCache.for_model(model), ids, (40, 1, 1, 14))
        methods = handle.spec.methods
    oracle = CodecCache(model, name, methods)
    with watching(oracle):
        want = logits(model, oracle, ids, (1,) * TOKENS if oracle.keeps else (40, 1, 1, 14))
    unit = (want - stock).std()
    assert unit > 0.02 * stock.std(), "nothing was quantized"
    difference = (got - want).abs() / unit
    assert difference.median() < 1e-6 and difference.mean() < 1e-3


@pytest.mark.parametrize("preset", ["KIVI2", "KVQuant2", "RotateKV2+"])
@pytest.mark.parametrize("name", ["mistral, sliding", "gemma3", "gpt_oss", "lfm2"])
def test_rows_of_a_padded_batch_are_those_rows_alone(name, preset, patched):
    """One row is all padding in the first call."""
    model, ids, config = FAMILIES[name].build(torch.float64), token_ids(3, TOKENS), CONFIGS[preset]
    with patched(model, config):
        cache = RotateKVCache.for_model(model)
        batch = logits(model, cache, ids, (30, 14, 1, 1, 10), left_padding(TOKENS, 0, 7, 33))
        for row, left, chunks in ((0, 0, (30, 14, 1, 1, 10)), (1, 7, (23, 14, 1, 1, 10)), (2, 33, (11, 1, 1, 10))):
            one = RotateKVCache.for_model(model)
            alone = logits(model, one, ids[row : row + 1, left:], chunks)
            torch.testing.assert_close(batch[row : row + 1, left:], alone, rtol=0, atol=1e-9)
            for ours, theirs in zip(cache.layers, one.layers, strict=True):
                if isinstance(theirs, RotateKVLayer):
                    kept = theirs.keys.shape[2]
                    assert torch.equal(ours.keys[row, :, -kept:], theirs.keys[0])
                    assert torch.equal(ours.values[row, :, -kept:], theirs.values[0])
