"""Massive activations: per layer, the largest entries of its input and the tokens that carry them, by their text.

python PPL_evaluation.py --save_massive_activations True
python visualize/massive_activations.py --input save_tensors/smollm2-135m --output massive_activations.png
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from rotatekv.capture.files import read_capture
from visualize.common import (
    COLOURS,
    PALETTE,
    SINK_COLOUR,
    Capture,
    Drawing,
    Figure,
    UserError,
    figure_script,
    layer_axis,
    token_label,
)

_MOST_TOKENS = 14  # columns of the lower panel
_TINY = 1e-9  # a median of 0 would leave no ratio


@figure_script(layer=True)
def main(args: argparse.Namespace) -> Drawing:
    capture = read_capture(args.input, "massive_activations")
    if args.layer is not None and args.layer not in capture.info.layers:
        raise UserError(f"{capture.path} does not hold layer {args.layer}")
    layers = list(capture.info.layers) if args.layer is None else [args.layer]
    tokens = carriers(capture, layers)

    heights = [2.4, 1.6 + 0.11 * len(layers)]  # inches
    figure = Figure(figsize=(10.5, sum(heights) + 0.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    draw_magnitudes(upper, capture, layers)
    draw_tokens(figure, lower, capture, layers, tokens)
    return Drawing(
        figure,
        f"Massive activations: {capture.info.where}",
        f"The largest layer inputs of {capture.info.where}: tokens far above the median, "
        "and with dots those that RotateKV leaves unquantized.",
    )


def carriers(capture: Capture, layers: list[int]) -> list[int]:
    """The tokens protected in most layers, at most ``_MOST_TOKENS``, in the order of the text."""
    counts = Counter(token for layer in layers for token in capture.get(layer, "sinks").tolist())
    return sorted(token for token, _ in counts.most_common(_MOST_TOKENS))


def draw_magnitudes(panel, capture: Capture, layers: list[int]) -> None:
    """The three largest magnitudes and the median of each layer, on a logarithmic scale."""
    entries = min(len(capture.get(layer, "top_values")) for layer in layers)
    for rank, marker in zip(range(entries), "osv", strict=False):
        values = [capture.get(layer, "top_values")[rank].item() for layer in layers]
        panel.plot(layers, values, marker=marker, markersize=4, color=PALETTE[rank], label=f"largest {rank + 1}")
    medians = [capture.get(layer, "median").item() for layer in layers]
    panel.plot(layers, medians, color=PALETTE[6], linestyle="--", marker=".", markersize=4, label="median")
    panel.set_yscale("log")
    layer_axis(panel, layers)
    panel.set_ylabel("|layer input|")
    panel.legend(ncols=4, fontsize=8, loc="upper left")
    panel.set_ylim(top=panel.get_ylim()[1] * 10)  # room for the legend
    panel.grid(axis="y", linewidth=0.3)


def draw_tokens(figure, panel, capture: Capture, layers: list[int], tokens: list[int]) -> None:
    """Each token's largest entry per layer, against the layer's median; a dot where the token is protected."""
    from matplotlib.colors import LogNorm

    ratios = [
        [
            (capture.get(layer, "token_maximum")[token] / capture.get(layer, "median").clamp_min(_TINY)).item()
            for token in tokens
        ]
        for layer in layers
    ]
    image = panel.imshow(ratios, aspect="auto", cmap=COLOURS, norm=LogNorm(), origin="lower")
    dots = [
        (column, row)
        for row, layer in enumerate(layers)
        for column, token in enumerate(tokens)
        if token in set(capture.get(layer, "sinks").tolist())
    ]
    places = [list(axis) for axis in zip(*dots, strict=True)] or [[], []]
    panel.scatter(*places, s=12, color=SINK_COLOUR, edgecolors="white", linewidths=0.4)
    texts = capture.info.token_texts
    panel.set_xticks(range(len(tokens)), [f"{token_label(texts[token])}\n{token}" for token in tokens], fontsize=8)
    rows = list(range(0, len(layers), max(1, len(layers) // 10)))
    panel.set_yticks(rows, [str(layers[row]) for row in rows])
    panel.set_ylabel("layer")
    panel.set_xlabel(
        f"the {len(tokens)} tokens the sink detector protects most often, text and place; dots: in these layers"
    )
    figure.colorbar(image, ax=panel, pad=0.01).set_label("token's max ÷ median")


if __name__ == "__main__":
    main()
