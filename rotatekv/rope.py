"""RoPE as a model has it: its tables at any position, and a layer's keys turned forth and back by its own function.

To turn keys is to apply RoPE to them, to unturn them is to undo it.
A rotary function is linear in cos and sin, whatever pairs of channels it turns. So the function itself, given
``cos / (cos² + sin²)`` and ``−sin / (cos² + sin²)``, undoes RoPE: the divisor is 1, or YaRN's factor squared, or what
rounding cos and sin to 16 bits has made of 1.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from rotatekv.errors import UserError
from rotatekv.kernels.rope_tables import RopeTables

_FIXED_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
_FEWEST_POSITIONS = 4096  # of a kernel's table
_CHECKED_POSITIONS = (0, 1, 7, 300)  # where a kernel's way of turning is compared with the family's

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin


class ModelRope:
    """What a model's ``rotary_emb`` gives, for one kind of its layers or several (their types, where they differ).

    Args:
        text_model: has the ``rotary_emb`` and the layers.
    """

    def __init__(self, text_model: nn.Module):
        self.rotary = text_model.rotary_emb
        self._kernel_tables: dict = {}
        self._made_of: dict = {}
        self._takes_type = "layer_type" in inspect.signature(type(self.rotary).forward).parameters
        self._types: list[str] = getattr(text_model.config, "layer_types", None) or []

    def kind(self, layer_idx: int) -> str | None:
        """The layer's type, where tables depend on it."""
        return self._types[layer_idx] if self._takes_type else None

    def tables(self, kind: str | None, positions: torch.Tensor, dtype: torch.dtype) -> Tables:
        """cos and sin as the model makes them for (B, T) positions: (B, T, ·) each, of ``dtype``."""
        stub = torch.empty(0, dtype=dtype, device=positions.device)  # rotary_emb only reads its dtype and device
        with torch.no_grad():
            return self.rotary(stub, positions, *([] if kind is None else [kind]))

    def frequencies(self, kind: str | None) -> torch.Tensor:
        """(rotary_dim / 2,) as the model has them: radians a position."""
        return getattr(self.rotary, "inv_freq" if kind is None else f"{kind}_inv_freq")

    def kernel_tables(self, kind: str | None, positions: int, device: torch.device) -> RopeTables:
        """Tables of the kernels for all positions up to ``positions``, made anew for longer ones."""
        found = self._kernel_tables.get((kind, device))
        if found is None or found.positions < positions:
            self._made_of[kind] = self._source(kind)
            room = max(_FEWEST_POSITIONS, 2 * positions)
            found = RopeTables.build(self._made_of[kind][0], room, self._made_of[kind][1]).to(device)
            self._kernel_tables[kind, device] = found
        return found

    def forget_stale(self) -> None:
        """Before a call: drop the kernels' tables if the model's frequencies are others by now, by dtype or value."""
        for kind, (old, old_scaling) in list(self._made_of.items()):
            frequencies, scaling = self._source(kind)
            if scaling != old_scaling or not torch.equal(frequencies, old):
                del self._made_of[kind]
                self._kernel_tables = {key: x for key, x in self._kernel_tables.items() if key[0] != kind}

    def _source(self, kind: str | None) -> tuple[torch.Tensor, float]:
        scaling = getattr(self.rotary, "attention_scaling" if kind is None else f"{kind}_attention_scaling", 1.0)
        return self.frequencies(kind).detach().to("cpu", torch.float64, copy=True), float(scaling)

    def check_type(self) -> None:
        """Raises UserError where keys would have to be turned by other frequencies as the text grows."""
        types = getattr(self.rotary, "rope_type", "default")
        for rope_type in types.values() if isinstance(types, dict) else [types]:
            if rope_type in _FIXED_TYPES:
                continue
            cure = f"use a model whose RoPE type is one of {', '.join(_FIXED_TYPES)}"
            if rope_type == "dynamic":  # up to that length it is the default
                length = self.rotary.config.max_position_embeddings
                cure += (
                    ", or set config.rope_parameters['rope_type'] = 'default' before loading if no text exceeds "
                    f"{length}"
                )
            raise UserError(f"RoPE type {rope_type!r} is not supported, its frequencies change with the length: {cure}")


def rotary_function(attention: nn.Module) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The family's own, for one tensor: ``(x (B, heads, T, rotary_dim), cos, sin) -> x``.

    Raises:
        UserError: its modeling file has none under the usual name.
    """
    family = sys.modules[type(attention).__module__]
    apply = getattr(family, "apply_rotary_pos_emb", None)
    if apply is None:
        raise UserError(f"{type(attention).__name__} has no apply_rotary_pos_emb: its RoPE cannot be undone")
    return _OnOne(apply)


@dataclass(frozen=True)
class _OnOne:
    """A rotary function of a query and a key, of one tensor alone; by name, so that it can be pickled."""

    apply: Callable

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.apply(x, x[:, :1], cos, sin)[0]


@dataclass(frozen=True)
class LayerRope:
    """How one layer's keys are turned.

    Args:
        apply: the family's function, see ``rotary_function``.
        kind: of the layer, see ``ModelRope``.
    """

    model: ModelRope
    kind: str | None
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __deepcopy__(self, memo: dict) -> LayerRope:  # caches are copied, the model's rotary_emb is not
        return self

    @cached_property
    def rotary_dim(self) -> int:
        """Channels of a head that are turned: the first ``rotary_dim``."""
        return 2 * len(self.model.frequencies(self.kind))

    def turn(self, keys: torch.Tensor, tables: Tables) -> torch.Tensor:
        """RoPE of (B, H_kv, T, D) keys; ``tables`` of their positions, (B, T, ·) each."""
        turned = self.apply(keys[..., : self.rotary_dim], *tables)
        if keys.shape[-1] == self.rotary_dim:
            return turned
        return torch.cat([turned, keys[..., self.rotary_dim :]], dim=-1)

    def unturn(self, keys: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Post-RoPE keys as they were before it, in float32."""
        return self.turn(keys.float(), inverse(tables))

    @cached_property
    def is_half_split(self) -> bool:
        """Whether channel i turns with channel i + rotary_dim / 2, as the kernels do it."""
        if self.model.frequencies(self.kind).is_meta:
            return True
        positions = torch.tensor([_CHECKED_POSITIONS], dtype=torch.int64, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(0)
        shape = 1, 1, positions.shape[1], self.rotary_dim
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        device = self.model.frequencies(self.kind).device
        tables = self.model.tables(self.kind, positions.to(device), torch.float32)
        expected = self.turn(x.to(device), tables).cpu()
        room = self.model.kernel_tables(self.kind, 1 + max(_CHECKED_POSITIONS), torch.device("cpu"))
        return torch.allclose(room.turn(x, positions), expected, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True, eq=False)
class KeyFrames:
    """Keys relative to the frame of tokens that they are in: ``kernels/transform_coding.py`` has the formulas.

    Args:
        size: tokens of a frame, by their place in the cache.
        mean: (H_kv, D) float32, of the keys before RoPE.
    """

    size: int
    mean: torch.Tensor

    def enter(self, keys: torch.Tensor, rope: LayerRope | None, positions: Positions, start: int) -> torch.Tensor:
        """(B, H_kv, T, D) keys as attention sees them, from token ``start`` on → turned back, less the mean."""
        if rope is None:
            return keys.float() - self.mean.to(keys.device).unsqueeze(1)
        (cos, sin), at = positions.frame_tables(rope, start, start + keys.shape[2], self.size, keys.device)
        return rope.turn(keys.float(), (cos, -sin)) - self._mean_at(rope, at)

    def leave(self, keys: torch.Tensor, rope: LayerRope | None, positions: Positions, start: int) -> torch.Tensor:
        """The inverse of ``enter``, float32."""
        if rope is None:
            return keys + self.mean.to(keys.device).unsqueeze(1)
        origin, at = positions.frame_tables(rope, start, start + keys.shape[2], self.size, keys.device)
        return rope.turn(keys + self._mean_at(rope, at), origin)

    def _mean_at(self, rope: LayerRope, tables: Tables) -> torch.Tensor:
        """(B, H_kv, T, D)."""
        batch, tokens = tables[0].shape[:2]
        mean = self.mean.to(tables[0].device)[None, :, None].expand(batch, -1, tokens, -1)
        return rope.turn(mean, tables)


def inverse(tables: Tables) -> Tables:
    """cos and sin that undo others, float32."""
    cos, sin = (table.float() for table in tables)
    norm = cos.square() + sin.square()
    return cos / norm, -sin / norm


def _without_factor(tables: Tables) -> Tables:
    """cos and sin whose squares sum to 1."""
    norm = (tables[0].square() + tables[1].square()).sqrt()
    return tables[0] / norm, tables[1] / norm


class Positions:
    """The position of every token in a cache, kept once for all layers, and the model's cos and sin there.

    Attributes:
        values: (B, T) int32; None: there are no tokens.
    """

    def __init__(self, values: torch.Tensor | None = None):
        self.values = values
        self._made: dict = {}

    @property
    def tokens(self) -> int:
        return 0 if self.values is None else self.values.shape[1]

    def set(self, values: torch.Tensor | None) -> None:
        self.values, self._made = values, {}

    def forget(self) -> None:
        """The running call is done: its tables are not needed any more."""
        self._made = {}

    def tables(self, rope: LayerRope, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tables:
        """Of the tokens from ``start`` to ``stop`` − 1, (B, T, ·) each."""
        make = partial(self._make, rope, start, stop, dtype, device)
        return self._once((rope.kind, start, stop, dtype, device), make)

    def kernel_unrope(self, rope: LayerRope, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tables:
        """What a kernel undoes RoPE with, of the tables of ``dtype``: cos and sin, (B, T, rotary_dim / 2) float32."""

        def make() -> Tables:
            cos, sin = inverse(self.tables(rope, start, stop, dtype, device))
            half, batch = rope.rotary_dim // 2, len(self._known)
            return tuple(x[..., :half].expand(batch, -1, -1).contiguous() for x in (cos, -sin))

        return self._once((rope.kind, start, stop, dtype, device, "unrope"), make)

    def frame_tables(
        self, rope: LayerRope, start: int, stop: int, frame: int, device: torch.device
    ) -> tuple[Tables, Tables]:
        """Of the tokens from ``start`` to ``stop`` − 1, float32 and without RoPE's factor: at the position of the first
        token of each one's frame, and at its own position counted from there."""

        def make() -> tuple[Tables, Tables]:
            index = torch.arange(start, stop, dtype=torch.int64, device=self._known.device)
            origin = self._known[:, index // frame * frame].long()  # (B, T)
            at = self._known[:, start:stop] - origin
            first, second = (rope.model.tables(rope.kind, x.to(device), torch.float32) for x in (origin, at))
            return _without_factor(first), _without_factor(second)

        return self._once((rope.kind, start, stop, frame, device, "frames"), make)

    def kernel_turns(
        self, rope: LayerRope, start: int, stop: int, frame: int, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """What a kernel turns keys to their frames with, see ``frame_tables``: cos and sin of the frame's position, and
        of a token's own, (B, T, rotary_dim / 2) float32 each."""

        def make() -> tuple[torch.Tensor, ...]:
            half, batch = rope.rotary_dim // 2, len(self._known)
            tables = (x for pair in self.frame_tables(rope, start, stop, frame, device) for x in pair)
            return tuple(x[..., :half].expand(batch, -1, -1).contiguous() for x in tables)

        return self._once((rope.kind, start, stop, frame, device, "turns"), make)

    @property
    def _known(self) -> torch.Tensor:
        if self.values is None:
            raise RuntimeError("a RotateKVCache only works in a model patched with patch_model(model, ...)")
        return self.values

    def _make(self, rope: LayerRope, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tables:
        return rope.model.tables(rope.kind, self._known[:, start:stop].to(device, torch.int64), dtype)

    def _once(self, key: tuple, make: Callable[[], Tables]) -> Tables:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
