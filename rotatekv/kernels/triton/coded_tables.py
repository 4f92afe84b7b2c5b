"""What the kernels of transform-coded keys and values read of a ``Transform``: made once for each. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, GROUP, STEPS, Transform
from rotatekv.kernels.triton.plan import power_of_two

MEANS = FRAME + 16  # columns of a query table before those of planes
UNIT_BITS = 24  # see spread.py: a code of 1 is 2^-24 there, at the first four numbers of a word
_PEAK = 14  # log2 of a column's largest number, as float16 has it
NUMBERS = torch.tensor([4.0 ** -(number % 4) for number in range(GROUP)], device="cpu")


@dataclass(frozen=True)
class CodedTables:
    """Letters: G = D / 16 groups, P and S the planes of pairs and of singles.

    Attributes:
        form: (H_kv, 3, G) int32: of each group its bits, its first plane of pairs and its plane of a single; 0 for a
            plane that it has not.
        costs: (H_kv, 2, G) float32: what an error of a component costs, and the step of one of variance 1; 0 for groups
            that are not stored.
        mean: (H_kv, D) float32.
        map: (H_kv, D, D) float32, Aᵀ.
        inverse: (H_kv, D, D) float32, (A⁻¹·γ)ᵀ.
        pairs, singles: P and S.
    """

    form: torch.Tensor
    costs: torch.Tensor
    mean: torch.Tensor
    map: torch.Tensor
    inverse: torch.Tensor
    pairs: int
    singles: int


@dataclass(frozen=True)
class QueryTable:
    """What a query in a frame is multiplied by, and where the numbers stand that its codes need.

    Attributes:
        table, table_lower: (H_kv, D, MEANS + 16·planes) float16, two halves: (R(j)·μ)ᵀ for the mean's score at place j;
            what the lowest codes score; zeros; then A⁻¹·γ for each number of a head's planes, first of the pairs, then
            of the singles, with what ``spread.py`` leaves to the other side of the dot, and zeros to whole chunks.
        column_scale: (H_kv, MEANS + 16·planes) float32, powers of two that a product's columns lack, in ``unit``.
        unit: (H_kv,) float32, powers of two: no column of a plane is longer than 1 in it.
        first: (H_kv, 4) int32: a head's first plane of pairs and their number, its first of singles and theirs.
        planes, single_start: planes of a row, and where the singles begin.
        chunk: planes of one dot.
    """

    table: torch.Tensor
    table_lower: torch.Tensor
    column_scale: torch.Tensor
    unit: torch.Tensor
    first: torch.Tensor
    planes: int
    single_start: int
    chunk: int


_MADE: WeakKeyDictionary[Transform, dict[torch.device, CodedTables]] = WeakKeyDictionary()
_OF_QUERIES: WeakKeyDictionary[Transform, dict[torch.device, tuple]] = WeakKeyDictionary()


def tables_of(transform: Transform, device: torch.device) -> CodedTables:
    """Those on ``device``, wherever the transform is."""
    made = _MADE.setdefault(transform, {})
    if device not in made:
        made[device] = _make(transform, device)
    return made[device]


def query_table(transform: Transform, rope: RopeTables | None, device: torch.device) -> QueryTable:
    """Made anew for another ``rope`` than last time."""
    made = _OF_QUERIES.setdefault(transform, {})
    if device not in made or made[device][0] is not rope:
        made[device] = rope, _make_query_table(transform, rope, device)
    return made[device][1]


def _make_query_table(transform: Transform, rope: RopeTables | None, device: torch.device) -> QueryTable:
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
        columns.append((spread * NUMBERS.double()).flatten(2))
        starts.append(starts[-1] + spread.shape[2])
    table = torch.cat(columns, -1)  # (H_kv, D, MEANS + 16·planes)
    longest = table[:, :, MEANS:].norm(dim=1).amax(1) if starts[-1] else table.new_zeros(heads)
    unit, peak = _power_above(longest), _power_above(table.abs().amax(1))
    table = table / (peak * 2.0**-_PEAK).unsqueeze(1)
    upper = table.half()
    lower = (table - upper.double()).half()
    scale = (peak * 2.0**-_PEAK / unit.unsqueeze(1)).float()
    moved = [x.to(device).contiguous() for x in (upper, lower, scale, unit.float(), first)]
    return QueryTable(moved[0], moved[1], moved[2], moved[3], moved[4], starts[-1], starts[1], chunk)


def _power_above(x: torch.Tensor) -> torch.Tensor:
    return torch.exp2(x.clamp_min(2.0**-60).log2().ceil())


def _make(transform: Transform, device: torch.device) -> CodedTables:
    pairs, singles = transform.planes
    form = torch.zeros(len(transform.bits), 3, transform.bits.shape[1], dtype=torch.int32, device="cpu")
    form[:, 0] = transform.bits
    for of, planes in ((1, pairs), (2, singles)):
        for plane in reversed(range(len(planes))):  # the first one of a group stays
            head, group, _ = planes[plane]
            form[head, of, group] = plane
    steps = torch.tensor(STEPS, dtype=torch.float32, device="cpu")[transform.bits]
    costs = torch.stack([transform.weights.float().cpu(), steps], 1) * (transform.bits > 0).unsqueeze(1)
    tensors = {
        "form": form,
        "costs": costs,
        "mean": transform.mean.float(),
        "map": transform.maps.float().mT,
        "inverse": transform.inverse.mT,
    }
    moved = {name: x.to(device).contiguous() for name, x in tensors.items()}
    return CodedTables(**moved, pairs=len(pairs), singles=len(singles))
