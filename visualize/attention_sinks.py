"""Attention maps per head, and the mean attention each token receives: the sinks stand out.

python PPL_evaluation.py --save_attention_scores True
python visualize/attention_sinks.py --input save_tensors/smollm2-135m --output attention_sinks.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from rotatekv import interrupts  # noqa: F401 (before torch, which takes seconds)

# isort: split
import torch

from rotatekv.capture.files import read_capture
from visualize.common import (
    COLOURS,
    PALETTE,
    SINK_COLOUR,
    Capture,
    Drawing,
    Figure,
    figure_script,
    pick_heads,
    pick_layer,
    token_label,
)

_FAINTEST = 1e-4  # weights below share the darkest colour
_NAMED = 3  # tokens named by their text in the lower panel
_FEWEST_QUERIES = 64  # a mean over fewer later queries is noise and is not drawn, of short windows over fewer than half


@figure_script(layer=True, heads="places of the heads in the file", max_tokens=64)
def main(args: argparse.Namespace) -> Drawing:
    capture = read_capture(args.input, "attention_scores")
    layer = pick_layer(capture, args.layer)
    places = pick_heads(capture, args.heads, len(capture.info.heads))
    scores = capture.get(layer, "scores")[places].float()  # (heads, T, T)

    figure = Figure(figsize=(max(8.0, 2.7 * len(places) + 1.2), 6.2), layout="constrained")
    maps, received = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    draw_maps(maps, capture, scores, places, args.max_tokens)
    draw_received(received.subplots(), capture, layer, scores)
    return Drawing(
        figure,
        f"Attention of layer {layer}: {capture.info.where}",
        f"Attention of layer {layer}, {capture.info.where}: bright columns are attention sinks; "
        "dots are the tokens that the sink detector protects.",
    )


def draw_maps(figure, capture: Capture, scores: torch.Tensor, places: list[int], tokens: int) -> None:
    """One lower-triangular map per head, logarithmic."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    panels = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    colours = colormaps[COLOURS].with_extremes(bad="white")
    for panel, place, weights in zip(panels, places, scores, strict=True):
        shown = weights[:tokens, :tokens].clamp_min(_FAINTEST)
        shown = shown.masked_fill(torch.ones_like(shown, dtype=torch.bool).triu(1), float("nan"))
        image = panel.imshow(shown.numpy(), cmap=colours, norm=LogNorm(_FAINTEST, 1.0), aspect="equal")
        panel.set_title(f"query head {capture.info.heads[place]}", fontsize=10)
        panel.set_xlabel("key token")
    panels[0].set_ylabel("query token")
    figure.colorbar(image, ax=list(panels), aspect=25, pad=0.01).set_label("attention weight")


def draw_received(panel, capture: Capture, layer: int, scores: torch.Tensor) -> None:
    """Mean attention a token receives from all later queries and the drawn heads; the protected ones as dots."""
    received = mean_received(scores)
    drawn = len(received) - min(_FEWEST_QUERIES, len(received) // 2)
    panel.plot(received[:drawn].numpy(), color=PALETTE[0], linewidth=0.6)
    sinks = capture.get(layer, "sinks").long()
    sinks = sinks[sinks < drawn]
    panel.plot(sinks.numpy(), received[sinks].numpy(), "o", color=SINK_COLOUR, markersize=4, label="protected token")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * max(3.0, (high / low) ** 0.2))  # room for the names
    named = received[:drawn].topk(min(_NAMED, drawn)).indices.tolist()
    for height, token in enumerate(reversed(named)):  # a larger value's name stands higher: none covers another
        is_right = token > drawn // 2
        panel.annotate(
            f"{token_label(capture.info.token_texts[token])} at {token}",
            (token, received[token].item()),
            xytext=(-8 if is_right else 8, 11 * height - 4),
            ha="right" if is_right else "left",
            textcoords="offset points",
            fontsize=8,
        )
    panel.set_xlabel("token")
    panel.set_ylabel("mean attention received\nfrom later queries")
    panel.legend(fontsize=8, loc="upper right")


def mean_received(scores: torch.Tensor) -> torch.Tensor:
    """(heads, T, T) weights → (T,): the mean over heads and over all later queries."""
    length = scores.shape[-1]
    own = scores.diagonal(dim1=1, dim2=2)  # a token's attention to itself is no sign of a sink
    later = torch.arange(length - 1, -1, -1).clamp_min(1)
    return ((scores.sum(dim=1) - own) / later).mean(dim=0)


if __name__ == "__main__":
    main()
