"""The interface of a KV-cache quantization method: a codec for the keys and values of one attention layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.kernels import Packed
from rotatekv.kernels.hadamard import channels_to_heads, heads_to_channels
from rotatekv.methods.stores import HeadForm, Store, TokenStore

Statistics = Mapping[str, torch.Tensor]  # of one layer, by name, as statistics.py loads them

_NEUTRAL = {  # what a flag must be for a method that has no use for it; a switch: False
    "k_groupsize": None,
    "v_groupsize": None,
    "k_clip_ratio": 1.0,
    "v_clip_ratio": 1.0,
    "head_group_num": 1,
    "extra_bit_share": 0.0,
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
    ``encode_*`` makes per-token tensors (B, T, ...) of them, and the ``*_store`` keeps those. Reading: ``decode_*``
    takes the per-token tensors, ``keys_out`` moves back. So the cache can cut, join and reorder without knowing the
    method. The keys are those before RoPE where ``keys_before_rope`` says so. The default space is the keys and values
    as they are.

    A codec is immutable and shared by all caches of a model; calibrated statistics are the codec's, not the cache's.

    Attributes:
        k_bits, v_bits: of this layer; the config's, unless the method says otherwise.
        statistics: those of the layer's calibrated tensors that the codec uses; they decide what its bytes mean.
        tokens_per_flush: tokens leave the recent window in multiples of it, so ``encode_*`` gets whole groups.
        unused_flags: fields of ``QuantConfig`` that mean nothing to the method: any but the default is refused.
    """

    tokens_per_flush = 1
    unused_flags: tuple[str, ...] = ()
    finds_massive_tokens = False  # it has a sink_threshold
    sink_threshold: float | None = None  # of a hidden-state entry, for sink_selection "massive"
    gives_extra_bits = False  # extra_bit_share means something to it
    keys_before_rope = False
    quantizes = True
    key_tokens_per_scale = 0  # tokens that share a channel's scale of the keys; 0: scales are per token
    can_fuse = False  # decode attention has a fused kernel: RTN.decode_options
    # How a kernel reads the stores' blocks: all that decode_* and *_out do. None: there is none, they do it.
    key_form: HeadForm | None = None
    value_form: HeadForm | None = None

    def __init__(self, config: QuantConfig, layer: LayerGeometry, statistics: Statistics | None = None):
        self.config, self.layer = config, layer
        self.statistics: Statistics = {}
        self._refuse_unused_flags()
        if config.sink_selection == "massive" and not self.finds_massive_tokens:
            raise UserError(f"{type(self).__name__} has no thresholds for sink_selection massive: detected or first")
        self.k_bits, self.v_bits = config.k_bits, config.v_bits
        self.k_groupsize = config.k_groupsize or layer.head_dim
        self.v_groupsize = config.v_groupsize or layer.head_dim
        if self.quantizes:
            self._check_shapes()

    @classmethod
    def statistics_kind(cls, config: QuantConfig) -> str | None:
        """Which calibrated statistics the codec needs, a name in ``calibration.KINDS``; None: none."""
        return None

    def use_statistics(self, statistics: Statistics | None, *names: str) -> list[torch.Tensor]:
        """Take what the codec needs of the layer's statistics.

        Raises:
            UserError: they are not there.
        """
        missing = [name for name in names if statistics is None or name not in statistics]
        if missing:
            raise UserError(f"{self.config.method} needs calibrated statistics: {', '.join(missing)}")
        self.statistics = {name: statistics[name] for name in names}
        return list(self.statistics.values())

    def _check_shapes(self) -> None:
        layer = self.layer
        self._check_key_groups()
        if layer.head_dim % self.v_groupsize:
            fits = _largest_divisor(layer.head_dim, self.v_groupsize)
            raise UserError(
                f"v_groupsize {self.v_groupsize} does not divide head_dim {layer.head_dim}: --v_groupsize {fits} does"
            )

    def _check_key_groups(self) -> None:
        layer = self.layer
        if layer.channels % self.k_groupsize:
            fits = _largest_divisor(layer.channels, self.k_groupsize)
            raise UserError(
                f"k_groupsize {self.k_groupsize} does not divide the {layer.channels} key channels "
                f"({layer.num_key_value_heads} heads × {layer.head_dim}): --k_groupsize {fits} does"
            )

    def _refuse_unused_flags(self) -> None:
        unused = self.unused_flags if self.gives_extra_bits else (*self.unused_flags, "extra_bit_share")
        given = [flag for flag in unused if getattr(self.config, flag) != _NEUTRAL.get(flag, False)]
        if given:
            flags = ", ".join(given)
            raise UserError(f"{type(self).__name__} has no use for {flags}: leave out {flags}, or take another method")

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return heads_to_channels(keys)  # (B, T, H_kv·D)

    def keys_out(self, channels: torch.Tensor) -> torch.Tensor:
        return channels_to_heads(channels, self.layer.head_dim)  # (B, H_kv, T, D)

    def values_in(self, values: torch.Tensor) -> torch.Tensor:
        return heads_to_channels(values)  # (B, T, H_kv·D)

    def values_out(self, channels: torch.Tensor) -> torch.Tensor:
        return channels_to_heads(channels, self.layer.head_dim)  # (B, H_kv, T, D)

    def key_store(self) -> Store:
        return TokenStore()

    def value_store(self) -> Store:
        return TokenStore()

    @abstractmethod
    def encode_keys(self, channels: torch.Tensor) -> Packed: ...

    @abstractmethod
    def decode_keys(self, tokens: Packed) -> torch.Tensor: ...

    @abstractmethod
    def encode_values(self, channels: torch.Tensor) -> Packed: ...

    @abstractmethod
    def decode_values(self, tokens: Packed) -> torch.Tensor: ...

    def __deepcopy__(self, memo: dict) -> KVMethod:
        return self


def _largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n up to ``most``."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)
