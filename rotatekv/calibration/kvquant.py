"""KVQuant's statistics (arXiv 2401.18079) of a model: key ranges and Fisher-weighted levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rotatekv.config import SUPPORTED_BITS
from rotatekv.errors import UserError
from rotatekv.kernels.hadamard import heads_to_channels
from rotatekv.methods.kvquant import OUTLIER_SHARE, outliers_per_token
from rotatekv.methods.nonuniform import LevelHistogram, split_values
from rotatekv.models.head import TOKENS_AT_ONCE, head_logits, run_without_head
from rotatekv.patching.patch import first_geometry
from rotatekv.patching.watching import Attended, stream_attention, watching

_SMALLEST_SCALE = 1e-6  # of a channel that never changes


class _Tails:
    """The smallest and largest numbers of each channel, enough of them for two exact percentiles.

    Args:
        tokens: how many will come. share: of the numbers, that lies outside both percentiles together.
    """

    def __init__(self, tokens: int, share: float):
        position = share / 2 * (tokens - 1)
        self.rank, self.between = int(position), position - int(position)
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None  # (rank + 2 at most, C), ascending and descending

    def add(self, x: torch.Tensor) -> None:
        """Count (T, C) numbers."""
        low, high = (x, x) if self.low is None else (torch.cat([self.low, x]), torch.cat([self.high, x]))
        keep = min(self.rank + 2, len(low))
        self.low = low.topk(keep, dim=0, largest=False).values
        self.high = high.topk(keep, dim=0).values

    def percentiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C,) float32 each, with linear interpolation."""
        assert self.low is not None and self.high is not None, "add comes first"
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
        offset, scale: (num_hidden_layers, H_kv·D) float32; 0 and next to 0 for a layer without attention.
    """
    if tokens < 1:
        raise UserError("the calibration text has no window of at least 2 tokens")
    tails: defaultdict[int, _Tails] = defaultdict(lambda: _Tails(tokens, OUTLIER_SHARE))

    def add(attended: Attended) -> None:
        keys = heads_to_channels(attended.before_rope(attended.key))  # (1, T, H_kv·D)
        tails[attended.layer].add(keys[:, 1:].flatten(0, 1))

    stream_attention(model, text_model, windows, add)
    shape = len(text_model.layers), first_geometry(text_model).channels
    low, high = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
    for number, tail in tails.items():
        low[number], high[number] = tail.percentiles()
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
        ``key_levels<bits>`` and ``value_levels<bits>``, (num_hidden_layers, 2^bits) float32 in [-1, 1], ascending;
        even ones for a layer without attention.
    """
    layers = len(text_model.layers)
    histograms = {kind: [LevelHistogram() for _ in range(layers)] for kind in ("key", "value")}
    outliers = outliers_per_token(key_offset.shape[1])
    for window in windows:
        for number, (keys, values) in _with_gradients(model, text_model, window).items():
            offset, scale = (x[number].to(keys[0].device) for x in (key_offset, key_scale))
            _count(histograms["key"][number], keys[0], keys[1], offset, scale)
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


def _with_gradients(model: nn.Module, text_model: nn.Module, window: torch.Tensor) -> dict[int, tuple]:
    """Keys before RoPE and values of one window, (T − 1, H_kv·D) float32 each, with their gradients, by layer.

    The first token is left out. The loss is summed over tokens: a factor on all weights, but no underflow in float16.
    """
    got: dict[int, Attended] = {}

    def take(attended: Attended) -> None:
        for x in (attended.key, attended.value):
            if not x.requires_grad:  # the first layer's, where all weights are frozen
                x.requires_grad_()
        got[attended.layer] = attended

    with torch.enable_grad(), watching(text_model, take):
        ids = window.to(model.device)
        output = run_without_head(model, input_ids=ids, use_cache=False)
        by_hidden = _gradient_of_loss(model, output, ids[0, 1:])
        inputs = [x for layer in got.values() for x in (layer.key, layer.value)]
        gradients = torch.autograd.grad(output.last_hidden_state[:, :-1], inputs, by_hidden)
    found = {}
    for attended, by_key, by_value in zip(got.values(), gradients[::2], gradients[1::2], strict=True):
        keys = attended.before_rope(attended.key.detach()), attended.gradient_before_rope(by_key)
        pairs = keys, (attended.value.detach(), by_value)
        found[attended.layer] = tuple(
            tuple(heads_to_channels(x)[:, 1:].flatten(0, 1).float() for x in pair) for pair in pairs
        )
    return found


def _gradient_of_loss(model: nn.Module, output, targets: torch.Tensor) -> torch.Tensor:
    """By all hidden states but the last, (1, T − 1, hidden_size), of the loss summed over the (T − 1,) next tokens."""
    gradients = []
    hidden = output.last_hidden_state[:, :-1].detach()
    for part, tokens in zip(hidden.split(TOKENS_AT_ONCE, 1), targets.split(TOKENS_AT_ONCE), strict=True):
        part = part.requires_grad_()
        logits = head_logits(model, output, part)[0].float()
        loss = cross_entropy(logits, tokens.to(logits.device), reduction="sum")
        gradients += torch.autograd.grad(loss, part)
    return torch.cat(gradients, 1)
