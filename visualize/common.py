"""What the figure scripts share: flags, colours, reading a capture, saving the PNG."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from rotatekv.capture_files import Capture, read_capture
from rotatekv.cli import make_parser
from rotatekv.errors import UserError
from rotatekv.files import write_atomically

COLOURS = "cividis"  # of magnitudes: readable without red-green vision, and in grey
# Okabe and Ito's palette, told apart by readers with any colour vision.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SINK_COLOUR = "#d55e00"
_DPI = 130


def figure_parser(description: str, default_output: str) -> argparse.ArgumentParser:
    """``--input`` and ``--output``, which every figure has."""
    parser = make_parser(description)
    parser.add_argument(
        "--input", required=True, help="a file of PPL_evaluation.py --save_*, or its folder (save_tensors/<model>)"
    )
    parser.add_argument("--output", default=default_output, help="PNG to write (default: %(default)s)")
    return parser


def add_layer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", type=int, help="layer number (default: the first in the file)")


def pick_layer(capture: Capture, layer: int | None) -> int:
    """The layer asked for, or the file's first.

    Raises:
        UserError: it is not in the file.
    """
    layers = capture.info.layers
    if layer is None:
        return layers[0]
    if layer not in layers:
        raise UserError(f"{capture.path} holds layers {', '.join(map(str, layers))}, not {layer}")
    return layer


def pick_heads(capture: Capture, asked: str | None, most: int, count: int) -> list[int]:
    """Head numbers of a comma-separated flag, or the first ``most`` of ``count``.

    Raises:
        UserError: a head that is not there.
    """
    if asked is None:
        return list(range(min(most, count)))
    try:
        heads = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UserError(f"--heads takes numbers separated by commas, not {asked!r}") from None
    if not all(0 <= head < count for head in heads):
        raise UserError(f"--heads {asked}: {capture.path} has heads 0 … {count - 1}")
    return heads


def read_kinds(path: str, kinds: tuple[str, ...]) -> list[Capture]:
    """The captures of ``kinds`` in a folder, or the one file given, which must be of one of them.

    Raises:
        UserError: none of them there, or a damaged or foreign file.
    """
    folder = Path(path)
    if not folder.is_dir():
        capture = read_capture(folder)
        if capture.info.kind not in kinds:
            raise UserError(f"{path} holds {capture.info.kind}: this figure draws {' or '.join(kinds)}")
        return [capture]
    present = [kind for kind in kinds if (folder / f"{kind}.safetensors").is_file()]
    return [read_capture(folder, kind) for kind in present or kinds[:1]]


def save_png(figure: Figure, output: str, description: str) -> None:
    """Write the figure atomically; ``description`` goes into the PNG, where the report finds its caption.

    Raises:
        UserError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Description": description, "Software": "RotateKV"})
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --output") from None
    print(path)


def token_label(text: str, longest: int = 12) -> str:
    """A token's text as a label: visible white space, cut to ``longest`` characters, no mathematics."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵").replace(" ", "·")
    shown = "".join(char if char.isprintable() else "�" for char in shown)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return f"“{shown}”".replace("$", r"\$")
