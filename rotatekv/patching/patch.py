"""patch_model / unpatch_model: put the quantized cache into one Hugging Face model, and take it out again.

A patched model's weights and forwards are its own. What is put in: each attention module's config becomes a copy that
names ``attention.attention`` as the attention function; hooks of the text model hand every call its cache and tell the
cache its positions; hooks of the decoder layers name attention sinks; ``generate`` makes our cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn
from transformers import GenerationMixin

from rotatekv.attention import NAME, choose_sinks, renamed_config
from rotatekv.cache.spec import HANDLE, CacheSpec, handle_of, is_patched
from rotatekv.compat import check_versions
from rotatekv.config import QuantConfig, resolve_config
from rotatekv.errors import UserError
from rotatekv.families import attention_modules, check_supported, find_text_model, layer_geometry
from rotatekv.methods import KVMethod, build_method, method_class
from rotatekv.methods.rotatekv import key_heads_per_group
from rotatekv.models.weights import calibration_digests, weights_digest
from rotatekv.patching.handle import PatchHandle
from rotatekv.patching.hooks import GENERATION, enter_forward, leave_forward
from rotatekv.patching.proof import prove
from rotatekv.rope import LayerRope, ModelRope, rotary_function
from rotatekv.statistics import CalibrationTarget, load_statistics


def patch_model(
    model: nn.Module, config: str | QuantConfig = "RotateKV2", calibration_file: str | Path | None = None
) -> PatchHandle:
    """Make every forward of ``model`` read and write a quantized KV cache.

    Afterwards ``model(...)``, ``model.generate(...)`` and any client that hands in no cache make a ``RotateKVCache``
    themselves; another cache class is refused. Only this instance changes, and none of its weights. Before it does, a
    few tokens run through the model with a cache that loses nothing, and what they give is compared with what they
    gave before (rotatekv/patching/proof.py).

    Args:
        model: a causal language model, or a model with one inside: a vision-language model, a PEFT model.
        config: a preset's name or a ``QuantConfig``.
        calibration_file: what ``calibrate_reorder.py`` made for the method; ``None`` looks in ``reorder_indices/`` for
            this model's.

    Raises:
        UserError: the model, its attention or the config is not supported; the line says what to change. The model is
            then as it was.
    """
    text_model, config = _check_patchable(model), resolve_config(config)
    return patch_with_methods(model, config, build_methods(model, text_model, config, calibration_file))


def _check_patchable(model: nn.Module) -> nn.Module:
    """The text model of a model that may be patched (UserError for any other)."""
    check_versions()
    text_model = find_text_model(model)
    if is_patched(text_model):
        raise UserError("the model is patched already: call unpatch_model(model) first")
    check_supported(text_model)
    return text_model


def patch_with_methods(model: nn.Module, config: QuantConfig, methods: Sequence[KVMethod | None]) -> PatchHandle:
    """``patch_model`` with codecs that are made already, one a layer."""
    text_model = _check_patchable(model)
    fingerprint = _fingerprint(model, config, methods)
    cache_fingerprint = f"{fingerprint}, weights {weights_digest(text_model)}"
    spec = CacheSpec(config, tuple(methods), cache_fingerprint, layer_ropes(text_model), text_model.config)
    handle = PatchHandle(model, text_model, spec, fingerprint)
    try:
        prove(handle, partial(_put_in, handle, config))
        return handle
    except BaseException:  # out of memory, Ctrl-C
        handle.undo()
        raise


def layer_ropes(text_model: nn.Module) -> tuple[LayerRope | None, ...]:
    """How each attention layer's keys are turned; the proof finds those that are not."""
    rope, attentions = ModelRope(text_model), attention_modules(text_model)
    return tuple(
        None if attention is None else LayerRope(rope, rope.kind(number), rotary_function(attention))
        for number, attention in enumerate(attentions)
    )


def _put_in(handle: PatchHandle, config: QuantConfig) -> None:
    model, text_model, changes = handle.model, handle.text_model, handle.changes
    changes.set(text_model, HANDLE, handle)
    for number, (layer, attention) in enumerate(zip(text_model.layers, attention_modules(text_model), strict=True)):
        if attention is None:
            continue
        changes.set(attention, "config", renamed_config(attention.config, NAME))
        if config.Attention_Sink_Aware:
            changes.hook(layer, "forward_pre", partial(choose_sinks, layer=number), with_kwargs=True)
    changes.hook(text_model, "forward_pre", enter_forward, with_kwargs=True)
    changes.hook(text_model, "forward", leave_forward, with_kwargs=True, always_call=True)
    for module in model.modules():
        for name, function in GENERATION.items() if isinstance(module, GenerationMixin) else ():
            if hasattr(module, name):
                changes.set(module, name, partial(function, module))


def unpatch_model(model: nn.Module) -> None:
    """Undo ``patch_model``: the attention modules' configs, the hooks, and what ``generate`` asks for.

    Raises:
        UserError: the model is not patched.
    """
    handle_of(model).undo()


def resolved_head_group(text_model: nn.Module, config: QuantConfig) -> int:
    """G: the key heads that are rotated together in this model."""
    return key_heads_per_group(config, first_geometry(text_model))


def first_geometry(text_model: nn.Module):
    """Of the first layer with attention."""
    return layer_geometry(next(attention for attention in attention_modules(text_model) if attention is not None))


def build_methods(
    model, text_model: nn.Module, config: QuantConfig, calibration_file: str | Path | None = None
) -> tuple[KVMethod | None, ...]:
    """The codec of every layer; None for a layer without attention.

    Raises:
        UserError: no calibrated statistics where the config needs them, or shapes that do not fit.
    """
    attentions = attention_modules(text_model)
    first = first_geometry(text_model)
    statistics = {}
    if (kind := method_class(config).statistics_kind(config)) is not None:
        method_class(config).check(config, first)  # a bad config before a missing file
        group = resolved_head_group(text_model, config)
        weights = calibration_digests(text_model)
        heads, dim = first.num_key_value_heads, first.head_dim
        target = CalibrationTarget(model.name_or_path, len(attentions), heads, dim, group, weights)
        statistics = load_statistics(kind, target, calibration_file)
        geometries = [None if attention is None else layer_geometry(attention) for attention in attentions]
        statistics = method_class(config).plan(config, statistics, geometries)
    return tuple(
        None
        if attention is None
        else build_method(config, layer_geometry(attention), {name: x[number] for name, x in statistics.items()})
        for number, attention in enumerate(attentions)
    )


def plan_fingerprint(model, config: QuantConfig, calibration_file: str | Path | None = None) -> str:
    """The fingerprint of ``patch_model``'s handle; the model may be one on the meta device, without weights."""
    return _fingerprint(model, config, build_methods(model, find_text_model(model), config, calibration_file))


def _fingerprint(model, config: QuantConfig, methods: Sequence[KVMethod | None]) -> str:
    """A hash of all but the weights that decides what a cache's bytes mean."""
    held = [method for method in methods if method is not None]
    first = held[0].geometry
    identity = {"model": model.name_or_path, "config": config.to_dict(), "layers": len(methods)}
    identity |= {"heads": first.num_key_value_heads, "head_dim": first.head_dim}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for method in held:
        for name in sorted(method.statistics):
            digest.update(name.encode() + method.statistics[name].numpy().tobytes())
    return digest.hexdigest()
