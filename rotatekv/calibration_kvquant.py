"""KVQuant's statistics (arXiv 2401.18079) of a model: key ranges and Fisher-weighted levels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rotatekv.calibration_reorder import stream_keys
from rotatekv.config import SUPPORTED_BITS
from rotatekv.errors import UserError
from rotatekv.methods.kvquant import OUTLIER_SHARE, outliers_per_token
from rotatekv.nonuniform import LevelHistogram, split_values

_SMALLEST_SCALE = 1e-6  # of a channel that never changes


class _Tails:
    """The smallest and largest numbers of each channel, enough of them for two exact percentiles.

    Args:
        tokens: how many will come. share: of the numbers, that lies outside both percentiles together.
    """

    def __init__(self, tokens: int, share: float):
        position = share / 2 * (tokens - 1)
        self.rank, self.between = int(position), position - int(position)
        self.low = self.high = None  # (rank + 2 at most, C), ascending and descending

    def add(self, x: torch.Tensor) -> None:
        """Count (T, C) numbers."""
        low, high = (x, x) if self.low is None else (torch.cat([self.low, x]), torch.cat([self.high, x]))
        keep = min(self.rank + 2, len(low))
        self.low = low.topk(keep, dim=0, largest=False).values
        self.high = high.topk(keep, dim=0).values

    def percentiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C,) float32 each, with linear interpolation."""
        upper = min(self.rank + 1, len(self.low) - 1)
        low, high = (x[self.rank].lerp(x[upper], self.between) for x in (self.low, self.high))
        return low, high


def collect_key_ranges(
    model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor], tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half-width of each pre-RoPE key channel's range without its 1 % outliers, half on either side.

    The first token of a window, which stays in 16 bits, does not count.

    Args:
        model: not patched.
        windows: token ids, (1, T) each, T ≥ 2.
        tokens: how many the windows hold, without their first.

    Returns:
        offset, scale: (num_hidden_layers, H_kv·D) float32.
    """
    if tokens < 1:
        raise UserError("the calibration text has no window of at least 2 tokens")
    tails = [_Tails(tokens, OUTLIER_SHARE) for _ in text_model.layers]
    stream_keys(model, text_model, windows, lambda number, keys: tails[number].add(keys[:, 1:].flatten(0, 1).float()))
    low, high = (torch.stack(x).cpu() for x in zip(*(tail.percentiles() for tail in tails), strict=True))
    return (high + low) / 2, ((high - low) / 2).clamp_min(_SMALLEST_SCALE)


def collect_levels(
    model: nn.Module,
    text_model: nn.Module,
    windows: Iterable[torch.Tensor],
    key_offset: torch.Tensor,
    key_scale: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Levels per layer for keys and values in their normalised range, weighted by their Fisher information.

    One backward pass per window; memory does not grow with their number.

    Args:
        model: not patched. windows: as for ``collect_key_ranges``. key_offset, key_scale: what that gave.

    Returns:
        ``key_levels<bits>`` and ``value_levels<bits>``, (num_hidden_layers, 2^bits) float32 in [-1, 1], ascending.
    """
    layers = len(text_model.layers)
    histograms = {kind: [LevelHistogram() for _ in range(layers)] for kind in ("key", "value")}
    outliers = outliers_per_token(key_offset.shape[1])
    for window in windows:
        for number, (keys, values) in enumerate(_with_gradients(model, text_model, window)):
            offset, scale = (x[number].to(keys[0].device) for x in (key_offset, key_scale))
            _count(histograms["key"][number], *keys, offset, scale)
            channels, offset, scale = split_values(values[0], outliers)
            exact = torch.zeros_like(values[0], dtype=torch.bool).scatter(-1, channels, True)
            gradient = values[1].masked_fill(exact, 0.0)
            _count(histograms["value"][number], values[0], gradient, offset.float(), scale.float())
    counts = tuple(2**bits for bits in SUPPORTED_BITS)
    levels = {kind: [histogram.levels(counts) for histogram in found] for kind, found in histograms.items()}
    return {
        f"{kind}_levels{bits}": torch.stack([of_layer[place] for of_layer in levels[kind]])
        for kind in levels
        for place, bits in enumerate(SUPPORTED_BITS)
    }


def _count(histogram: LevelHistogram, x: torch.Tensor, gradient: torch.Tensor, offset, scale) -> None:
    # PAPER: eq. 1 weighs the error of the numbers themselves by the squared gradient: an error of the normalised
    # number is ``scale`` times as large. AUTHORS: their k-means weighs it by the squared gradient alone.
    histogram.add((x - offset) / scale, (gradient.double() * scale) ** 2)


def _with_gradients(model: nn.Module, text_model: nn.Module, window: torch.Tensor) -> list[tuple]:
    """Per layer, keys before RoPE and values of one window, (T − 1, H_kv·D) float32, each with its gradient.

    The first token is left out. The loss is summed over tokens: a factor on all weights, but no underflow in float16.
    """
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for layer in text_model.layers:
        for kind, module in _projections(layer.self_attn).items():

            def keep(module, args, output, name=(layer.self_attn.layer_idx, kind)):
                outputs[name] = output if output.requires_grad else output.requires_grad_()
                return outputs[name]

            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            ids = window.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum")
            gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer in text_model.layers:
        slices = _slices(layer.self_attn)
        number = layer.self_attn.layer_idx
        pairs = []
        for kind, channels in slices.items():
            name = (number, kind) if (number, kind) in outputs else (number, "both")
            pair = (outputs[name].detach(), gradients[name])
            # A norm's output is (B, T, H_kv, D), a projection's (B, T, channels).
            pairs.append(tuple(x[:, 1:].flatten(2)[..., channels].flatten(0, 1).float() for x in pair))
        found.append(tuple(pairs))
    return found


def _projections(attention: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are the keys before RoPE and the values, or both (phi3)."""
    if hasattr(attention, "qkv_proj"):
        return {"both": attention.qkv_proj}
    return {"key": getattr(attention, "k_norm", None) or attention.k_proj, "value": attention.v_proj}


def _slices(attention: nn.Module) -> dict[str, slice]:
    """Where keys and values lie in those outputs."""
    if not hasattr(attention, "qkv_proj"):
        return {"key": slice(None), "value": slice(None)}
    config, head_dim = attention.config, attention.head_dim
    start, width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {"key": slice(start, start + width), "value": slice(start + width, start + 2 * width)}
