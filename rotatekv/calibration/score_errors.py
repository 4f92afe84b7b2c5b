"""How far each preset's quantized keys move a model's attention scores on a text, by forward passes of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.families import find_text_model
from rotatekv.methods import KVMethod, method_class
from rotatekv.methods.fp16 import FP16
from rotatekv.patching.patch import build_methods
from rotatekv.patching.watching import Attended, stream_attention
from rotatekv.statistics import has_statistics

LARGE_ERROR = 0.5  # of a layer's scores: the noise is then half of what they say about a token
CHECKED_WINDOWS, CHECKED_TOKENS = 2, 512
_QUERY_STEP = 8  # every eighth query is asked
_WORST = 3  # layers named


def score_errors(
    model: nn.Module, windows: Iterable[torch.Tensor], codecs: Mapping[str, Sequence[KVMethod]]
) -> dict[str, torch.Tensor]:
    """Relative error of the scores q·k (after RoPE, before softmax), per layer, of every method.

    ``|q·(k̂ − k)| / |q·(k − μ)|``, both root mean squares over heads and pairs of a query and a token it sees. μ is
    the mean of the keys before RoPE: what all tokens have in common says nothing about any of them, but it is what a
    large bias of ``k_proj`` adds, and per-token rounding loses the rest beside it.

    Args:
        model: not patched. windows: token ids, (1, T) each.
        codecs: method name → its codec per layer.

    Returns:
        method name → (num_hidden_layers,) float64; 0 for a layer without attention.
    """
    text_model = find_text_model(model)
    shape = len(text_model.layers)
    total = {name: torch.zeros(shape, dtype=torch.float64, device="cpu") for name in ("", *codecs)}

    def take(attended: Attended) -> None:
        key, number = attended.key, attended.layer
        query = attended.query[0, :, ::_QUERY_STEP].float().unflatten(0, (key.shape[1], -1))  # (H_kv, H / H_kv, T_q, D)
        seen = attended.sees[::_QUERY_STEP]  # (T_q, T)

        def add(name: str, keys: torch.Tensor) -> None:
            scores = (query @ keys[0].float().unsqueeze(1).transpose(2, 3)) * seen  # (H_kv, H / H_kv, T_q, T)
            total[name][number] += scores.square().sum().double().cpu()

        before = attended.before_rope(key)
        add("", attended.after_rope(before - before.mean(2, keepdim=True)))
        for name, of_layers in codecs.items():
            add(name, attended.stored(of_layers[number])[0] - key)

    stream_attention(model, text_model, windows, take)
    smallest = torch.finfo(torch.float64).tiny
    return {name: (total[name] / total[""].clamp_min(smallest)).sqrt() for name in codecs}


def presets_for(
    model: nn.Module, made: str | None = None, path: str | Path | None = None
) -> tuple[dict[str, tuple], dict[str, str]]:
    """The codecs of every quantizing preset that this model can take, by name, and why the others cannot.

    Args:
        made, path: a kind of statistics (``calibration.KINDS``) and its file; other kinds are looked up by the model.
    """
    text_model = find_text_model(model)
    codecs: dict[str, tuple] = {}
    others: dict[str, str] = {}
    for name, config in PRESETS.items():
        kind = method_class(config).statistics_kind(config)
        if method_class(config) is FP16:
            continue
        if kind not in (None, made) and not has_statistics(kind, model.name_or_path):
            others[name] = f"no statistics of the kind {kind}"
            continue
        try:
            codecs[name] = build_methods(model, text_model, config, path if kind == made else None)
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
        lines.append(f"{name:<12}{of_layers[of_layers != 0].median():>8.2f}  {named}")
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
