"""Attention-Sink-Aware quantization: the tokens that stay unquantized, by massive activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rotatekv.cache.cropping import MOST_CROPPED
from rotatekv.config import QuantConfig

if TYPE_CHECKING:
    from rotatekv.cache.layer import RotateKVLayer


def give_sinks(layer: RotateKVLayer, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
    """Tell a layer of the cache which tokens of the coming update stay unquantized.

    Args:
        hidden_states: (B, T, hidden_size), the input of the decoder layer.
        token_mask: (B, T) bool of these tokens, False at padding; None: there is none.
    """
    config = layer.method.config
    if config.sink_selection == "massive":
        layer.set_massive(massive_tokens(hidden_states, layer.method.sink_threshold, token_mask))
    # PAPER: sinks are found at prefill; a prefill in several calls has them chosen in the first.
    elif layer.get_seq_length() == 0 and layer.record_past and config.sink_selection == "detected":
        layer.set_sinks(*sinks_of_prefixes(hidden_states, config.num_sink_entries, MOST_CROPPED, token_mask))
    elif layer.get_seq_length() == 0:
        layer.set_sinks(*sinks_of(config, hidden_states, token_mask))


def massive_tokens(
    hidden_states: torch.Tensor, threshold: float, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T) bool: the tokens with an entry beyond ``threshold``, padding left out; a token's own business, so that it
    does not matter in which call it comes."""
    is_massive = largest_magnitude(hidden_states) > threshold
    return is_massive if token_mask is None else is_massive & token_mask.to(is_massive.device)


def largest_magnitude(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, T, hidden_size) → (B, T)."""
    return hidden_states.detach().abs().amax(-1)


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


def sinks_of_prefixes(
    hidden_states: torch.Tensor, num_entries: int, most_cropped: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sinks of the first t tokens for all t from T − ``most_cropped`` to T, each with the largest such t.

    A token that is a sink of t tokens is one of any fewer that hold it, since fewer compete.

    Returns:
        rows, columns, until: (S,) int32 each, sorted by row and column.
    """
    magnitudes = hidden_states.detach().abs()
    if token_mask is not None:
        magnitudes = magnitudes.masked_fill(~token_mask.to(magnitudes.device).unsqueeze(-1), -1.0)
    batch, tokens, width = magnitudes.shape
    shortest = max(tokens - most_cropped, 1)
    # All entries that can be among the largest: those of the shortest prefix, and each later token's own.
    first = magnitudes[:, :shortest].flatten(1)
    first = first.topk(min(num_entries, first.shape[1]), dim=1)
    later = magnitudes[:, shortest:].topk(min(num_entries, width), dim=2).values  # (B, T − shortest, ·)
    owners = torch.arange(shortest, tokens, dtype=torch.int64, device=magnitudes.device)
    owners = owners.repeat_interleave(later.shape[2])
    entries = torch.cat([first.values, later.flatten(1)], dim=1)
    columns = torch.cat([first.indices // width, owners.expand(batch, -1)], dim=1)
    until = torch.zeros(batch, tokens, dtype=torch.int32, device=magnitudes.device)
    for length in range(shortest, tokens):
        seen = entries.masked_fill(columns >= length, -1.0)
        top = seen.topk(min(num_entries, length * width), dim=1)
        until.scatter_(1, columns.gather(1, top.indices), length)
    rows, whole = detect_sinks(hidden_states, num_entries, token_mask)
    until[rows.long(), whole.long()] = tokens
    if token_mask is not None:
        until.masked_fill_(~token_mask.to(until.device), 0)
    rows, columns = until.nonzero(as_tuple=True)
    return rows.int(), columns.int(), until[rows, columns]
