"""A layer of the cache as a plain list of tokens per row: what tests/test_cache_states.py compares it with.

The list knows of each token what it was given, whether it is a sink, and what it decodes to once it is packed. Only the
codec's own encoding and decoding, and the model's RoPE, are taken from the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from rotatekv.methods import KVMethod
from rotatekv.rope import LayerRope

BLOCK, FRAME = 16, 128  # tokens
RECORDED = 64  # tokens of a recording layer's last call that a crop gives up without a trace
MASSIVE = 2.0  # threshold of the hidden states


@dataclass(frozen=True)
class Token:
    """key, value: (H_kv, D) in 16 bits, as float32. decoded: both, once the token is packed. frame: the position of the
    first token of its frame."""

    key: torch.Tensor
    value: torch.Tensor
    position: int
    frame: int = 0
    is_sink: bool = False
    decoded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.key, self.value) if self.decoded is None or self.is_sink else self.decoded


@dataclass(frozen=True)
class Call:
    """tokens: of each row, without sinks. hidden_states: (B, T, hidden_size)."""

    tokens: list[list[Token]]
    hidden_states: torch.Tensor

    def first(self, count: int) -> Call:
        return Call([row[:count] for row in self.tokens], self.hidden_states[:, :count])


@dataclass
class TokenList:
    """What the layer is to hold: the tokens of each row that are not dropped."""

    method: KVMethod
    rope: LayerRope
    sliding_window: int | None
    rows: list[list[Token]] = field(default_factory=list)
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def packed(self) -> int:
        return sum(token.decoded is not None for token in self.rows[0]) if self.rows else 0

    def copy(self) -> TokenList:
        return replace(self, rows=[list(row) for row in self.rows])

    def append(self, call: Call) -> None:
        sinks = self.sinks_of(call.hidden_states)
        old = self.rows or [[] for _ in call.tokens]
        self.rows = [
            [*row, *(self.in_window(replace(token, is_sink=index in chosen)) for index, token in enumerate(new))]
            for row, new, chosen in zip(old, call.tokens, sinks, strict=True)
        ]
        for row, start in zip(self.rows, map(len, old), strict=True):
            for index in range(start, len(row)):
                is_first = (self.dropped + index) % FRAME == 0
                row[index] = replace(row[index], frame=row[index].position if is_first else row[index - 1].frame)
        start, end = self.packed, self.packed_with(0)
        for row in self.rows if end > start else []:
            row[start:end] = self.packed_tokens(row[start:end])

    def in_window(self, token: Token) -> Token:
        """Every token comes through the recent window, which may have 8 bits a number: −127 … 127, by the largest."""
        if self.method.config.residual_bits == 16:
            return replace(token, key=token.key.half().float(), value=token.value.half().float())
        steps = [(x.abs().amax(-1, keepdim=True) / 127).half() for x in (token.key, token.value)]  # (H_kv, 1)
        key, value = (
            ((x / step).round().clamp(-127, 127) * step).half().float()
            for x, step in zip((token.key, token.value), map(torch.Tensor.float, steps), strict=True)
        )
        return replace(token, key=key, value=value)

    def packed_with(self, new_tokens: int) -> int:
        """How many tokens are packed once so many are added: whole groups, and those that are packed stay so."""
        group, recent = self.method.tokens_per_flush, self.method.residual_length(self.sliding_window)
        older = self.tokens + new_tokens - recent
        return max(older // group * group, self.packed)

    def sinks_of(self, hidden_states: torch.Tensor) -> list[set[int]]:
        """Which tokens of a call are sinks, for each row."""
        config, entries = self.method.config, hidden_states.abs()
        if not config.Attention_Sink_Aware or (config.sink_selection == "detected" and self.tokens):
            return [set() for _ in entries]
        if config.sink_selection == "massive":
            return [set((row > MASSIVE).any(1).nonzero()[:, 0].tolist()) for row in entries]
        tops = [
            row.flatten().topk(min(config.num_sink_entries, row.numel())).indices // row.shape[1] for row in entries
        ]
        return [set(top.tolist()) for top in tops]

    def packed_tokens(self, tokens: list[Token]) -> list[Token]:
        """The tokens of one row, whole groups of them, through the codec."""
        method = self.method
        keys, values = (torch.stack([getattr(x, kind) for x in tokens], dim=1)[None] for kind in ("key", "value"))
        positions = torch.tensor([[token.position for token in tokens]])
        tables = self.rope.model.tables(None, positions, torch.float32)
        if method.keys_before_rope:
            keys = self.rope.unturn(keys, tables)
        if method.key_frames is not None:
            keys = self.in_frames(keys, tokens)
        keys = method.keys_out(method.decode_keys(method.encode_keys(method.keys_in(keys)))).float()
        values = method.values_out(method.decode_values(method.encode_values(method.values_in(values)))).float()
        if method.keys_before_rope:
            keys = self.rope.turn(keys, tables)
        if method.key_frames is not None:
            keys = self.out_of_frames(keys, tokens)
        pairs = zip(keys[0].unbind(1), values[0].unbind(1), strict=True)  # (H_kv, D) each
        return [replace(token, decoded=pair) for token, pair in zip(tokens, pairs, strict=True)]

    def in_frames(self, keys: torch.Tensor, tokens: list[Token]) -> torch.Tensor:
        """(1, H_kv, T, D) turned back by their frame's position, less the mean turned to their own place in it."""
        (cos, sin), mean = self.frame_of(tokens)
        return self.rope.turn(keys, (cos, -sin)) - mean

    def out_of_frames(self, keys: torch.Tensor, tokens: list[Token]) -> torch.Tensor:
        origin, mean = self.frame_of(tokens)
        return self.rope.turn(keys + mean, origin)

    def frame_of(self, tokens: list[Token]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """cos and sin of the position of each token's frame, and the keys' mean turned to the token's place in it."""
        frames, own = (torch.tensor([[getattr(x, name) for x in tokens]]) for name in ("frame", "position"))
        tables = (self.rope.model.tables(None, x, torch.float32) for x in (frames, own - frames))
        origin, there = (
            (cos / (cos.square() + sin.square()).sqrt(), sin / (cos.square() + sin.square()).sqrt())
            for cos, sin in tables
        )
        mean = self.method.key_transform.mean[None, :, None].expand(-1, -1, len(tokens), -1)
        return origin, self.rope.turn(mean, there)

    def crop(self, length: int) -> None:
        """What is packed stays packed, but for the first tokens of a group that is cut."""
        if length <= 0:
            self.rows, self.dropped = [], 0
            return
        packed, group = self.packed, self.method.tokens_per_flush
        self.rows = [row[:length] for row in self.rows]
        if length >= packed:
            return
        for row in self.rows:
            for index in range(length // group * group, length):
                key, value = row[index].seen
                token = replace(row[index], key=key, value=value, decoded=None)
                row[index] = token if token.is_sink else self.in_window(token)

    def drop(self, count: int) -> None:
        self.rows, self.dropped = [row[count:] for row in self.rows], self.dropped + count

    def drop_unseen(self, spare: int) -> None:
        """Whole blocks of packed tokens before those that a window of the next query sees, and ``spare`` more."""
        if self.sliding_window is not None:
            unseen = min(self.tokens - (self.sliding_window - 1) - spare, self.packed)
            self.drop(max(unseen, 0) // BLOCK * BLOCK)

    def refuses_crop(self, count: int) -> bool:
        return bool(count and self.dropped) and self.tokens - count < self.sliding_window - 1

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H_kv, T, D) each."""
        pairs = [[token.seen for token in row] for row in self.rows]
        return tuple(
            torch.stack([torch.stack([pair[kind] for pair in row], dim=1) for row in pairs]) for kind in (0, 1)
        )

    def exact(self) -> dict[tuple[int, int], torch.Tensor]:
        """The keys of all tokens in 16 bits, by batch index and token index."""
        return {
            (batch_index, token_index): token.key
            for batch_index, row in enumerate(self.rows)
            for token_index, token in enumerate(row)
            if token.decoded is None or token.is_sink
        }
