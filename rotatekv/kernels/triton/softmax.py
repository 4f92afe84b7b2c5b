"""What the attention kernels share: a tile of queries, scores of 16 tokens, the online softmax, a part's result."""

from __future__ import annotations

import triton
import triton.language as tl

from rotatekv.kernels.triton.tiles import dot_halves, halves, peak


@triton.jit
def query_rows(tile, query_tokens, REPEAT: tl.constexpr, TILE: tl.constexpr, Q_PAD: tl.constexpr):
    """Row repeat·TILE + i of a KV head is query tile·TILE + i of its query head ``repeat``; (Q_PAD,) each."""
    row = tl.arange(0, Q_PAD)
    query = tile * TILE + row % TILE
    return row // TILE, query, (row < REPEAT * TILE) & (query < query_tokens)


@triton.jit
def load_queries(
    queries,
    batch,
    group,
    tile,
    query_tokens,
    heads,
    channel,
    here,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    Q_PAD: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
):
    """Those channels (D',) of the queries of G KV heads, as float32; 0 where not ``here``: (G_PAD, D', Q_PAD)."""
    repeat, query, real = query_rows(tile, query_tokens, REPEAT, TILE, Q_PAD)
    kv = tl.arange(0, G_PAD)[:, None, None]
    head = (group * G + kv) * REPEAT + repeat[None, None, :]
    start = ((batch * heads + head) * query_tokens + query[None, None, :]) * D
    keep = (kv < G) & here[None, :, None] & real[None, None, :]
    return tl.load(queries + start + channel[None, :, None], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def visible(token, kept, own, window):
    """Whether each query sees each of 16 tokens, (16, Q_PAD). kept: (16,). own: the queries' tokens, (1, Q_PAD)."""
    token = token[:, None]
    return kept[:, None] & (token <= own) & (token > own - window)


@triton.jit
def score(q_high, q_low, turned_high, turned_low, scale, keys, cos, sin, seen, HALF: tl.constexpr, TERMS: tl.constexpr):
    """Scores of 16 tokens in log2 units, (G_PAD, 16, Q_PAD); −inf where not seen.

    Args:
        q_high, q_low, turned_high, turned_low: halves of q / scale and q⊥ / scale, (G_PAD, D', Q_PAD).
        keys: (G_PAD, D', 16). cos, sin: (D', 16). seen: (16, Q_PAD).
    """
    of_keys = peak(keys)
    keys = tl.permute(keys * (1 / of_keys), (0, 2, 1))  # (G_PAD, 16, D')
    scores = tl.zeros((q_high.shape[0], 16, q_high.shape[2]), tl.float32)
    if HALF:
        scores = dot_halves(keys * tl.permute(cos, (1, 0))[None, :, :], q_high, q_low, scores, TERMS)
        scores = dot_halves(keys * tl.permute(sin, (1, 0))[None, :, :], turned_high, turned_low, scores, TERMS)
    else:
        scores = dot_halves(keys, q_high, q_low, scores, TERMS)
    return tl.where(seen[None, :, :], scores * (of_keys * scale), float("-inf"))


@triton.jit
def accumulate(scores, values, top, total, acc, TERMS: tl.constexpr):
    """Online softmax: scores (G_PAD, 16, Q_PAD), values (G_PAD, DV', 16), top and total (G_PAD, Q_PAD),
    acc (G_PAD, DV', Q_PAD)."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe[:, None, :])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(weights, 1)
    of_values = peak(values)
    high, low = halves(weights * 2.0**14)
    new = dot_halves(values * (1 / of_values), high, low, tl.zeros_like(acc), TERMS)
    acc = acc * decay[:, None, :] + new * (of_values * 2.0**-14)
    return new_top, total, acc


@triton.jit
def store_part(
    parts,
    tops,
    totals,
    split,
    batch,
    batches,
    group,
    tile,
    query_tokens,
    heads,
    top,
    total,
    acc,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    Q_PAD: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """parts (splits, B, H, T_q, D); tops and totals (splits, B, H, T_q)."""
    repeat, query, real = query_rows(tile, query_tokens, REPEAT, TILE, Q_PAD)
    kv = tl.arange(0, G_PAD)[:, None]
    head = (group * G + kv) * REPEAT + repeat[None, :]
    row = ((split.to(tl.int64) * batches + batch) * heads + head) * query_tokens + query[None, :]  # (G_PAD, Q_PAD)
    keep = (kv < G) & real[None, :]
    tl.store(tops + row, top, mask=keep)
    tl.store(totals + row, total, mask=keep)
    d = tl.arange(0, DV_PAD)[None, :, None]
    tl.store(parts + row[:, None, :] * D + d, acc, mask=keep[:, None, :] & (d < D))
