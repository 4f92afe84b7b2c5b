"""RotateKV+'s statistics of a model: key means and factors, and which layers need one more bit. By forward passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rotatekv.cache.sinks import largest_magnitude
from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.families import attention_modules, find_text_model, layer_geometry
from rotatekv.kernels.hadamard import heads_to_channels, rotate_channels
from rotatekv.methods.base import KVMethod, LayerGeometry
from rotatekv.methods.fp16 import FP16
from rotatekv.methods.rotatekv_plus import RotateKVPlus
from rotatekv.methods.stores import TokenStore
from rotatekv.models.head import TOKENS_AT_ONCE, head_logits, run_without_head
from rotatekv.patching.patch import first_geometry, patch_with_methods
from rotatekv.patching.watching import Attended, stream_attention

SINK_SHARE = 1 / 512  # of the tokens, whose largest hidden-state entry lies above the threshold
FIRST_TOKENS = 16  # of a window, that do not count: the sinks among them are kept in 16 bits and are unlike the rest
_SMALLEST = 1e-8


@dataclass
class _Moments:
    """Sums over tokens of one layer: keys and their squares (C,), squared queries (C,), and how many."""

    keys: torch.Tensor
    squares: torch.Tensor
    queries: torch.Tensor
    tokens: int = 0

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """(B, H, T, D) and (B, H_kv, T, D), both before RoPE."""
        keys = heads_to_channels(key)[:, FIRST_TOKENS:].double().flatten(0, 1)  # (B·T, C)
        groups = query[:, :, FIRST_TOKENS:].unflatten(1, (key.shape[1], -1)).double()  # (B, H_kv, H / H_kv, T, D)
        self.keys += keys.sum(0)
        self.squares += keys.square().sum(0)
        self.queries += groups.square().sum(dim=(0, 2, 3)).flatten()
        self.tokens += len(keys)


def collect_key_factors(
    model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each pre-RoPE key channel, and its factor (E q² / Var k)^¼, of geometric mean 1 in a layer.

    E q² is the mean square of the pre-RoPE queries that meet the channel, summed over the heads that share it.

    Args:
        model: not patched. windows: token ids, (1, T) each; the first 16 of each do not count.

    Returns:
        mean, scale: (num_hidden_layers, H_kv·D) float32; 0 and 1 for a layer without attention.
    """
    zeros = torch.zeros(first_geometry(text_model).channels, dtype=torch.float64, device="cpu")
    sums = [_Moments(*(zeros.clone() for _ in range(3))) for _ in text_model.layers]

    def take(attended: Attended) -> None:
        query, key = (attended.before_rope(x).cpu() for x in (attended.query, attended.key))
        sums[attended.layer].add(query, key)

    stream_attention(model, text_model, windows, take)
    if not any(moments.tokens for moments in sums):
        raise UserError(f"the calibration text has no window of more than {FIRST_TOKENS} tokens")
    means, scales = zip(*(_factors(moments) for moments in sums), strict=True)
    return torch.stack(means).float(), torch.stack(scales).float()


def order_channels(
    model: nn.Module,
    text_model: nn.Module,
    windows: Iterable[torch.Tensor],
    key_mean: torch.Tensor,
    key_scale: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """argsort of the variances of the rotated, centred and balanced key channels (ties in channel order).

    Args:
        key_mean, key_scale: of ``collect_key_factors``. width: channels per rotation group, G·D.

    Returns:
        (num_hidden_layers, H_kv·D) int64; in channel order for a layer without attention.
    """
    squares = torch.zeros(key_mean.shape, dtype=torch.float64, device="cpu")

    def add(attended: Attended) -> None:
        keys, number = heads_to_channels(attended.before_rope(attended.key)), attended.layer  # (1, T, H_kv·D)
        centred = (keys[:, FIRST_TOKENS:].double().cpu() - key_mean[number]) * key_scale[number]
        squares[number] += rotate_channels(centred, width).square().sum(dim=(0, 1))

    stream_attention(model, text_model, windows, add)
    return squares.argsort(dim=-1, stable=True)


def collect_sink_thresholds(model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor]) -> torch.Tensor:
    """What the largest hidden-state entry of one token in 512 exceeds, per layer.

    Args:
        model: not patched. windows: token ids, (1, T) each.

    Returns:
        (num_hidden_layers, 1) float32; 0 for a layer without attention.
    """
    found: dict[int, list[torch.Tensor]] = defaultdict(list)

    def take(attended: Attended) -> None:
        found[attended.layer].append(largest_magnitude(attended.hidden_states).flatten().float().cpu())

    stream_attention(model, text_model, windows, take)
    thresholds = torch.zeros(len(text_model.layers), 1, dtype=torch.float32, device="cpu")
    for number, parts in found.items():
        magnitudes = torch.cat(parts)  # (tokens,)
        count = max(round(len(magnitudes) * SINK_SHARE), 1)
        thresholds[number] = magnitudes.topk(min(count + 1, len(magnitudes))).values[-1]
    return thresholds


def _factors(moments: _Moments) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = max(moments.tokens, 1)
    mean = moments.keys / tokens
    variance = (moments.squares / tokens - mean**2).clamp_min(_SMALLEST)
    log_scale = ((moments.queries / tokens).clamp_min(_SMALLEST) / variance).log() / 4
    return mean, (log_scale - log_scale.mean()).exp()


def rank_sensitivity(
    model: nn.Module,
    windows: Iterable[torch.Tensor],
    statistics: Mapping[str, torch.Tensor],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> torch.Tensor:
    """Which layers' keys and values it costs most to quantize: one at a time, everything else exact.

    The cost is the Kullback-Leibler divergence of the predictions from the unquantized model's, by the RotateKV2+
    preset: 2·L forward passes a window.

    Args:
        model: not patched. windows: token ids, (1, T) each. statistics: the others of the kind ``plus``, of all layers.
        progress: wraps the numbers of the layers.

    Returns:
        (num_hidden_layers, 2) float32, keys and values: (place + ½) / (2·L), place 0 is the most sensitive of all.
        L counts layers with attention; the others come last, above 1.
    """
    attentions = attention_modules(find_text_model(model))
    windows = [(window.to(model.device), list(_log_probabilities(model, window))) for window in windows]
    config = replace(PRESETS["RotateKV2+"], extra_bit_share=0.0)
    exact = [
        None if attention is None else _Exact(config, layer_geometry(attention), threshold.item())
        for attention, threshold in zip(attentions, statistics["sink_threshold"], strict=True)
    ]
    costs = torch.full((len(attentions), 2), -torch.inf, dtype=torch.float64, device="cpu")
    measured = [number for number, codec in enumerate(exact) if codec is not None]
    with patch_with_methods(model, config, exact) as handle:
        for number in progress(measured):
            of_layer = {name: rows[number] for name, rows in statistics.items()} | {"extra_bit_rank": costs.new_ones(2)}
            for column, codec in enumerate((_KeysAlone, _ValuesAlone)):
                methods: list[KVMethod | None] = list(exact)
                methods[number] = codec(config, layer_geometry(attentions[number]), of_layer)
                handle.held_spec = replace(handle.held_spec, methods=tuple(methods))  # of the caches to come
                costs[number, column] = sum(
                    (want.exp() * (want - got)).sum().item()
                    for window, wanted in windows
                    for want, got in zip(wanted, _log_probabilities(model, window), strict=True)
                )
    places = costs.flatten().argsort(descending=True, stable=True).argsort().float()
    return ((places + 0.5) / (2 * len(measured))).view_as(costs)


@torch.no_grad()
def _log_probabilities(model: nn.Module, window: torch.Tensor) -> Iterator[torch.Tensor]:
    """(≤ 512, V) float32, one part of the window after another."""
    output = run_without_head(model, input_ids=window.to(model.device), use_cache=False)
    for hidden in output.last_hidden_state.split(TOKENS_AT_ONCE, dim=1):
        yield torch.log_softmax(head_logits(model, output, hidden)[0].float(), -1)


class _Exact(KVMethod):
    """Keys and values as they are, in the cache of a quantizing config."""

    flags, sink_selections = RotateKVPlus.flags, RotateKVPlus.sink_selections

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, sink_threshold: float):
        super().__init__(config, geometry)
        self.sink_threshold = sink_threshold

    encode_keys, decode_keys = FP16.encode_keys, FP16.decode_keys
    encode_values, decode_values = FP16.encode_values, FP16.decode_values


class _KeysAlone(RotateKVPlus):
    """RotateKV+ with values as they are (rotated, which loses nothing)."""

    value_format, value_store = None, TokenStore
    encode_values, decode_values = FP16.encode_values, FP16.decode_values


class _ValuesAlone(RotateKVPlus):
    """RotateKV+ with keys as they are (transformed, which loses nothing)."""

    key_format, key_store = None, TokenStore
    encode_keys, decode_keys = FP16.encode_keys, FP16.decode_keys
