"""What the kernels of transform-coded keys and values read of a ``Transform``: made once for each. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, STEPS, Transform


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


_MADE: WeakKeyDictionary[Transform, dict[torch.device, CodedTables]] = WeakKeyDictionary()
_OF_QUERIES: WeakKeyDictionary[Transform, dict[torch.device, tuple]] = WeakKeyDictionary()


def tables_of(transform: Transform, device: torch.device) -> CodedTables:
    """Those on ``device``, wherever the transform is."""
    made = _MADE.setdefault(transform, {})
    if device not in made:
        made[device] = _make(transform, device)
    return made[device]


def query_table(transform: Transform, rope: RopeTables | None, device: torch.device) -> torch.Tensor:
    """(H_kv, D, D + FRAME) float32, [A⁻¹·γ, (R(j)·μ)ᵀ]: what a query in a frame is multiplied by, for its product with
    codes and with the mean at place j. Made anew for another ``rope`` than last time."""
    made = _OF_QUERIES.setdefault(transform, {})
    if device not in made or made[device][0] is not rope:
        mean = transform.mean.float()[None, :, None].expand(-1, -1, FRAME, -1)  # (1, H_kv, FRAME, D)
        if rope is not None:
            place = torch.arange(FRAME, dtype=torch.int64, device=mean.device)[None]
            mean = replace(rope.to(mean.device), attention_scaling=1.0).turn(mean, place.clamp(max=rope.positions - 1))
        table = torch.cat([transform.inverse, mean[0].mT], -1)
        made[device] = rope, table.to(device).contiguous()
    return made[device][1]


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
