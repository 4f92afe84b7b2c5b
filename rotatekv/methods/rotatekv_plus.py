"""RotateKV+: transform-coded keys and values, bits where calibration finds that they count.

Ours, not the paper's: docs/beyond.md says what was tried, and what each part is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from rotatekv.config import QuantConfig, baseline
from rotatekv.errors import UserError
from rotatekv.kernels import transform_coding
from rotatekv.kernels.hadamard import channels_to_heads, heads_to_channels
from rotatekv.kernels.layout import BLOCK
from rotatekv.kernels.transform_coding import (
    FRAME,
    GROUP,
    MOST_BITS,
    NOISE,
    SCALE_BITS,
    STEPS,
    Transform,
    dequantize_components,
    quantize_components,
)
from rotatekv.methods.base import KVMethod, LayerGeometry, Statistics
from rotatekv.methods.bit_budget import Choice, allocate
from rotatekv.methods.formats import FusedDecode
from rotatekv.methods.registry import register
from rotatekv.methods.stores import Encoded, Store, TransformStore
from rotatekv.rope import KeyFrames

# How much of the length that rounding takes is given back, see kernels/transform_coding.py. All of it for values, which
# attention averages; scores that are too small also make attention less sure of what is noise.
KEYS_GIVEN_BACK, VALUES_GIVEN_BACK = 0.375, 1.0
LEAST_KEY_BITS = 1  # of a head's strongest group: without any, a query tells no old token from another
LEAST_VALUE_BITS = 1  # a value that reads as the mean is an error that no average takes away
FAR_MEAN = 64  # deviations, in a mean's largest channel; there a step of 8 bits is half a deviation
SLIDING_SHARE = 32  # a recent window is at most one part in so many of a sliding window
_NO_LIMIT = 2**62  # tokens
VALUE_NOISE = tuple(noise / (1 - noise) for noise in NOISE[LEAST_VALUE_BITS:])  # with all of it given back


def _preset(bits: int) -> QuantConfig:
    kept = {"Attention_Sink_Aware": True, "sink_selection": "massive", "residual_length": 64, "residual_bits": 8}
    return replace(baseline("rotatekv_plus", 2, **kept), bits=float(bits))


@register("rotatekv_plus", presets={f"RotateKV{bits}+": _preset(bits) for bits in (2, 3, 4)})
class RotateKVPlus(KVMethod):
    """Keys and values by transform coding (``kernels/transform_coding.py``).

    *Keys.* RoPE, and all that a decode step would have to undo of it, moves to the query. So a head's keys can be
    mapped by any matrix: the one that makes the rounding noise that queries see least. Strong directions get up to
    5 bits, weak ones none.
    *Values* likewise, for what the output projection sees. But their strength differs more from token to token than
    from direction to direction, so a head's components are all mixed and have the same bits.
    *Bits.* ``bits`` is what a number of a packed token takes on average, its share of a scale included, over keys and
    values of all layers. One greedy allocation splits it: a bit goes where it saves most of the predictions' change, as
    calibration has measured it.
    *Massive.* A token with a massive activation is kept in 16 bits whenever it comes: in each layer, one whose largest
    hidden-state entry is above a calibrated threshold.
    *Recent.* The last ``residual_length`` tokens take 8 bits a number; in a layer with a sliding window no more than a
    32nd of it, since there they are that much of all that is kept. Tokens leave in blocks of 16, so there are up to 15
    more.

    Attributes:
        key_transform, value_transform: of this layer.
    """

    flags = ("bits",)
    sink_selections = (*KVMethod.sink_selections, "massive")
    tokens_per_flush = BLOCK

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        super().__init__(config, geometry, statistics)
        kinds = "map", "mean", "cost", "bits"
        names = [f"{of}_{kind}" for of in ("key", "value") for kind in kinds]
        *found, threshold = self.use_statistics(statistics, *names, "sink_threshold")
        self.sink_threshold = threshold.item()
        value_map, value_mean, value_cost, value_bits = found[4:]
        per_group = value_map.shape[-1] // GROUP
        of_groups = (x.unsqueeze(-1).expand(-1, per_group) for x in (value_cost, value_bits))
        self.key_transform = _transform(*found[:4], given_back=KEYS_GIVEN_BACK)
        self.value_transform = _transform(
            value_map, value_mean, *of_groups, given_back=VALUES_GIVEN_BACK, words_of_tokens=False
        )
        self.key_frames = KeyFrames(FRAME, self.key_transform.mean)
        self.k_bits, self.v_bits = (x.bits.double().mean().item() for x in (self.key_transform, self.value_transform))

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        super().check(config, geometry)
        if config.bits is None:
            raise UserError("rotatekv_plus needs a number of bits: --bits 2.0")
        if config.k_bits != 2 or config.v_bits != 2:
            raise UserError(
                "rotatekv_plus splits one budget over keys and values: set --bits, not --k_bits or --v_bits"
            )
        if geometry.head_dim % GROUP:
            raise UserError(
                f"rotatekv_plus codes {GROUP} components at a time, head_dim {geometry.head_dim} has others: "
                "take a method that does not, --method RTN2, RTN3 or RTN4"
            )

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str:
        return "plus"

    @classmethod
    def plan(
        cls, config: QuantConfig, statistics: dict[str, torch.Tensor], geometries: Sequence[LayerGeometry | None]
    ) -> dict[str, torch.Tensor]:
        assert config.bits is not None
        key_cost, value_cost = statistics["key_cost"], statistics["value_cost"]  # (L, H_kv, D / 16), (L, H_kv)
        numbers, scales, choices = 0, 0, []
        for geometry, keys, values in zip(geometries, key_cost, value_cost, strict=True):
            if geometry is None:
                continue
            numbers += 2 * geometry.channels
            scales += 2 * geometry.num_key_value_heads * SCALE_BITS
            for strongest, *others in keys.tolist():
                choices.append(Choice(strongest, GROUP, NOISE[LEAST_KEY_BITS : MOST_BITS + 1], LEAST_KEY_BITS))
                choices += [Choice(cost, GROUP, NOISE[: MOST_BITS + 1]) for cost in others]
            choices += [Choice(cost, geometry.head_dim, VALUE_NOISE, LEAST_VALUE_BITS) for cost in values.tolist()]
        allocated = iter(allocate(choices, config.bits * numbers - scales))
        key_bits, value_bits = (torch.zeros(x.shape, dtype=torch.int64, device="cpu") for x in (key_cost, value_cost))
        for number, geometry in enumerate(geometries):
            for bits in (key_bits, value_bits) if geometry is not None else ():
                of_layer = [next(allocated) for _ in range(bits[number].numel())]
                bits[number] = torch.tensor(of_layer, dtype=torch.int64, device="cpu").view_as(bits[number])
        return {**statistics, "key_bits": key_bits, "value_bits": value_bits}

    def residual_length(self, sliding_window: int | None) -> int:
        return min(self.config.residual_length, (sliding_window or _NO_LIMIT) // SLIDING_SHARE)

    @cached_property
    def window_bits(self) -> tuple[int, int]:
        """Keys with a mean far above what differs between them, as of models with large key biases, take 16 bits."""
        inverse = self.statistics["key_map"].double().cpu().inverse()  # (H_kv, D, D), of components of variance 1
        deviation = inverse.square().sum(-1).mean(-1).sqrt()  # (H_kv,)
        is_far = (self.statistics["key_mean"].double().cpu().abs().amax(-1) > FAR_MEAN * deviation).any()
        return 16 if is_far else self.config.residual_bits, self.config.residual_bits

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return self._components(keys, self.key_transform)  # centred already, in their frames

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        return self._heads(channels, self.key_transform)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        mean = self.value_transform.on(values.device).mean
        return self._components(values.float() - mean.unsqueeze(1), self.value_transform)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        return self._heads(channels, self.value_transform) + self.value_transform.on(channels.device).mean.unsqueeze(1)

    def encode_keys(self, channels: torch.Tensor) -> Encoded:
        return self._encode(channels, self.key_transform)

    def decode_keys(self, tokens: Encoded) -> torch.Tensor:
        return self._decode(tokens, self.key_transform)

    def encode_values(self, channels: torch.Tensor) -> Encoded:
        return self._encode(channels, self.value_transform)

    def decode_values(self, tokens: Encoded) -> torch.Tensor:
        return self._decode(tokens, self.value_transform)

    def key_store(self) -> Store:
        return TransformStore(self.key_transform)

    def value_store(self) -> Store:
        return TransformStore(self.value_transform)

    @cached_property
    def fused_decode(self) -> FusedDecode | None:
        fits = self.key_frames is not None and self.key_frames.size == transform_coding.FRAME
        return FusedDecode(self.key_transform, self.value_transform) if fits else None

    def _components(self, heads: torch.Tensor, transform: Transform) -> torch.Tensor:
        return heads_to_channels(heads.float() @ transform.on(heads.device).maps.transpose(1, 2))  # (B, T, H_kv·D)

    def _heads(self, channels: torch.Tensor, transform: Transform) -> torch.Tensor:
        inverse = transform.on(channels.device).inverse
        return channels_to_heads(channels, self.geometry.head_dim) @ inverse.transpose(1, 2)  # (B, H_kv, T, D)

    def _encode(self, channels: torch.Tensor, transform: Transform) -> Encoded:
        components = channels.unflatten(-1, (-1, self.geometry.head_dim))  # (B, T, H_kv, D)
        codes, scale = quantize_components(components, transform.on(channels.device))
        return {"codes": codes, "scale": scale}

    def _decode(self, tokens: Encoded, transform: Transform) -> torch.Tensor:
        transform = transform.on(tokens["codes"].device)
        return dequantize_components(tokens["codes"], tokens["scale"], transform).flatten(2)  # (B, T, H_kv·D)


def _transform(maps: torch.Tensor, mean: torch.Tensor, cost: torch.Tensor, bits: torch.Tensor, **options) -> Transform:
    """The maps (H_kv, D, D) of calibration give components of variance 1; here a code's step is 1."""
    steps = torch.tensor(STEPS, dtype=torch.float64, device="cpu")[bits]  # (H_kv, D / 16)
    maps = maps.double() / steps.repeat_interleave(GROUP, 1).unsqueeze(-1)
    weights = cost.double() * steps.square()
    weights = weights / weights.amax().clamp_min(torch.finfo(torch.float64).tiny)
    return Transform(maps.float(), mean.float(), bits, weights.float(), **options)
