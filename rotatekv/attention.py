"""The one patched attention forward, for every supported family. Start reading here.

    keys     k_proj → rotate groups of heads → reorder channels → 2-bit codes        (write, before RoPE)
             codes → inverse reorder → inverse rotation → RoPE at its own position   (read)
    values   v_proj → rotate each head → 2-bit codes → inverse rotation
    queries  as usual

The write and the read are ``cache.update``; which codec they use is ``rotatekv/methods/``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotatekv.cache import RotateKVCache
from rotatekv.compat import CACHE_NAMES, disable_compiler, find_cache
from rotatekv.sinks import give_sinks
from rotatekv.window import attend_with_own_windows

# Lengths that change at each call, in-place writes and kernels of our own are no compiler's business. A layer of a
# compiled model has two graphs, before its attention and after it, and the kernels stay in use.
outside_compiled_graphs = disable_compiler(
    "a patched model's attention runs outside of compiled graphs: leave out fullgraph=True"
)


@outside_compiled_graphs
def attention_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the quantized cache; takes and returns what Hugging Face's own forward does.

    Args:
        hidden_states: (B, T, hidden_size).
        position_embeddings: cos and sin of the new tokens, (B, T, rotary_dim) each.
        kwargs: the cache among them, and what the attention interface takes.

    Raises:
        RuntimeError: called with no cache, as gradient checkpointing does.
    """
    cache: RotateKVCache | None = find_cache(kwargs)
    if cache is None:
        raise RuntimeError(
            "RotateKV's attention was called without a cache: call the whole model, and switch gradient "
            "checkpointing off or unpatch_model(model) before training"
        )
    query, key, value = project_qkv(self, hidden_states)  # (B, H, T, D), (B, H_kv, T, D), (B, H_kv, T, D)
    options = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    attend = _attend if cache.parts is None else _attend_to_parts
    output, weights = attend(self, cache, query, key, value, position_embeddings, attention_mask, options)
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _attend(
    self: nn.Module,
    cache: RotateKVCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    options: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store the new tokens' (B, H_kv, T, D) keys and values and let their queries, (B, H, T, D), attend.

    Returns:
        (B, T, H, D), and the weights (B, H, T, T_cached) if the attention interface gives them.
    """
    rope = rope_function(self)
    dropout = self.attention_dropout if self.training else 0.0
    if self.config._attn_implementation == "sdpa" and not dropout and cache.attends(self.layer_idx, query):
        # A few new tokens: one kernel reads the packed cache (rotatekv/kernels/).
        output = cache.attend(
            query, key, value, self.layer_idx, self.scaling, lambda x: rope(x, *position_embeddings)
        )  # (B, H, T, D)
        return output.transpose(1, 2), None
    query = rope(query, *position_embeddings)
    key, value, flushed = cache.update(key, value, self.layer_idx, rope=rope)  # (B, H_kv, T_cached, D)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, _modeling_module(self).eager_attention_forward
    )
    if flushed is not None:  # packed by now, but the call's first queries have them in their recent window
        is_causal = cache.mask_is_causal and options.get("is_causal") is not False
        attend = partial(attend_with_own_windows, attend, flushed, is_causal)
    return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **options)


def _attend_to_parts(
    self: nn.Module, cache: RotateKVCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor], attention_mask: torch.Tensor | None, options: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``_attend`` for each sequence in its own cache; zeros for padding."""
    output, all_weights = query.new_zeros(query.transpose(1, 2).shape), None
    for part in cache.parts.running():
        heads = (part.of(x, 2) for x in (query, key, value))
        tables = tuple(part.of(x, 1) for x in position_embeddings)
        mask = part.attention_mask(attention_mask)
        of_part, weights = _attend(self, part.cache, *heads, tables, mask, options)
        output[part.row, part.new] = of_part[0]
        if weights is not None:
            if all_weights is None:
                all_weights = query.new_zeros(*query.shape[:3], cache.positions.shape[1])
            all_weights[part.row][:, part.new[:, None], part.columns] = weights[0]
    return output, all_weights


def project_qkv(attention: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value heads of any supported family, before RoPE.

    Handles separate and fused (phi3) projections, and query/key normalisation per head (qwen3) or over all heads
    (olmo2).

    Returns:
        (B, H, T, D), (B, H_kv, T, D), (B, H_kv, T, D).
    """
    if hasattr(attention, "qkv_proj"):
        config, head_dim = attention.config, attention.head_dim
        kv_width = config.num_key_value_heads * head_dim
        query, key, value = attention.qkv_proj(x).split(
            (config.num_attention_heads * head_dim, kv_width, kv_width), dim=-1
        )
    else:
        query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    query = _normed_heads(query, attention.head_dim, getattr(attention, "q_norm", None))
    key = _normed_heads(key, attention.head_dim, getattr(attention, "k_norm", None))
    return query, key, _normed_heads(value, attention.head_dim, None)


def rope_function(attention: nn.Module) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The family's own rotary embedding, for one tensor: ``rope(x (B, heads, T, D), cos, sin) -> x``."""
    apply_to_pair = _modeling_module(attention).apply_rotary_pos_emb

    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply_to_pair(x, x[:, :1], cos, sin)[0]

    return rope


@outside_compiled_graphs
def choose_sinks(decoder_layer: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-hook of a decoder layer: name the tokens that stay unquantized."""
    cache = find_cache(kwargs)
    if not isinstance(cache, RotateKVCache) or not cache.config.Attention_Sink_Aware:
        return
    hidden_states, layer = args[0] if args else kwargs["hidden_states"], decoder_layer.self_attn.layer_idx
    if cache.parts is None:
        return give_sinks(cache.layers[layer], hidden_states, cache.token_mask)
    for part in cache.parts.running():
        give_sinks(part.cache.layers[layer], part.of(hidden_states, 1))


def _normed_heads(x: torch.Tensor, head_dim: int, norm: nn.Module | None) -> torch.Tensor:
    norm_is_per_head = norm is not None and norm.weight.shape[-1] == head_dim
    if norm is not None and not norm_is_per_head:
        x = norm(x)
    x = x.unflatten(-1, (-1, head_dim))  # (B, T, heads, D)
    if norm_is_per_head:
        x = norm(x)
    return x.transpose(1, 2)  # (B, heads, T, D)


def _modeling_module(attention: nn.Module):
    return sys.modules[type(attention).__module__]
