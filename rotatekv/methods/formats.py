"""How numbers lie in a codec's blocks: which channels share a scale, and what a kernel that reads them must undo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from rotatekv.kernels.decode_attention import DecodeOptions
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import Transform


class PerDevice:
    """A tensor that never changes, copied once to each device that asks for it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.contiguous()
        self._copies = {tensor.device: self.tensor}

    def on(self, device: torch.device) -> torch.Tensor:
        found = self._copies.get(device)
        if found is None:
            found = self._copies[device] = self.tensor.to(device)
        return found


class ChannelGroups:
    """Which channels share a scale and a zero point; made once per codec, so that its caches hold no copy.

    Attributes:
        size: channels of a group.
        of_channel: (C,) int32, each channel's group.
        order: (C,) int32, the channels group after group, as the kernels that write want them; None: 0 … C − 1.
    """

    def __init__(self, of_channel: torch.Tensor):
        is_consecutive = bool((of_channel.diff() >= 0).all())
        self.size = len(of_channel) // (int(of_channel.max()) + 1)
        self.of_channel = PerDevice(of_channel.int())
        self.order = None if is_consecutive else PerDevice(torch.argsort(of_channel, stable=True).int())

    @classmethod
    def consecutive(cls, channels: int, size: int) -> ChannelGroups:
        return cls(torch.arange(channels, dtype=torch.int32, device="cpu") // size)


@dataclass(frozen=True)
class BlockFormat:
    """How the channels of a store's blocks become heads again.

    Args:
        bits: per code.
        head_dim: D.
        groups: the channels that share a scale; None: each has its own, see ``tokens_per_scale``.
        rotation_width: order of the Hadamard matrix to undo, whole heads; 0: none.
        tokens_per_scale: tokens that share a channel's scale, a multiple of 16; 0: scales are per token.
    """

    bits: int
    head_dim: int
    groups: ChannelGroups | None
    rotation_width: int = 0
    tokens_per_scale: int = 0

    def groups_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.groups is None else self.groups.of_channel.on(device)


@dataclass(frozen=True, eq=False)
class FusedDecode:
    """Attention of a few new tokens, by a kernel that reads keys and values of these formats."""

    keys: BlockFormat | Transform
    values: BlockFormat | Transform
    _options: dict[tuple, DecodeOptions] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, keys: BlockFormat | None, values: BlockFormat | None) -> FusedDecode | None:
        """None: no kernel reads both, or heads or groups of values are not made of whole SIMD vectors."""
        if keys is None or values is None or values.groups is None:
            return None
        return cls(keys, values) if keys.head_dim % 16 == 0 and values.groups.size % 16 == 0 else None

    def group_of_channel(self, device: torch.device) -> torch.Tensor | None:
        """(C,) int32, the keys' quantization groups; None: there are none."""
        return None if isinstance(self.keys, Transform) else self.keys.groups_on(device)

    def options(
        self, softmax_scale: float, rope: RopeTables | None, device: torch.device, sliding_window: int = 0
    ) -> DecodeOptions:
        """What the kernel must know of this layer; made once for the same arguments."""
        asked = softmax_scale, rope, device, sliding_window
        found = self._options.get(asked)
        if found is None:
            self._options.clear()
            found = self._options[asked] = self._make_options(*asked)
        return found

    def _make_options(
        self, softmax_scale: float, rope: RopeTables | None, device: torch.device, sliding_window: int
    ) -> DecodeOptions:
        common: dict[str, Any] = {"softmax_scale": softmax_scale, "rope": rope, "sliding_window": sliding_window}
        return DecodeOptions(**common, **self._of_keys(device), **self._of_values(device))

    def _of_keys(self, device: torch.device) -> dict[str, Any]:
        if isinstance(self.keys, Transform):
            return {"head_dim": self.keys.maps.shape[-1], "key_bits": 0, "key_transform": self.keys.on(device)}
        return {
            "head_dim": self.keys.head_dim,
            "key_bits": self.keys.bits,
            "rotation_width": self.keys.rotation_width,
            "key_tokens_per_scale": self.keys.tokens_per_scale,
        }

    def _of_values(self, device: torch.device) -> dict[str, Any]:
        if isinstance(self.values, Transform):
            return {"value_bits": 0, "value_transform": self.values.on(device)}
        return {"value_bits": self.values.bits, "unrotate_values": self.values.rotation_width > 0}
