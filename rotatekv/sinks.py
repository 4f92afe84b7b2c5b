"""Attention-Sink-Aware quantization: the tokens that stay unquantized, by massive activations."""

from __future__ import annotations

import torch

from rotatekv.config import QuantConfig


def sinks_of(
    config: QuantConfig, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that ``config`` keeps unquantized; see ``detect_sinks`` and ``first_tokens``."""
    if config.sink_selection == "first":
        return first_tokens(hidden_states, config.num_sink_entries, token_mask)
    return detect_sinks(hidden_states, config.num_sink_entries, token_mask)


def first_tokens(
    hidden_states: torch.Tensor, count: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` tokens of each sequence, padding left out (KVQuant, arXiv 2401.18079: one).

    Args, returns: as ``detect_sinks``.
    """
    real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    if token_mask is not None:
        real = token_mask.to(hidden_states.device)
    rows, columns = (real & (real.cumsum(1) <= count)).nonzero(as_tuple=True)
    return rows.int(), columns.int()


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
