"""Magnitude of the cached keys, channel × token, several heads side by side (as the paper's figures of K).

python PPL_evaluation.py --save_k_pre_rope True --save_k_post_rope True
python visualize/keys_2d.py --input save_tensors/smollm2-135m --output keys_2d.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from visualize.common import COLOURS, Drawing, Figure, figure_script, pick_heads, pick_layer, read_kinds

_ROWS = {"k_pre_rope": "before RoPE", "k_post_rope": "after RoPE"}


@figure_script(layer=True, heads="key heads", max_tokens=256)
def main(args: argparse.Namespace) -> Drawing:
    captures = read_kinds(args.input, tuple(_ROWS))
    info = captures[0].info
    layer = pick_layer(captures[0], args.layer)
    heads = pick_heads(captures[0], args.heads, info.num_key_value_heads)
    rows = {capture.info.kind: capture.get(layer, "keys")[heads, : args.max_tokens].abs() for capture in captures}

    figure = Figure(figsize=(max(5.0, 2.9 * len(heads) + 1.2), 2.9 * len(rows) + 0.7), layout="constrained")
    panels = figure.subplots(len(rows), len(heads), squeeze=False, sharex=True, sharey=True)
    top = max(keys.max().item() for keys in rows.values())
    for line, (kind, keys) in zip(panels, rows.items(), strict=True):
        for panel, head, magnitudes in zip(line, heads, keys.float(), strict=True):
            image = panel.imshow(
                magnitudes.T.numpy(),
                aspect="auto",
                origin="lower",
                cmap=COLOURS,
                vmin=0,
                vmax=top,
                interpolation="antialiased",
            )
            panel.set_title(f"key head {head}, {_ROWS[kind]}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("token")
    for panel in panels[:, 0]:
        panel.set_ylabel("channel of the head")
    figure.colorbar(image, ax=panels, aspect=35, pad=0.02).set_label("|key|")
    return Drawing(
        figure,
        f"Keys of layer {layer}: {info.where}",
        f"Magnitude of the keys of layer {layer}, {info.where}: outlier channels show as lines along the tokens.",
    )


if __name__ == "__main__":
    main()
