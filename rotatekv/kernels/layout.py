"""The block layout of a packed cache, in plain torch: the specification of what the CPU kernels read and write.

Tokens are cut into blocks of 16; N = ceil(T / 16) blocks, or more where room is kept for later tokens. A block keeps,
for each channel, the codes of its 16 tokens in one word, so a kernel reads a word and spreads it over 16 SIMD lanes:

    low    int32   (B, N, C)           the two low bits of each code, token t of the block at bits 2t and 2t + 1
    high   int16   (B, N, C)           3 bits only: the high bit of each code, token t at bit t
    high   int32   (B, N, C)           4 bits only: the two high bits of each code, token t at bits 2t and 2t + 1
    scale  float16 (B, N, groups, 16)  one per token and quantization group
    zero   int8    (B, N, groups, 16)

``x̂[channel] = (code − zero)·scale`` with the scale and zero of the channel's group.

Channels lie as the Hadamard matrix gives them. A group of values is consecutive channels. The group of key channel c is
``group_of_channel[c]``: the outlier-aware permutation decides which channels share a scale, and moves none of them. A
new block's lanes past T are zero.

Codecs whose scales are not per token keep the planes ``low`` and ``high`` alone in blocks: ``stores.PlaneStore``. A
kernel reads these where scales are per channel over groups of g tokens, g a multiple of 16, so that a block has one of
each; R ≥ ceil(T / g), and row r serves the tokens g·r … g·r + g − 1:

    scale  float16 (B, R, C)
    zero   int8    (B, R, C)
"""

from __future__ import annotations

import torch

Packed = dict[str, torch.Tensor]  # the planes of one cache tensor, by name
BLOCK = 16  # tokens
HIGH_PLANE = {3: (torch.int16, 1), 4: (torch.int32, 2)}  # bits → dtype of the high plane, its bits per token


class Blocks(dict):
    """Planes of one cache tensor by name. Their numbers change in place, the tensors never do.

    Attributes:
        checked: what a kernel has found of these tensors, to look up at the next call.
    """

    def __init__(self, planes: Packed):
        super().__init__(planes)
        self.checked: dict = {}

    def __setitem__(self, name: str, plane: torch.Tensor) -> None:
        raise TypeError("make new Blocks of other tensors")

    def __reduce__(self) -> tuple:  # a copy has tensors, and addresses, of its own
        return Blocks, (dict(self),)


def allocate_blocks(batch: int, blocks: int, channels: int, groups: int, bits: int, device=None) -> Blocks:
    """Zeroed storage for ``blocks`` blocks of 16 tokens a sequence, in the layout above."""
    packed = allocate_planes(batch, blocks, channels, bits, device)
    packed["scale"] = torch.zeros(batch, blocks, groups, BLOCK, dtype=torch.float16, device=device)
    packed["zero"] = torch.zeros(batch, blocks, groups, BLOCK, dtype=torch.int8, device=device)
    return Blocks(packed)


def allocate_planes(batch: int, blocks: int, channels: int, bits: int, device=None) -> Packed:
    """Zeroed planes of codes alone, ``low`` and ``high`` of the layout above."""
    planes = {"low": torch.zeros(batch, blocks, channels, dtype=torch.int32, device=device)}
    if bits in HIGH_PLANE:
        planes["high"] = torch.zeros(batch, blocks, channels, dtype=HIGH_PLANE[bits][0], device=device)
    return planes


def unpack_codes(packed: Packed, tokens: int, bits: int) -> torch.Tensor:
    """The codes of the first ``tokens`` tokens, (B, T, C) uint8."""
    codes = _unpack_plane(packed["low"], 2)
    if bits in HIGH_PLANE:
        codes = codes | _unpack_plane(packed["high"], HIGH_PLANE[bits][1]) << 2
    return codes[:, :tokens]


def unpack_blocks(packed: Packed, tokens: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first ``tokens`` tokens: codes (B, T, C) uint8, scale and zero (B, T, groups) as they are stored."""
    scale, zero = (packed[name].transpose(2, 3).flatten(1, 2) for name in ("scale", "zero"))  # (B, N·16, groups)
    return unpack_codes(packed, tokens, bits), scale[:, :tokens], zero[:, :tokens]


def unpack_planes(
    packed: Packed, tokens: int, bits: int, tokens_per_scale: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of planes with scales per channel: codes uint8, scale float16 and zero int8, (B, T, C) each."""
    scale, zero = (packed[name].repeat_interleave(tokens_per_scale, 1) for name in ("scale", "zero"))  # (B, R·g, C)
    return unpack_codes(packed, tokens, bits), scale[:, :tokens], zero[:, :tokens]


def write_codes(packed: Packed, start: int, codes: torch.Tensor, bits: int) -> None:
    """Write the codes (B, T, C) uint8 of T tokens in place from token ``start`` on; other tokens keep theirs.

    Raises:
        ValueError: the tokens do not fit in the allocated blocks.
    """
    touched, where = _touched_blocks(packed, start, codes.shape[1])
    old = unpack_codes(touched, touched["low"].shape[1] * BLOCK, bits)
    old[:, where] = codes
    touched["low"].copy_(_pack_plane(old & 3, 2))
    if bits in HIGH_PLANE:
        dtype, width = HIGH_PLANE[bits]
        touched["high"].copy_(_pack_plane(old >> 2, width).to(dtype))


def write_blocks(
    packed: Packed, start: int, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> None:
    """Write T tokens in place from token ``start`` on; tokens outside keep their codes.

    Args:
        codes (B, T, C) uint8, scale and zero (B, T, groups) in the blocks' format.

    Raises:
        ValueError: the tokens do not fit in the allocated blocks.
    """
    write_codes(packed, start, codes, bits)
    touched, where = _touched_blocks(packed, start, codes.shape[1])
    for name, new in (("scale", scale), ("zero", zero)):
        old = touched[name].transpose(2, 3).flatten(1, 2).clone()  # (B, N·16, groups); may be a view of the storage
        old[:, where] = new
        touched[name].copy_(old.unflatten(1, (-1, BLOCK)).transpose(2, 3))


def _touched_blocks(packed: Packed, start: int, tokens: int) -> tuple[Packed, slice]:
    """Views of the blocks that tokens ``start`` … ``start`` + T − 1 lie in, and those tokens' place in them."""
    capacity = packed["low"].shape[1] * BLOCK
    if start < 0 or start + tokens > capacity:
        raise ValueError(f"tokens {start} … {start + tokens} do not fit in {capacity} allocated tokens")
    first = start // BLOCK
    last = max(-(-(start + tokens) // BLOCK), first)  # blocks
    where = slice(start - first * BLOCK, start - first * BLOCK + tokens)
    return {name: plane[:, first:last] for name, plane in packed.items()}, where


def _pack_plane(bits_of_tokens: torch.Tensor, width: int) -> torch.Tensor:
    """(B, N·16, C) numbers below 2^width → (B, N, C) int32 (int16 for width 1)."""
    lanes = bits_of_tokens.long().unflatten(1, (-1, BLOCK))  # (B, N, 16, C)
    shifts = torch.arange(0, BLOCK * width, width, dtype=torch.int64, device=lanes.device).view(BLOCK, 1)
    words = (lanes << shifts).sum(2)
    size = BLOCK * width
    return (words - ((words >> (size - 1)) << size)).to(torch.int32)  # the top bit is the sign


def _unpack_plane(words: torch.Tensor, width: int) -> torch.Tensor:
    """(B, N, C) → (B, N·16, C) uint8."""
    shifts = torch.arange(0, BLOCK * width, width, dtype=words.dtype, device=words.device).view(BLOCK, 1)
    lanes = (words.unsqueeze(2) >> shifts) & (2**width - 1)  # (B, N, 16, C)
    return lanes.to(torch.uint8).flatten(1, 2)
