"""Logits made part by part are the model's own, scaled and capped as its forward does it."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCABULARY
from torch.nn import functional as F

from rotatekv import patch_model
from rotatekv.evals import perplexity
from rotatekv.models import head
from rotatekv.models.head import head_logits, run_without_head


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "llava llama"])
def test_a_part_has_the_logits_of_the_whole(family):
    model = FAMILIES[family].build()
    for name, value in (("final_logit_softcapping", 2.0), ("logits_scaling", 3.0)):
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    ids = torch.randint(4, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    modules = dict(model.named_modules())
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        output = run_without_head(model, input_ids=ids, use_cache=False)
        parts = [head_logits(model, output, part) for part in output.last_hidden_state.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)
    assert dict(model.named_modules()) == modules and output.last_hidden_state.shape[1] == 20


@pytest.mark.parametrize("chunk_size", [None, 11, 1])
def test_a_window_scored_in_parts_has_the_loss_of_the_whole(monkeypatch, chunk_size):
    model = FAMILIES["gemma2"].build()
    ids = torch.randint(4, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]).item()
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 7)
    held = []
    monkeypatch.setattr(perplexity, "head_logits", lambda *args: held.append(head_logits(*args)) or held[-1])
    with patch_model(model, "FP16"):
        assert perplexity.score_window(model, ids, chunk_size)["nll"] == pytest.approx(want, rel=1e-5)
    assert max(logits.shape[1] for logits in held) <= 7 <= head.TOKENS_AT_ONCE


@pytest.mark.parametrize("chunk_size", [None, 11])
def test_the_divergence_is_that_of_all_words_from_the_stock_model(monkeypatch, chunk_size):
    model = FAMILIES["gemma2"].build()
    ids = torch.randint(4, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 7)
    with torch.no_grad():
        stock = model(input_ids=ids, use_cache=False).logits[0, :-1].double().softmax(-1)
    hidden = perplexity.final_hidden_states(model, ids)
    with patch_model(model, "RTN2"):
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].double().softmax(-1)
        want = (stock * (stock / found).log()).sum(-1).mean().item()
        scores = perplexity.score_window(model, ids, chunk_size, hidden)
    assert want > 1e-3 and scores["kl"] == pytest.approx(want, rel=1e-3)
    with patch_model(model, "FP16"):
        assert abs(perplexity.score_window(model, ids, chunk_size, hidden)["kl"]) < 1e-6
        assert "kl" not in perplexity.score_window(model, ids, chunk_size)
