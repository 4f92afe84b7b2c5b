"""2-, 3- and 4-bit codes ↔ bytes.

Layout: a code is cut into bit planes of a power-of-two width (2 bits: one plane of 2; 3 bits: a plane of the low 2 and
a plane of the high 1; 4 bits: one plane of 4). Within a plane of width w, byte ``i`` of a row holds channels
``i·8/w … i·8/w + 8/w − 1``, the first in the lowest bits. The planes of a row follow each other, so C codes of ``bits``
bits take exactly ``C·bits / 8`` bytes.
"""

from __future__ import annotations

import torch

_PLANES = {2: (2,), 3: (2, 1), 4: (4,)}


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., C) uint8 codes below 2^bits → (..., C·bits / 8) uint8 bytes. C must be a multiple of 8."""
    if codes.shape[-1] % 8:
        raise ValueError(f"the number of channels must be a multiple of 8, not {codes.shape[-1]}")
    planes, offset = [], 0
    for width in _PLANES[bits]:
        plane = (codes >> offset) & (2**width - 1)
        lanes = plane.unflatten(-1, (-1, 8 // width))  # (..., bytes, codes per byte)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((lanes << shifts).sum(-1, dtype=torch.uint8))
        offset += width
    return torch.cat(planes, dim=-1)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., C·bits / 8) uint8 bytes → (..., C) uint8 codes; the inverse of ``pack_codes``."""
    channels = packed.shape[-1] * 8 // bits
    codes, start, offset = None, 0, 0
    for width in _PLANES[bits]:
        plane = packed[..., start : start + channels * width // 8]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        lanes = ((plane.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(-2)  # (..., C)
        codes = lanes if codes is None else codes | (lanes << offset)
        start += channels * width // 8
        offset += width
    return codes
