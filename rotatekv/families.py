"""What differs between model families and must be known before a run: the decoder, its attention, its shapes."""

from __future__ import annotations

import torch
from torch import nn

from rotatekv.errors import UserError
from rotatekv.methods import LayerGeometry
from rotatekv.rope import ModelRope

SUPPORTED_ATTENTION = ("eager", "sdpa")
_LAYER_TYPES = ("full_attention", "sliding_attention")  # whose keys and values are cached
_OWN_CACHE = ("linear_attention", "conv")  # keep transformers' own
_ATTENTION_NAMES = ("self_attn", "attention")
_PROJECTION_NAMES = ("o_proj", "out_proj", "dense")  # of what attention gives


def find_text_model(model: nn.Module) -> nn.Module:
    """The module that runs the decoder layers: the model, its base, or a vision-language model's text model."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        layers = getattr(module, "layers", ())
        is_decoder = isinstance(layers, nn.ModuleList) and len(layers) and hasattr(module, "rotary_emb")
        if is_decoder and any(attention_of(layer) is not None for layer in layers):
            return module
    raise UserError(
        f"{type(model).__name__} has no decoder with rotary attention (layers, a rotary_emb, and self_attn in a layer)"
    )


def attention_of(decoder_layer: nn.Module) -> nn.Module | None:
    """A decoder layer's attention module; None for linear attention, convolutions and the like."""
    found = (getattr(decoder_layer, name, None) for name in _ATTENTION_NAMES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def attention_modules(text_model: nn.Module) -> list[nn.Module | None]:
    """Of every layer; see ``attention_of``."""
    return [attention_of(layer) for layer in text_model.layers]


def check_supported(text_model: nn.Module) -> None:
    """Raises UserError for a RoPE, an attention or a kind of layer that would be silently wrong (patching/proof.py)."""
    config = text_model.config
    for number, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind not in (*_LAYER_TYPES, *_OWN_CACHE):
            raise UserError(f"layer {number} is of type {kind!r}, which is not supported: take another model")
        if (kind in _LAYER_TYPES) != (attention_of(text_model.layers[number]) is not None):
            raise UserError(f"layer {number} is of type {kind!r} but its modules are not: take another model")
    ModelRope(text_model).check_type()
    check_attention(config)


def check_attention(config) -> None:
    """Raises UserError for an attention implementation other than eager and sdpa."""
    if config._attn_implementation not in SUPPORTED_ATTENTION:
        raise UserError(
            f"attention {config._attn_implementation!r} is not supported: load the model with "
            "attn_implementation='sdpa' (--attn_implementation sdpa) or 'eager'"
        )


def layer_geometry(attention: nn.Module) -> LayerGeometry:
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if head_dim is None or not hasattr(attention, "config"):  # an older attention; latent attention
        missing = "head_dim" if hasattr(attention, "config") else "config"
        raise UserError(f"{type(attention).__name__} has no {missing}: this model's cache cannot be quantized")
    heads = getattr(attention.config, "num_key_value_heads", None) or attention.config.num_attention_heads
    return LayerGeometry(attention.layer_idx, heads, head_dim)


def output_projection(attention: nn.Module) -> torch.Tensor | None:
    """The weight (hidden_size, H·D) that reads attention's output; None: it has none under the usual names."""
    found = (getattr(attention, name, None) for name in _PROJECTION_NAMES)
    module = next((module for module in found if isinstance(module, nn.Module)), None)
    weight = None if module is None else getattr(module, "weight", None)
    return weight.detach() if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None


def input_device(text_model: nn.Module) -> torch.device:
    """Where a call's token ids lie: with the embedding, or where accelerate's hook brings one that is offloaded.

    Raises:
        UserError: the model has no weights.
    """
    embedding = text_model.get_input_embeddings()
    device = next((x.device for x in (*embedding.parameters(), *embedding.buffers())), torch.device("cpu"))
    if device.type != "meta":
        return device
    if not hasattr(embedding, "_hf_hook"):
        raise UserError("the model is on the meta device, without weights: load them first")
    device = getattr(embedding._hf_hook, "execution_device", None)
    return torch.device("cpu" if device is None else device)
