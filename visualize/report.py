"""Gathers every run under results/ and every figure into one page that needs nothing beside itself.

python visualize/report.py
python visualize/report.py --input results,/mnt/other/results --output report.html
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also starts from a checkout not installed

from rotatekv.cli import make_parser
from rotatekv.errors import UserError
from rotatekv.files import write_output
from rotatekv.scripts import exit_on_user_error
from visualize.report_page.figures import collect_figures
from visualize.report_page.page import build_page, counted
from visualize.report_page.runs import collect_runs

_INPUT, _FIGURES = "results", "visualize/gallery"
LARGE_MEGABYTES = 50


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--input", metavar="DIR,DIR", help=f"folders with runs (default: {_INPUT})")
    parser.add_argument("--figures", metavar="DIR,DIR", help=f"folders with PNG files (default: {_FIGURES})")
    parser.add_argument("--output", default="report.html", help="default: %(default)s")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output = Path(args.output)
    runs, problems = collect_runs(folders_of(args.input, _INPUT, "--input"))
    if not runs and not problems:
        raise UserError(
            f"no run under {args.input or _INPUT}: run an evaluation first (PPL_evaluation.py, say), "
            "or pass --input DIR, the --output_dir of one"
        )
    figures = collect_figures(folders_of(args.figures, _FIGURES, "--figures"), runs, problems)
    page = build_page(runs, figures, problems, datetime.now(timezone.utc)).encode(errors="replace")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    write_page(output, page)
    print(f"{counted(runs, 'run')}, {counted(figures, 'figure')}, {len(page) / 1e6:.1f} MB: {output}")


def folders_of(given: str | None, default: str, flag: str) -> list[Path]:
    """The folders of a comma-separated flag; the default one need not be there.

    Raises:
        UserError: a folder that was asked for is not there.
    """
    if given is None:
        return [Path(default)]
    folders = [Path(name.strip()) for name in given.split(",") if name.strip()]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{flag}: {folder} is no folder")
    return folders


def write_page(output: Path, page: bytes) -> None:
    size = len(page) / 1e6
    if size > LARGE_MEGABYTES:
        print(f"warning: the page has {size:.0f} MB: browsers may be slow; pass fewer --input folders", file=sys.stderr)
    write_output(output, page)


if __name__ == "__main__":
    main()
