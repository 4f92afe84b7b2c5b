"""The patched attention: stock logits and weights under FP16, and what a quantizing cache hands to Hugging Face's own
function. ``test_families.py`` compares 2 bits with an oracle, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits, tiny_model, token_ids
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotatekv import PRESETS, RotateKVCache, patch_model

PHI3 = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_fp16_gives_the_stock_logits_at_once_and_in_chunks(family, attention):
    model = tiny_model(family, attn_implementation=attention, **(PHI3 if family == "phi3" else {}))
    ids, chunks = token_ids(2, 21), (1, 9, 1, 1, 5, 4)
    with torch.no_grad():
        stock = model(ids).logits
        with patch_model(model, "FP16"):
            assert torch.equal(model(ids).logits, stock)
            assert torch.equal(model(ids, use_cache=False).logits, stock)
            cache = RotateKVCache.for_model(model)
            torch.testing.assert_close(logits(model, cache, ids, chunks), stock, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fp16_gives_the_stock_logits_of_a_left_padded_batch_with_its_own_positions(any_family, attention):
    any_family.set_attn_implementation(attention)
    ids, mask = token_ids(2, 14), left_padding(14, 5, 0)
    chunks = (8, 3, 1, 1, 1)
    stock = logits(any_family, DynamicCache(config=any_family.config), ids, chunks, mask)
    with patch_model(any_family, "FP16"):
        ours = logits(any_family, RotateKVCache.for_model(any_family), ids, chunks, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=1e-4, atol=2e-4)


def test_eager_attention_returns_the_stock_attention_weights(any_family):
    any_family.set_attn_implementation("eager")
    ids = token_ids(1, 9)
    with torch.no_grad():
        stock = any_family(ids, output_attentions=True, output_hidden_states=True)
        with patch_model(any_family, "FP16"):
            ours = any_family(ids, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == len(stock.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, stock.attentions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True))


def test_a_key_is_given_rope_at_its_own_position_on_every_read():
    """What attention sees of layer 0: the stored keys, transformed back, with RoPE at each row's positions."""
    model = tiny_model("llama").double()
    ids, positions = token_ids(2, 7), torch.tensor([[0, 0, 0, 0, 1, 2, 3], [50, 51, 52, 53, 90, 91, 92]])
    seen = {}

    def note(module, query, key, value, *args, **kwargs):
        seen.setdefault(module.layer_idx, []).append(key)
        return query.transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = replace(PRESETS["RotateKV4"], Outlier_Aware_Key_Rotation=False, Attention_Sink_Aware=False)
    with patch_model(model, config), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", note)
        cache = RotateKVCache.for_model(model)
        model(ids[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        model(ids[:, 4:], position_ids=positions[:, 4:], past_key_values=cache)
        assert torch.equal(cache.positions, positions.int())
        method, packed = cache.layers[0].method, cache.layers[0].packed.keys
        keys = method.keys_out(method.decode_keys(packed.tokens())).double()
        cos, sin = model.model.rotary_emb(torch.empty(0, dtype=torch.double), position_ids=positions)
        want = apply_rotary_pos_emb(keys, keys, cos, sin)[0]
    assert seen[0][0].shape[2] == 4 and seen[0][1].shape[2] == 7
    torch.testing.assert_close(seen[0][1], want, rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_is_refused_where_it_would_attend_without_the_cache():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    with patch_model(model, "FP16"), pytest.raises(RuntimeError, match="switch gradient checkpointing off"):
        model(torch.randint(3, 128, (1, 9)))
