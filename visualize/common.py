"""What the figure scripts share: flags, colours, reading a capture, saving the PNG."""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from rotatekv.capture.files import Capture, read_capture
from rotatekv.cli import make_parser
from rotatekv.errors import UserError
from rotatekv.evals.colours import PALETTE
from rotatekv.files import write_output

SINK_COLOUR = PALETTE[1]
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
        UserError: none of them there, a damaged or foreign file, or files of different windows.
    """
    folder = Path(path)
    if not folder.is_dir():
        capture = read_capture(folder)
        if capture.info.kind not in kinds:
            raise UserError(f"{path} holds {capture.info.kind}: this figure draws {' or '.join(kinds)}")
        return [capture]
    present = [kind for kind in kinds if (folder / f"{kind}.safetensors").is_file()]
    captures = [read_capture(folder, kind) for kind in present or kinds[:1]]
    first = captures[0]
    for capture in captures[1:]:  # one title stands over all of them
        if _window_of(capture) != _window_of(first):
            raise UserError(
                f"{capture.path} is of {capture.info.where}, {first.path} of {first.info.where}: "
                "pass one of the files, or save both again in one call"
            )
    return captures


def _window_of(capture: Capture) -> tuple:
    info = capture.info
    return info.model, info.text_sha256, info.window, info.token_texts


def set_title(figure: Figure, text: str) -> None:
    """The figure's title, broken into lines where it is wider than the figure."""
    lines = textwrap.wrap(plain_text(text), width=int(10.5 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=11)


def layer_axis(panel, layers: Sequence[int]) -> None:
    """Layers on the x axis: whole numbers."""
    if len(layers) > 1:
        panel.xaxis.get_major_locator().set_params(integer=True)
    else:
        panel.set_xticks(layers)
    panel.set_xlabel("layer")


def save_png(figure: Figure, output: str, description: str) -> None:
    """Write the figure atomically; ``description`` goes into the PNG, where the report finds its caption.

    Raises:
        UserError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Description": description, "Software": "RotateKV"})
    write_output(Path(output), content.getvalue())
    print(Path(output))


def token_label(text: str, longest: int = 12) -> str:
    """A token's text as a label: visible white space, cut to ``longest`` characters, no mathematics."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵").replace(" ", "·")
    shown = plain_text(shown)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return f"“{shown}”".replace("$", r"\$")


def plain_text(text: str) -> str:
    """``text`` with a replacement character where the figures' font has none (CJK, most emoji) or it does not print."""
    return "".join(char if char.isprintable() and ord(char) in _glyphs() else "�" for char in text)


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
