"""Attention-Sink-Aware quantization: find the tokens that carry massive activations (paper section 4.3)."""

from __future__ import annotations

import torch


def detect_sinks(
    hidden_states: torch.Tensor, num_entries: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens holding the ``num_entries`` largest magnitudes of a layer's input hidden states, per sequence.

    Several entries may fall on one token, so a sequence has at most ``num_entries`` sinks.

    Args:
        hidden_states: (B, T, hidden_size), the input of the decoder layer.
        token_mask: (B, T) bool, False at padding, which is never a sink.

    Returns:
        rows, columns: (S,) int32 each, the sequence and the token of every sink, sorted.
    """
    magnitudes = hidden_states.detach().abs()
    if token_mask is not None:
        token_mask = token_mask.to(magnitudes.device)
        magnitudes = magnitudes.masked_fill(~token_mask.unsqueeze(-1), -1.0)
    batch, tokens, width = magnitudes.shape
    flat = magnitudes.flatten(1)  # (B, T·hidden_size)
    top = flat.topk(min(num_entries, tokens * width), dim=1)
    is_sink = torch.zeros(batch, tokens, dtype=torch.bool, device=flat.device)
    is_sink.scatter_(1, top.indices // width, True)
    if token_mask is not None:
        is_sink &= token_mask
    rows, columns = is_sink.nonzero(as_tuple=True)
    return rows.int(), columns.int()


def first_sinks(
    hidden_states: torch.Tensor, num_tokens: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``num_tokens`` tokens of every sequence; takes and returns what ``detect_sinks`` does.

    For the ablation of the detector: what a method keeps that takes the sinks to be the first tokens.
    """
    batch, tokens, _ = hidden_states.shape
    if token_mask is None:
        token_mask = torch.ones(batch, tokens, dtype=torch.bool, device=hidden_states.device)
    token_mask = token_mask.to(hidden_states.device)
    rows, columns = (token_mask & (token_mask.cumsum(1) <= num_tokens)).nonzero(as_tuple=True)
    return rows.int(), columns.int()
