"""Attention to some of the tokens that a query sees, and how it is joined with attention to its others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rotatekv.kernels.layout import BLOCK

_aten = torch.ops.aten
_ON_GPUS = (torch.float16, torch.bfloat16)  # what flash attention takes there
_MOST_DIM_ON_GPUS = 256


class Attended(NamedTuple):
    """Attention to some tokens.

    Args:
        output: (B, T, H, D), as if a query saw no others.
        logsumexp: (B, T, H) float32 or float64, the logarithm of the sum of each query's exponentials.
    """

    output: torch.Tensor
    logsumexp: torch.Tensor

    def join(self, others: Attended) -> Attended:
        """Attention to these tokens and to those of ``others``, in the dtype of ``logsumexp``."""
        share = torch.sigmoid(others.logsumexp - self.logsumexp)
        output = torch.lerp(*(x.output.to(share.dtype) for x in (self, others)), share.unsqueeze(-1))
        return Attended(output, torch.logaddexp(self.logsumexp, others.logsumexp))


@dataclass(frozen=True)
class Bands:
    """The tokens that consecutive blocks of queries may see: N blocks of Q queries, W tokens each.

    Args:
        columns: (N, W) int32, counted in the keys, then in the flushed keys.
        is_seen: (N, W, Q or more, a multiple of 16) bool, whether a query sees a token; True for queries past Q.
    """

    columns: torch.Tensor
    is_seen: torch.Tensor

    @classmethod
    def of(cls, columns: torch.Tensor, is_seen: torch.Tensor) -> Bands:
        """``is_seen`` (N, W, Q)."""
        padding = 0, -is_seen.shape[2] % BLOCK
        return cls(columns.int().contiguous(), torch.nn.functional.pad(is_seen, padding, value=True).contiguous())

    def to(self, device: torch.device) -> Bands:
        return Bands(self.columns.to(device), self.is_seen.to(device))


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
) -> Attended:
    """Attention to all tokens, or to those up to the query's own, by torch's flash attention.

    Args:
        query: (B, H, T, D). key, value: (B, H_kv, T_seen, D); T of them where ``is_causal``.
        scaling: factor on the scores.
    """
    if query.device.type == "cpu":
        flash = _aten._scaled_dot_product_flash_attention_for_cpu
    else:
        flash = _aten._scaled_dot_product_flash_attention
    return Attended(*(x.transpose(1, 2) for x in flash(query, key, value, 0.0, is_causal, scale=scaling)[:2]))


def attend_to_bands_reference(
    query: torch.Tensor,
    heads: tuple[torch.Tensor, torch.Tensor],
    flushed: tuple[torch.Tensor, torch.Tensor],
    bands: Bands,
    scaling: float,
    older: Attended | None,
    output: torch.Tensor,
) -> None:
    """Attention to the last tokens before each query, joined with attention to those before them.

    Args:
        query: (B, H, N·Q, D).
        heads: keys and values (B, H_kv, T_cached, D). flushed: (B, H_kv, T_flushed, D), of fewer bits or alike.
        scaling: factor on the scores.
        older: of the last queries, which see earlier tokens than the bands' too; None: none does.
        output: (B, N·Q, H, D) float32, or float64 of such queries; written.
    """
    (blocks, columns), queries = bands.columns.shape, query.shape[2] // len(bands.columns)
    is_seen = bands.is_seen[..., :queries].transpose(1, 2)  # (N, Q, W)
    for row in range(len(query)):
        per_block = query[row].unflatten(1, (blocks, queries)).transpose(0, 1)  # (N, H, Q, D)
        keys, values = (
            torch.cat([x[row], old[row].to(x.dtype)], dim=1)
            .index_select(1, bands.columns.flatten())
            .unflatten(1, (blocks, columns))
            .transpose(0, 1)  # (N, H_kv, W, D)
            for x, old in zip(heads, flushed, strict=True)
        )
        band = Attended(*(x.flatten(0, 1)[None] for x in masked_attention(per_block, keys, values, scaling, is_seen)))
        alone = query.shape[2] if older is None else query.shape[2] - older.output.shape[1]
        output[row, :alone] = band.output[0, :alone]
        if older is not None:
            with_older = Attended(*(x[:, alone:] for x in band)).join(Attended(*(x[row : row + 1] for x in older)))
            output[row, alone:] = with_older.output[0]


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_seen: torch.Tensor
) -> Attended:
    """Attention to the tokens that ``is_seen`` (B, T, T_seen) bool says, some for each query; else as
    ``flash_attention``."""
    heads = query.unflatten(1, (key.shape[1], -1))  # (B, H_kv, H / H_kv, T, D)
    scores = heads @ (key * scaling).unsqueeze(2).transpose(-1, -2)
    scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    output = scores.softmax(-1).to(value.dtype) @ value.unsqueeze(2)
    return Attended(output.flatten(1, 2).transpose(1, 2), scores.logsumexp(-1).flatten(1, 2).transpose(1, 2))
