"""The oracle itself: it undoes each family's RoPE, and what it does around the rounding loses nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import left_padding, logits
from families import FAMILIES, SUPPORTED, random_orders, token_ids
from oracle import OracleCache, watching
from transformers import DynamicCache


class Noting(OracleCache):
    """Notes the keys before RoPE."""

    def before_rope(self, keys, layer):
        plain = super().before_rope(keys, layer)
        self.noted = {**getattr(self, "noted", {}), layer: plain}
        return plain


@pytest.mark.parametrize("name", SUPPORTED)
def test_keys_before_rope_do_not_depend_on_where_a_text_begins(name):
    """Other frequencies or pairs of channels than the model's would show, by numbers of the keys' own size."""
    family, ids, found = FAMILIES[name], token_ids(1, 30), []
    model = family.build(torch.float64)
    for start in (0, 77):
        with watching(Noting(model, family, bits=None)) as cache, torch.no_grad():
            model(ids, past_key_values=cache, position_ids=torch.arange(start, start + 30)[None])
            found.append(cache.noted)
    assert found[0] and found[0].keys() == found[1].keys()
    for layer, keys in found[0].items():
        torch.testing.assert_close(keys, found[1][layer], rtol=0, atol=5e-3)


def test_yarns_factor_is_divided_out():
    family = FAMILIES["llama, yarn"]
    model, projected = family.build(torch.float64), []
    assert model.model.rotary_emb.attention_scaling > 1.1
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, keys: projected.append(keys))
    with watching(Noting(model, family, bits=None)) as cache:
        logits(model, cache, token_ids(1, 30), (30,))
    torch.testing.assert_close(cache.noted[0].transpose(1, 2).flatten(2), projected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_without_rounding_the_oracle_is_the_stock_model(name):
    family, ids, mask, chunks = FAMILIES[name], token_ids(3, 60), left_padding(60, 0, 7, 13), (50, 1, 1, 8)
    model = family.build(family.widest)
    stock = logits(model, DynamicCache(config=model.config), ids, chunks, mask)[mask.bool()]
    orders = random_orders(model)
    with watching(OracleCache(model, family, orders, bits=None, entries=0)) as cache:
        torch.testing.assert_close(logits(model, cache, ids, chunks, mask)[mask.bool()], stock, rtol=0, atol=1e-4)
    with watching(OracleCache(model, family, orders)) as cache:
        quantized = logits(model, cache, ids, chunks, mask)[mask.bool()]
    assert (quantized - stock).std() > 0.03 * stock.std(), "attention does not matter in this model"
