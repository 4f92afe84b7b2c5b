"""The paper's tables, and ours beside them: runs what is missing and writes results/tables/<table>.md and .csv.

Perplexity, all methods:  python reproduce.py --table ppl --limit 16
The commands behind it:   python reproduce.py --table ppl --limit 16 --dry_run

A finished run is reused, a broken-off one goes on. Every table is written again after each run.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from rotatekv.cli import check_positive, make_parser
from rotatekv.errors import UserError
from rotatekv.evals.needle import NEEDLE_TYPES
from rotatekv.models.text import DTYPES, EMBEDDED_MODEL
from rotatekv.reproduce.ablation import ablation_cells
from rotatekv.reproduce.paper_figures import load_paper_figures
from rotatekv.reproduce.plan import TABLES, Cell, Options, check_methods, default_methods, method_cells
from rotatekv.reproduce.runs import Runs, shown
from rotatekv.reproduce.tables import write_tables
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--table", default="ppl", help=f"{', '.join(TABLES)} or all; several as a list (default: ppl)")
    parser.add_argument("--models", default=EMBEDDED_MODEL, help="as --model of the scripts (default: %(default)s)")
    parser.add_argument("--methods", help=f"NAME,NAME (default: all, {', '.join(default_methods())}); not for ablation")
    parser.add_argument("--dry_run", action="store_true", help="list the commands that are missing; run nothing")
    group = parser.add_argument_group("handed to the scripts")
    group.add_argument("--data_dir", help="folder with local data sets (default: the Hub)")
    group.add_argument("--output_dir", default="results", help="runs, and tables/ in it (default: results)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 …")
    group.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: auto, the checkpoint's own")
    group.add_argument("--limit", type=int, help="windows, questions, records per task, cells (default: all)")
    group.add_argument("--dataset", help="of ppl and ablation (default: %(default)s)")
    group.add_argument("--PPL_seq_length", type=int, help="default: 4096 for the paper's models, else 2048")
    group.add_argument("--chunk_size", type=int, help="tokens a call of a streamed window (default: %(default)s)")
    group.add_argument("--context_lengths", help="of needle (default: %(default)s)")
    group.add_argument("--depths", help="of needle (default: %(default)s)")
    group.add_argument("--needle_type", choices=list(NEEDLE_TYPES), help="default: %(default)s")
    group.add_argument("--max_new_tokens", type=int, help="of the generating scripts (default: each one's own)")
    parser.set_defaults(**_cell_options(Options()))
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    if argv is None:  # the process is this command's own: SIGTERM stops the script under way, too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = parse_args(argv)
    check_positive(args, "limit", "chunk_size", "PPL_seq_length", "max_new_tokens")
    tables = _names(args.table, "--table")
    tables = list(TABLES) if tables == ["all"] else tables
    if unknown := [name for name in tables if name not in TABLES]:
        raise UserError(f"no table {', '.join(unknown)}: choose {', '.join(TABLES)} or all")
    runs = Runs(args.output_dir, args.limit, args.dtype)
    cells = {table: cells_of(table, args, runs) for table in tables}
    if args.dry_run:
        return list_commands(cells, runs)
    made_by = shlex.join(["python", "reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    failed = {table: fill(table, found, runs, made_by) for table, found in cells.items()}
    for table in tables:
        print(f"{table}: {Path(args.output_dir) / 'tables' / table}.md and .csv, {failed[table]} of the cells failed")
    if any(failed.values()):
        sys.exit(1)


def cells_of(table: str, args: argparse.Namespace, runs: Runs) -> list[Cell]:
    models = _names(args.models, "--models")
    figures = load_paper_figures()
    handed_on = {
        "data_dir": args.data_dir,
        "device": args.device,
        "dtype": args.dtype if args.dtype != "auto" else None,
    }
    shared = [part for name, value in handed_on.items() if value is not None for part in (f"--{name}", value)]
    options = Options(tuple(shared), **_cell_options(args))
    if table == "ablation":
        rows = (ablation_cells(model, options, figures, runs.geometry(model), tuple(shared)) for model in models)
        cells = [cell for found in rows for cell in found]
    else:
        methods = default_methods() if args.methods is None else check_methods(_names(args.methods, "--methods"))
        cells = method_cells(table, models, methods, options, figures)
    return [runs.calibrated(cell, tuple(shared)) for cell in cells]


def _cell_options(holder: Options | argparse.Namespace) -> dict:
    """The flags that decide cells, by name."""
    return {field.name: getattr(holder, field.name) for field in fields(Options) if field.name != "shared"}


def list_commands(tables: Mapping[str, Sequence[Cell]], runs: Runs) -> None:
    """Print what would be started, each command once, under a line that counts the table's cells."""
    listed: set[str] = set()
    for table, cells in tables.items():
        outcomes = {cell: runs.find(cell) for cell in cells}
        done = sum(outcome.status == "done" for outcome in outcomes.values())
        print(f"# {table}: {len(cells)} cells, {done} finished")
        for cell, outcome in outcomes.items():
            commands = [] if outcome.status == "done" else [runs.calibration_command(cell), runs.command(cell)]
            note = f"  # cannot run here: {outcome.reason}" if outcome.reason else ""
            for line in dict.fromkeys(shown(command) for command in commands if command):
                if line not in listed:
                    listed.add(line)
                    print(f"{line}{note}")


def fill(table: str, cells: Sequence[Cell], runs: Runs, made_by: str) -> int:
    """Run what is missing and write the table after each run → the number of failed cells."""
    outcomes = {cell: runs.find(cell) for cell in cells}
    folder = runs.output_dir / "tables"
    write_tables(folder, table, outcomes, runs, made_by)
    missing = [cell for cell, outcome in outcomes.items() if outcome.status != "done" and not outcome.reason]
    for cell, outcome in outcomes.items():
        if outcome.reason:
            tqdm.write(f"{table}: {cell.label}, {cell.view}: {outcome.status}, {outcome.reason}", file=sys.stderr)
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=table, unit="cell", file=sys.stderr) as bar:
        for number, cell in enumerate(missing):
            bar.set_postfix(row=cell.label, view=cell.view)
            outcome = runs.find(cell)  # an earlier cell may have been the same run
            if outcome.status != "done":
                outcome = runs.run(cell, folder / "logs" / f"{table}-{number}.log")
            outcomes[cell] = outcome
            if outcome.status == "failed":
                bar.write(f"{table}: {cell.label}, {cell.view}: failed, {outcome.reason}", file=sys.stderr)
            write_tables(folder, table, outcomes, runs, made_by)
            bar.update()
    return sum(outcome.status == "failed" for outcome in outcomes.values())


def _names(text: str, flag: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"{flag} needs names: NAME,NAME")
    return names


if __name__ == "__main__":
    main()
