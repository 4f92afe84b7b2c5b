"""RotateKV+'s statistics of a model: what makes an activation massive, and what noise costs. By forward passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from rotatekv.cache.sinks import largest_magnitude
from rotatekv.config import PRESETS, QuantConfig
from rotatekv.families import attention_modules, find_text_model, layer_geometry
from rotatekv.kernels.transform_coding import GROUP, NOISE, SCALE_BITS
from rotatekv.methods.base import KVMethod, LayerGeometry
from rotatekv.methods.fp16 import FP16
from rotatekv.methods.rotatekv_plus import LEAST_KEY_BITS, LEAST_VALUE_BITS, VALUE_NOISE, RotateKVPlus
from rotatekv.methods.stores import TokenStore
from rotatekv.models import head
from rotatekv.models.head import TOKENS_AT_ONCE, head_logits, run_without_head
from rotatekv.patching.patch import patch_with_methods
from rotatekv.patching.watching import Attended, stream_attention

SINK_SHARE = 1 / 512  # of the tokens, whose largest hidden-state entry lies above the threshold
MEASURED_BITS = 2  # of a layer's keys or values where their cost is measured


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


def in_predictions(
    model: nn.Module,
    windows: Iterable[torch.Tensor],
    statistics: Mapping[str, torch.Tensor],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, torch.Tensor]:
    """``key_cost`` and ``value_cost`` in terms of the predictions, which makes all layers' comparable.

    Maps are calibrated for what noise does to the output of their layer's attention. What that does to the predictions
    is measured: one layer's keys or values at a time take 2 bits a number, everything else is exact. The factor of that
    layer's costs is the Kullback-Leibler divergence from the unquantized model's predictions, over the noise that
    ``NOISE`` foretells. The errors of all layers together may do more than each alone: all keys at once are measured
    too, and all values, and the costs of either grow by as much. 2·L + 2 forward passes a window.

    Args:
        model: not patched. windows: token ids, (1, T) each. statistics: the others of the kind ``plus``, of all layers.
        progress: wraps the numbers of the layers.
    """
    attentions = attention_modules(find_text_model(model))
    geometries = [None if attention is None else layer_geometry(attention) for attention in attentions]
    windows = [(window.to(model.device), list(log_probabilities(model, window))) for window in windows]
    config = replace(PRESETS["RotateKV2+"], bits=float(MEASURED_BITS), residual_bits=16)  # the window has no noise
    methods = [
        None if geometry is None else _Exact(config, geometry, threshold.item())
        for geometry, threshold in zip(geometries, statistics["sink_threshold"], strict=True)
    ]
    kinds: dict[str, type[_KeysAlone | _ValuesAlone]] = {"key_cost": _KeysAlone, "value_cost": _ValuesAlone}
    planned = {
        name: [
            None if geometry is None else _of_layer(statistics, number, geometry, name)
            for number, geometry in enumerate(geometries)
        ]
        for name in kinds
    }
    alone = {
        name: [
            None if geometry is None or of_layer is None else kind(config, geometry, of_layer)
            for geometry, of_layer in zip(geometries, planned[name], strict=True)
        ]
        for name, kind in kinds.items()
    }
    costs = {name: statistics[name].clone() for name in kinds}
    total = dict.fromkeys(kinds, 0.0)
    with patch_with_methods(model, config, methods) as handle:

        def measure(changed: Sequence[KVMethod | None]) -> float:
            handle.held_spec = replace(handle.held_spec, methods=tuple(changed))  # of the caches to come
            return max(divergence(model, windows), 0.0)  # not below, by rounding

        for number in progress([number for number, geometry in enumerate(geometries) if geometry is not None]):
            for name, codecs in alone.items():
                of_layer = planned[name][number]
                assert of_layer is not None
                change = measure([codecs[number] if other == number else x for other, x in enumerate(methods)])
                costs[name][number] *= change / _foretold(of_layer)
                total[name] += change
        return {name: costs[name] * (measure(alone[name]) / total[name] if total[name] else 1.0) for name in kinds}


def compare_foretold(
    model: nn.Module, windows: Iterable[torch.Tensor], statistics: Mapping[str, torch.Tensor]
) -> list[str]:
    """A line for each preset of RotateKV+: its divergence on these windows, as its costs foretell it and as it is."""
    attentions = attention_modules(find_text_model(model))
    geometries = [None if attention is None else layer_geometry(attention) for attention in attentions]
    known = [(window.to(model.device), list(log_probabilities(model, window))) for window in windows]
    tokens = sum(window.shape[1] for window, _ in known)
    lines = [f"divergence from the unquantized model's predictions, nats a token, on {tokens} held-out tokens"]
    for name, config in PRESETS.items():
        if config.method != "rotatekv_plus":
            continue
        planned = RotateKVPlus.plan(config, dict(statistics), geometries)
        methods = [
            None if geometry is None else RotateKVPlus(config, geometry, {key: x[number] for key, x in planned.items()})
            for number, geometry in enumerate(geometries)
        ]
        with patch_with_methods(model, config, methods):
            measured = divergence(model, known)
        lines.append(f"{name:<12}foretold {_foretold(planned):.4f}, measured {measured:.4f}")
    return lines


def _foretold(planned: Mapping[str, torch.Tensor]) -> float:
    """The noise of a plan, of all its layers."""
    key_noise, value_noise = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (NOISE, VALUE_NOISE))
    keys = planned["key_cost"] * key_noise[planned["key_bits"]]
    values = planned["value_cost"] * value_noise[(planned["value_bits"] - LEAST_VALUE_BITS).clamp_min(0)]
    return (keys.sum() + values.sum()).item()


def _of_layer(
    statistics: Mapping[str, torch.Tensor], number: int, geometry: LayerGeometry, measured: str
) -> dict[str, torch.Tensor]:
    """One layer's statistics, with the bits of a plan that gives the measured ones 2 bits a number; the others cost
    nothing."""
    one = {name: rows[number : number + 1] for name, rows in statistics.items()}
    other = "value_cost" if measured == "key_cost" else "key_cost"
    least_of_keys = LEAST_KEY_BITS * GROUP / geometry.head_dim
    codes = MEASURED_BITS + (LEAST_VALUE_BITS if measured == "key_cost" else least_of_keys)  # a key and a value number
    budget = codes / 2 + SCALE_BITS / geometry.head_dim
    planned = RotateKVPlus.plan(
        replace(PRESETS["RotateKV2+"], bits=budget), {**one, other: torch.zeros_like(one[other])}, [geometry]
    )
    return {name: rows[0] for name, rows in planned.items()}


def divergence(model: nn.Module, windows: Iterable[tuple[torch.Tensor, list[torch.Tensor]]]) -> float:
    """Of a model's predictions from the known ones of windows, nats a token."""
    total, tokens = 0.0, 0
    for window, wanted in windows:
        for want, logits in zip(wanted, _logits(model, window), strict=True):
            total += head.divergence(want, logits)
            tokens += len(want)
    return total / tokens


def log_probabilities(model: nn.Module, window: torch.Tensor) -> Iterator[torch.Tensor]:
    """(≤ 512, V) float32, one part of the window after another."""
    return (logits.float().log_softmax(-1) for logits in _logits(model, window))


@torch.no_grad()
def _logits(model: nn.Module, window: torch.Tensor) -> Iterator[torch.Tensor]:
    output = run_without_head(model, input_ids=window.to(model.device), use_cache=False)
    for hidden in output.last_hidden_state.split(TOKENS_AT_ONCE, dim=1):
        yield head_logits(model, output, hidden)[0]


class _Exact(KVMethod):
    """Keys and values as they are, in the cache of a quantizing config."""

    flags, sink_selections = RotateKVPlus.flags, RotateKVPlus.sink_selections

    def __init__(self, config: QuantConfig, geometry: LayerGeometry, sink_threshold: float):
        super().__init__(config, geometry)
        self.sink_threshold = sink_threshold

    encode_keys, decode_keys = FP16.encode_keys, FP16.decode_keys
    encode_values, decode_values = FP16.encode_values, FP16.decode_values


class _KeysAlone(RotateKVPlus):
    """RotateKV+ with values as they are."""

    values_in, values_out, value_store = KVMethod.values_in, KVMethod.values_out, lambda self: TokenStore()
    encode_values, decode_values = FP16.encode_values, FP16.decode_values


class _ValuesAlone(RotateKVPlus):
    """RotateKV+ with keys as they are."""

    keys_in, keys_out, key_store = KVMethod.keys_in, KVMethod.keys_out, lambda self: TokenStore()
    encode_keys, decode_keys = FP16.encode_keys, FP16.decode_keys
