"""Proof that a model can be patched: a few tokens through it, before and after, with a cache that loses nothing.

Three things could be silently wrong in a family that nobody has tried. A layer's keys may not be what its rotary
function makes of others; its attention may not get what ``cache.update`` returned; a mask may not fit a sliding window.
All show in what the layers' attention gives for a padded prompt and a step after it. Each layer gets the inputs it had
in the unpatched model, so that the first to differ is the one to name, and a router's choice of experts stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import DynamicCache

from rotatekv.cache.cache import RotateKVCache, Unattended
from rotatekv.cache.spec import CacheSpec
from rotatekv.compat import CACHE_NAME
from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.families import attention_modules, input_device, layer_geometry
from rotatekv.methods.fp16 import FP16
from rotatekv.patching.changes import passing_changes
from rotatekv.patching.handle import PatchHandle
from rotatekv.rope import LayerRope

_TOKENS, _PADDING = 6, 2  # of the prompt; of these, at the left of its second row
_LARGEST_ERROR = {torch.float32: 1e-4, torch.float64: 1e-4}  # root mean square over that of what it should be
_LARGEST_16_BIT_ERROR = 0.05


@dataclass
class _Run:
    """What a prompt and a step gave, by (call, layer).

    Attributes:
        padding: tokens of it before the second row's first.
        inputs: (B, T, hidden_size) of the decoder layers. outputs: (B, T, ·) of their attention modules.
        keys: (B, H_kv, T, D) as ``cache.update`` got them.
    """

    padding: int
    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)


class _Recorder(DynamicCache):
    """The stock cache; notes the keys of the running call."""

    def __init__(self, config, keys: dict):
        super().__init__(config=config)
        self.noted, self.call = keys, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.noted[self.call, layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _Lossless(FP16):
    """Keys before RoPE and values in float32: all that is done to them, and nothing lost."""

    keys_before_rope = True

    def keys_in(self, keys: torch.Tensor) -> torch.Tensor:
        return super().keys_in(keys.float())


def prove(handle: PatchHandle, put_in: Callable[[], None]) -> None:
    """Patch by ``put_in`` if the patched model is the stock one up to its codec; ``handle.held_spec`` then knows which
    layers' keys RoPE does not turn.

    Raises:
        UserError: it is not; the line names the layer.
    """
    text_model, spec = handle.text_model, handle.held_spec
    with _evaluating(text_model):
        stock = _stock_run(text_model)
        ropes = _find_ropes(text_model, spec.ropes, stock)
        handle.held_spec = lossless = _lossless(text_model, replace(spec, ropes=ropes))
        put_in()
        found = _Run(stock.padding)
        try:
            _run(text_model, RotateKVCache(lossless), found, stock.inputs)
        except Unattended as error:
            attention = attention_modules(text_model)[error.layers[0]]
            why = "attends to other keys than its cache gives it: not supported"
            raise _refusal(text_model, attention, why) from None
    _compare(text_model, stock, found)
    handle.held_spec = replace(spec, ropes=ropes)


def proven_ropes(text_model: nn.Module, ropes: tuple[LayerRope | None, ...]) -> tuple[LayerRope | None, ...]:
    """``ropes`` without those of layers that turn nothing; ``text_model`` is not patched.

    Raises:
        UserError: see ``_find_ropes``.
    """
    with _evaluating(text_model):
        return _find_ropes(text_model, ropes, _stock_run(text_model))


def _stock_run(text_model: nn.Module) -> _Run:
    """A left-padded prompt, or one without padding where that alone gives NaN: eager attention does in float64."""
    for padding in (_PADDING, 0):
        run = _Run(padding)
        _run(text_model, _Recorder(text_model.config, run.keys), run)
        if all(bool(x.isfinite().all()) for x in run.outputs.values()):
            return run
    raise UserError("the model gives NaN or infinity as it is: load it in float32 or bfloat16, or check its weights")


def _run(text_model: nn.Module, cache, run: _Run, inputs: dict | None = None) -> None:
    """A left-padded prompt and a step; ``inputs``: what each decoder layer is given in place of its own."""
    ids, mask, positions = _prompt(text_model, run.padding)
    with _watched(text_model, run, inputs) as start:
        for call, new in enumerate((slice(0, _TOKENS), slice(_TOKENS, _TOKENS + 1))):
            start(call)
            cache.call = call
            options = {"attention_mask": mask[:, : new.stop], "position_ids": positions[:, new], CACHE_NAME: cache}
            text_model(input_ids=ids[:, new], use_cache=True, **options)


def _find_ropes(text_model: nn.Module, ropes: tuple[LayerRope | None, ...], stock: _Run) -> tuple:
    """``ropes`` without those of layers that turn nothing, by a prompt whose tokens all have position 0.

    Raises:
        UserError: a layer hands no keys to the cache, keys of another shape than its config says, or keys that its
            rotary function does not turn.
    """
    level = _Run(stock.padding)
    ids, mask, positions = (x[:, :_TOKENS] for x in _prompt(text_model, stock.padding))
    cache = _Recorder(text_model.config, level.keys)
    with _watched(text_model, level, stock.inputs):
        options = {"attention_mask": mask, "position_ids": torch.zeros_like(ids), CACHE_NAME: cache}
        text_model(input_ids=ids, use_cache=True, **options)
    found: list[LayerRope | None] = []
    for number, (attention, rope) in enumerate(zip(attention_modules(text_model), ropes, strict=True)):
        if rope is None:
            found.append(None)
            continue
        if (0, number) not in stock.keys:
            raise _refusal(text_model, attention, "hands no keys to the cache: this model's cache cannot be quantized")
        keys, values = stock.keys[0, number]
        shape = layer_geometry(attention)
        expected = (len(ids), shape.num_key_value_heads, _TOKENS, shape.head_dim)
        if keys.shape != expected or values.shape != expected:
            held = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
            why = f"caches {held}, not {expected} as its config says: this model's cache cannot be quantized"
            raise _refusal(text_model, attention, why)
        at_zero = level.keys[0, number][0]
        if torch.equal(at_zero, keys):
            found.append(None)
            continue
        tables = (rope.model.tables(rope.kind, x, keys.dtype) for x in (positions, torch.zeros_like(positions)))
        before, expected = (rope.unturn(x, table) for x, table in zip((keys, at_zero), tables, strict=True))
        if not _error(before, expected) < _limit(keys.dtype):
            raise _refusal(
                text_model, attention, "turns its keys in a way that its rotary function does not undo: not supported"
            )
        found.append(rope)
    return tuple(found)


def _lossless(text_model: nn.Module, spec: CacheSpec) -> CacheSpec:
    config = PRESETS["FP16"]
    methods = tuple(
        None if attention is None else _Lossless(config, layer_geometry(attention))
        for attention in attention_modules(text_model)
    )
    return replace(spec, config=config, methods=methods)


def _compare(text_model: nn.Module, stock: _Run, found: _Run) -> None:
    attentions = attention_modules(text_model)
    for (call, number), expected in stock.outputs.items():
        what = "a padded prompt" if call == 0 else "the step after a padded prompt"
        error = _error(found.outputs[call, number], expected)
        if not error < _limit(expected.dtype):  # not NaN either
            why = f"attends otherwise with the cache than without, by {error:.1e} for {what}: this model is not"
            raise _refusal(text_model, attentions[number], f"{why} supported")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``expected``, where both are of real tokens."""
    difference = (found.float() - expected.float()).square().mean()
    return (difference / expected.float().square().mean().clamp_min(1e-30)).sqrt().item()


def _limit(dtype: torch.dtype) -> float:
    return _LARGEST_ERROR.get(dtype, _LARGEST_16_BIT_ERROR)


def _prompt(text_model: nn.Module, padding: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and positions of the prompt and the step, (2, T + 1) int64 each, always the same."""
    count = 2 * (_TOKENS + 1)
    ids = torch.arange(count, dtype=torch.int64, device=input_device(text_model)) * 7919 + 11
    ids = (ids % text_model.config.vocab_size).view(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def _refusal(text_model: nn.Module, attention: nn.Module, why: str) -> UserError:
    """One line that begins with the attention module's name."""
    return UserError(f"{next(name for name, module in text_model.named_modules() if module is attention)} {why}")


@contextmanager
def _watched(text_model: nn.Module, run: _Run, inputs: dict | None) -> Iterator[Callable[[int], None]]:
    """Note what comes into the decoder layers and what their attention gives, or put ``inputs`` in; yields what to call
    with the number of each call."""
    call = [0]

    def before(number: int, args: tuple, kwargs: dict):
        if inputs is not None:
            given = inputs[call[0], number]
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
        run.inputs[call[0], number] = args[0] if args else kwargs["hidden_states"]
        return None

    def after(number: int, output) -> None:
        run.outputs[call[0], number] = _real(output[0] if isinstance(output, tuple) else output, run.padding, call[0])

    def start(number: int) -> None:
        call[0] = number

    with passing_changes() as changes:
        for number, (layer, attention) in enumerate(zip(text_model.layers, attention_modules(text_model), strict=True)):
            changes.hook(
                layer,
                "forward_pre",
                lambda module, args, kwargs, number=number: before(number, args, kwargs),
                with_kwargs=True,
                prepend=True,
            )
            if attention is not None:
                changes.hook(attention, "forward", lambda m, args, output, number=number: after(number, output))
        yield start


def _real(x: torch.Tensor, padding: int, call: int) -> torch.Tensor:
    """(2, T, ·) → the tokens that are not padding, (·, ·)."""
    return torch.cat([x[0], x[1, padding:] if call == 0 else x[1]])


@contextmanager
def _evaluating(text_model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no autocast."""
    with passing_changes() as changes:
        for module in text_model.modules():
            if module.training:
                changes.set(module, "training", False)
        no_autocast = torch.autocast(input_device(text_model).type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            yield
