"""How far each preset's quantized keys move a model's attention scores on a text, by forward passes of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from rotatekv.attention import project_qkv, rope_function
from rotatekv.cache_layer import RotateKVLayer, rope_from
from rotatekv.calibration import has_statistics
from rotatekv.calibration_reorder import stream_modules
from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.families import find_text_model
from rotatekv.methods import KVMethod, method_class
from rotatekv.patch import build_methods
from rotatekv.sinks import give_sinks

LARGE_ERROR = 0.5  # of a layer's scores: the noise is then half of what they say about a token
CHECKED_WINDOWS, CHECKED_TOKENS = 2, 512
_QUERY_STEP = 8  # every eighth query is asked
_WORST = 3  # layers named


def score_errors(
    model: nn.Module, windows: Iterable[torch.Tensor], codecs: Mapping[str, Sequence[KVMethod]]
) -> dict[str, torch.Tensor]:
    """Relative error of the scores q·k (after RoPE, before softmax), per layer, of every method.

    ``|q·(k̂ − k)| / |q·(k − μ)|``, both root mean squares over heads and pairs of a query and a token before it. μ is
    the mean of the keys before RoPE: what all tokens have in common says nothing about any of them, but it is what a
    large bias of ``k_proj`` adds, and per-token rounding loses the rest beside it.

    Args:
        model: not patched. windows: token ids, (1, T) each.
        codecs: method name → its codec per layer, nothing of it folded.

    Returns:
        method name → (num_hidden_layers,) float64.
    """
    text_model = find_text_model(model)
    layers = list(text_model.layers)
    total = {name: torch.zeros(len(layers), dtype=torch.float64, device="cpu") for name in ("", *codecs)}
    inputs: dict[int, torch.Tensor] = {}

    def take(module: nn.Module, x: torch.Tensor) -> None:
        if hasattr(module, "self_attn"):
            inputs[module.self_attn.layer_idx] = x
            return
        number = module.layer_idx
        query, key, value = project_qkv(module, x)  # (1, H, T, D), (1, H_kv, T, D) twice
        positions = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
        cos, sin = text_model.rotary_emb(x, position_ids=positions.unsqueeze(0))
        rope = rope_function(module)
        asked = positions[::_QUERY_STEP]
        query = rope(query, cos, sin)[0, :, asked].float().unflatten(0, (key.shape[1], -1))  # (H_kv, H / H_kv, T_q, D)
        seen = positions <= asked[:, None]  # (T_q, T)

        def add(name: str, keys: torch.Tensor) -> None:
            scores = (query @ keys[0].float().unsqueeze(1).transpose(2, 3)) * seen  # (H_kv, H / H_kv, T_q, T)
            total[name][number] += scores.square().sum().double().cpu()

        add("", rope(key - key.mean(2, keepdim=True), cos, sin))
        exact, hidden_states = rope(key, cos, sin), inputs.pop(number)
        for name, of_layers in codecs.items():
            layer = RotateKVLayer(of_layers[number])
            if layer.method.config.Attention_Sink_Aware:
                give_sinks(layer, hidden_states)
            add(name, layer.update(key, value, rope_from(rope, cos, sin))[0] - exact)

    modules = [module for layer in layers for module in (layer, layer.self_attn)]
    stream_modules(model, text_model, windows, modules, take)
    smallest = torch.finfo(torch.float64).tiny
    return {name: (total[name] / total[""].clamp_min(smallest)).sqrt() for name in codecs}


def presets_for(
    model: nn.Module, made: str | None = None, path: str | Path | None = None
) -> tuple[dict[str, Sequence[KVMethod]], dict[str, str]]:
    """The codecs of every quantizing preset that this model can take, by name, and why the others cannot.

    Args:
        made, path: a kind of statistics (``calibration.KINDS``) and its file; other kinds are looked up by the model.
    """
    codecs, others, text_model = {}, {}, find_text_model(model)
    for name, config in PRESETS.items():
        kind = method_class(config).statistics_kind(config)
        if not method_class(config).quantizes:
            continue
        if kind not in (None, made) and not has_statistics(kind, model.name_or_path):
            others[name] = f"no statistics of the kind {kind}"
            continue
        try:
            codecs[name] = build_methods(model, text_model, config, path if kind == made else None, fold=False)
        except UserError as error:
            others[name] = str(error)
    return codecs, others


def describe(errors: Mapping[str, torch.Tensor]) -> list[str]:
    """A table, and one line more for the methods with a layer above ``LARGE_ERROR``."""
    lines = ["relative error of the attention scores, on this text", f"{'method':<12}{'median':>8}  worst layers"]
    for name, of_layers in errors.items():
        worst = of_layers.topk(min(_WORST, len(of_layers)))
        pairs = zip(worst.indices.tolist(), worst.values.tolist(), strict=True)
        named = ", ".join(f"{number}: {error:.2f}" for number, error in pairs)
        lines.append(f"{name:<12}{of_layers.median():>8.2f}  {named}")
    if large := [name for name, of_layers in errors.items() if not (of_layers <= LARGE_ERROR).all()]:
        lines.append(
            f"warning: {', '.join(large)}: in some layers the error is above {LARGE_ERROR:.0%} of what the scores say "
            "about a token: take another method, or measure what it costs (PPL_evaluation.py)"
        )
    return lines


def check_presets(model: nn.Module, windows: Sequence[torch.Tensor], made: str, path: Path) -> list[str]:
    """``describe`` the presets on the first tokens of a few windows of the calibration text."""
    few = [window[:, :CHECKED_TOKENS] for window in windows[:CHECKED_WINDOWS] if window.shape[1] > 1]
    if not few:
        return ["the presets are not checked: the text has no window of two tokens"]
    codecs, others = presets_for(model, made, path)
    return describe(score_errors(model, few, codecs)) + [f"not checked: {x} ({why})" for x, why in others.items()]
