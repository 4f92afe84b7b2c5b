"""The interface of a KV-cache quantization method: a codec for the keys and values of one attention layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import channels_to_heads, heads_to_channels
from rotatekv.methods.formats import BlockFormat, FusedDecode
from rotatekv.methods.stores import Encoded, Store, TokenStore
from rotatekv.rope import KeyFrames

Statistics = Mapping[str, torch.Tensor]  # of one layer, by name, as statistics.py loads them

# The fields of QuantConfig that not every method has a use for, and what they are where it has none.
# head_group_num is not among them: it means nothing without Grouped_Head_Key_Rotation.
_UNUSED = {
    "k_groupsize": None,
    "v_groupsize": None,
    "k_clip_ratio": 1.0,
    "v_clip_ratio": 1.0,
    "Grouped_Head_Key_Rotation": False,
    "Outlier_Aware_Key_Rotation": False,
    "bits": None,
}


@dataclass(frozen=True)
class LayerGeometry:
    """What a codec must know of its layer."""

    layer_idx: int
    num_key_value_heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.num_key_value_heads * self.head_dim


class KVMethod(ABC):
    """Turns one layer's keys and values into what is stored, and back.

    Writing: ``keys_in`` moves (B, H_kv, T, D) heads to the space that is quantized, (B, T, H_kv·D) channels;
    ``encode_keys`` makes per-token tensors (B, T, ...) of them, and ``key_store`` keeps those. Reading: ``decode_keys``
    takes the per-token tensors, ``keys_out`` moves back. Values have the same five. So the cache can cut, join and
    reorder tokens without knowing the method.

    A codec is immutable and shared by all caches of a model; calibrated statistics are the codec's, not the cache's.

    Attributes:
        flags: the fields of ``QuantConfig`` that mean something to the method, of those that do not to all methods.
        sink_selections: the values of ``QuantConfig.sink_selection`` that it can serve.
        tokens_per_flush: tokens leave the recent window in multiples of it, so ``encode_*`` gets whole groups.
        keys_before_rope: keys come before RoPE is applied; otherwise after.
        key_frames: how they come relative to their frame instead; None: they do not.
        key_format, value_format: how a kernel reads the stores' blocks, all that ``decode_*`` and ``*_out`` do. None:
            no kernel does, they do it.
        k_bits, v_bits: of this layer; the config's, unless the method says otherwise.
        sink_threshold: of a hidden-state entry, for ``sink_selection`` "massive".
        statistics: those of the layer's calibrated tensors that the codec uses; they decide what its bytes mean.
    """

    flags: tuple[str, ...] = ()
    sink_selections: tuple[str, ...] = ("detected", "first")
    tokens_per_flush = 1
    keys_before_rope = False
    key_frames: KeyFrames | None = None
    sink_threshold: float

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, statistics: Statistics | None = None):
        self.check(config, geometry)
        self.config, self.geometry = config, geometry
        self.k_bits, self.v_bits = config.k_bits, config.v_bits
        self.statistics: Statistics = {}

    @classmethod
    def check(cls, config: QuantConfig, geometry: LayerGeometry) -> None:
        """Raises UserError for a config that the method cannot follow in such a layer."""
        unused = [flag for flag in _UNUSED if flag not in cls.flags and getattr(config, flag) != _UNUSED[flag]]
        if unused:
            given = ", ".join(unused)
            raise UserError(f"{cls.__name__} has no use for {given}: leave out {given}, or take another method")
        if config.sink_selection not in cls.sink_selections:
            choices = " or ".join(cls.sink_selections)
            raise UserError(f"{cls.__name__} has no thresholds for sink_selection {config.sink_selection}: {choices}")

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str | None:
        """Which calibrated statistics the codec needs, a name in ``statistics.KINDS``; None: none."""
        return None

    @classmethod
    def plan(
        cls, config: QuantConfig, statistics: dict[str, torch.Tensor], geometries: Sequence[LayerGeometry | None]
    ) -> dict[str, torch.Tensor]:
        """What the codecs of all layers decide together: their calibrated tensors, (num_hidden_layers, ...) each, and
        others made of them."""
        return statistics

    def use_statistics(self, statistics: Statistics | None, *names: str) -> list[torch.Tensor]:
        """Take what the codec needs of the layer's statistics.

        Raises:
            UserError: they are not there.
        """
        statistics = statistics or {}
        missing = [name for name in names if name not in statistics]
        if missing:
            raise UserError(f"{self.config.method} needs calibrated statistics: {', '.join(missing)}")
        self.statistics = {name: statistics[name] for name in names}
        return list(self.statistics.values())

    def residual_length(self, sliding_window: int | None) -> int:
        """Tokens that a layer keeps in its recent window, at least; ``sliding_window``: None, or all that it keeps."""
        return self.config.residual_length

    @cached_property
    def window_bits(self) -> tuple[int, int]:
        """Of a key and a value number in the recent window: 8 or 16."""
        return self.config.residual_bits, self.config.residual_bits

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return heads_to_channels(keys)  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        return channels_to_heads(channels, self.geometry.head_dim)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        return heads_to_channels(values)  # (B, T, H_kv·D)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        return channels_to_heads(channels, self.geometry.head_dim)  # (B, H_kv, T, D)

    @abstractmethod
    def encode_keys(self, channels: torch.Tensor) -> Encoded: ...

    @abstractmethod
    def decode_keys(self, tokens: Encoded) -> torch.Tensor: ...

    @abstractmethod
    def encode_values(self, channels: torch.Tensor) -> Encoded: ...

    @abstractmethod
    def decode_values(self, tokens: Encoded) -> torch.Tensor: ...

    @property
    def key_format(self) -> BlockFormat | None:
        return None

    @property
    def value_format(self) -> BlockFormat | None:
        return None

    def key_store(self) -> Store:
        return TokenStore()

    def value_store(self) -> Store:
        return TokenStore()

    @cached_property
    def fused_decode(self) -> FusedDecode | None:
        """Attention in one kernel that reads the blocks as they lie; None: there is none for these formats."""
        return FusedDecode.of(self.key_format, self.value_format)

    def __deepcopy__(self, memo: dict) -> KVMethod:
        return self
