"""Keys of one layer as surfaces: before and after RoPE, after grouped-head rotation, after reordering.

python PPL_evaluation.py --save_k_pre_rope True --save_k_post_rope True --save_k_rotated True
python visualize/keys_3d.py --input save_tensors/smollm2-135m --output keys_3d.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from rotatekv import interrupts  # noqa: F401 (before torch, which takes seconds)

# isort: split
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from rotatekv.kernels.hadamard import heads_to_channels
from visualize.common import COLOURS, Capture, Drawing, Figure, figure_script, pick_layer, read_kinds

_KINDS = ("k_pre_rope", "k_post_rope", "k_rotated")
_PER_ROW = 2
_MOST_POINTS = 96  # along each axis of a surface; more are joined by their maximum


@figure_script(layer=True, max_tokens=256)
def main(args: argparse.Namespace) -> Drawing:
    captures = read_kinds(args.input, _KINDS)
    info = captures[0].info
    layer = pick_layer(captures[0], args.layer)
    stages = {name: keys for capture in captures for name, keys in stages_of(capture, layer, args.max_tokens).items()}

    rows = -(-len(stages) // _PER_ROW)
    columns = min(len(stages), _PER_ROW)
    figure = Figure(figsize=(4.7 * columns + 1.0, 3.5 * rows + 0.8))
    figure.subplots_adjust(left=0.0, right=0.88, bottom=0.04, top=0.88, wspace=0.0, hspace=0.3)
    top = max(keys.max().item() for keys in stages.values())
    for number, (name, magnitudes) in enumerate(stages.items()):
        panel = figure.add_subplot(rows, columns, number + 1, projection="3d")
        colours = draw_surface(panel, magnitudes, top)
        panel.set_title(f"{name}\nlargest {magnitudes.max():.1f}", fontsize=10)
    figure.colorbar(colours, cax=figure.add_axes((0.92, 0.15, 0.018, 0.65))).set_label("|key|")
    return Drawing(
        figure,
        f"Keys of layer {layer}, all heads: {info.where}",
        f"Keys of layer {layer}, {info.where}: outlier channels are ridges; compare them after the rotation.",
    )


def stages_of(capture: Capture, layer: int, tokens: int) -> dict[str, torch.Tensor]:
    """Title → (T, H_kv·D) magnitudes of one file."""
    kind = capture.info.kind
    if kind != "k_rotated":
        channels = heads_to_channels(capture.get(layer, "keys").unsqueeze(0))[0]  # (T, H_kv·D)
        return {"before RoPE" if kind == "k_pre_rope" else "after RoPE": channels[:tokens].float().abs()}
    stages = {}
    group = capture.info.heads_per_group
    stages[f"before RoPE, rotated in groups of {group} heads"] = capture.get(layer, "rotated")
    if f"layers.{layer}.reordered" in capture.tensors:
        stages["rotated and reordered"] = capture.get(layer, "reordered")
    return {name: keys[:tokens].float().abs() for name, keys in stages.items()}


def draw_surface(panel, magnitudes: torch.Tensor, top: float):
    """One surface over tokens and channels; of many points the maximum of each patch, so that no outlier is lost."""
    tokens, channels = magnitudes.shape
    steps = max(1, -(-tokens // _MOST_POINTS)), max(1, -(-channels // _MOST_POINTS))
    patches = torch.nn.functional.max_pool2d(magnitudes[None, None], steps, steps, ceil_mode=True)[0, 0]
    patches = patches.repeat([2 if length == 1 else 1 for length in patches.shape])  # one line is no surface
    along_tokens = torch.arange(patches.shape[0]) * steps[0]
    along_channels = torch.arange(patches.shape[1]) * steps[1]
    grid = torch.meshgrid(along_tokens, along_channels, indexing="ij")
    # A facet has the colour of its highest corner, not of the mean: a ridge one channel wide keeps its height's colour.
    highest = torch.nn.functional.max_pool2d(patches[None, None], 2, 1)[0, 0]
    colours = ScalarMappable(Normalize(0, top), COLOURS)
    panel.plot_surface(
        grid[0].numpy(),
        grid[1].numpy(),
        patches.numpy(),
        facecolors=colours.to_rgba(highest.numpy()),
        rcount=_MOST_POINTS,
        ccount=_MOST_POINTS,
        linewidth=0,
        shade=False,
        antialiased=False,
    )
    panel.set_xlabel("token")
    panel.set_ylabel("channel (all heads)")
    panel.set_zlabel("|key|")
    panel.set_zlim(0, top)
    panel.view_init(elev=32, azim=-55)
    panel.set_box_aspect((4, 4, 2.6), zoom=1.0)
    return colours


if __name__ == "__main__":
    main()
