"""Relative error of the cached keys and values, layer by layer, for each method.

python PPL_evaluation.py --save_quantization_error True
python visualize/quantization_error.py --input save_tensors/smollm2-135m --output quantization_error.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from matplotlib.ticker import FuncFormatter, NullFormatter

from rotatekv.capture.files import read_capture
from visualize.common import PALETTE, Capture, Drawing, Figure, UserError, figure_script, layer_axis

_TITLES = {"keys": "keys, after RoPE", "values": "values"}
_MARKERS = "osv^D*P"
_NARROW = 50  # on an axis from x to less than 50 x, the ticks between powers of ten are named too


@figure_script(flags=lambda parser: parser.add_argument("--methods", help="RTN2,RotateKV2 (default: all in the file)"))
def main(args: argparse.Namespace) -> Drawing:
    capture = read_capture(args.input, "quantization_error")
    methods = pick_methods(capture, args.methods)

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (what, title) in zip(panels, _TITLES.items(), strict=True):
        for number, method in enumerate(methods):
            draw_method(panel, capture, f"{method}.{what}", method, number)
        panel.set_title(f"{title}, all heads", fontsize=10)
        layer_axis(panel, capture.info.layers)
        panel.set_yscale("log")
        percent = FuncFormatter(lambda value, place: f"{100 * value:g}%")
        low, high = panel.get_ylim()
        panel.yaxis.set_major_formatter(percent)
        panel.yaxis.set_minor_formatter(percent if high < _NARROW * low else NullFormatter())
        panel.grid(axis="y", linewidth=0.3, which="both")
        panel.tick_params(which="minor", labelsize=8)
    panels[0].set_ylabel("relative error |x̂ − x| / |x| per token\nmedian, band: quartiles")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        ncols=len(methods),
        fontsize=9,
        loc="outside lower center",
        frameon=False,
    )
    return Drawing(
        figure,
        f"Quantization error: {capture.info.where}",
        f"Relative error of keys and values by layer, {capture.info.where}: compare RTN and RotateKV at equal bits.",
    )


def pick_methods(capture: Capture, asked: str | None) -> list[str]:
    """The methods to draw.

    Raises:
        UserError: one that the file does not hold.
    """
    held = [name.split(".")[2] for name in capture.tensors if name.endswith(".keys")]
    held = list(dict.fromkeys(held))
    wanted = asked.split(",") if asked else sorted(held, key=lambda name: (name.rstrip("*")[-1], name))
    for method in wanted:
        if method not in held:
            raise UserError(f"{capture.path} holds {', '.join(held)}, not {method}")
    return wanted


def draw_method(panel, capture: Capture, what: str, label: str, number: int) -> None:
    """The median over tokens of each layer, with the quartiles as a band."""
    layers = list(capture.info.layers)
    quartiles = [
        capture.get(layer, what).quantile(capture.get(layer, what).new_tensor([0.25, 0.5, 0.75])).tolist()
        for layer in layers
    ]
    low, middle, high = zip(*quartiles, strict=True)
    colour = PALETTE[number % len(PALETTE)]
    marker = _MARKERS[number % len(_MARKERS)]
    panel.plot(layers, middle, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    panel.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    main()
