"""patch_model / unpatch_model: put the quantized cache into one Hugging Face model, and take it out again."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch import nn

from rotatekv.attention import attention_forward, choose_sinks, outside_compiled_graphs
from rotatekv.cache import CacheSpec, RotateKVCache
from rotatekv.calibration import CalibrationTarget, load_statistics, placeholders
from rotatekv.compat import CACHE_NAME, CACHE_NAMES, check_versions, find_cache
from rotatekv.config import QuantConfig, resolve_config
from rotatekv.decode import RopeSource, plan_fused_call
from rotatekv.errors import UserError
from rotatekv.families import check_attention, check_supported, find_text_model, layer_geometry
from rotatekv.fuse import can_fold_keys, check_foldable, fuse_weights, restore_weights
from rotatekv.methods import KVMethod, build_method, method_class
from rotatekv.methods.rotatekv import RotateKV, key_heads_per_group
from rotatekv.parts import find_documents, warn_of_padding
from rotatekv.speculation import prompt_first
from rotatekv.weights import calibration_digests, weights_digest

_HANDLE = "_rotatekv_handle"
_MARK = "_rotatekv_not_pickled"


class NotPickled:
    """Stands in a patched model and in every module that it changed: no part of it is pickled."""

    def __deepcopy__(self, memo: dict) -> NotPickled:
        return self

    def __reduce_ex__(self, protocol):
        raise UserError("a patched model cannot be pickled: call unpatch_model(model) first, and patch what is loaded")


@dataclass
class PatchHandle(NotPickled):
    """What ``patch_model`` did to a model. ``with patch_model(...) as handle:`` undoes it at the end."""

    model: nn.Module
    spec: CacheSpec
    rope_source: RopeSource
    fingerprint: str  # as ``plan_fingerprint`` tells it; the cache's knows the weights too
    text_forward: Callable | None = None  # the text model's own
    warned_of_padding: bool = False
    hooks: list = field(default_factory=list)
    rebound: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    saved_weights: list = field(default_factory=list)

    external = False  # as against HF's own cache: rotatekv/external.py

    @property
    def config(self) -> QuantConfig:
        return self.spec.config

    def bind(self, module: nn.Module, name: str, function) -> None:
        """Shadow ``module.name`` for this instance alone."""
        name = _forward_name(module) if name == "forward" else name
        for key, value in ((name, MethodType(function, module)), (_MARK, NotPickled())):
            self.rebound.append((module, key, vars(module).get(key)))
            setattr(module, key, value)

    def guard(self, text_model: nn.Module) -> None:
        """Have a call that does not come to its end, by Ctrl-C too, take back what it has stored."""
        self.text_forward = getattr(text_model, _forward_name(text_model))
        self.bind(text_model, "forward", _guarded(self.text_forward))

    def unbind(self) -> None:
        for module, name, earlier in reversed(self.rebound):
            if earlier is None:
                delattr(module, name)
            else:
                setattr(module, name, earlier)

    def __deepcopy__(self, memo: dict) -> PatchHandle:
        """A copied model's own handle, so that it is patched and unpatched by itself."""
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info) -> None:
        if is_patched(self.model):
            unpatch_model(self.model)


def patch_model(
    model: nn.Module,
    config: str | QuantConfig = "RotateKV2",
    calibration_file: str | Path | None = None,
) -> PatchHandle:
    """Make every forward of ``model`` read and write a quantized KV cache.

    Afterwards ``model(...)``, ``model.generate(...)`` and any client that hands in no cache make a ``RotateKVCache``
    themselves; another cache class is refused. Only this instance changes.

    Args:
        model: a causal language model, or a vision-language model with one inside, of a supported family.
        config: a preset's name or a ``QuantConfig``.
        calibration_file: what ``calibrate_reorder.py`` made for the method; ``None`` looks in ``reorder_indices/`` for
            this model's.

    Raises:
        UserError: the model, its attention or the config is not supported; the line says what to change.
    """
    text_model, config = _check_patchable(model), resolve_config(config)
    return patch_with_methods(model, config, build_methods(model, text_model, config, calibration_file))


def _check_patchable(model: nn.Module) -> nn.Module:
    """The text model of a model that may be patched (UserError for any other)."""
    check_versions()
    text_model = find_text_model(model)
    if is_patched(model) or is_patched(text_model):
        raise UserError("the model is patched already: call unpatch_model(model) first")
    check_supported(text_model)
    return text_model


def patch_with_methods(model: nn.Module, config: QuantConfig, methods: Sequence[KVMethod]) -> PatchHandle:
    """``patch_model`` with codecs that are made already, one a layer."""
    text_model, methods = _check_patchable(model), tuple(methods)
    fingerprint = _fingerprint(model, config, methods)
    spec = CacheSpec(config, methods, f"{fingerprint}, weights {weights_digest(text_model)}")
    handle = PatchHandle(model, spec, RopeSource(text_model), fingerprint)
    try:
        _put_in(handle, text_model)
    except BaseException:  # out of memory, Ctrl-C: half of the weights are folded
        _take_out(handle)
        raise
    for patched in {id(model): model, id(text_model): text_model}.values():
        setattr(patched, _HANDLE, handle)
    return handle


def _put_in(handle: PatchHandle, text_model: nn.Module) -> None:
    model = handle.model
    with torch.inference_mode(False), torch.no_grad():
        for layer, method in zip(text_model.layers, handle.spec.methods, strict=True):
            handle.bind(layer.self_attn, "forward", attention_forward)
            handle.hooks.append(layer.register_forward_pre_hook(choose_sinks, with_kwargs=True))
            if isinstance(method, RotateKV):
                fuse_weights(layer.self_attn, method, handle.saved_weights)
    handle.hooks.append(text_model.register_forward_pre_hook(partial(_enter_forward, handle), with_kwargs=True))
    handle.hooks.append(text_model.register_forward_hook(_leave_forward, with_kwargs=True, always_call=True))
    handle.guard(text_model)
    if hasattr(model, "_get_candidate_generator"):
        handle.bind(model, "_get_candidate_generator", _get_candidate_generator)
    if hasattr(model, "_prepare_cache_for_generation"):
        handle.bind(model, "_prepare_cache_for_generation", partial(_prepare_cache, handle))
    for name in ("generate_batch", "init_continuous_batching"):
        if hasattr(model, name):
            handle.bind(model, name, _refuse_continuous_batching)
    if handle.saved_weights:
        handle.bind(model, "save_pretrained", _refuse_save)
        handle.hooks.append(model.register_state_dict_pre_hook(_refuse_save))
        handle.hooks.append(model.register_load_state_dict_pre_hook(_refuse_load))


def _take_out(handle: PatchHandle) -> None:
    for hook in handle.hooks:
        hook.remove()
    handle.unbind()
    restore_weights(handle.saved_weights)


def unpatch_model(model: nn.Module) -> None:
    """Undo ``patch_model``: forwards, hooks and, bit for bit, the weights.

    Raises:
        UserError: the model is not patched.
    """
    handle = handle_of(model)
    _take_out(handle)
    for patched in {id(m): m for m in (handle.model, find_text_model(handle.model))}.values():
        delattr(patched, _HANDLE)


def is_patched(model: nn.Module) -> bool:
    return hasattr(model, _HANDLE)


def handle_of(model: nn.Module) -> PatchHandle:
    """The handle of a patched model (UserError if it is not)."""
    if not is_patched(model):
        raise UserError("the model is not patched: call patch_model(model, ...) first")
    return getattr(model, _HANDLE)


def _forward_name(module: nn.Module) -> str:
    """Where a module's forward is: accelerate's own (device_map) wraps the module's."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _guarded(forward: Callable) -> Callable:
    """See ``PatchHandle.guard``; closes over nothing, so that a copied model's runs the copy."""

    @functools.wraps(getattr(forward, "__func__", forward))
    def guarded(text_model: nn.Module, *args, **kwargs):
        try:
            return handle_of(text_model).text_forward(*args, **kwargs)
        except BaseException:
            if isinstance(cache := find_cache(kwargs), RotateKVCache):
                cache.end_forward(failed=True)
            raise

    return guarded


def resolved_head_group(text_model: nn.Module, config: QuantConfig) -> int:
    """G: the key heads that are rotated together in this model."""
    return key_heads_per_group(config, layer_geometry(text_model.layers[0].self_attn))


def build_methods(
    model, text_model: nn.Module, config: QuantConfig, calibration_file: str | Path | None = None, fold: bool = True
) -> tuple[KVMethod, ...]:
    """The codec of every layer.

    Args:
        fold: the rotations are to be folded into the weights, where the config says so; False: always online.

    Raises:
        UserError: no calibrated statistics where the config needs them, or shapes that do not fit.
    """
    attentions = [layer.self_attn for layer in text_model.layers]
    first = layer_geometry(attentions[0])
    statistics = {}
    if (kind := method_class(config).statistics_kind(config)) is not None:
        build_method(config, first, placeholders(kind, first.channels))  # a bad config before a missing file
        group = resolved_head_group(text_model, config)
        weights = calibration_digests(text_model)
        target = CalibrationTarget(model.name_or_path, len(attentions), first.channels, group, weights)
        statistics = load_statistics(kind, target, calibration_file)
    fold = fold and config.fuse_weights and issubclass(method_class(config), RotateKV)
    methods = []
    for number, attention in enumerate(attentions):
        if fold:
            check_foldable(attention)
        keys_folded = fold and can_fold_keys(attention) and config.Grouped_Head_Key_Rotation
        geometry = layer_geometry(attention, keys_folded=keys_folded, values_folded=fold)
        methods.append(build_method(config, geometry, {name: x[number] for name, x in statistics.items()}))
    return tuple(methods)


def plan_fingerprint(model, config: QuantConfig, calibration_file: str | Path | None = None) -> str:
    """The fingerprint of ``patch_model``'s handle; the model may be one on the meta device, without weights."""
    methods = build_methods(model, find_text_model(model), config, calibration_file, fold=False)  # it has no weights
    return _fingerprint(model, config, methods)


def _fingerprint(model, config: QuantConfig, methods: tuple[KVMethod, ...]) -> str:
    """A hash of all but the weights that decides what a cache's bytes mean."""
    first = methods[0].layer
    identity = {"model": model.name_or_path, "config": config.to_dict(), "layers": len(methods)}
    identity |= {"heads": first.num_key_value_heads, "head_dim": first.head_dim}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for method in methods:
        for name in sorted(method.statistics):
            digest.update(name.encode() + method.statistics[name].numpy().tobytes())
    return digest.hexdigest()


@outside_compiled_graphs
def _enter_forward(handle: PatchHandle, text_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Pre-hook of the text model: give it the cache it is to use, and the cache the tokens' positions."""
    if args:  # input_ids is the only argument HF's own callers pass by position
        kwargs = {"input_ids": args[0], **kwargs}
        if len(args) > 1:
            raise UserError("a patched model takes its arguments after input_ids by name")
    given = cache = find_cache(kwargs)
    if cache is None:
        cache = RotateKVCache(handle.spec)
    check_cache(handle, cache)
    check_attention(text_model.config)
    layers = text_model.config.num_hidden_layers
    if min(layers, len(text_model.layers)) != len(cache.layers):
        raise UserError(
            f"config.num_hidden_layers is {layers}, the model was patched with {len(cache.layers)} layers: "
            f"set it to {len(cache.layers)} again"
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
    tokens = embeds if embeds is not None else ids
    if tokens is None or not tokens.numel():
        raise UserError("the call has no tokens: pass input_ids or inputs_embeds with at least one token")
    batch_size, length = tokens.shape[:2]
    position_ids, documents = kwargs.get("position_ids"), None
    if position_ids is not None and kwargs.get("attention_mask") is None and given is None:
        documents = find_documents(position_ids, _uses_cache(text_model, kwargs))
    if position_ids is None:
        past = cache.get_seq_length()
        counted = torch.arange(past, past + length, dtype=torch.int64, device=tokens.device)
        position_ids = counted.unsqueeze(0)  # (1, T)
    mask = kwargs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if mask is None and documents is None and ids is not None and batch_size > 1 and not cache.get_seq_length():
        warn_of_padding(handle, ids, text_model.config.pad_token_id)
    cache.begin_forward(position_ids, batch_size, mask, documents)
    dtype = embeds.dtype if embeds is not None else text_model.get_input_embeddings().weight.dtype
    stub = torch.empty(0, dtype=dtype, device=tokens.device)  # rotary_emb only reads its dtype and device
    handle.rope_source.forget_stale()
    running = [(cache, length, mask)]
    if cache.parts is not None:
        running = [(part.cache, len(part.new), part.token_mask(mask)) for part in cache.parts.running()]
    for one, new, its_mask in running:
        one.fused_call = plan_fused_call(one.positions, new, its_mask, handle.rope_source)
        positions = one.positions.to(tokens.device)
        one.set_rope_table(partial(text_model.rotary_emb, stub, position_ids=positions))
    return (), {**kwargs, "position_ids": position_ids, CACHE_NAME: cache}


@outside_compiled_graphs
def _leave_forward(text_model: nn.Module, args: tuple, kwargs: dict, output):
    """Hook of the text model: drop the call's tables, and the cache from the output where use_cache is False."""
    cache = find_cache(kwargs)
    if isinstance(cache, RotateKVCache):
        cache.end_forward(failed=output is None)
    if _uses_cache(text_model, kwargs) or output is None:
        return output
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, RotateKVCache))
    setattr(output, CACHE_NAME, None)
    return output


def _uses_cache(text_model: nn.Module, kwargs: dict) -> bool:
    use_cache = kwargs.get("use_cache")
    return text_model.config.use_cache if use_cache is None else use_cache


def check_cache(handle: PatchHandle, cache) -> None:
    """Raises UserError for another cache class, or a cache of another config."""
    if not isinstance(cache, RotateKVCache):
        raise UserError(
            f"a patched model takes no {type(cache).__name__}: leave past_key_values out, "
            "or pass RotateKVCache.for_model(model)"
        )
    if cache.fingerprint != handle.spec.fingerprint:
        raise UserError("the cache was made under another config, model or calibration than the model is patched with")


def _prepare_cache(handle: PatchHandle, model, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
    """Stands in for ``GenerationMixin._prepare_cache_for_generation``."""
    if generation_config.cache_implementation is not None:
        raise UserError(
            f"cache_implementation={generation_config.cache_implementation!r} is not possible in a patched model: "
            "its cache is the RotateKVCache"
        )
    if generation_config.assistant_early_exit is not None:
        raise UserError(
            "assistant_early_exit runs the model with fewer layers, which a patched model does not: "
            "take prompt_lookup_num_tokens or an assistant_model"
        )
    cache = find_cache(model_kwargs)
    if cache is not None:
        check_cache(handle, cache)
        cache._is_user_defined = True  # generate asks for it when a cache is handed in
        # A checkpoint's use_cache=False beside a cache would feed the whole sequence at every step, after itself.
        generation_config.use_cache = True
    elif generation_config.use_cache:
        model_kwargs[CACHE_NAME] = RotateKVCache(handle.spec)


def _get_candidate_generator(model, *args, **kwargs):
    """Stands in for ``GenerationMixin._get_candidate_generator``."""
    return prompt_first(type(model)._get_candidate_generator(model, *args, **kwargs))


def _refuse_save(model, *args, **kwargs) -> None:
    raise UserError("the weights hold folded rotations: call unpatch_model(model) before saving them")


def _refuse_load(model, *args, **kwargs) -> None:
    raise UserError("the weights hold folded rotations: call unpatch_model(model) before loading others")


def _refuse_continuous_batching(model, *args, **kwargs) -> None:
    raise UserError("continuous batching brings its own paged cache: a patched model takes generate instead")
