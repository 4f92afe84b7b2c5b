"""TurboQuant (arXiv 2504.19874), the MSE variant: a random rotation, and one codebook for every coordinate."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from rotatekv.config import SUPPORTED_BITS, QuantConfig, baseline
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import channels_to_heads, has_hadamard, heads_to_channels, no_hadamard, rotate_channels
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.formats import PerDevice
from rotatekv.methods.registry import register
from rotatekv.methods.stores import Encoded, PlaneStore

SIGN_SEED = 2504_19874  # of the rotation's signs: the same for every layer, head and run
_GRID = 2**14  # intervals on which the density is integrated
_LARGEST_NORM = 65504.0  # largest float16
_SMALLEST_NORM = 1e-30


@register("turboquant", presets={f"TurboQuant{bits}": baseline("turboquant", bits) for bits in SUPPORTED_BITS})
class TurboQuant(KVMethod):
    """TurboQuant_mse (algorithm 1) on post-RoPE keys and on values, each head vector x of D numbers for itself.

    ``y = Π·x / |x|`` lies on the unit sphere whatever x was, so each coordinate follows one known distribution
    (lemma 1); it is rounded to the nearest of the 2^bits levels that are best for it. Stored are the codes and |x|;
    ``x̂ = |x|·Πᵀ·levels[code]``, the norm in floating point as there. The paper does not scale the vector of
    levels to length 1, so neither does this.

    Keys and values lie in a ``PlaneStore`` each: the planes, and ``norm`` (B, T, H_kv) float16.
    """

    # PAPER: Π is a random orthogonal matrix (QR of a Gaussian one), dense; here it is the Hadamard matrix times fixed
    # random signs, which takes two small matmuls. For vectors of many like channels the coordinates follow lemma 1. A
    # vector with one channel alone has all of them at ±1/√D, halfway between two levels: at 2 bits and D = 128 that
    # errs by 0.26 of its square instead of theorem 1's 0.117.

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        generator = torch.Generator(device="cpu").manual_seed(SIGN_SEED)
        drawn = torch.randint(2, (geometry.head_dim,), generator=generator, dtype=torch.int64, device="cpu")
        signs = drawn.mul(2).sub(1).float()  # (D,) ±1
        levels = (
            torch.tensor(sphere_levels(geometry.head_dim, bits), dtype=torch.float32, device="cpu")
            for bits in (config.k_bits, config.v_bits)
        )
        self.signs, self.key_levels, self.value_levels = map(PerDevice, (signs, *levels))

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        super().check(config, geometry)
        if not has_hadamard(geometry.head_dim):
            raise UserError(no_hadamard(geometry.head_dim))

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        signed = keys.float() * self.signs.on(keys.device)
        return rotate_channels(heads_to_channels(signed), self.geometry.head_dim)  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        signed = rotate_channels(channels.float(), self.geometry.head_dim, inverse=True)  # (B, T, H_kv·D)
        return channels_to_heads(signed, self.geometry.head_dim) * self.signs.on(channels.device)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        return self.keys_in(values)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        return self.keys_out(channels)

    def key_store(self) -> PlaneStore:
        return PlaneStore(self.k_bits)

    def value_store(self) -> PlaneStore:
        return PlaneStore(self.v_bits)

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        return self._encode(channels, self.key_levels)

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        return self._decode(tokens, self.key_levels)

    def encode_values(self, channels: torch.Tensor) -> Encoded:
        return self._encode(channels, self.value_levels)

    def decode_values(self, tokens: Encoded) -> torch.Tensor:
        return self._decode(tokens, self.value_levels)

    def _encode(self, channels: torch.Tensor, levels: PerDevice) -> Encoded:
        """(B, T, H_kv·D), rotated → ``codes`` (B, T, H_kv·D) uint8, ``norm`` (B, T, H_kv) float16."""
        heads = channels.float().unflatten(-1, (-1, self.geometry.head_dim))  # (B, T, H_kv, D)
        norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
        rising = levels.on(channels.device)
        between = (rising[1:] + rising[:-1]) / 2
        codes = torch.bucketize(heads / norm.clamp_min(_SMALLEST_NORM), between, out_int32=True)
        return {"codes": codes.byte().flatten(2), "norm": norm[..., 0].clamp_max(_LARGEST_NORM).half()}

    def _decode(self, tokens: Encoded, levels: PerDevice) -> torch.Tensor:
        codes = tokens["codes"].unflatten(-1, (-1, self.geometry.head_dim))  # (B, T, H_kv, D)
        heads = levels.on(codes.device)[codes.int()]
        return (heads * tokens["norm"].float().unsqueeze(-1)).flatten(2)  # (B, T, H_kv·D)


@lru_cache(maxsize=16)
def sphere_levels(dimension: int, bits: int) -> tuple[float, ...]:
    """The 2^bits levels with the least mean squared error for one coordinate of a uniform point on the unit sphere.

    Lloyd-Max iterations on the exact density (lemma 1), proportional to
    ``(1 − x²)^((D − 3) / 2)`` on [−1, 1], integrated by the trapezoidal rule; to about 1e-6 of the standard deviation.

    Args:
        dimension: D ≥ 3.
    """
    reach = min(1.0, 12 / math.sqrt(dimension))  # standard deviations; nothing lies further out
    x = np.linspace(-reach, reach, _GRID + 1)
    density = np.clip(1 - x * x, 0, None) ** ((dimension - 3) / 2)
    mass, moment = (_cumulative(weight, x) for weight in (density, density * x))
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits * mass[-1], mass, x)
    for _ in range(10_000):
        edges = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
        better = np.diff(np.interp(edges, x, moment)) / np.diff(np.interp(edges, x, mass))
        moved, levels = np.abs(better - levels).max(), better
        if moved < 1e-10 * reach:
            break
    return tuple(levels.tolist())


def _cumulative(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    steps = (y[1:] + y[:-1]) / 2 * np.diff(x)
    return np.concatenate([[0.0], np.cumsum(steps)])
