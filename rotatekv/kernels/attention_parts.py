"""Attention to some of the tokens that a query sees, and how it is joined with attention to its others."""

from __future__ import annotations

import torch

_aten = torch.ops.aten
_ON_GPUS = (torch.float16, torch.bfloat16)  # what flash attention takes there
_MOST_DIM_ON_GPUS = 256


def flash_serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch has flash attention for such (B, H, T, D) queries and values."""
    if query.shape[-1] != value.shape[-1] or query.dtype != value.dtype:
        return False
    if query.device.type == "cpu":
        return True
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= _MOST_DIM_ON_GPUS
    return query.device.type == "cuda" and query.dtype in _ON_GPUS and fits


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to all tokens, or to those up to the query's own, by torch's flash attention.

    Args:
        query: (B, H, T, D). key, value: (B, H_kv, T_seen, D); T of them where ``is_causal``.
        scaling: factor on the scores.

    Returns:
        (B, T, H, D), and (B, T, H) float32 or float64, the logarithm of the sum of each query's exponentials.
    """
    if query.device.type == "cpu":
        flash = _aten._scaled_dot_product_flash_attention_for_cpu
    else:
        flash = _aten._scaled_dot_product_flash_attention
    output, logsumexp = flash(query, key, value, 0.0, is_causal, scale=scaling)[:2]
    return output.transpose(1, 2), logsumexp.transpose(1, 2)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of few queries in each of many rows to few tokens.

    Args:
        query: (B, H, T, D). key, value: (B, H_kv, T_seen, D).
        is_seen: (B, T, T_seen) bool; each query sees some token.

    Returns:
        As ``flash_attention``.
    """
    mask = torch.zeros_like(is_seen, dtype=query.dtype).masked_fill_(~is_seen, -torch.inf).unsqueeze(1)
    if query.device.type == "cpu":
        output, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scaling
        )
        return output.transpose(1, 2), logsumexp.transpose(1, 2)
    return masked_attention_reference(query, key, value, scaling, is_seen)


def masked_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``masked_attention`` in plain torch: the specification, and what a GPU runs."""
    heads = query.unflatten(1, (key.shape[1], -1))  # (B, H_kv, H / H_kv, T, D)
    scores = heads @ (key * scaling).unsqueeze(2).transpose(-1, -2)
    scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    output = scores.softmax(-1).to(value.dtype) @ value.unsqueeze(2)
    return output.flatten(1, 2).transpose(1, 2), scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)


def join(output: torch.Tensor, logsumexp: torch.Tensor, others: tuple[torch.Tensor, torch.Tensor]) -> None:
    """In place: attention to some tokens becomes attention to these and to those of ``others``; shapes as above."""
    other_output, other_logsumexp = others
    share = torch.sigmoid(other_logsumexp - logsumexp)
    output.lerp_(other_output, share.unsqueeze(-1).to(output.dtype))
    logsumexp.copy_(torch.logaddexp(logsumexp, other_logsumexp))
