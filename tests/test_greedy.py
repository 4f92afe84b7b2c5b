"""The fused kernel decodes the embedded model as the reference path does, to what 16 bits cost.

Which token is the likeliest is no measure: the layers amplify a rounding of 1e-4 until codes are other ones, in the
reference path alone too, so that tokens part after some steps, at other steps on another CPU.
"""

from __future__ import annotations

import copy

import pytest
import torch

from rotatekv import RotateKVCache, patch_model
from rotatekv.evals.texts import load_text, tokenize
from rotatekv.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")

PROMPT, STEPS = 64, 30


def round_to_bfloat16(module: torch.nn.Module, args: tuple) -> tuple:
    return (args[0].bfloat16().to(args[0].dtype),)


def decode(model, start: RotateKVCache, tokens: torch.Tensor) -> torch.Tensor:
    """(STEPS, vocabulary) logits of the tokens, each after the ones before it."""
    cache = copy.deepcopy(start)
    return torch.stack([model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in tokens])


@pytest.mark.parametrize("method", ["RotateKV4", "RotateKV2", "RotateKV2+"])
def test_the_fused_kernel_costs_less_than_attention_in_bfloat16(embedded, method, monkeypatch):
    model, tokenizer = embedded
    text = tokenize(tokenizer, load_text("essays", None))
    prompt, tokens = text[:, :PROMPT], text[0, PROMPT : PROMPT + STEPS]
    with patch_model(model, method), torch.no_grad():
        monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
        start = RotateKVCache.for_model(model)
        model(prompt, past_key_values=start)
        reference = decode(model, start, tokens)
        hooks = [x.self_attn.o_proj.register_forward_pre_hook(round_to_bfloat16) for x in model.model.layers]
        rounded = decode(model, start, tokens)
        for hook in hooks:
            hook.remove()
        monkeypatch.setenv("ROTATEKV_BACKEND", "cpu")
        fused = decode(model, start, tokens)
    error, allowed = ((x - reference).abs().mean(-1) for x in (fused, rounded))  # (STEPS,)
    assert 0 < error[0] < allowed[0]  # no code is another one yet
    assert error.mean() < 1.5 * allowed.mean()
