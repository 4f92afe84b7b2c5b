"""What queries are multiplied by before they meet codes: made once for each form of keys. Plain torch, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from rotatekv.kernels.hadamard import rotate_channels
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, GROUP, Transform
from rotatekv.kernels.triton.plan import power_of_two

SUMS = 16  # float32 columns of ``rotated_table``
MEANS = FRAME + 16  # those of a ``FrameTable``
UNIT_BITS = 24  # see spread.py: a code of 1 is 2^-24 there, at the first four numbers of a word
_PEAK = 14  # log2 of a column's largest number, as float16 has it
_LEFT = torch.tensor([4.0 ** -(number % 4) for number in range(GROUP)], dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class QueryTable:
    """What queries are multiplied by, for numbers in float32 and then for those that meet codes, 16 to a plane.

    Attributes:
        table, table_lower: (H_kv, D, float32 columns + 16·planes) float16, two halves.
        column_scale: (H_kv, float32 columns + 16·planes) float32, powers of two that a product lacks, in ``unit``.
        unit: (H_kv,) float32, powers of two: no column of a plane is longer than 1 in it.
    """

    table: torch.Tensor
    table_lower: torch.Tensor
    column_scale: torch.Tensor
    unit: torch.Tensor
    planes: int


@dataclass(frozen=True)
class FrameTable:
    """For a query in a frame: (R(j)·μ)ᵀ for the mean's score at place j; what the lowest codes score; zeros to MEANS;
    then A⁻¹·γ for each number of a head's planes, first of the pairs, then of the singles, with what ``spread.py``
    leaves to the other side of the dot, and zeros to whole chunks.

    Attributes:
        columns: what is said above.
        first: (H_kv, 4) int32: a head's first plane of pairs and their number, its first of singles and theirs.
        single_start: where the singles begin. chunk: planes of one dot.
    """

    columns: QueryTable
    first: torch.Tensor
    single_start: int
    chunk: int


_MADE: WeakKeyDictionary[Transform, dict[torch.device, tuple]] = WeakKeyDictionary()


def frame_table(transform: Transform, rope: RopeTables | None, device: torch.device) -> FrameTable:
    """Made anew for another ``rope`` than last time."""
    made = _MADE.setdefault(transform, {})
    if device not in made or made[device][0] is not rope:
        made[device] = rope, _make_frame_table(transform, rope, device)
    return made[device][1]


def _make_frame_table(transform: Transform, rope: RopeTables | None, device: torch.device) -> FrameTable:
    heads, dim = transform.mean.shape
    chunk = max(power_of_two(dim) // 32, 1)
    mean = transform.mean.float().cpu()[None, :, None].expand(-1, -1, FRAME, -1)  # (1, H_kv, FRAME, D)
    if rope is not None:
        place = torch.arange(FRAME, dtype=torch.int64, device="cpu")[None]
        mean = replace(rope.to(mean.device), attention_scaling=1.0).turn(mean, place.clamp(max=rope.positions - 1))
    inverse = transform.inverse.cpu().double()
    lowest = inverse @ (transform.levels.cpu().double() - 0.5).clamp_min(0).unsqueeze(-1)  # what a score of codes has
    columns = [mean[0].mT.double(), -lowest * 2.0**-UNIT_BITS, inverse.new_zeros(heads, dim, MEANS - FRAME - 1)]
    starts, first = [0], torch.zeros(heads, 4, dtype=torch.int32, device="cpu")
    for number, planes in enumerate(transform.planes):
        of_heads = [[plane[1:] for plane in planes if plane[0] == head] for head in range(heads)]
        counts = torch.tensor([len(x) for x in of_heads], dtype=torch.int32, device="cpu")
        first[:, 2 * number], first[:, 2 * number + 1] = counts.cumsum(0) - counts, counts
        spread = inverse.new_zeros(heads, dim, -(-max(map(len, of_heads)) // chunk) * chunk, GROUP)
        for head, here in enumerate(of_heads):
            for place, (group, low) in enumerate(here):
                spread[head, :, place] = inverse[head, :, group * GROUP : (group + 1) * GROUP] * 2**low
        columns.append((spread * _LEFT).flatten(2))
        starts.append(starts[-1] + spread.shape[2])
    floats = torch.cat(columns[:3], -1)  # (H_kv, D, MEANS)
    return FrameTable(_query_table(floats, torch.cat(columns[3:], -1), device), first.to(device), starts[1], chunk)


@lru_cache(maxsize=64)
def rotated_table(width: int, head_dim: int, kv_heads: int, device: torch.device) -> QueryTable:
    """For the sum of a rotated query's numbers, zeros to SUMS, and those numbers. width: of each head, or 0."""
    eye = torch.eye(head_dim, dtype=torch.float64, device="cpu").unsqueeze(0)  # (1, D, D)
    codes = (rotate_channels(eye, width) if width else eye).expand(kv_heads, -1, -1)
    sums = torch.nn.functional.pad(codes.sum(-1, keepdim=True), (0, SUMS - 1))
    return _query_table(sums, codes, device)


def _query_table(floats: torch.Tensor, codes: torch.Tensor, device: torch.device) -> QueryTable:
    """Of columns (H_kv, D, n) float64 of both kinds."""
    longest = codes.norm(dim=1).amax(1) if codes.shape[2] else codes.new_zeros(len(codes))
    table = torch.cat([floats, codes], -1)
    unit, peak = _power_above(longest), _power_above(table.abs().amax(1)) * 2.0**-_PEAK
    table = table / peak.unsqueeze(1)
    upper = table.half()
    lower, scale = (table - upper.double()).half(), (peak / unit.unsqueeze(1)).float()
    moved = [x.to(device).contiguous() for x in (upper, lower, scale, unit.float())]
    return QueryTable(moved[0], moved[1], moved[2], moved[3], codes.shape[2] // GROUP)


def _power_above(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(x.clamp_min(2.0**-60).log2().ceil())
