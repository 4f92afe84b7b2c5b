"""A model's logits part by part: those of a few thousand tokens are gigabytes where the vocabulary is large."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import kl_div

TOKENS_AT_ONCE = 512
_FEW_TOKENS = 16  # whose logits fit a CPU's cache, where the vocabulary is large


def run_without_head(model: nn.Module, **inputs):
    """What a causal language model's inner model gives, ``last_hidden_state`` (B, T, hidden_size) among it."""
    return getattr(model, model.base_model_prefix)(**inputs)


def head_logits(model: nn.Module, output, hidden: torch.Tensor) -> torch.Tensor:
    """(B, T, vocabulary) logits of some tokens' part of ``output.last_hidden_state``.

    Args:
        output: of ``run_without_head``. hidden: (B, T, hidden_size).
    """
    head = copy.copy(model)  # shallow: its forward, with scaled or capped logits, ends what the inner model began
    done = _Done(type(output)(**{**output, "last_hidden_state": hidden}))
    head._modules = {**model._modules, model.base_model_prefix: done}
    return type(model).forward(head).logits


def divergence(wanted: torch.Tensor, logits: torch.Tensor) -> float:
    """Σ over tokens of the Kullback-Leibler divergence of (T, V) logits from wanted log-probabilities, nats."""
    total = 0.0
    for some, got in zip(wanted.split(_FEW_TOKENS), logits.split(_FEW_TOKENS), strict=True):
        total += kl_div(got.float().log_softmax(-1), some, reduction="sum", log_target=True).item()
    return total


class _Done(nn.Module):
    """Stands where the inner model was: its output is there already."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output
