"""RotateKV2 in plain torch: transformers' own cache and attention, given what the method would give back.

Nothing of ``rotatekv`` is imported here: dense matrices in float64, plain rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as cached
from functools import partial

import torch
from families import Family, find_decoder
from scipy.linalg import hadamard as sylvester
from torch import nn
from transformers import DynamicCache


class OracleCache(DynamicCache):
    """Keys and values of every token as RotateKV2 decodes them, in the model's dtype.

    Args:
        orders: (layers, H_kv·D), the channels that are quantized one after the other; None: as they are rotated.
        bits, clip: of the rounding; bits None: all but the rounding, which must give the stock model.
        entries: hidden-state entries, the largest of each sequence and layer, that name the tokens kept in float16.

    Attributes:
        margin: how far all that was rounded lay from a tie, in steps, and scales in hundreds of float16's last places.
    """

    def __init__(self, model: nn.Module, family: Family, orders=None, bits=2, clip=0.8, entries=5):
        super().__init__(config=model.config)
        self.decoder, self.family, self.orders = find_decoder(model), family, orders
        self.bits, self.clip, self.entries = bits, clip, entries
        self.margin, self.position_ids = 0.5, None
        self.states: dict[int, torch.Tensor] = {}  # what comes into each layer in the running call
        self.is_sink: dict[int, torch.Tensor] = {}  # of the running call's tokens, if it is the first

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.fake_keys(key_states.double(), layer_idx), value_states.double()
        values = self.rounded_heads(values, values.shape[-1], None)
        if (sinks := self.is_sink.get(layer_idx)) is not None:
            sinks = sinks[:, None, :, None]
            keys = torch.where(sinks, key_states.half().double(), keys)
            values = torch.where(sinks, value_states.half().double(), values)
        keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def fake_keys(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """(B, H_kv, T, D) after RoPE."""
        angles, scaling = self.angles(layer)
        heads, dim = keys.shape[1], keys.shape[3]
        group = next(g for g in (4, 3, 2, 1) if heads % g == 0)
        order = None if self.orders is None else self.orders[layer]
        fake = self.rounded_heads(self.before_rope(keys, layer), group * dim, order)
        return self.turned(fake, angles.cos() * scaling, angles.sin() * scaling)

    def before_rope(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        angles, scaling = self.angles(layer)
        return self.turned(keys, angles.cos() / scaling, -angles.sin() / scaling)

    def angles(self, layer: int) -> tuple[torch.Tensor, float]:
        """RoPE's angles, (B, 1, T, rotary_dim / 2), and its factor on cos and sin."""
        embedding = self.decoder.rotary_emb
        kind = "" if hasattr(embedding, "inv_freq") else f"{self.decoder.config.layer_types[layer]}_"
        frequencies = getattr(embedding, f"{kind}inv_freq").float() * (layer not in self.family.no_rope)
        angles = self.position_ids[:, None, :, None].float() * frequencies  # as Hugging Face rounds them
        return angles.double(), getattr(embedding, f"{kind}attention_scaling")

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Pairs of channels as complex numbers times cos + i·sin, the channels beyond rotary_dim as they are."""
        half = cos.shape[-1]
        part, rest = x[..., : 2 * half], x[..., 2 * half :]
        pairs = part.unflatten(-1, (half, 2)) if self.family.interleaved else part.unflatten(-1, (2, half)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
        return torch.cat([(turned if self.family.interleaved else turned.mT).flatten(-2), rest], dim=-1)

    def rounded_heads(self, x: torch.Tensor, width: int, order: torch.Tensor | None) -> torch.Tensor:
        """(B, H_kv, T, D): ``width`` channels rotated together, all put in ``order``, rounded, and back."""
        matrix = hadamard(width)
        channels = x.transpose(1, 2).flatten(2)  # (B, T, H_kv·D)
        rotated = (channels.unflatten(-1, (-1, width)) @ matrix.T).flatten(-2)
        order = torch.arange(rotated.shape[-1]) if order is None else order
        restored = torch.empty_like(rotated)
        restored[..., order] = self.rounded(rotated[..., order], x.shape[-1])
        back = (restored.unflatten(-1, (-1, width)) @ matrix).flatten(-2)
        return back.unflatten(-1, x.shape[1::2]).transpose(1, 2)

    def rounded(self, x: torch.Tensor, group_size: int) -> torch.Tensor:
        """(..., C) in groups: c·max and c·min, float16 scale, integer zero."""
        if self.bits is None:
            return x
        groups = x.unflatten(-1, (-1, group_size))
        top, bottom = self.clip * groups.amax(-1, keepdim=True), self.clip * groups.amin(-1, keepdim=True)
        exact = torch.maximum((top - bottom) / (2**self.bits - 1), bottom.abs() / 127)
        scale = exact.half().double()
        zero = (-bottom / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, 2**self.bits - 1)
        last_places = exact / 2.0 ** (exact.log2().floor() - 10)
        self.margin = min(self.margin, to_tie(groups / scale), to_tie(bottom / scale), to_tie(last_places) / 100)
        return ((codes - zero) * scale).flatten(-2)


def to_tie(x: torch.Tensor) -> float:
    """The smallest distance of a number to one that may be rounded up or down."""
    return (x - x.floor() - 0.5).abs().min().item()


@cached
def hadamard(order: int) -> torch.Tensor:
    """Orthonormal: Sylvester's, or order 48 = 12 × 4 written out: the quadratic residues mod 11 are 1, 3, 4, 5, 9."""
    if order & (order - 1) == 0:
        return torch.from_numpy(sylvester(order)).double() / order**0.5
    assert order == 48
    twelve = torch.ones(12, 12, dtype=torch.float64)
    for row in range(11):
        twelve[row + 1, 0] = -1
        for column in range(11):
            twelve[row + 1, column + 1] = 1 if (column - row) % 11 in (0, 1, 3, 4, 5, 9) else -1
    return torch.kron(twelve, torch.from_numpy(sylvester(4)).double()) / order**0.5


def sink_tokens(hidden_states: torch.Tensor, entries: int, real: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the tokens with each sequence's ``entries`` largest magnitudes; ``real`` is False at padding."""
    is_sink = torch.zeros(hidden_states.shape[:2], dtype=torch.bool)
    for row, states in enumerate(hidden_states.abs() * real[..., None]):
        is_sink[row, states.flatten().topk(entries).indices // states.shape[-1]] = True
    return is_sink & real


@contextmanager
def watching(cache: OracleCache) -> Iterator[OracleCache]:
    """Tells the cache each call's positions and, in the first call, which tokens are sinks."""

    def begin(decoder, args, kwargs):
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        past, new = cache.get_seq_length(), tokens.shape[1]
        positions = kwargs.get("position_ids")
        cache.position_ids = torch.arange(past, past + new)[None] if positions is None else positions
        cache.first, cache.is_sink, mask = not past, {}, kwargs.get("attention_mask")
        cache.real = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask[:, past:].bool()

    def find_sinks(number, layer, args, kwargs):
        states = cache.states[number] = args[0] if args else kwargs["hidden_states"]
        if cache.first and cache.entries:
            cache.is_sink[number] = sink_tokens(states, cache.entries, cache.real)

    hooks = [cache.decoder.register_forward_pre_hook(begin, with_kwargs=True)]
    for number, layer in enumerate(cache.decoder.layers):
        hooks.append(layer.register_forward_pre_hook(partial(find_sinks, number), with_kwargs=True))
    try:
        yield cache
    finally:
        for hook in hooks:
            hook.remove()
