"""How much smaller the cache is than 16 bits a number, measured on real caches of 8192 tokens with 20 sinks a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from rotatekv import PRESETS
from rotatekv.cache.cache import RotateKVCache
from rotatekv.cache.sinks import FirstCallSinks
from rotatekv.cache.spec import CacheSpec
from rotatekv.methods import LayerGeometry, build_method

TOKENS = 8192


@pytest.mark.parametrize(("kv_heads", "head_dim", "least"), [(8, 128, 7.0), (3, 64, 6.0)])
def test_bytes_against_16_bits_at_8k(kv_heads, head_dim, least):
    config = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)
    method = build_method(config, LayerGeometry(0, kv_heads, head_dim))
    text_config = LlamaConfig(num_hidden_layers=1)
    cache = RotateKVCache(CacheSpec(config, (method,), "none", (None,), text_config))
    cache.begin_forward(torch.arange(TOKENS).view(1, -1), 1, None)
    layer, numbers = cache.layers[0], torch.randn(1, kv_heads, TOKENS, head_dim)
    sinks = FirstCallSinks(torch.zeros(20, dtype=torch.int32), torch.arange(0, 8000, 400, dtype=torch.int32))
    layer.update(numbers, numbers, sinks=sinks)
    in_16_bits = 2 * 2 * kv_heads * head_dim * TOKENS
    assert layer.sinks.keys.shape[0] == 20
    ratio = in_16_bits / cache.nbytes()  # positions included, though they are kept once for all layers
    print(f"{kv_heads} × {head_dim}: {ratio:.2f}")
    assert ratio >= least
