"""Where one layer's keys or values lie: packed in blocks of 16 tokens, as plain tensors by token, or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from rotatekv.kernels import Packed
from rotatekv.kernels.affine import Affine
from rotatekv.kernels.layout import (
    BLOCK,
    Blocks,
    allocate_blocks,
    allocate_planes,
    unpack_blocks,
    unpack_codes,
    write_blocks,
    write_codes,
)


class Store(ABC):
    """The first ``length`` tokens of (B, T, ...) tensors. ``tensors`` are those held, whatever their layout."""

    is_written_by_kernels = False

    def __init__(self) -> None:
        self.length = 0
        self.tensors: Packed = {}

    @abstractmethod
    def append(self, new: Packed) -> None:
        """Add tokens, per-token tensors (B, T, ...)."""

    def add(
        self,
        heads: torch.Tensor,
        encode: Callable[[torch.Tensor], Packed],
        kernels: ModuleType | None = None,
        form: HeadForm | None = None,
        unrope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Encode (B, H_kv, T, D) heads with the codec's ``encode`` and append them.

        Args:
            kernels, form: do all that ``encode`` does in one kernel, where the store is one it writes.
            unrope: what the kernel undoes RoPE with first; see ``quantize_into_blocks_reference``.
        """
        self.append(encode(heads))

    @abstractmethod
    def tokens(self) -> Packed:
        """All tokens, as they were appended."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens; the others' bytes are freed."""

    @abstractmethod
    def drop(self, count: int) -> None:
        """Drop the first ``count`` tokens, whole blocks and groups; their bytes are freed."""

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are by now; None: there are none."""
        return next((x.device for x in self.tensors.values()), None)

    def select_rows(self, rows: torch.Tensor) -> None:
        self._each(lambda x: x.index_select(0, rows))

    def move(self, device: torch.device | str) -> None:
        self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tensors = type(self.tensors)({name: change(x) for name, x in self.tensors.items()})

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors.values())


class TokenStore(Store):
    """Tensors as they are, joined along T."""

    def append(self, new: Packed) -> None:
        self.length += next(iter(new.values())).shape[1]
        if self.tensors:
            self.tensors = {name: torch.cat([self.tensors[name], x], dim=1) for name, x in new.items()}
        else:
            self.tensors = {name: _whole(x) for name, x in new.items()}

    def tokens(self) -> Packed:
        return self.tensors

    def crop(self, length: int) -> None:
        self.length = length
        # A clone, not a view: a view would keep the dropped tokens' bytes alive.
        self._each(lambda x: x[:, :length].clone())

    def drop(self, count: int) -> None:
        self.length -= count
        self._each(lambda x: x[:, count:].clone())


def _whole(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it is a view of a larger one, such as a whole projection's output."""
    is_whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if is_whole else x.clone(memory_format=torch.contiguous_format)


class Constant:
    """A tensor that never changes, copied once to each device that asks for it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.contiguous()
        self._copies = {tensor.device: self.tensor}

    def on(self, device: torch.device) -> torch.Tensor:
        found = self._copies.get(device)
        if found is None:
            found = self._copies[device] = self.tensor.to(device)
        return found


@dataclass(frozen=True)
class HeadForm:
    """How the channels of a store's blocks become heads again, for a kernel to read.

    Args:
        head_dim: D.
        groups: the channels that share a scale; None: each has its own.
        rotation_width: order of the Hadamard matrix to undo, whole heads; 0: none.
        tokens_per_scale: tokens that share a channel's scale, a multiple of 16; 0: scales are per token.
        factor, offset: (C,) float32, ``x·factor + offset`` after the rotation is undone; None: nothing of it.
    """

    head_dim: int
    groups: ChannelGroups | None
    rotation_width: int = 0
    tokens_per_scale: int = 0
    factor: Constant | None = None
    offset: Constant | None = None

    def groups_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.groups is None else self.groups.of_channel.on(device)

    def affine_on(self, device: torch.device) -> Affine | None:
        return None if self.factor is None else Affine(self.factor.on(device), self.offset.on(device))


class ChannelGroups:
    """Which channels share a scale and a zero point; made once per codec, so that its caches hold no copy.

    Attributes:
        size: channels of a group.
        of_channel: (C,) int32, each channel's group.
        order: (C,) int32, the channels group after group, as the kernels that write want them; None: 0 … C − 1.
    """

    def __init__(self, of_channel: torch.Tensor):
        order = torch.argsort(of_channel, stable=True)
        self.size = len(order) // (int(of_channel.max()) + 1)
        self.of_channel = Constant(of_channel.int())
        is_consecutive = bool((of_channel.diff() >= 0).all())
        self.order = None if is_consecutive else Constant(order.int())

    @classmethod
    def consecutive(cls, channels: int, size: int) -> ChannelGroups:
        return cls(torch.arange(channels, dtype=torch.int32, device="cpu") // size)


class CodeStore(Store):
    """Codes in the bit planes of ``kernels/layout.py``, ``bits`` per code: what a kernel can read."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def missing_blocks(self, tokens: int) -> int:
        """How many more blocks ``tokens`` more tokens need."""
        held = self.tensors["low"].shape[1] if self.tensors else 0
        return -(-(self.length + tokens) // BLOCK) - held

    def heads(self, form: HeadForm, room: int, kernels: ModuleType) -> torch.Tensor:
        """All tokens as heads (B, H_kv, room, D) float32, by a kernel; what lies past ``length`` is not set."""
        low = self.tensors["low"]
        shape = low.shape[0], low.shape[2] // form.head_dim, room, form.head_dim
        return kernels.dequantize_blocks(
            self.tensors,
            self.length,
            self.bits,
            form.groups_on(low.device),
            form.head_dim,
            form.rotation_width,
            out=torch.empty(shape, dtype=torch.float32, device=low.device),
            tokens_per_scale=form.tokens_per_scale,
            affine=form.affine_on(low.device),
        )


class BlockStore(CodeStore):
    """Codes, scales and zero points in the block layout of ``kernels/layout.py``, grown by one block at a time.

    Args:
        bits: per code.
        groups: the channels that share a scale. clip_ratio, fine: see ``quantize.quantize_groups``.
    """

    is_written_by_kernels = True

    def __init__(self, bits: int, groups: ChannelGroups, clip_ratio: float = 1.0, fine: bool = False):
        super().__init__(bits)
        self.tensors = Blocks({})
        self.groups, self.clip_ratio, self.fine = groups, clip_ratio, fine

    def append(self, new: Packed) -> None:
        codes = new["codes"]  # (B, T, C)
        self.reserve(*codes.shape, codes.device)
        write_blocks(self.tensors, self.length, codes, new["scale"], new["zero"], self.bits)
        self.length += codes.shape[1]

    def add(
        self,
        heads: torch.Tensor,
        encode: Callable[[torch.Tensor], Packed],
        kernels: ModuleType | None = None,
        form: HeadForm | None = None,
        unrope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if kernels is None:
            return super().add(heads, encode)
        batch, count, tokens, dim = heads.shape
        self.reserve(batch, tokens, count * dim, heads.device)
        order = self.groups.order
        heads = heads.float() if heads.dtype == torch.float64 else heads  # which kernels do not read
        kernels.quantize_into_blocks(
            heads,
            self.tensors,
            self.length,
            self.bits,
            self.groups.size,
            self.clip_ratio,
            None if order is None else order.on(heads.device),
            form.rotation_width,
            form.affine_on(heads.device),
            unrope,
        )
        self.length += tokens

    def reserve(self, batch: int, tokens: int, channels: int, device: torch.device) -> None:
        """Make room for ``tokens`` more tokens."""
        missing = self.missing_blocks(tokens)
        if missing > 0:
            groups = channels // self.groups.size
            fresh = allocate_blocks(batch, missing, channels, groups, self.bits, device, self.fine)
            if self.tensors:
                fresh = Blocks({name: torch.cat([self.tensors[name], x], dim=1) for name, x in fresh.items()})
            self.tensors = fresh

    def tokens(self) -> Packed:
        codes, scale, zero = unpack_blocks(self.tensors, self.length, self.bits)
        return {"codes": codes, "scale": scale, "zero": zero}

    def crop(self, length: int) -> None:
        blocks = -(-length // BLOCK)
        self._each(lambda x: x[:, :blocks].clone())
        if length % BLOCK:  # lanes past the end are zero
            last = {name: x[:, -1:] for name, x in self.tensors.items()}
            kept = [tensor.clone() for tensor in unpack_blocks(last, BLOCK, self.bits)]
            for tensor in kept:
                tensor[:, length % BLOCK :] = 0
            write_blocks(last, 0, *kept, self.bits)
        self.length = length

    def drop(self, count: int) -> None:
        self.length -= count
        self._each(lambda x: x[:, count // BLOCK :].clone())


class PlaneStore(CodeStore):
    """Codes in the bit planes of ``kernels/layout.py``, beside side tensors with one row per ``tokens_per_row`` tokens.

    For T tokens of C channels, N = ceil(T / 16) and g = ``tokens_per_row``:

        low, high   (B, N, C)         the codes' planes, dtypes as in ``kernels/layout.py``; lanes past T are zero
        others      (B, T / g, ...)   as the codec made them; row r belongs to tokens g·r … g·r + g − 1

    T is always a multiple of g, so no row ever stands for a part of its tokens.

    Args:
        bits: per code.
        tokens_per_row: g.
    """

    def __init__(self, bits: int, tokens_per_row: int = 1):
        super().__init__(bits)
        self.tokens_per_row = tokens_per_row

    def append(self, new: Packed) -> None:
        """Add T tokens: ``codes`` (B, T, C) uint8 and side tensors (B, T / g, ...) (ValueError: cut groups)."""
        codes = new["codes"]
        self._check_whole(codes.shape[1])
        batch, tokens, channels = codes.shape
        missing = self.missing_blocks(tokens)
        grown = {name: x for name, x in new.items() if name != "codes"}
        if missing > 0:
            grown |= allocate_planes(batch, missing, channels, self.bits, codes.device)
        joined = {name: torch.cat([self.tensors[name], x], dim=1) for name, x in grown.items() if name in self.tensors}
        self.tensors = {**{name: x.contiguous() for name, x in grown.items()}, **self.tensors, **joined}
        write_codes(self._planes(), self.length, codes, self.bits)
        self.length += tokens

    def tokens(self) -> Packed:
        sides = {name: x for name, x in self.tensors.items() if name not in ("low", "high")}
        return {"codes": unpack_codes(self._planes(), self.length, self.bits), **sides}

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens, whole groups (ValueError otherwise); the others' bytes are freed."""
        self._check_whole(length)
        blocks, planes = -(-length // BLOCK), self._planes()
        rows = {name: blocks if name in planes else length // self.tokens_per_row for name in self.tensors}
        self.tensors = {name: x[:, : rows[name]].clone() for name, x in self.tensors.items()}
        self.length = length
        if past := -length % BLOCK:  # lanes past the end are zero
            batch, _, channels = self.tensors["low"].shape
            write_codes(self._planes(), length, self.tensors["low"].new_zeros(batch, past, channels).byte(), self.bits)

    def drop(self, count: int) -> None:
        self._check_whole(count)
        planes, rows = self._planes(), count // self.tokens_per_row
        first = {name: count // BLOCK if name in planes else rows for name in self.tensors}
        self.tensors = {name: x[:, first[name] :].clone() for name, x in self.tensors.items()}
        self.length -= count

    def _planes(self) -> Packed:
        return {name: self.tensors[name] for name in ("low", "high") if name in self.tensors}

    def _check_whole(self, tokens: int) -> None:
        if tokens % self.tokens_per_row:
            raise ValueError(f"{tokens} tokens are not whole groups of {self.tokens_per_row}")
