"""Transform coding of keys and values in plain torch: a map per head, symmetric levels, a scale a token.

This is what a faster one must compute. *Values* are stored as x = A·(v − μ) and read as v̂ = A⁻¹·γ·x̂ + μ. *Keys* lie
in frames.
A *frame* is ``FRAME`` tokens by their place in the cache. A key is stored turned back by the position of its frame's
first token, less the mean of all keys turned to its own place in the frame:

    x = A·(R(−o)·k − R(p − o)·μ)                                    o, p: positions of the frame's first token, its own
    x̂ = scale·(code + ½ − 2^(bits − 1)),   scale = 2^((stored − 128) / 8),   one stored scale (uint8) a token and head
    k̂ = R(o)·(A⁻¹·γ·x̂ + R(p − o)·μ)

R is RoPE without a factor (YaRN's is in the keys). The components of x lie in groups of ``GROUP``, of ``bits`` 0 … 5
each; those of 0 bits are not stored and read as 0. So a score needs no turned key:

    q·k̂ = scale·Σ u_c·(code_c + ½ − 2^(bits_c − 1)) + (R(−o)·q)·(R(p − o)·μ),   u = γ·A⁻ᵀ·R(−o)·q

γ is a factor of each group. The best scale of a token makes x̂ too short, since rounding errors oppose what they round:
noise of 0.13 takes 13 % of x away. Attention averages noise over tokens, but not that. γ gives it back, all of it or a
part.

Layout: N blocks of 16 tokens; of each, the groups of all heads in order, each 16 × 16 codes. Keys have a word for each
token, with its 16 components; values have one for each component, with its 16 tokens.

    pairs    int32  (B, N, P, 16)     a plane for two bits of the code: number c of a word at bits 2c and 2c + 1
    singles  int16  (B, N, S, 16)     a plane for one bit: number 4a + b of a word at bit 4·(0, 2, 1, 3)[a] + b
    scale    uint8  (B, N, H_kv, 16)  by token

A group of b bits has b // 2 planes of pairs, the lowest bits first, and where b is odd one single, the highest bit. The
order of a single's bits lets ``word | word << 12`` hold four numbers in the low half of each of its four bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from rotatekv.kernels.layout import BLOCK, Packed

FRAME = 128  # tokens
GROUP = 16  # components of one number of bits
MOST_BITS = 5
SCALE_BITS = 8  # a token and head
# Of a normal variable of variance 1, for 0 … 5 bits: the step of the best uniform symmetric quantizer, and its noise
# with one scale a token (../docs/beyond.md says how they were found).
STEPS = (1.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881)
NOISE = (1.0, 0.40, 0.13, 0.040, 0.0115, 0.0033)
_SCALE_STEPS = 8  # of a factor of two
_SCALE_ZERO = 128  # stored for a scale of 1
_CANDIDATES = range(-4, 12, 2)  # stored scales tried, from the one of the root mean square; more above, for outliers
_SINGLE_SHIFTS = (*range(0, 4), *range(8, 12), *range(4, 8), *range(12, 16))  # of a group's 16 components


@dataclass(frozen=True, eq=False)
class Transform:
    """One layer's keys in a frame, or its values ↔ components.

    Args:
        maps: (H_kv, D, D) float32, the A of each head, in units of its groups' steps.
        mean: (H_kv, D) float32, μ.
        bits: (H_kv, D / GROUP) int64, on the CPU.
        weights: (H_kv, D / GROUP) float32: what an error of 1 of a component costs.
        given_back: log γ / −log(1 − noise), in [0, 1].
        words_of_tokens: a word has 16 components of a token; else 16 tokens of a component.
    """

    maps: torch.Tensor
    mean: torch.Tensor
    bits: torch.Tensor
    weights: torch.Tensor
    given_back: float = 0.0
    words_of_tokens: bool = True

    @cached_property
    def inverse(self) -> torch.Tensor:
        """(H_kv, D, D) float32, A⁻¹·γ."""
        kept = 1 - torch.tensor((0.0, *NOISE[1:]), dtype=torch.float64, device="cpu")[self.bits]  # (H_kv, D / 16)
        factor = (kept**-self.given_back).repeat_interleave(GROUP, 1)  # (H_kv, D)
        inverse = torch.linalg.inv(self.maps.double().cpu()) * factor.unsqueeze(1)
        return inverse.float().to(self.maps.device)

    @cached_property
    def component_bits(self) -> torch.Tensor:
        """(H_kv, D) int64."""
        return self.bits.repeat_interleave(GROUP, 1).to(self.maps.device)

    @cached_property
    def levels(self) -> torch.Tensor:
        """(H_kv, D) float32, 2^(bits − 1); 0 for 0 bits."""
        return ((2**self.component_bits).float() / 2).masked_fill(self.component_bits == 0, 0.0)

    @cached_property
    def planes(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Of the pairs and of the singles: head, group and lowest bit of each plane."""
        pairs, singles = [], []
        for head, of_head in enumerate(self.bits.tolist()):
            for group, bits in enumerate(of_head):
                pairs += [(head, group, 2 * plane) for plane in range(bits // 2)]
                singles += [(head, group, bits - 1)] * (bits % 2)
        return pairs, singles

    @cached_property
    def _copies(self) -> dict[torch.device, Transform]:
        return {self.maps.device: self}

    def on(self, device: torch.device) -> Transform:
        """This one, or a copy there; made once."""
        found = self._copies.get(device)
        if found is None:
            moved = {name: getattr(self, name).to(device) for name in ("maps", "mean", "weights")}
            found = self._copies[device] = replace(self, **moved)
        return found


def quantize_components(x: torch.Tensor, transform: Transform) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, H_kv, D) components → codes (B, T, H_kv, D) uint8 and stored scales (B, T, H_kv) uint8.

    The scale is the one of eight about the root mean square whose rounding error, weighted, is least, or a neighbour of
    that.
    """
    levels, stored = transform.levels, transform.component_bits > 0
    weights = (transform.weights.repeat_interleave(GROUP, 1) * stored).float()  # (H_kv, D)
    steps = torch.tensor(STEPS, dtype=x.dtype, device=x.device)[transform.component_bits] * stored
    mean_square = (x * steps).square().sum(-1) / stored.sum(-1).clamp_min(1)  # (B, T, H_kv), 1 for a usual token
    middle = (mean_square.clamp_min(2.0**-40).log2() * (_SCALE_STEPS / 2)).round().int() + _SCALE_ZERO
    best, best_error = middle, torch.full_like(mean_square, torch.inf)
    for offsets in (_CANDIDATES, (-1, 1)):
        middle = best
        for offset in offsets:
            candidate = (middle + offset).clamp(0, 255)
            error = ((_nearest(x, candidate, levels) - x).square() * weights).sum(-1)
            is_better = error < best_error
            best_error, best = torch.where(is_better, error, best_error), torch.where(is_better, candidate, best)
    codes = (x / scale_of(best).unsqueeze(-1) + levels).floor().clamp_min(0).minimum((2 * levels - 1).clamp_min(0))
    return codes.to(torch.uint8), best.to(torch.uint8)


def _nearest(x: torch.Tensor, stored_scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    scale = scale_of(stored_scale).unsqueeze(-1)
    code = (x / scale + levels).floor().clamp_min(0).minimum((2 * levels - 1).clamp_min(0))
    return (code + 0.5 - levels) * scale


def scale_of(stored: torch.Tensor) -> torch.Tensor:
    return torch.exp2((stored.float() - _SCALE_ZERO) / _SCALE_STEPS)


def dequantize_components(codes: torch.Tensor, scale: torch.Tensor, transform: Transform) -> torch.Tensor:
    """(B, T, H_kv, D) float32 from the codes and stored scales of ``quantize_components``."""
    x = (codes.float() + 0.5 - transform.levels) * scale_of(scale).unsqueeze(-1)
    return x.masked_fill(transform.component_bits == 0, 0.0)


def allocate_planes(transform: Transform, batch: int, blocks: int, device: torch.device) -> Packed:
    """Zeroed planes for ``blocks`` blocks of 16 tokens a sequence."""
    pairs, singles = transform.planes
    widths = {"pairs": len(pairs), "singles": len(singles), "scale": len(transform.bits)}
    dtypes = {"pairs": torch.int32, "singles": torch.int16, "scale": torch.uint8}
    return {name: torch.zeros(batch, blocks, n, BLOCK, dtype=dtypes[name], device=device) for name, n in widths.items()}


def pack_components(codes: torch.Tensor, scale: torch.Tensor, transform: Transform) -> Packed:
    """Whole blocks: codes (B, 16·N, H_kv, D) uint8 and scale (B, 16·N, H_kv) uint8 → planes."""
    blocks = codes.long().unflatten(-1, (-1, GROUP)).unflatten(1, (-1, BLOCK))  # (B, N, 16, H_kv, D / 16, 16)
    blocks = blocks.permute(
        3, 4, 0, 1, *((2, 5) if transform.words_of_tokens else (5, 2))
    )  # (H_kv, D / 16, B, N, 16, 16)
    packed = allocate_planes(transform, codes.shape[0], codes.shape[1] // BLOCK, codes.device)
    for name, planes, shifts in _planes(transform, codes.device):
        size, mask = (32, 3) if name == "pairs" else (16, 1)
        for plane, (head, group, low) in enumerate(planes):
            words = ((blocks[head, group] >> low & mask) << shifts).sum(-1)  # (B, N, 16)
            packed[name][:, :, plane] = words - ((words >> (size - 1)) << size)  # the top bit is the sign
    packed["scale"].copy_(scale.unflatten(1, (-1, BLOCK)).transpose(2, 3))
    return packed


def unpack_components(packed: Packed, tokens: int, transform: Transform) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``tokens`` tokens: codes (B, T, H_kv, D) uint8 and stored scales (B, T, H_kv) uint8."""
    batch, count, heads, _ = packed["scale"].shape
    device, shape = packed["scale"].device, (heads, transform.bits.shape[1], batch, count, BLOCK, GROUP)
    blocks = torch.zeros(shape, dtype=torch.uint8, device=device)
    for name, planes, shifts in _planes(transform, device):
        mask = 3 if name == "pairs" else 1
        for plane, (head, group, low) in enumerate(planes):
            numbers = packed[name][:, :, plane].int().unsqueeze(-1) >> shifts & mask  # (B, N, 16, 16)
            blocks[head, group] |= (numbers << low).to(torch.uint8)
    blocks = blocks if transform.words_of_tokens else blocks.transpose(4, 5)
    codes = blocks.permute(2, 3, 4, 0, 1, 5).flatten(4).flatten(1, 2)  # (B, T, H_kv, D)
    scale = packed["scale"].transpose(2, 3).flatten(1, 2)  # (B, T, H_kv)
    return codes[:, :tokens], scale[:, :tokens]


def _planes(transform: Transform, device: torch.device):
    """Name, planes and the place of each number in a word, of the pairs and the singles."""
    pairs, singles = transform.planes
    counted = {"dtype": torch.int32, "device": device}
    yield "pairs", pairs, torch.arange(0, 2 * GROUP, 2, **counted)
    yield "singles", singles, torch.tensor(_SINGLE_SHIFTS, **counted)
