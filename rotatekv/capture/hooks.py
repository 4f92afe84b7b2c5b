"""What the figures need of one full-precision forward: keys, massive activations, attention maps, quantization errors.

``capture_window`` runs an unpatched model on one window and keeps only what was asked for, per kind and layer;
``capture/files.py`` writes and reads the files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rotatekv.cache.sinks import detect_sinks
from rotatekv.config import PRESETS
from rotatekv.kernels.hadamard import heads_to_channels
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.patching.patch import first_geometry
from rotatekv.patching.watching import Attended, stream_attention

KINDS = ("k_pre_rope", "k_post_rope", "k_rotated", "massive_activations", "attention_scores", "quantization_error")
TOP_ENTRIES = PRESETS["RotateKV2"].num_sink_entries
_LIGHT = ("massive_activations", "quantization_error")  # a few numbers a token
_QUERY_CHUNK = 512  # query rows whose float32 scores are held at once

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CaptureRequest:
    """What to keep of one window.

    Args:
        kinds: of ``KINDS``.
        layers: layer numbers for the kinds that are per layer.
        activation_layers: layer numbers for ``massive_activations`` and ``quantization_error``, a few numbers a token.
        heads: query heads whose attention maps are kept.
        rotation: per layer, the RotateKV codec whose rotation and order ``k_rotated`` shows.
        codecs: method name → its codec per layer, for ``quantization_error``.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    activation_layers: tuple[int, ...]
    heads: tuple[int, ...]
    rotation: Sequence[RotateKV] = ()
    codecs: dict[str, tuple] = field(default_factory=dict)

    def layers_of(self, kind: str) -> tuple[int, ...]:
        return self.activation_layers if kind in _LIGHT else self.layers


def capture_window(text_model: nn.Module, window: torch.Tensor, request: CaptureRequest) -> dict[str, Tensors]:
    """One forward of an unpatched model, which is then as it was.

    Args:
        text_model: what ``find_text_model`` found.
        window: (1, T) token ids.

    Returns:
        per kind, tensors named ``layers.<number>.<what>`` on the CPU:
            k_pre_rope, k_post_rope: ``keys`` (H_kv, T, D), in the model's dtype.
            k_rotated: ``rotated`` and, where the method reorders, ``reordered``, (T, H_kv·D) float32, before RoPE.
            massive_activations: ``token_maximum`` (T,), the largest magnitude of each token's layer input; its
                ``TOP_ENTRIES`` largest entries as ``top_values``, ``top_tokens`` and ``top_channels``; the layer's
                ``median`` magnitude (1,); ``sinks`` (S,), the tokens that RotateKV keeps unquantized.
            attention_scores: ``scores`` (heads, T, T) float16, softmax weights, and ``sinks`` (S,).
            quantization_error: ``<method>.keys`` and ``<method>.values``, (T,) float32, |x̂ − x| / |x| per token
                over all heads, of the keys after RoPE and the values as attention sees them.
    """
    captured: dict[str, Tensors] = {kind: {} for kind in request.kinds}

    def keep(attended: Attended) -> None:
        for kind, found in _found(attended, request):
            for name, tensor in found.items():
                captured[kind][f"layers.{attended.layer}.{name}"] = tensor.detach().cpu().contiguous().clone()

    stream_attention(text_model, text_model, [window], keep)
    return captured


def _found(attended: Attended, request: CaptureRequest) -> Iterator[tuple[str, Tensors]]:
    """(kind, its tensors) of one layer."""
    kinds = [kind for kind in request.kinds if attended.layer in request.layers_of(kind)]
    if not kinds:
        return
    key, value, sinks = attended.key, attended.value, detect_sinks(attended.hidden_states, TOP_ENTRIES)[1]
    if "massive_activations" in kinds:
        yield "massive_activations", top_activations(attended.hidden_states[0]) | {"sinks": sinks}
    if "k_pre_rope" in kinds:
        yield "k_pre_rope", {"keys": attended.before_rope(key)[0].to(key.dtype)}
    if "k_post_rope" in kinds:
        yield "k_post_rope", {"keys": key[0]}
    if "k_rotated" in kinds:
        yield "k_rotated", _rotated(request.rotation[attended.layer], attended.before_rope(key))
    if "attention_scores" in kinds:
        yield "attention_scores", {"scores": attention_scores(attended, request.heads), "sinks": sinks}
    for name, codecs in request.codecs.items() if "quantization_error" in kinds else ():
        stored = attended.stored(codecs[attended.layer])
        errors = [relative_error(seen, exact) for seen, exact in zip(stored, (key, value), strict=True)]
        yield "quantization_error", {f"{name}.keys": errors[0], f"{name}.values": errors[1]}


def top_activations(hidden_states: torch.Tensor) -> Tensors:
    """The largest magnitudes of (T, hidden_size) hidden states; see ``capture_window``."""
    magnitudes = hidden_states.abs().float()
    flat = magnitudes.flatten()
    top = flat.topk(min(TOP_ENTRIES, flat.numel()))
    width = magnitudes.shape[1]
    return {
        "token_maximum": magnitudes.amax(dim=1),
        "median": flat.median().reshape(1),
        "top_values": top.values,
        "top_tokens": (top.indices // width).int(),
        "top_channels": (top.indices % width).int(),
    }


def attention_scores(attended: Attended, heads: Sequence[int]) -> torch.Tensor:
    """Softmax weights of some query heads, by the family's own eager attention in float32 → (heads, T, T) float16."""
    attend = sys.modules[type(attended.module).__module__].eager_attention_forward
    query, key, value = (x.float() for x in (attended.query, attended.key, attended.value))
    hidden = torch.zeros(attended.sees.shape, dtype=torch.float32, device=key.device)
    hidden = hidden.masked_fill(~attended.sees, -torch.inf)[None, None]  # (1, 1, T, T)
    scores = torch.zeros(len(heads), *attended.sees.shape, dtype=torch.float16, device="cpu")
    for start in range(0, query.shape[2], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        chunk = query[:, :, rows], key, value, hidden[:, :, rows]
        weights = attend(attended.module, *chunk, **attended.options)[1]  # (1, H, rows, T)
        scores[:, rows] = weights[0, list(heads)].half().cpu()
    return scores


def relative_error(stored: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|x̂ − x| / |x| per token over heads and channels; (1, H_kv, T, D) each → (T,) float32."""
    difference = (stored.float() - exact.float()).transpose(1, 2)[0].flatten(1)  # (T, H_kv·D)
    norm = exact.float().transpose(1, 2)[0].flatten(1).norm(dim=1)
    return difference.norm(dim=1) / norm.clamp_min(torch.finfo(torch.float32).tiny)


def capture_bytes(text_model: nn.Module, tokens: int, request: CaptureRequest) -> dict[str, int]:
    """Bytes each kind will take, before anything runs."""
    keys = tokens * first_geometry(text_model).channels
    stages = 2 if request.rotation and request.rotation[0].order is not None else 1
    of_layer = {
        "k_pre_rope": keys * text_model.dtype.itemsize,
        "k_post_rope": keys * text_model.dtype.itemsize,
        "k_rotated": keys * 4 * stages,
        "massive_activations": 4 * tokens + 16 * TOP_ENTRIES,
        "attention_scores": len(request.heads) * tokens * tokens * 2,
        "quantization_error": len(request.codecs) * tokens * 8,
    }
    return {kind: len(request.layers_of(kind)) * of_layer[kind] for kind in request.kinds}


def _rotated(codec: RotateKV, key: torch.Tensor) -> Tensors:
    channels = heads_to_channels(key)[0].float()  # (T, H_kv·D)
    stages = {"rotated": codec.rotate_key_channels(channels)}
    if codec.order is not None:
        stages["reordered"] = stages["rotated"][:, codec.order.to(channels.device)]
    return stages
