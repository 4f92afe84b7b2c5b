"""The tokens of a layer that are quantized: the codec and the stores of keys and values, together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from rotatekv.methods import KVMethod
from rotatekv.methods.formats import BlockFormat
from rotatekv.methods.stores import CodeStore, Encoded, Store, TransformStore


@dataclass
class PackedTokens:
    """The first tokens of a layer, as codes.

    Args:
        keys, values: the stores of what the method's ``encode_*`` made of them.
    """

    method: KVMethod
    keys: Store
    values: Store

    @classmethod
    def none(cls, method: KVMethod) -> PackedTokens:
        return cls(method, method.key_store(), method.value_store())

    @property
    def length(self) -> int:
        return self.keys.length

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        kernels: ModuleType | None,
        unrope: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        """Quantize (B, H_kv, T, D) tokens. ``unrope``: what a kernel undoes the keys' RoPE with; None: nothing is."""
        method = self.method
        self.keys.add(keys, lambda x: method.encode_keys(method.keys_in(x)), kernels, method.key_format, unrope)
        self.values.add(values, lambda x: method.encode_values(method.values_in(x)), kernels, method.value_format)

    def are_read_by(self, kernels: ModuleType | None) -> bool:
        if kernels is None or not self.length:
            return False
        key_format = self.method.key_format
        return kernels.READS_TOKEN_GROUPS or key_format is None or not key_format.tokens_per_scale

    def heads(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        kernels: ModuleType | None,
        views: bool = False,
        turns: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of (B, H_kv, T, D) ``shape``, of which these first tokens are set.

        Args:
            views: they may be what the stores hold; else they can be written to.
            turns: what kernels that read heads take keys of frames to their positions with; none where RoPE does not
                turn them. None: keys of frames come as they are there.

        Returns:
            in ``dtype``, but keys in their frames, which are not as attention sees them yet, in float32.
        """
        method, kernels = self.method, kernels if self.are_read_by(kernels) else None
        key_dtype = dtype if method.key_frames is None or turns is not None else torch.float32
        read = partial(_heads, shape, device=device, kernels=kernels, views=views)
        return (
            read(key_dtype, self.keys, method.key_format, method.decode_keys, method.keys_out, turns=turns),
            read(dtype, self.values, method.value_format, method.decode_values, method.values_out, turns=()),
        )

    def leave_frames(self, kernels: ModuleType | None) -> bool:
        """Whether ``heads`` takes keys out of their frames, given ``turns``."""
        return kernels is not None and kernels.READS_HEADS and isinstance(self.keys, TransformStore) and self.length > 0

    def crop(self, length: int) -> None:
        self.keys.crop(length)
        self.values.crop(length)

    def after(self, count: int) -> PackedTokens:
        """A copy without the first ``count`` tokens, whole blocks and groups."""
        keys, values = copy.copy(self.keys), copy.copy(self.values)
        keys.drop(count)
        values.drop(count)
        return PackedTokens(self.method, keys, values)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def move(self, device: torch.device | str) -> None:
        self.keys.move(device)
        self.values.move(device)


def _heads(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    store: Store,
    form: BlockFormat | None,
    decode: Callable[[Encoded], torch.Tensor],
    to_heads: Callable[[torch.Tensor], torch.Tensor],
    *,
    device: torch.device,
    kernels: ModuleType | None,
    views: bool,
    turns: tuple[torch.Tensor, ...] | None,
) -> torch.Tensor:
    """One of the two of ``PackedTokens.heads``, by kernels that read the store or by the codec."""
    if kernels is not None and isinstance(store, TransformStore) and kernels.READS_HEADS and turns is not None:
        return store.heads(shape[2], kernels, turns).to(dtype)
    if kernels is not None and form is not None and isinstance(store, CodeStore):
        return store.heads(form, shape[2], kernels).to(dtype)

    def decoded() -> torch.Tensor:
        if kernels is not None and isinstance(store, TransformStore):
            return to_heads(store.channels(kernels))
        return to_heads(decode(store.tokens()))

    if views and store.length == shape[2]:
        return decoded().to(dtype)
    heads = torch.empty(shape, dtype=dtype, device=device)
    if store.length:
        heads[:, :, : store.length] = decoded()
    return heads
