"""What a patched model's calls and its ``generate`` come by: they get a RotateKVCache, and it learns their tokens.

All are functions of a module's file, found by name: a patched model can be copied and pickled.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from rotatekv.cache.cache import RotateKVCache
from rotatekv.cache.fused_call import plan_fused_call
from rotatekv.cache.parts import find_documents
from rotatekv.cache.spec import HANDLE, handle_of
from rotatekv.compat import CACHE_NAME, CACHE_NAMES, find_cache, outside_compiled_graphs
from rotatekv.errors import UserError
from rotatekv.families import check_attention
from rotatekv.patching.handle import PatchHandle
from rotatekv.patching.speculation import prompt_first


@outside_compiled_graphs
def enter_forward(text_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Pre-hook of the text model: give it the cache it is to use, and the cache the tokens' positions."""
    handle: PatchHandle = getattr(text_model, HANDLE)
    if args:  # input_ids is the only argument HF's own callers pass by position
        kwargs = {"input_ids": args[0], **kwargs}
        if len(args) > 1:
            raise UserError("a patched model takes its arguments after input_ids by name")
    check_layers(handle)
    given = cache = find_cache(kwargs)
    if cache is None:
        cache = RotateKVCache(handle.spec)
    check_cache(handle, cache)
    cache.follow(handle.spec)
    check_attention(text_model.config)
    kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
    tokens = embeds if embeds is not None else ids
    if tokens is None or not tokens.numel():
        raise UserError("the call has no tokens: pass input_ids or inputs_embeds with at least one token")
    batch_size, length = tokens.shape[:2]
    position_ids, documents = kwargs.get("position_ids"), None
    if position_ids is not None and position_ids.dim() != 2:
        raise UserError(f"position_ids of {position_ids.dim()} dimensions are not supported: pass (B, T)")
    if position_ids is not None and kwargs.get("attention_mask") is None and given is None:
        documents = find_documents(position_ids, uses_cache(text_model, kwargs))
    cache.settle()
    if position_ids is None:
        past = cache.get_seq_length()
        counted = torch.arange(past, past + length, dtype=torch.int64, device=tokens.device)
        position_ids = counted.unsqueeze(0)  # (1, T)
    mask = kwargs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if mask is None and documents is None and ids is not None and batch_size > 1 and not cache.get_seq_length():
        warn_of_padding(handle, ids, getattr(text_model.config, "pad_token_id", None))
    cache.begin_forward(position_ids, batch_size, mask, documents)
    if handle.rope is not None:
        handle.rope.forget_stale()
    running = [(cache, length, mask)]
    if cache.parts is not None:
        # A sliding window counts a row's padding, where it lies between its tokens, but no kernel does.
        parts = [part for part in cache.parts.running() if not (any(cache.is_sliding) and part.has_gaps)]
        running = [(part.cache, len(part.new), part.token_mask(mask)) for part in parts]
    if text_model.config._attn_implementation == "sdpa":
        for one, new, its_mask in running:
            one.fused_call = plan_fused_call(one.positions, new, its_mask)
    return (), {**kwargs, "position_ids": position_ids, CACHE_NAME: cache}


def warn_of_padding(handle: PatchHandle, input_ids: torch.Tensor, pad_token_id: int | None) -> None:
    """Once a model: the rows of (B, T) tokens without a mask look padded, and the method would take padding for text.

    Some rows, not all, begin or end with a padding token: the model's, or 0, which lm_eval pads with.
    """
    matters = handle.config.Attention_Sink_Aware or any(
        method is not None and method.tokens_per_flush > 1 for method in handle.spec.methods
    )
    if not matters or handle.warned_of_padding:
        return
    outer = input_ids[:, [0, -1]]
    is_padding = (outer == 0) | (outer == (0 if pad_token_id is None else pad_token_id))
    if not bool((is_padding.any(0) & ~is_padding.all(0)).any()):
        return
    handle.warned_of_padding = True
    warnings.warn(
        "a batch without an attention_mask has rows that look padded: padding then counts as text and can take an "
        "attention sink's place. Pass attention_mask; for lm_eval take rotatekv.evals.lm_eval_client.MaskedHFLM",
        stacklevel=2,
    )


@outside_compiled_graphs
def leave_forward(text_model: nn.Module, args: tuple, kwargs: dict, output):
    """Hook of the text model: the call is done; drop the cache from the output where use_cache is False."""
    cache = find_cache(kwargs)
    if isinstance(cache, RotateKVCache):
        cache.end_forward(failed=output is None)
    if uses_cache(text_model, kwargs) or output is None:
        return output
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, RotateKVCache))
    setattr(output, CACHE_NAME, None)
    return output


def uses_cache(text_model: nn.Module, kwargs: dict) -> bool:
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


def check_layers(handle: PatchHandle) -> None:
    """Raises UserError for a model of fewer or more layers than were patched."""
    layers, patched = handle.text_model.config.num_hidden_layers, len(handle.held_spec.methods)
    if min(layers, len(handle.text_model.layers)) != patched:
        raise UserError(
            f"config.num_hidden_layers is {layers}, the model was patched with {patched} layers: set it to {patched} "
            "again"
        )


def prepare_cache(model: nn.Module, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
    """Stands in for ``GenerationMixin._prepare_cache_for_generation``."""
    handle = handle_of(model)
    check_layers(handle)
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
        cache.settle()
        cache._is_user_defined = True  # generate asks for it when a cache is handed in
        # A checkpoint's use_cache=False beside a cache would feed the whole sequence at every step, after itself.
        generation_config.use_cache = True
    elif generation_config.use_cache:
        model_kwargs[CACHE_NAME] = RotateKVCache(handle.spec)


def get_candidate_generator(model: nn.Module, *args, **kwargs):
    """Stands in for ``GenerationMixin._get_candidate_generator``."""
    return prompt_first(type(model)._get_candidate_generator(model, *args, **kwargs))


def refuse_continuous_batching(model: nn.Module, *args, **kwargs) -> None:
    raise UserError("continuous batching brings its own paged cache: a patched model takes generate instead")


GENERATION = {  # of a GenerationMixin, by name
    "_prepare_cache_for_generation": prepare_cache,
    "_get_candidate_generator": get_candidate_generator,
    "generate_batch": refuse_continuous_batching,
    "init_continuous_batching": refuse_continuous_batching,
}
