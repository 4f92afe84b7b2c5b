"""Perplexity over non-overlapping windows, read through the model's cache."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from rotatekv.compat import CACHE_NAME
from rotatekv.evals.running import cache_use
from rotatekv.external import new_cache
from rotatekv.models.head import TOKENS_AT_ONCE, head_logits, run_without_head


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
            output = run_without_head(model, input_ids=chunk.to(model.device), use_cache=True, **{CACHE_NAME: cache})
            hidden = output.last_hidden_state[:, : len(targets)].split(TOKENS_AT_ONCE, dim=1)
            for part, tokens in zip(hidden, targets.split(TOKENS_AT_ONCE), strict=True):
                logits = head_logits(model, output, part)[0].float()
                total += F.cross_entropy(logits, tokens.to(logits.device), reduction="sum").double().cpu()
    return {"nll": float(total) / (length - 1), **cache_use(cache)}


def perplexity(nlls: list[float | None]) -> float:
    """exp of the mean over windows of their mean negative log-likelihood, as in the paper.

    NaN where a window has none (None, as a sample's record holds what is not finite), infinity where exp overflows.
    """
    try:
        return math.exp(sum(math.nan if nll is None else nll for nll in nlls) / len(nlls))
    except OverflowError:
        return math.inf
