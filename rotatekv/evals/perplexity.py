"""Perplexity over non-overlapping windows, read through the model's cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from rotatekv.compat import CACHE_NAME
from rotatekv.evals.running import cache_use
from rotatekv.external import new_cache

_LOSS_CHUNK = 512  # tokens whose logits are held at once


def score_window(model, window: torch.Tensor, chunk_size: int | None = None) -> dict:
    """Score one window of a patched model, or one with HF's cache, from an empty cache.

    Args:
        window: (1, T) token ids, T ≥ 2.
        chunk_size: feed the window this many tokens at a time, so that later chunks read what earlier ones stored;
            None feeds it at once.

    Returns:
        ``nll``, mean negative log-likelihood in nats per predicted token, and what ``cache_use`` measures.
    """
    cache = new_cache(model)
    length = window.shape[1]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for start in range(0, length, chunk_size or length):
            chunk = window[:, start : start + (chunk_size or length)]
            # A chunk's last logits predict the next chunk's first token; the window's last predict nothing.
            targets = window[0, start + 1 : start + 1 + chunk.shape[1]]
            for part, logits in zip(targets.split(_LOSS_CHUNK), _logits(model, chunk, cache), strict=False):
                nll = F.cross_entropy(logits[: len(part)].float(), part.to(logits.device), reduction="sum")
                total += nll.double().cpu()
    return {"nll": float(total) / (length - 1), **cache_use(cache)}


def perplexity(nlls: list[float | None]) -> float:
    """exp of the mean over windows of their mean negative log-likelihood, as in the paper.

    NaN where a window has none (None, as a sample's record holds what is not finite), infinity where exp overflows.
    """
    try:
        return math.exp(sum(math.nan if nll is None else nll for nll in nlls) / len(nlls))
    except OverflowError:
        return math.inf


def _logits(model, ids: torch.Tensor, cache) -> Iterator[torch.Tensor]:
    """The (≤ 512, vocabulary) logits of one call, part by part: a large vocabulary's would be gigabytes.

    The model without its head runs once. What is made of a part of its output is the model's own forward's: that of a
    shallow copy, whose inner model gives that part.
    """
    base = getattr(model, model.base_model_prefix)
    output = base(input_ids=ids.to(model.device), use_cache=True, **{CACHE_NAME: cache})
    head = copy.copy(model)
    for part in output.last_hidden_state.split(_LOSS_CHUNK, dim=1):
        held = _Held(type(output)(**{**output, "last_hidden_state": part}))
        head._modules = {**model._modules, model.base_model_prefix: held}
        yield type(model).forward(head, input_ids=ids[:, : part.shape[1]]).logits[0]


class _Held(nn.Module):
    """Stands where a model was: its output is there already."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output
