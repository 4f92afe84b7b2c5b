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
from rotatekv.kernels.attention_parts import flash_attention, join, masked_attention

QUERIES_AT_ONCE = 128  # their tokens in both forms, and their mask, are all that is held besides the keys and values
_BLOCK = 16  # queries whose band is laid out as one
_BLOCKS_AT_ONCE = 64
_BANDS_KEPT = 64  # for the call's next layers; 0.1 MB each


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
    new, tokens = query.shape[2], key.shape[2]
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    logsumexp = torch.empty_like(output[..., 0], dtype=torch.promote_types(query.dtype, torch.float32))
    for band in _bands(flushed, tokens - new, new):
        for row in range(len(query)):
            queries = band.queries_of(query[row])
            keys, values = (
                band.laid_out(*x) for x in ((key[row], flushed.keys[row]), (value[row], flushed.values[row]))
            )
            found = masked_attention(queries, keys, values, scaling, band.is_seen)
            for whole, of_band in zip((output, logsumexp), found, strict=True):
                whole[row, band.queries] = of_band.flatten(0, 1)
    # The tokens further back: the last ``rows`` queries see one more each, and all of them those before.
    older = tokens - flushed.policy.longest_window
    rows = min(new, older)
    if rows > 0:
        last, diagonal = slice(new - rows, None), slice(older - rows, older)
        seen = flash_attention(query[:, :, last], key[:, :, diagonal], value[:, :, diagonal], scaling, is_causal=True)
        join(output[:, last], logsumexp[:, last], seen)
    if older > rows > 0:
        before = slice(0, older - rows)
        join(output, logsumexp, flash_attention(query, key[:, :, before], value[:, :, before], scaling))
    return output


@dataclass(frozen=True)
class _Band:
    """The last tokens before each query of consecutive blocks of queries: N blocks of Q that see W tokens each.

    Args:
        queries: which of the call's.
        tokens: those that may be seen in the form that the layer has by now.
        flushed: those of the flushed tokens that may be seen as they were in the window.
        columns: (N·W,) int64, the tokens that each block may see, counted in ``tokens``, then in ``flushed``.
        is_seen: (N, Q, W) bool.
    """

    queries: slice
    tokens: slice
    flushed: slice
    columns: torch.Tensor
    is_seen: torch.Tensor

    def queries_of(self, query: torch.Tensor) -> torch.Tensor:
        """(H, T, D) → (N, H, Q, D)."""
        return query[:, self.queries].unflatten(1, self.is_seen.shape[:2]).transpose(0, 1)

    def laid_out(self, x: torch.Tensor, flushed: torch.Tensor) -> torch.Tensor:
        """(H_kv, T_cached, D) and (H_kv, T_flushed, D) → (N, H_kv, W, D)."""
        both = torch.cat([x[:, self.tokens], flushed[:, self.flushed]], dim=1)
        return both.index_select(1, self.columns).unflatten(1, self.is_seen.shape[::2]).transpose(0, 1)


def _bands(flushed: FlushedTokens, first: int, new: int) -> Iterator[_Band]:
    """For ``new`` queries, the first of which is token ``first``: blocks that start where a flush may."""
    head = min(-(first + 1 - flushed.policy.residual_length) % _BLOCK, new)
    blocks, tail = divmod(new - head, _BLOCK)
    runs = [(first, 1, head)]
    for done in range(0, blocks, _BLOCKS_AT_ONCE):
        runs.append((first + head + done * _BLOCK, min(_BLOCKS_AT_ONCE, blocks - done), _BLOCK))
    runs.append((first + new - tail, 1, tail))
    for start, blocks, size in runs:
        if size:
            yield _band(flushed.policy, flushed.end, first, start, blocks, size, flushed.keys.device)


@lru_cache(maxsize=_BANDS_KEPT)
def _band(
    policy: FlushPolicy, flushed: int, first: int, start: int, blocks: int, size: int, device: torch.device
) -> _Band:
    """Of ``blocks`` blocks of ``size`` queries from token ``start`` on; the call begins with token ``first``.

    Args:
        flushed: the end of the flushed tokens.
    """
    counted, end = {"dtype": torch.int64, "device": "cpu"}, start + blocks * size
    here = torch.arange(start, end, **counted).view(blocks, size)  # (N, Q)
    packed = policy.packed_of_each(here + 1)
    oldest = here[:, :1] + 1 - policy.longest_window  # (N, 1)
    decoded = max(int((packed[:, -1:] - oldest).max()), 0)  # columns
    exact = int((here[:, -1:] + 1 - packed[:, :1]).max())
    columns = (oldest + torch.arange(decoded, **counted), packed[:, :1] + torch.arange(exact, **counted))
    token, is_exact = torch.cat(columns, 1), torch.arange(decoded + exact, **counted) >= decoded  # (N, W), (W,)
    tokens = slice(max(int(oldest[0]), 0), end)
    in_window = slice(int(packed[0, 0]), max(min(flushed, end), int(packed[0, 0])))
    counted_in = torch.where(is_exact & (token < in_window.stop), end - in_window.start, 0) - tokens.start
    column = token.clamp(tokens.start, end - 1) + counted_in
    token, here, packed = token.unsqueeze(1), here.unsqueeze(2), packed.unsqueeze(2)  # (N, 1, W), (N, Q, 1)
    is_older = (token > here - policy.longest_window) & (token >= 0) & (token < packed)
    is_seen = torch.where(is_exact, (token >= packed) & (token <= here), is_older)
    return _Band(
        queries=slice(start - first, end - first),
        tokens=tokens,
        flushed=slice(in_window.start - policy.packed, in_window.stop - policy.packed),
        columns=column.flatten().to(device),
        is_seen=is_seen.to(device),
    )
