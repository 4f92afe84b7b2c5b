"""The attention of a patched model, for every family. Start reading here.

Hugging Face's own forwards run: projections, norms and RoPE are theirs. Two things are ours. Their ``cache.update``
stores the new tokens, by a codec of ``rotatekv/methods/``:

    keys     undo RoPE → rotate groups of heads → 2-bit codes, like channels share a scale   (write)
             codes → inverse rotation → RoPE again                                           (read)
    values   rotate each head → 2-bit codes → inverse rotation

It returns the new keys with their layer's cache as an attribute, so that no token is decoded before it is needed. Their
attention function is ``attention`` below: a few new tokens attend in one kernel that reads the codes as they lie and
un-rotates values once, in its output; a prefill decodes the layer's cache, and Hugging Face's function does the rest.

Where each idea of the paper is (docs/architecture.md draws how they hang together):

    rotation             rotatekv/methods/rotatekv.py:RotateKV.keys_in
                         rotatekv/kernels/hadamard.py:rotate_channels
    reorder              rotatekv/methods/rotatekv.py:RotateKV.key_groups
    attention sinks      rotatekv/cache/sinks.py:detect_sinks
    quantize and pack    rotatekv/kernels/quantize.py:quantize_groups
                         rotatekv/kernels/layout.py:write_blocks
    write, in one kernel rotatekv/kernels/cpu/__init__.py:quantize_into_blocks
      its specification  rotatekv/kernels/blocks.py:quantize_into_blocks_reference
    fused decode         rotatekv/kernels/cpu/__init__.py:decode_attention
      its specification  rotatekv/kernels/decode_attention.py:decode_attention_reference

The reorder's indices are calibrated: rotatekv/calibration/reorder.py:indices_from_key_sums.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotatekv.cache.cache import RotateKVCache, handed_over
from rotatekv.cache.prefill import attend_in_pieces, attend_in_two
from rotatekv.compat import CACHE_NAMES, outside_compiled_graphs
from rotatekv.kernels.attention_parts import flash_serves

NAME = "rotatekv"  # of the attention function
_STOCK_CONFIG = "_rotatekv_stock_config"  # on the config of a patched attention module: the one it had
_OTHERWISE = ("dropout", "position_bias", "softcap")  # what would make it more than softmax(scaling·q·k)·v
_CACHE_NAMES = (*CACHE_NAMES, "layer_past")  # GPT-NeoX

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@outside_compiled_graphs
def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A Hugging Face attention function, over the quantized cache where the keys come from one.

    Args:
        query: (B, H, T, D), after RoPE.
        key, value: (B, H_kv, T, D), what ``cache.update`` returned.
        attention_mask: (B or 1, H or 1, T or 1, T_cached), bool or to be added; None: causal.
        options: dropout, scaling and whatever else the family hands its attention function.

    Returns:
        (B, T, H, D), and the weights (B, H, T, T_cached) if Hugging Face's function gives them.
    """
    handed = handed_over(key)
    if handed is None:
        return stock_attention(module)(module, query, key, value, attention_mask, **options)
    cache, layer = handed
    if cache.parts is None or (cache.first_call_is_exact and not cache.parts.is_packed):
        return _attend(cache, layer, module, query, key, value, attention_mask, options)
    output, all_weights = query.new_zeros(query.transpose(1, 2).shape), None
    for part in cache.parts.running():  # each sequence in its own cache; zeros for padding
        own: Any = part.cache  # a RotateKVCache, which parts.py does not import
        own_query, own_key, own_value = (part.of(x, 2) for x in (query, key, value))
        mask = part.attention_mask(attention_mask)
        of_part, weights = _attend(own, layer, module, own_query, own_key, own_value, mask, options)
        output[part.batch_index, part.new] = of_part[0].to(output.dtype)  # under autocast it is another one
        if weights is not None:
            if all_weights is None:
                assert cache.positions is not None
                all_weights = query.new_zeros(*query.shape[:3], cache.positions.shape[1])
            kept = part.kept_by(layer)
            all_weights[part.batch_index][:, part.new[:, None], kept] = weights[0].to(query.dtype)
    return output, all_weights


def _attend(
    cache: RotateKVCache,
    number: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``attention`` over one cache, whose layer ``number`` has stored the call's keys and values by now."""
    layer = cache.layers[number]
    is_plain = options.get("is_causal") is not False and not any(options.get(name) for name in _OTHERWISE)
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_plain and cache.attends(number, query):
        return layer.attend(query, scaling, cache.fused_call).transpose(1, 2), None
    stock = stock_attention(module)
    if cache.first_call_is_exact:
        return stock(module, query, key, value, attention_mask, **options)
    flushed, layer.flushed = layer.flushed, None  # as large as all the layer's new keys and values: for its turn alone
    keys, values = layer.read()  # (B, H_kv, T_kept, D)
    if attention_mask is not None and attention_mask.shape[-1] == layer.get_seq_length():
        attention_mask = attention_mask[..., layer.dropped :]  # a caller's own is of all tokens
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        keys, values = _NoGradient.apply(keys, key), _NoGradient.apply(values, value)
    if flushed is not None:  # packed by now, but the call's first queries have them in their recent window
        is_causal = cache.mask_is_causal and options.get("is_causal") is not False
        is_plain = is_plain and is_causal and stock is ALL_ATTENTION_FUNCTIONS["sdpa"]
        if is_plain and _sees_all_before(query, keys, attention_mask) and flash_serves(query, values):
            return attend_in_two(flushed, query, keys, values, scaling), None
        most_seen = layer.sliding_window if cache.mask_is_causal else None
        stock = partial(attend_in_pieces, stock, flushed, is_causal, most_seen)
    return stock(module, query, keys, values, attention_mask, **options)


def _sees_all_before(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether each query of a causal call sees all tokens up to its own; not under gradients or autocast, which are
    left to Hugging Face's function. A mask that transformers made hides a token from all queries, from those before it,
    or from those that a sliding window has taken past it: if from any, from the last one too."""
    if query.dtype != keys.dtype or torch.is_autocast_enabled(query.device.type):
        return False
    if torch.is_grad_enabled() and query.requires_grad:
        return False
    if mask is None:
        return True
    seen_by_last = mask[..., -1, :]
    return bool((seen_by_last if mask.dtype == torch.bool else seen_by_last == 0).all())


def renamed_config(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """A copy of an attention module's config that names another attention function; ``stock_attention`` finds the one
    that ``config`` names."""
    renamed = copy.copy(config)
    renamed._attn_implementation_internal = name
    setattr(renamed, _STOCK_CONFIG, config)
    return renamed


def stock_attention(module: nn.Module) -> Attention:
    """What would attend in the unpatched model."""
    config = getattr(module.config, _STOCK_CONFIG, module.config)
    family = sys.modules[type(module).__module__]
    return ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, getattr(family, "eager_attention_forward", None)
    )


def choose_sinks(decoder_layer: nn.Module, args: tuple, kwargs: dict, layer: int) -> None:
    """Pre-hook of a decoder layer: name the tokens that stay unquantized."""
    cache = next((kwargs[name] for name in _CACHE_NAMES if name in kwargs), None)
    if isinstance(cache, RotateKVCache) and cache.names_sinks:
        _choose_sinks(cache, layer, args[0] if args else kwargs["hidden_states"])


@outside_compiled_graphs
def _choose_sinks(cache: RotateKVCache, layer: int, hidden_states: torch.Tensor) -> None:
    cache.choose_sinks(layer, hidden_states)


class _NoGradient(torch.autograd.Function):
    """Identity whose backward says that gradients stop here, instead of silently training half a model."""

    @staticmethod
    def forward(ctx, cached: torch.Tensor, _projected: torch.Tensor) -> torch.Tensor:
        return cached.view_as(cached)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise RuntimeError("no gradients through a quantized KV cache: call unpatch_model(model) before training")


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
