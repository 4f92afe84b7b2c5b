"""What the kernels of transform-coded keys and values read of a ``Transform``: made once for each. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from rotatekv.kernels.transform_coding import STEPS, Transform


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


def tables_of(transform: Transform, device: torch.device) -> CodedTables:
    """Those on ``device``, wherever the transform is."""
    made = _MADE.setdefault(transform, {})
    if device not in made:
        made[device] = _make(transform, device)
    return made[device]


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
