"""The frame of every figure: flags, reading a capture, title, saving the PNG. A figure's file is its drawing."""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from rotatekv.capture.files import Capture, read_capture
from rotatekv.cli import check_positive, make_parser
from rotatekv.errors import UserError
from rotatekv.evals.figures import COLOURS, PALETTE, png_of
from rotatekv.files import write_output
from rotatekv.scripts import exit_on_user_error

__all__ = ["COLOURS", "PALETTE", "SINK_COLOUR", "Capture", "Drawing", "Figure", "UserError", "figure_script"]
SINK_COLOUR = PALETTE[1]
_INPUT = "a file of PPL_evaluation.py --save_*, or its folder (save_tensors/<model>)"


@dataclass(frozen=True)
class Drawing:
    """What a figure's script draws; ``description`` goes into the PNG, where the report finds its caption."""

    figure: Figure
    title: str
    description: str


def figure_script(
    input: str = _INPUT,
    layer: bool = False,
    heads: str = "",
    max_tokens: int | None = None,
    flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> Callable:
    """A function from the flags to a ``Drawing`` → the script's ``main``; its module's docstring is the help.

    Args:
        input: help of ``--input``.
        layer: it has ``--layer``.
        heads: help of ``--heads``; empty: it has none.
        max_tokens: default of ``--max_tokens``; None: it has none.
        flags: adds the script's own.
    """

    def decorate(draw: Callable[[argparse.Namespace], Drawing]) -> Callable[..., None]:
        module = sys.modules[draw.__module__]

        @exit_on_user_error
        @functools.wraps(draw)
        def main(argv: list[str] | None = None) -> None:
            parser = make_parser(module.__doc__)
            parser.add_argument("--input", required=True, help=input)
            default = f"{Path(module.__file__).stem}.png"
            parser.add_argument("--output", default=default, help="PNG to write (default: %(default)s)")
            if layer:
                parser.add_argument("--layer", type=int, help="layer number (default: the first in the file)")
            if heads:
                parser.add_argument("--heads", help=f"{heads}, 0,2 (default: the first 4)")
            if max_tokens is not None:
                more = {"type": int, "default": max_tokens}
                parser.add_argument("--max_tokens", **more, help="first tokens drawn (default: %(default)s)")
            flags(parser)
            args = parser.parse_args(argv)
            if max_tokens is not None:
                check_positive(args, "max_tokens")
            save(draw(args), Path(args.output))

        return main

    return decorate


def save(drawing: Drawing, output: Path) -> None:
    """Write the PNG atomically, under its title.

    Raises:
        UserError: it cannot be written.
    """
    set_title(drawing.figure, drawing.title)
    write_output(output, png_of(drawing.figure, drawing.description))
    print(output)


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


def pick_heads(capture: Capture, asked: str | None, count: int) -> list[int]:
    """Head numbers of a comma-separated flag, or the first 4 of ``count``.

    Raises:
        UserError: a head that is not there.
    """
    if asked is None:
        return list(range(min(4, count)))
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
