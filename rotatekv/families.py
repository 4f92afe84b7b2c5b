"""What a model must be to be patched: its family, attention, RoPE and the shapes of its layers."""

from __future__ import annotations

from torch import nn

from rotatekv.errors import UserError
from rotatekv.methods import LayerGeometry

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SUPPORTED_ATTENTION = ("eager", "sdpa")
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


def find_text_model(model: nn.Module) -> nn.Module:
    """The module that runs the decoder layers: the model, its base, or a vision-language model's text model."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        layers = getattr(module, "layers", None)
        is_decoder = isinstance(layers, nn.ModuleList) and len(layers) and hasattr(module, "rotary_emb")
        if is_decoder and hasattr(layers[0], "self_attn"):
            return module
    raise UserError(f"{type(model).__name__} has no decoder with rotary attention: supported are {_families()}")


def check_supported(text_model: nn.Module) -> None:
    """Raises UserError for a family, attention, sliding window or RoPE that would be silently wrong."""
    config = text_model.config
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UserError(f"model type {config.model_type!r} is not supported: supported are {_families()}")
    window = getattr(config, "sliding_window", None)
    # layer_types decides where a config has it: qwen2 keeps a sliding_window it does not use.
    layer_types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    if any(kind != "full_attention" for kind in layer_types):
        named = getattr(config, "layer_types", None)
        every_layer = f", layer_types=['full_attention'] * {len(named)}" if named else ""
        raise UserError(
            f"sliding-window layers (window {window}) are not supported: use a model without, or, if no text exceeds "
            f"the window, from_pretrained(..., sliding_window=None{every_layer})"
        )
    _check_rope(text_model)
    check_attention(config)


def _check_rope(text_model: nn.Module) -> None:
    """Raises UserError where keys would have to be turned by other frequencies as the text grows."""
    rope_type = getattr(text_model.rotary_emb, "rope_type", "default")
    if rope_type in _FIXED_ROPE_TYPES:
        return
    cure = f"use a model whose RoPE type is one of {', '.join(_FIXED_ROPE_TYPES)}"
    if rope_type == "dynamic":  # up to that length it is the default
        length = text_model.config.max_position_embeddings
        cure += f", or set config.rope_parameters['rope_type'] = 'default' before loading if no text exceeds {length}"
    raise UserError(f"RoPE type {rope_type!r} is not supported, its frequencies change with the length: {cure}")


def check_attention(config) -> None:
    """Raises UserError for an attention implementation other than eager and sdpa."""
    if config._attn_implementation not in SUPPORTED_ATTENTION:
        raise UserError(
            f"attention {config._attn_implementation!r} is not supported: load the model with "
            "attn_implementation='sdpa' (--attn_implementation sdpa) or 'eager'"
        )


def layer_geometry(attention: nn.Module, **folded: bool) -> LayerGeometry:
    heads = attention.config.num_key_value_heads
    return LayerGeometry(attention.layer_idx, heads, attention.head_dim, **folded)


def _families() -> str:
    return ", ".join(SUPPORTED_FAMILIES)
