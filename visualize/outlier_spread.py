"""Largest magnitude of each key channel: no rotation, per-head rotation, grouped-head rotation, then reordered.

python PPL_evaluation.py --save_k_rotated True
python visualize/outlier_spread.py --input save_tensors/smollm2-135m --output outlier_spread.png
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
from rotatekv.kernels.hadamard import rotate_channels
from visualize.common import PALETTE, Capture, Drawing, Figure, figure_script, pick_layer


@figure_script(layer=True)
def main(args: argparse.Namespace) -> Drawing:
    capture = read_capture(args.input, "k_rotated")
    info = capture.info
    layer = pick_layer(capture, args.layer)
    stages = stages_of(capture, layer)

    figure = Figure(figsize=(10.5, 2.1 * len(stages) + 0.8), layout="constrained")
    panels = figure.subplots(len(stages), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (name, keys), colour in zip(panels, stages.items(), PALETTE, strict=False):
        maxima = keys.abs().amax(dim=0)
        panel.bar(range(len(maxima)), maxima.numpy(), width=1.0, color=colour)
        spread = group_range(keys, info.head_dim)
        panel.set_title(
            f"{name}: largest {maxima.max():.1f}, mean range of a {info.head_dim}-channel group {spread:.2f}",
            fontsize=10,
            loc="left",
        )
        panel.set_ylabel("max |key|\nover tokens")
        for head in range(1, info.num_key_value_heads):
            panel.axvline(head * info.head_dim - 0.5, color="grey", linewidth=0.6, linestyle=":")
    panels[-1].set_xlabel(f"channel (dotted: every {info.head_dim} channels, a head or a quantization group)")
    panels[-1].set_xlim(-0.5, len(maxima) - 0.5)
    return Drawing(
        figure,
        f"Keys of layer {layer} before RoPE, all heads: {info.where}",
        f"Channel maxima of the keys of layer {layer}, {info.where}: rotation shares outliers out, reordering "
        "puts channels of like mean into one group; compare the range that a group's scale must cover.",
    )


def stages_of(capture: Capture, layer: int) -> dict[str, torch.Tensor]:
    """Title → (T, H_kv·D) keys. The rotation is orthonormal: undoing it gives the keys as they were."""
    info = capture.info
    grouped = capture.get(layer, "rotated").float()
    plain = rotate_channels(grouped, info.heads_per_group * info.head_dim, inverse=True)
    stages = {
        "no rotation": plain,
        "rotated per head": rotate_channels(plain, info.head_dim),
        f"rotated in groups of {info.heads_per_group} heads": grouped,
    }
    if f"layers.{layer}.reordered" in capture.tensors:
        stages["rotated and reordered"] = capture.get(layer, "reordered").float()
    return stages


def group_range(keys: torch.Tensor, group_size: int) -> float:
    """Mean over tokens and groups of max − min within a group: what the quantization scale must cover."""
    groups = keys.unflatten(-1, (-1, group_size))  # (T, C / g, g)
    return (groups.amax(-1) - groups.amin(-1)).mean().item()


if __name__ == "__main__":
    main()
