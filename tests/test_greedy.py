"""The fused kernel generates what the reference path generates: 200 greedy tokens of the embedded model."""

from __future__ import annotations

import copy

import pytest
import torch

from rotatekv import RotateKVCache, patch_model
from rotatekv.evals.texts import load_text, tokenize
from rotatekv.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")

PROMPT, STEPS = 64, 200


@pytest.fixture(scope="module")
def prompt(embedded) -> torch.Tensor:
    return tokenize(embedded[1], load_text("essays", None))[:, :PROMPT]


def decode(model, start: RotateKVCache, logits: torch.Tensor, backend: str, monkeypatch, tokens=None) -> torch.Tensor:
    """(STEPS + 1, vocabulary) logits; each token is the likeliest one, or the given one."""
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    cache, found = copy.deepcopy(start), [logits]
    for step in range(STEPS):
        token = found[-1].argmax() if tokens is None else tokens[step]
        found.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(found)


def begin(model, prompt: torch.Tensor, monkeypatch) -> tuple[RotateKVCache, torch.Tensor]:
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    cache = RotateKVCache.for_model(model)
    return cache, model(prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def test_200_greedy_tokens_are_those_of_the_reference_path(embedded, prompt, monkeypatch):
    model = embedded[0]
    with patch_model(model, "RotateKV4"), torch.no_grad():
        start = begin(model, prompt, monkeypatch)
        general = decode(model, *start, "reference", monkeypatch).argmax(-1)
        fused = decode(model, *start, "cpu", monkeypatch).argmax(-1)
    assert fused.tolist() == general.tolist()


def test_at_2_bits_the_first_other_token_is_a_tie(embedded, prompt, monkeypatch):
    """At 2 bits the layers amplify rounding, in the reference path alone too: where the two part, the two likeliest
    tokens lie closer together than the logits of that step, of the same tokens, lie apart."""
    model = embedded[0]
    with patch_model(model, "RotateKV2"), torch.no_grad():
        start = begin(model, prompt, monkeypatch)
        general = decode(model, *start, "reference", monkeypatch)
        tokens = general.argmax(-1)
        fused = decode(model, *start, "cpu", monkeypatch, tokens)
    differs = (fused.argmax(-1) != tokens).nonzero()[:, 0]
    if len(differs):
        first, second = general[differs[0]].topk(2).values
        assert first - second < (fused - general)[differs[0]].abs().max()
        assert first - second < 0.1 * (general.topk(2).values @ torch.tensor([1.0, -1.0])).median()
    assert len(differs) < STEPS / 4
