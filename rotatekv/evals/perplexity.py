"""Perplexity over non-overlapping windows, read through the model's cache."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from rotatekv.compat import CACHE_NAME
from rotatekv.evals.running import cache_use
from rotatekv.external import new_cache
from rotatekv.models.head import TOKENS_AT_ONCE, divergence, head_logits, run_without_head


@torch.no_grad()
def final_hidden_states(model, window: torch.Tensor) -> torch.Tensor:
    """(1, T, hidden_size) on the CPU: what an unpatched model's logits of a window (1, T) are made of."""
    return run_without_head(model, input_ids=window.to(model.device), use_cache=False).last_hidden_state.cpu()


def score_window(
    model, window: torch.Tensor, chunk_size: int | None = None, unquantized: torch.Tensor | None = None
) -> dict:
    """Score one window of a patched model, or one with HF's cache, from an empty cache.

    Args:
        window: (1, T) token ids, T ≥ 2.
        chunk_size: feed the window this many tokens at a time, so that later chunks read what earlier ones stored;
            None feeds it at once.
        unquantized: ``final_hidden_states`` of the window, to compare predictions with.

    Returns:
        ``nll``, mean negative log-likelihood in nats per predicted token, and what ``cache_use`` measures; with
        ``unquantized`` also ``kl``, the mean Kullback-Leibler divergence from those predictions in nats per token.
    """
    cache = new_cache(model)
    length = window.shape[1]
    total, moved = torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
    with torch.no_grad():
        for start in range(0, length, chunk_size or length):
            chunk = window[:, start : start + (chunk_size or length)]
            # A chunk's last logits predict the next chunk's first token; the window's last predict nothing.
            targets = window[0, start + 1 : start + 1 + chunk.shape[1]]
            output = run_without_head(model, input_ids=chunk.to(model.device), use_cache=True, **{CACHE_NAME: cache})
            for first in range(0, len(targets), TOKENS_AT_ONCE):
                some = slice(first, min(first + TOKENS_AT_ONCE, len(targets)))
                logits = head_logits(model, output, output.last_hidden_state[:, some])[0].float()
                total += F.cross_entropy(logits, targets[some].to(logits.device), reduction="sum").double().cpu()
                if unquantized is not None:
                    known = unquantized[:, start + some.start : start + some.stop].to(logits.device)
                    moved += divergence(head_logits(model, output, known)[0].float().log_softmax(-1), logits)
    scores = {"nll": float(total) / (length - 1)}
    if unquantized is not None:
        scores["kl"] = moved / (length - 1)
    return scores | cache_use(cache)


def perplexity(nlls: list[float | None]) -> float:
    """exp of the mean over windows of their mean negative log-likelihood, as in the paper.

    NaN where a window has none (None, as a sample's record holds what is not finite), infinity where exp overflows.
    """
    try:
        return math.exp(sum(math.nan if nll is None else nll for nll in nlls) / len(nlls))
    except OverflowError:
        return math.inf
