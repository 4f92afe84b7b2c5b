"""What the kernels read of a layer's ``Transform``: made once for each and kept as long as that is.

*Keys.* With w = γ·A⁻ᵀ·q_f, q_f the query in a frame, a score's part of codes is a product with w. Its part of the mean
is q_f·R(j)·μ = (A⁻ᵀ·q_f)·(A·R(j)·μ): of each head a table of FRAME rows, which few directions span to far below the
noise of rounding. So one matrix makes of q_f both w and the numbers that those directions' coefficients are multiplied
by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, GROUP, NOISE, STEPS, Transform

_POSITION_ERROR = 0.02  # of the noise of rounding a key
_QUERY_LEVELS = 8191  # a query's numbers are rounded to −8191 … 8191
_WORD_LEVELS = 32767
_COLUMN_SUM = (2**31 - 1) // _QUERY_LEVELS  # Σ |integer| of a column: products with a query add up to less than 2^31


@dataclass(frozen=True)
class FrameTables:
    """What keys are read by. O = D + rank outputs, rounded up to a multiple of 16.

    Attributes:
        channel_factor: (H_kv, D) float32, what a query is multiplied by before it is rounded; the same for the two
            channels that RoPE turns together.
        matrix: (H_kv, D / 2, O) int32, two int16 each: rows 2i and 2i + 1 of [A⁻¹·γ, A⁻¹·(directions)ᵀ], each row
            divided by its channel factor and each column by its unit.
        units: (H_kv, O) float32.
        positions: (H_kv, rank / 2, FRAME) int32, the same of the directions' coefficients of R(j)·μ; rank is even.
        position_units: (H_kv, FRAME) float32.
    """

    channel_factor: torch.Tensor
    matrix: torch.Tensor
    units: torch.Tensor
    positions: torch.Tensor
    position_units: torch.Tensor


@dataclass(frozen=True)
class ValueTables:
    """What values are read by.

    Attributes:
        map: (H_kv, D, D) float32, (A⁻¹·γ)ᵀ. mean: (H_kv, D) float32.
    """

    map: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True)
class WriteTables:
    """What a write needs.

    Attributes:
        map: (H_kv, D, D) float32, Aᵀ. mean: (H_kv, D) float32.
        weights, steps: (H_kv, D) float32, what an error of a component costs, and the step of one of variance 1; 0
            where a component is not stored.
    """

    map: torch.Tensor
    mean: torch.Tensor
    weights: torch.Tensor
    steps: torch.Tensor


_Kept = WeakKeyDictionary[Transform, Any]
_frame_tables: _Kept = WeakKeyDictionary()
_value_tables: _Kept = WeakKeyDictionary()
_write_tables: _Kept = WeakKeyDictionary()
_read_tables: _Kept = WeakKeyDictionary()
_bits: _Kept = WeakKeyDictionary()


def frame_tables_of(transform: Transform, rope: RopeTables | None) -> FrameTables:
    """Made once for each transform of keys and the RoPE it was last used with."""
    found = _frame_tables.get(transform)
    if found is None or found[0] is not rope:
        found = _frame_tables[transform] = rope, _make(transform, rope)
    return found[1]


def value_tables_of(transform: Transform) -> ValueTables:
    found = _value_tables.get(transform)
    if found is None:
        made = ValueTables(transform.inverse.mT.contiguous(), transform.mean.float().contiguous())
        found = _value_tables[transform] = made
    return found


def write_tables_of(transform: Transform) -> WriteTables:
    found = _write_tables.get(transform)
    if found is None:
        bits = transform.component_bits
        steps = torch.tensor(STEPS, dtype=torch.float32, device=bits.device)[bits]
        weights = transform.weights.repeat_interleave(GROUP, 1).float()
        found = _write_tables[transform] = WriteTables(
            transform.maps.float().mT.contiguous(),
            transform.mean.float().contiguous(),
            (weights * (bits > 0)).contiguous(),
            (steps * (bits > 0)).contiguous(),
        )
    return found


def read_tables_of(transform: Transform) -> tuple[torch.Tensor, torch.Tensor]:
    """(H_kv, D, D), the transpose of A⁻¹·γ, and (H_kv, D), μ."""
    found = _read_tables.get(transform)
    if found is None:
        found = _read_tables[transform] = transform.inverse.mT.contiguous(), transform.mean.float().contiguous()
    return found


def bits_of(transform: Transform) -> torch.Tensor:
    """(H_kv, D / 16) int32."""
    found = _bits.get(transform)
    if found is None:
        found = _bits[transform] = transform.bits.to(torch.int32).contiguous()
    return found


def _make(transform: Transform, rope: RopeTables | None) -> FrameTables:
    positions, directions = _mean_by_position(transform, rope)
    of_mean = torch.linalg.inv(transform.maps.double()) @ directions.mT
    matrix = torch.cat([transform.inverse.double(), of_mean], -1)  # (H_kv, D, O)
    factor = _channel_factor(matrix, 0 if rope is None else rope.rotary_dim)
    matrix, units = _rounded(matrix / factor.unsqueeze(-1))
    positions, position_units = _rounded(positions.mT)
    return FrameTables(factor.float(), matrix, units, positions, position_units)


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(H_kv, 2·n, O) → words (H_kv, n, O) of two integers, rows 2i and 2i + 1, and the unit of each column."""
    rows = matrix.shape[1]
    largest = torch.nn.functional.pad(matrix.abs(), (0, 0, 0, 1)).amax(1)  # there may be no row
    units = torch.maximum(largest / _WORD_LEVELS, matrix.abs().sum(1) / (_COLUMN_SUM - rows))
    rounded = (matrix / units.clamp_min(1e-30).unsqueeze(1)).round().to(torch.int32)
    return ((rounded[:, 0::2] & 0xFFFF) | (rounded[:, 1::2] << 16)).contiguous(), units.float()


def _mean_by_position(transform: Transform, rope: RopeTables | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients (H_kv, FRAME, rank) and directions (H_kv, O − D, D): their product is nearly A·R(j)·μ."""
    mean = transform.mean.double()[:, None].expand(-1, FRAME, -1)  # (H_kv, FRAME, D)
    if rope is not None:
        in_frame = torch.arange(FRAME, dtype=torch.int64, device=mean.device).clamp(max=rope.positions - 1)[None]
        mean = replace(rope, attention_scaling=1.0).turn(mean[None], in_frame)[0]
    left, sizes, directions = torch.linalg.svd(mean @ transform.maps.double().mT, full_matrices=False)
    noise = torch.tensor([n / s**2 for n, s in zip(NOISE, STEPS, strict=True)], dtype=torch.float64, device=mean.device)
    allowed = noise[transform.bits].sum(-1, keepdim=True) * GROUP * FRAME * _POSITION_ERROR**2  # (H_kv, 1)
    rest = sizes.square().flip(-1).cumsum(-1).flip(-1)  # of a frame, with the directions before this one
    rank = -(-int((rest > allowed).sum(-1).max()) // 2) * 2
    padded = torch.zeros(len(mean), -(-rank // 16) * 16, mean.shape[-1], dtype=torch.float64, device=mean.device)
    padded[:, :rank] = directions[:, :rank]
    return (left * sizes.unsqueeze(1))[..., :rank], padded


def _channel_factor(matrix: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """(H_kv, D) the root mean square of the rows: as large as the keys' channels are."""
    square = matrix.square().mean(-1)
    half = rotary_dim // 2
    low, high, rest = square.tensor_split((half, rotary_dim), dim=-1)
    pair = (low + high) / 2
    return torch.cat([pair, pair, rest], -1).sqrt().clamp_min(1e-30)
