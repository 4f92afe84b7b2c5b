"""Where one layer's keys or values lie: packed in blocks of 16 tokens, as plain tensors by token, or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch.nn.functional import pad

from rotatekv.kernels.hadamard import heads_to_channels
from rotatekv.kernels.layout import (
    BLOCK,
    Blocks,
    Packed,
    allocate_blocks,
    allocate_planes,
    unpack_blocks,
    unpack_codes,
    write_blocks,
    write_codes,
)
from rotatekv.kernels.transform_coding import Transform, pack_components, unpack_components
from rotatekv.kernels.transform_coding import allocate_planes as allocate_coded
from rotatekv.methods.formats import BlockFormat, ChannelGroups

Encoded = dict[str, torch.Tensor]  # what a codec makes of T tokens, by name: (B, T, ...) each, or (B, T / g, ...)


class Store(ABC):
    """The first ``length`` tokens of (B, T, ...) tensors. ``tensors`` are those held, whatever their layout."""

    is_written_by_kernels = False

    def __init__(self) -> None:
        self.length = 0
        self.tensors: Packed = {}

    @abstractmethod
    def append(self, new: Encoded) -> None:
        """Add tokens, per-token tensors (B, T, ...)."""

    def add(
        self,
        heads: torch.Tensor,
        encode: Callable[[torch.Tensor], Encoded],
        kernels: ModuleType | None = None,
        form: BlockFormat | None = None,
        unrope: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        """Encode (B, H_kv, T, D) heads with the codec's ``encode`` and append them.

        Args:
            kernels, form: do all that ``encode`` does in one kernel, where the store is one it writes.
            unrope: what the kernel undoes RoPE with first; see ``quantize_into_blocks_reference``. Of transform-coded
                keys, the ``turns`` of ``quantize_into_frames``.
        """
        self.append(encode(heads))

    @abstractmethod
    def tokens(self) -> Encoded:
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

    def append(self, new: Encoded) -> None:
        self.length += next(iter(new.values())).shape[1]
        if self.tensors:
            self.tensors = {name: torch.cat([self.tensors[name], x], dim=1) for name, x in new.items()}
        else:
            self.tensors = {name: _whole(x) for name, x in new.items()}

    def tokens(self) -> Encoded:
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


class CodeStore(Store):
    """Codes in the bit planes of ``kernels/layout.py``, ``bits`` per code: what a kernel can read."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def missing_blocks(self, tokens: int) -> int:
        """How many more blocks ``tokens`` more tokens need."""
        held = self.tensors["low"].shape[1] if self.tensors else 0
        return -(-(self.length + tokens) // BLOCK) - held

    def heads(self, form: BlockFormat, room: int, kernels: ModuleType) -> torch.Tensor:
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
        )


class BlockStore(CodeStore):
    """Codes, scales and zero points in the block layout of ``kernels/layout.py``, grown by one block at a time.

    Args:
        bits: per code.
        groups: the channels that share a scale. clip_ratio: see ``quantize.quantize_groups``.
    """

    is_written_by_kernels = True

    def __init__(self, bits: int, groups: ChannelGroups, clip_ratio: float = 1.0):
        super().__init__(bits)
        self.tensors = Blocks({})
        self.groups, self.clip_ratio = groups, clip_ratio

    def append(self, new: Encoded) -> None:
        codes = new["codes"]  # (B, T, C)
        batch, tokens, channels = codes.shape
        self.reserve(batch, tokens, channels, codes.device)
        write_blocks(self.tensors, self.length, codes, new["scale"], new["zero"], self.bits)
        self.length += tokens

    def add(
        self,
        heads: torch.Tensor,
        encode: Callable[[torch.Tensor], Encoded],
        kernels: ModuleType | None = None,
        form: BlockFormat | None = None,
        unrope: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        if kernels is None or form is None:
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
            unrope,
        )
        self.length += tokens

    def reserve(self, batch: int, tokens: int, channels: int, device: torch.device) -> None:
        """Make room for ``tokens`` more tokens."""
        missing = self.missing_blocks(tokens)
        if missing > 0:
            groups = channels // self.groups.size
            fresh = allocate_blocks(batch, missing, channels, groups, self.bits, device)
            if self.tensors:
                fresh = Blocks({name: torch.cat([self.tensors[name], x], dim=1) for name, x in fresh.items()})
            self.tensors = fresh

    def tokens(self) -> Encoded:
        codes, scale, zero = unpack_blocks(self.tensors, self.length, self.bits)
        return {"codes": codes, "scale": scale, "zero": zero}

    def crop(self, length: int) -> None:
        blocks = -(-length // BLOCK)
        self._each(lambda x: x[:, :blocks].clone())
        if length % BLOCK:  # lanes past the end are zero
            last = {name: x[:, -1:] for name, x in self.tensors.items()}
            codes, scale, zero = (tensor.clone() for tensor in unpack_blocks(last, BLOCK, self.bits))
            for tensor in (codes, scale, zero):
                tensor[:, length % BLOCK :] = 0
            write_blocks(last, 0, codes, scale, zero, self.bits)
        self.length = length

    def drop(self, count: int) -> None:
        self.length -= count
        self._each(lambda x: x[:, count // BLOCK :].clone())


class TransformStore(Store):
    """Codes and scales in the planes of ``kernels/transform_coding.py``, grown by one block at a time.

    A kernel takes keys as attention sees them, and values as they are: it centres both, and turns keys to their frames.
    """

    is_written_by_kernels = True

    def __init__(self, transform: Transform):
        super().__init__()
        self.transform = transform
        self.tensors = Blocks({})

    def add(
        self,
        heads: torch.Tensor,
        encode: Callable[[torch.Tensor], Encoded],
        kernels: ModuleType | None = None,
        form: BlockFormat | None = None,
        unrope: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        if kernels is None:
            return super().add(heads, encode)
        transform, tokens = self.transform.on(heads.device), heads.shape[2]
        heads = heads.float() if heads.dtype == torch.float64 else heads  # which kernels do not read
        self.reserve(heads.shape[0], tokens, heads.device)
        kernels.quantize_into_frames(heads, self.tensors, self.length, transform, unrope)
        self.length += tokens

    def reserve(self, batch: int, tokens: int, device: torch.device) -> None:
        """Make room for ``tokens`` more tokens."""
        held = self.tensors["scale"].shape[1] if self.tensors else 0
        missing = -(-(self.length + tokens) // BLOCK) - held
        if missing > 0:
            fresh = allocate_coded(self.transform, batch, missing, device)
            self.tensors = Blocks(
                {name: torch.cat([self.tensors[name], x], 1) if held else x for name, x in fresh.items()}
            )

    def append(self, new: Encoded) -> None:
        """Add tokens, codes (B, T, H_kv, D) and scale (B, T, H_kv)."""
        whole = self.length // BLOCK
        if self.length % BLOCK:
            last = unpack_components(
                {name: x[:, whole:] for name, x in self.tensors.items()}, self.length % BLOCK, self.transform
            )
            new = {name: torch.cat([old, new[name]], 1) for name, old in zip(("codes", "scale"), last, strict=True)}
        self.length = whole * BLOCK + new["scale"].shape[1]
        past = -new["scale"].shape[1] % BLOCK
        codes, scale = pad(new["codes"], (0, 0, 0, 0, 0, past)), pad(new["scale"], (0, 0, 0, past))
        fresh = pack_components(codes, scale, self.transform)
        self.tensors = Blocks(
            {name: torch.cat([self.tensors[name][:, :whole], x], 1) if whole else x for name, x in fresh.items()}
        )

    def tokens(self) -> Encoded:
        codes, scale = unpack_components(self.tensors, self.length, self.transform)
        return {"codes": codes, "scale": scale}

    def channels(self, kernels: ModuleType) -> torch.Tensor:
        """What the codec's ``decode`` makes of ``tokens``, (B, T, H_kv·D) float32, by a kernel."""
        (heads, dim), scale = self.transform.maps.shape[:2], self.tensors["scale"]
        out = torch.empty(len(scale), heads, self.length, dim, dtype=torch.float32, device=scale.device)
        kernels.read_components(self.tensors, self.length, self.transform.on(scale.device), out)
        return heads_to_channels(out)

    def heads(self, room: int, kernels: ModuleType, turns: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All tokens as heads (B, H_kv, room, D) float32, by a kernel; what lies past ``length`` is not set.

        Args:
            turns: of keys that RoPE turns, what takes them from their frames; see ``Positions.kernel_turns``.
        """
        (heads, dim), scale = self.transform.maps.shape[:2], self.tensors["scale"]
        out = torch.empty(len(scale), heads, room, dim, dtype=torch.float32, device=scale.device)
        kernels.read_heads(self.tensors, self.length, self.transform.on(scale.device), out, turns or None)
        return out

    def crop(self, length: int) -> None:
        blocks, part = length // BLOCK, length % BLOCK
        last = {name: x[:, blocks : blocks + 1] for name, x in self.tensors.items()}
        self._each(lambda x: x[:, :blocks].clone())
        self.length = blocks * BLOCK
        if part:
            codes, scale = unpack_components(last, part, self.transform)
            self.append({"codes": codes, "scale": scale})

    def drop(self, count: int) -> None:
        self.length -= count
        self._each(lambda x: x[:, count // BLOCK :].clone())


class PlaneStore(CodeStore):
    """Codes in the bit planes of ``kernels/layout.py``, and tensors with one row per ``tokens_per_row`` tokens.

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

    def append(self, new: Encoded) -> None:
        """Add T tokens: ``codes`` (B, T, C) uint8 and others (B, T / g, ...) (ValueError: cut groups)."""
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

    def tokens(self) -> Encoded:
        others = {name: x for name, x in self.tensors.items() if name not in ("low", "high")}
        return {"codes": unpack_codes(self._planes(), self.length, self.bits), **others}

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
