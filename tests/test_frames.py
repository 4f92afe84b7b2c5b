"""Keys in frames: with a codec that does not round, every family gives the stock model's logits.

``test_nothing_but_the_rounding_is_lost`` has each family's kind of RoPE: plain, linear, llama3, YaRN (llama, gpt_oss),
partial (phi, glm, stablelm, gpt_neox, qwen3_next), interleaved (cohere, glm), none in a layer (smollm3, cohere2),
of two bases (gemma3, olmo3), in full and in sliding layers. Its runs are decode steps, a left-padded batch in chunks,
crops and beams. ``test_positions_with_holes_and_restarts`` has positions that jump, stand still and begin again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import SUPPORTED, token_ids
from test_families import KINDS_OF_LAYERS, PADDED, RUNS, TOKENS, built
from torch import nn
from transformers import DynamicCache

from benchmarks.random_models import random_statistics
from rotatekv import PRESETS, RotateKVCache
from rotatekv.families import attention_modules, find_text_model, layer_geometry
from rotatekv.methods import rotatekv_plus
from rotatekv.methods.rotatekv_plus import RotateKVPlus
from rotatekv.methods.stores import TokenStore
from rotatekv.patching.handle import PatchHandle
from rotatekv.patching.patch import first_geometry, patch_with_methods
from rotatekv.rope import KeyFrames
from rotatekv.statistics import CalibrationTarget

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = replace(PRESETS["RotateKV2+"], residual_length=0, Attention_Sink_Aware=False, sink_selection="detected")
FRAME = 24  # several in a text, no multiple of a block
OFTEN = ("llama, yarn", "mistral, sliding", "gemma3", "phi", "smollm3", "cohere2", "gpt_oss")


class Unrounded(RotateKVPlus):
    """RotateKV+ whose components are stored as they are, at once: no window, which has 16 bits, and no sinks."""

    tokens_per_flush = 1

    def __init__(self, *args):
        super().__init__(*args)
        self.key_frames = KeyFrames(FRAME, self.key_transform.mean)
        self.key_transform, self.value_transform = (
            replace(x, given_back=0.0) for x in (self.key_transform, self.value_transform)
        )

    def key_store(self):
        return TokenStore()

    def value_store(self):
        return TokenStore()

    def _encode(self, channels, transform):
        return {"components": channels}

    def _decode(self, tokens, transform):
        return tokens["components"]


def patch_unrounded(model: nn.Module, codec: type[RotateKVPlus] = Unrounded) -> PatchHandle:
    text_model = find_text_model(model)
    attentions, geometry = attention_modules(text_model), first_geometry(text_model)
    geometries = [None if attention is None else layer_geometry(attention) for attention in attentions]
    target = CalibrationTarget("", len(attentions), geometry.num_key_value_heads, geometry.head_dim)
    statistics = codec.plan(CONFIG, random_statistics("plus", target), geometries)
    methods = [
        None if geometry is None else codec(CONFIG, geometry, {name: x[number] for name, x in statistics.items()})
        for number, geometry in enumerate(geometries)
    ]
    return patch_with_methods(model, CONFIG, methods)


def assert_same(found: torch.Tensor, want: torch.Tensor) -> None:
    assert (found - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("name", "run"),
    [
        *((name, run) for name in SUPPORTED for run in ("decode", "padded chunks")),
        *((name, run) for name in KINDS_OF_LAYERS for run in ("crop", "beams")),
    ],
)
def test_nothing_but_the_rounding_is_lost(name, run):
    model, (step, mask) = built(name, torch.float32), RUNS[run]
    ids = token_ids(len(mask), TOKENS)
    want = step(model, DynamicCache(config=model.config), ids, mask)
    with patch_unrounded(model):
        found = step(model, RotateKVCache.for_model(model), ids, mask)
    real = mask.bool() if run != "beams" else ...
    assert_same(found[real], want[real])


def stepped(model: nn.Module, cache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    parts, start = [], 0
    with torch.no_grad():
        for tokens in (30, 14, 1, 1, 10):
            now = slice(start, start + tokens)
            parts.append(model(ids[:, now], position_ids=positions[:, now], past_key_values=cache).logits)
            start += tokens
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", OFTEN)
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_with_holes_and_restarts(name, rows):
    """The second row has others."""
    model, ids = built(name, torch.float32), token_ids(rows, TOKENS)
    first = [*range(10), *range(110, 130), 129, 129, *range(3, 15), *range(TOKENS - 44)]
    positions = torch.tensor([first, [7, 3, *range(40, 38 + TOKENS)]])[:rows]
    want = stepped(model, DynamicCache(config=model.config), ids, positions)
    assert not torch.allclose(want, stepped(model, DynamicCache(config=model.config), ids, 0 * positions))
    with patch_unrounded(model):
        assert_same(stepped(model, RotateKVCache.for_model(model), ids, positions), want)


def test_the_test_sees_what_rounding_and_a_wrong_mean_do():
    model, (step, mask) = built("llama", torch.float32), RUNS["padded chunks"]
    ids, real = token_ids(len(mask), TOKENS), PADDED.bool()
    want = step(model, DynamicCache(config=model.config), ids, mask)[real]

    class WrongMean(Unrounded):
        def decode_keys(self, tokens):
            return super().decode_keys(tokens) + 0.01

    for codec in (WrongMean, RotateKVPlus):
        with patch_unrounded(model, codec), pytest.raises(AssertionError):
            assert_same(step(model, RotateKVCache.for_model(model), ids, mask)[real], want)
    assert rotatekv_plus.FRAME == 128
