"""What the figures need of one full-precision forward: keys, massive activations, attention maps, quantization errors.

``capture_window`` runs an unpatched model on one window and keeps only what was asked for, per kind and layer;
``capture_files.py`` writes and reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rotatekv.attention import project_qkv, rope_function
from rotatekv.cache_layer import RotateKVLayer, rope_from
from rotatekv.config import PRESETS
from rotatekv.families import layer_geometry
from rotatekv.methods import KVMethod
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.sinks import detect_sinks, give_sinks
from rotatekv.transforms import heads_to_channels

KINDS = (
    "k_pre_rope",
    "k_post_rope",
    "k_rotated",
    "massive_activations",
    "attention_scores",
    "quantization_error",
)
TOP_ENTRIES = PRESETS["RotateKV2"].num_sink_entries
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
    codecs: dict[str, Sequence[KVMethod]] = field(default_factory=dict)


def capture_window(text_model: nn.Module, window: torch.Tensor, request: CaptureRequest) -> dict[str, Tensors]:
    """One forward of an unpatched model with hooks; they are gone when it returns.

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
    hooks = []
    for layer in text_model.layers:
        keep = _Keeper(layer, request, captured)
        if keep.kinds:
            hooks.append(layer.register_forward_pre_hook(keep.layer_input, with_kwargs=True))
            hooks.append(layer.self_attn.register_forward_pre_hook(keep.attention_input, with_kwargs=True))
    try:
        with torch.no_grad():
            text_model(input_ids=window.to(text_model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return captured


class _Keeper:
    """The hooks of one decoder layer."""

    def __init__(self, layer: nn.Module, request: CaptureRequest, captured: dict[str, Tensors]):
        self.request, self.captured = request, captured
        self.number = layer.self_attn.layer_idx
        few = self.number in request.activation_layers
        many = self.number in request.layers
        light = ("massive_activations", "quantization_error")
        self.kinds = [kind for kind in request.kinds if (few if kind in light else many)]
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None

    def layer_input(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]  # (1, T, hidden_size)
        self.sinks = detect_sinks(hidden_states, TOP_ENTRIES)
        if "massive_activations" in self.kinds:
            found = top_activations(hidden_states[0])
            self._store("massive_activations", **found, sinks=self.sinks[1])

    def attention_input(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        if not set(self.kinds) - {"massive_activations"}:
            return
        hidden_states = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        rope = rope_function(attention)
        query, key, value = project_qkv(attention, hidden_states)  # (1, H, T, D), (1, H_kv, T, D) twice
        roped = rope(key, cos, sin)
        if "k_pre_rope" in self.kinds:
            self._store("k_pre_rope", keys=key[0])
        if "k_post_rope" in self.kinds:
            self._store("k_post_rope", keys=roped[0])
        if "k_rotated" in self.kinds:
            self._store("k_rotated", **_rotated(self.request.rotation[self.number], key))
        if "attention_scores" in self.kinds:
            heads = torch.tensor(self.request.heads, dtype=torch.int64, device=query.device)
            groups = heads // (query.shape[1] // key.shape[1])
            query = rope(query, cos, sin)[0, heads]
            scores = attention_scores(query, roped[0, groups], attention.scaling)
            self._store("attention_scores", scores=scores, sinks=self.sinks[1])
        for name, codecs in self.request.codecs.items() if "quantization_error" in self.kinds else ():
            layer = RotateKVLayer(codecs[self.number])
            config = layer.method.config
            if config.Attention_Sink_Aware:
                if config.sink_selection == "detected":
                    layer.set_sinks(*self.sinks)
                else:
                    give_sinks(layer, hidden_states)
            stored = layer.update(key, value, rope_from(rope, cos, sin))[:2]
            errors = [relative_error(seen, exact) for seen, exact in zip(stored, (roped, value), strict=True)]
            self._store("quantization_error", **{f"{name}.keys": errors[0], f"{name}.values": errors[1]})

    def _store(self, kind: str, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.captured[kind][f"layers.{self.number}.{name}"] = tensor.detach().cpu().contiguous().clone()


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


def attention_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal softmax weights of (heads, T, D) queries and keys after RoPE → (heads, T, T) float16."""
    heads, length, _ = query.shape
    scores = torch.zeros(heads, length, length, dtype=torch.float16, device="cpu")
    for start in range(0, length, _QUERY_CHUNK):
        rows = query[:, start : start + _QUERY_CHUNK].float()
        products = rows @ key[:, : start + rows.shape[1]].float().transpose(1, 2) * scaling
        future = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device).triu(start + 1)
        weights = products.masked_fill(future, -torch.inf).softmax(dim=-1)
        scores[:, start : start + rows.shape[1], : weights.shape[-1]] = weights.half().cpu()
    return scores


def relative_error(stored: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|x̂ − x| / |x| per token over heads and channels; (1, H_kv, T, D) each → (T,) float32."""
    difference = (stored.float() - exact.float()).transpose(1, 2)[0].flatten(1)  # (T, H_kv·D)
    norm = exact.float().transpose(1, 2)[0].flatten(1).norm(dim=1)
    return difference.norm(dim=1) / norm.clamp_min(torch.finfo(torch.float32).tiny)


def capture_bytes(text_model: nn.Module, tokens: int, request: CaptureRequest) -> dict[str, int]:
    """Bytes each kind will take, before anything runs."""
    geometry = layer_geometry(text_model.layers[0].self_attn)
    width = {"k_pre_rope": text_model.dtype.itemsize, "k_post_rope": text_model.dtype.itemsize, "k_rotated": 4}
    sizes: dict[str, Callable[[], int]] = {
        "massive_activations": lambda: len(request.activation_layers) * (4 * tokens + 16 * TOP_ENTRIES),
        "attention_scores": lambda: len(request.layers) * len(request.heads) * tokens * tokens * 2,
        "quantization_error": lambda: len(request.activation_layers) * len(request.codecs) * tokens * 8,
    }
    for kind, itemsize in width.items():
        stages = 2 if kind == "k_rotated" and request.rotation and request.rotation[0].order is not None else 1
        sizes[kind] = lambda n=itemsize * stages: len(request.layers) * tokens * geometry.channels * n
    return {kind: sizes[kind]() for kind in request.kinds}


def _rotated(codec: RotateKV, key: torch.Tensor) -> Tensors:
    channels = heads_to_channels(key)[0].float()  # (T, H_kv·D)
    stages = {"rotated": codec.rotate_key_channels(channels)}
    if codec.order is not None:
        stages["reordered"] = codec.transform_key_channels(channels)
    return stages
