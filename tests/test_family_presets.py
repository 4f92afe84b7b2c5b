"""The other methods in a few families: their codecs around Hugging Face's own cache and attention, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits
from families import FAMILIES, find_decoder, random_orders, token_ids
from oracle import OracleCache, watching
from torch import nn
from transformers import DynamicCache

from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.cache.layer import RotateKVLayer
from rotatekv.statistics import save_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
KIVI = {"k_groupsize": 16, "v_groupsize": 16, "residual_length": 8}
CONFIGS = {
    "RTN2": PRESETS["RTN2"],
    "QuaRot2": PRESETS["QuaRot2"],
    "TurboQuant2": PRESETS["TurboQuant2"],
    "KVQuant2": PRESETS["KVQuant2"],
    "KIVI2": replace(PRESETS["KIVI2"], **KIVI),
    "RotateKV2+": PRESETS["RotateKV2+"],
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
        self.keeps = methods[0].config.residual_length > 0 or methods[0].tokens_per_flush > 1

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        method = self.methods[layer_idx]
        config, group = method.config, method.tokens_per_flush
        positions = self.position_ids.expand(len(key_states), -1)
        new = [key_states, value_states, positions, self.exact_of(method, layer_idx)]
        if self.keeps:
            new[:2] = [x.half().to(x.dtype) for x in new[:2]]
        axes = 2, 2, 1, 1
        old = self.history.get(layer_idx, [x.narrow(axis, 0, 0) for x, axis in zip(new, axes, strict=True)])
        held = [torch.cat(pair, axis) for pair, axis in zip(zip(old, new, strict=True), axes, strict=True)]
        self.history[layer_idx] = held
        keys, values, positions, exact = held
        packed = max(keys.shape[2] - config.residual_length, 0) // group * group
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
        plain = self.before_rope(keys.double(), layer) if method.keys_before_rope else keys
        fake = method.keys_out(method.decode_keys(method.encode_keys(method.keys_in(plain.float())))).double()
        if method.keys_before_rope:
            angles, scaling = self.angles(layer)
            fake = self.turned(fake, angles.cos() * scaling, angles.sin() * scaling)
        self.position_ids = now
        of_values = method.values_out(method.decode_values(method.encode_values(method.values_in(values.float()))))
        return fake.to(keys.dtype), of_values.to(values.dtype)

    def exact_of(self, method, layer: int) -> torch.Tensor:
        """(B, T) bool of the call's tokens: those that stay in float16."""
        states, config = self.states[layer], method.config
        if config.sink_selection == "massive":
            return states.abs().amax(-1) > method.sink_threshold
        first = self.position_ids.expand(len(states), -1) == 0
        return first & (config.Attention_Sink_Aware and config.sink_selection == "first")


def statistics_of(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    orders, generator = random_orders(model), torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    shape = orders.shape
    if kind == "kvquant":
        names = [(f"{x}_levels{bits}", bits) for x in ("key", "value") for bits in (2, 3, 4)]
        levels = {name: (2 * draw(shape[0], 2**bits) - 1).sort(-1).values for name, bits in names}
        return {"key_offset": draw(*shape) - 0.5, "key_scale": 0.5 + 2 * draw(*shape), **levels}
    thresholds = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: thresholds.append(args[0].abs().amax(-1).quantile(0.9)))
        for layer in find_decoder(model).layers
    ]
    logits(model, DynamicCache(config=model.config), token_ids(2, TOKENS), (TOKENS,))
    for hook in hooks:
        hook.remove()
    return {
        "key_mean": draw(*shape) - 0.5,
        "key_scale": draw(*shape) + 0.5,
        "reorder_index": orders,
        "extra_bit_rank": torch.linspace(0, 1, 2 * shape[0]).view(-1, 2),
        "sink_threshold": torch.stack(thresholds).float()[:, None],
    }


@pytest.fixture
def patched(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")

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
