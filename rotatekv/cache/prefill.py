"""Attention of a call of several tokens with a recent window: each query sees its own, as ``cache/window.py`` says.

``attend_in_pieces`` is for any mask and any attention function: it puts each query's tokens together.

``attend_in_two`` is for the plain causal case. All that lies further back than the longest window is packed for every
query, so one causal flash call, shifted by that window, attends to it as it decodes. What is left is a band of the last
tokens before each query, some of them packed: few enough to be laid out anew for each block of queries. The two are
joined by the sums of their exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from rotatekv.cache.window import FlushedTokens, FlushPolicy
from rotatekv.kernels.attention_parts import Attended, Bands, attend_to_bands_reference, flash_attention
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.layout import BLOCK

QUERIES_AT_ONCE = 128  # their tokens in both forms, and their mask, are all that is held besides the keys and values
BLOCKS_AT_ONCE = 64
_RUNS_KEPT = 64  # for the call's next layers; 0.1 MB each


def attend_in_pieces(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    flushed: FlushedTokens,
    causal: bool,
    most_seen: int | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``attend``, a Hugging Face attention function, with every query's own recent window.

    The mask decides which tokens a query sees, the window in which form; a later token, where the mask shows one, is
    in the window.

    Args:
        causal: no query sees a later token, whatever the mask is.
        most_seen: no query sees more tokens than so many, its own included: the mask hides the others, and they are
            left out. None: the mask may show all.
        query: (B, H, T, D), the last T tokens.
        key, value: (B, H_kv, T_cached, D), the flushed tokens among them as they decode.
        attention_mask: (B or 1, H or 1, T or 1, T_cached), bool or to be added; None: all that ``causal`` leaves.

    Returns:
        (B, T, H, D), and the weights (B, H, T, T_cached) if ``attend`` gives them.
    """
    new, tokens = query.shape[2], key.shape[2]
    outputs, all_weights = [], []
    for first in range(0, new, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, new)
        own = range(tokens - new + first, tokens - new + last)  # the queries' own tokens
        seen = own.stop if causal else tokens  # by the last of these queries
        unseen = 0 if most_seen is None else max(own.start + 1 - most_seen, 0)
        parts, token_index, visible = _forms(flushed, own, unseen, seen, key.device)
        if causal:
            here = torch.arange(own.start, own.stop, dtype=torch.int64, device=key.device)
            visible &= token_index <= here[:, None]
        keys, values = (
            torch.cat([x[:, :, parts[0]], old[:, :, parts[1]], x[:, :, parts[2]]], dim=2)
            for x, old in ((key, flushed.keys), (value, flushed.values))
        )
        mask = _with_mask(attention_mask, slice(first, last), token_index, visible)
        output, weights = attend(module, query[:, :, first:last], keys, values, mask, **options)
        outputs.append(output)
        if weights is not None:  # a token has weight in one form alone
            whole = weights.new_zeros(*weights.shape[:3], tokens)
            all_weights.append(whole.index_add_(-1, token_index, weights))
    return torch.cat(outputs, dim=1), torch.cat(all_weights, dim=2) if all_weights else None


def _forms(
    flushed: FlushedTokens, own: range, unseen: int, seen: int, device: torch.device
) -> tuple[tuple[slice, slice, slice], torch.Tensor, torch.Tensor]:
    """The tokens that the queries at ``own`` see, from ``unseen`` to ``seen`` − 1, in the forms that they see.

    Returns:
        parts: as they decode, as they were in the window (counted in ``flushed``), and those that are there still.
        token_index: (K,) int64, of all parts.
        visible: (Q, K) bool, whether a query sees a token in that form.
    """
    counted, edges = {"dtype": torch.int64, "device": device}, [flushed.policy.packed_of(token + 1) for token in own]
    parts = (min(unseen, edges[0]), edges[-1]), (edges[0], min(flushed.end, seen)), (flushed.end, seen)
    token_index = torch.cat([torch.arange(*part, **counted) for part in parts if part[0] < part[1]])
    is_exact = torch.arange(len(token_index), **counted) >= parts[0][1] - parts[0][0]
    visible = is_exact == (token_index >= torch.tensor(edges, **counted)[:, None])
    decoded, old, still = (slice(*part) for part in parts)
    return (decoded, slice(old.start - flushed.start, old.stop - flushed.start), still), token_index, visible


def _with_mask(
    mask: torch.Tensor | None, queries: slice, token_index: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """The caller's mask for these queries and tokens, and what is not ``visible`` hidden; (B or 1, H or 1, Q, K)."""
    if mask is None:
        return visible[None, None]
    mask = (mask[:, :, queries] if mask.shape[2] > 1 else mask).index_select(-1, token_index)
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def attend_in_two(
    flushed: FlushedTokens, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention with every query's own recent window, where ``flash_serves``; (B, T, H, D).

    Args: as of ``attend_in_pieces``. scaling: factor on the scores.
    """
    new, tokens, kernels = query.shape[2], key.shape[2], kernels_on(query.device)
    attend = attend_to_bands_reference
    if (
        kernels is not None
        and kernels.ATTENDS_TO_BANDS
        and query.dtype != torch.float64
        and query.shape[-1] % BLOCK == 0
    ):
        attend = kernels.attend_to_bands
    older = _attend_to_older(flushed.policy.longest_window, query, key, value, scaling)
    alone = new if older is None else new - older.output.shape[1]  # queries that see no older tokens
    wide = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty_like(query.transpose(1, 2), dtype=wide, memory_format=torch.contiguous_format)
    for run in _runs(flushed, tokens - new, new):
        queries, first = run.queries, max(run.queries.start - alone, 0)
        older_here = None
        if older is not None and queries.stop > alone:
            older_here = Attended(*(x[:, first : queries.stop - alone] for x in older))
        heads, old = (key[:, :, run.tokens], value[:, :, run.tokens]), run.of(flushed)
        attend(query[:, :, queries], heads, old, run.bands, scaling, older_here, output[:, queries])
    return output.to(query.dtype)


def _attend_to_older(
    longest_window: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> Attended | None:
    """To the tokens that came ``longest_window`` before a query, and all earlier ones; of the last queries, which see
    some. None: no query does."""
    new, older = query.shape[2], key.shape[2] - longest_window  # that the last query sees
    rows = min(new, older)  # each sees one more than the one before it
    if rows <= 0:
        return None
    diagonal, before = slice(older - rows, older), slice(0, older - rows)
    last = query[:, :, new - rows :]
    attended = flash_attention(last, key[:, :, diagonal], value[:, :, diagonal], scaling, is_causal=True)
    if older == rows:
        return attended
    return attended.join(flash_attention(last, key[:, :, before], value[:, :, before], scaling))


@dataclass(frozen=True)
class _Run:
    """Consecutive blocks of queries.

    Args:
        queries: which of the call's.
        tokens: those that may be seen in the form that the layer has by now.
        flushed: those of the flushed tokens that may be seen as they were in the window.
        bands: what of both each block sees.
    """

    queries: slice
    tokens: slice
    flushed: slice
    bands: Bands

    def of(self, flushed: FlushedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        return flushed.keys[:, :, self.flushed], flushed.values[:, :, self.flushed]


def _runs(flushed: FlushedTokens, first: int, new: int) -> Iterator[_Run]:
    """For ``new`` queries, the first of which is token ``first``: blocks that start where a flush may."""
    head = min(-(first + 1 - flushed.policy.residual_length) % BLOCK, new)
    blocks, tail = divmod(new - head, BLOCK)
    runs = [(first, 1, head)]
    for done in range(0, blocks, BLOCKS_AT_ONCE):
        runs.append((first + head + done * BLOCK, min(BLOCKS_AT_ONCE, blocks - done), BLOCK))
    runs.append((first + new - tail, 1, tail))
    for start, count, size in runs:
        if size:
            yield _run(flushed.policy, flushed.end, first, start, count, size, flushed.keys.device)


@lru_cache(maxsize=_RUNS_KEPT)
def _run(
    policy: FlushPolicy, flushed: int, first: int, start: int, blocks: int, size: int, device: torch.device
) -> _Run:
    """``blocks`` blocks of ``size`` queries from token ``start`` on; the call begins with token ``first``.

    Args:
        flushed: the end of the flushed tokens.
    """
    counted, end = {"dtype": torch.int64, "device": "cpu"}, start + blocks * size
    here = torch.arange(start, end, **counted).view(blocks, size)  # (N, Q)
    packed = policy.packed_of_each(here + 1)
    oldest = (here[:, :1] + 1 - policy.longest_window).clamp(min=0)  # (N, 1)
    decoded = max(int((packed[:, -1:] - oldest).max()), 0)  # columns
    exact = int((here[:, -1:] + 1 - packed[:, :1]).max())
    columns = (oldest + torch.arange(decoded, **counted), packed[:, :1] + torch.arange(exact, **counted))
    token, is_exact = torch.cat(columns, 1), torch.arange(decoded + exact, **counted) >= decoded  # (N, W), (W,)
    tokens, in_window = slice(int(oldest[0]), end), slice(int(packed[0, 0]), min(flushed, end))
    of_window = torch.where(is_exact & (token < in_window.stop), end - in_window.start, 0)
    column = token.clamp(tokens.start, end - 1) - tokens.start + of_window
    token, here, packed = token.unsqueeze(2), here.unsqueeze(1), packed.unsqueeze(1)  # (N, W, 1), (N, 1, Q)
    as_decoded = (token > here - policy.longest_window) & (token < packed)
    is_seen = torch.where(is_exact[:, None], (token >= packed) & (token <= here), as_decoded)
    return _Run(
        queries=slice(start - first, end - first),
        tokens=tokens,
        flushed=slice(in_window.start - policy.packed, max(in_window.stop, in_window.start) - policy.packed),
        bands=Bands.of(column, is_seen).to(device),
    )
