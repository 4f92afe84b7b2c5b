"""Speed, memory and largest batch of a quantized KV cache beside Hugging Face's own, over context lengths and batches.

With no data and no network:  python efficiency_evaluation.py --context_lengths 1024,4096 --methods RotateKV2,RTN2
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from rotatekv import distributed, load_model
from rotatekv.cache.spec import handle_of
from rotatekv.cli import add_switch, check_positive, evaluation_parser, methods_from_args, model_flags
from rotatekv.errors import UserError
from rotatekv.evals.efficiency import (
    Side,
    add_largest_batches,
    backend_name,
    baseline_side,
    batch_of_text,
    cells_of,
    circumstances,
    last_speedup,
    measure_cell,
    method_side,
    metric_of,
    total_steps,
)
from rotatekv.evals.efficiency_figure import line_of, write_report
from rotatekv.evals.generation import check_context
from rotatekv.evals.needle import parse_grid
from rotatekv.evals.peak_memory import measures_peak
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples
from rotatekv.evals.texts import load_text, tokenize
from rotatekv.evals.tokens import check_token_ids
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "cells")
    group = parser.add_argument_group("efficiency")
    grid = "as a list (10,20,50) or min:max:steps; default"
    group.add_argument("--context_lengths", default="1024,4096", help=f"prompt tokens, {grid}: %(default)s")
    group.add_argument("--batch_sizes", default="1", help=f"sequences at once, {grid}: %(default)s")
    group.add_argument("--methods", metavar="NAME,NAME", help="several presets, each beside HF's cache")
    group.add_argument("--decode_tokens", type=int, default=64, help="timed decode steps a side (default: 64)")
    group.add_argument("--prefill_repeats", type=int, default=5, help="timed prefills a side (default: 5)")
    group.add_argument("--dataset", default="essays", help="the text: essays (default), wikitext2, or a file")
    group.add_argument(
        "--memory_budget_gb", type=float, help="find the largest batch that fits into this many GB (10^9 bytes)"
    )
    add_switch(group, "try_batches", "find it by trying (default: from the bytes measured at --batch_sizes)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.rescore is not None:
        return score_again(args.rescore)
    check_flags(args)
    methods = methods_from_args(args)
    lengths = parse_grid(args.context_lengths, "context_lengths", lowest=1)
    batch_sizes = parse_grid(args.batch_sizes, "batch_sizes", lowest=1)
    text = load_text(args.dataset, args.data_dir)
    model, tokenizer = load_model(**model_flags(args))
    check_context(model, max(lengths), total_steps(args.decode_tokens))
    if args.try_batches and not measures_peak(model.device):
        raise UserError("--try_batches needs peak memory, which is not measured on this platform: leave it out")
    ids = tokenize(tokenizer, text)
    check_token_ids(model, ids)
    cells = cells_of(list(methods), lengths, batch_sizes)
    samples = cells[: args.limit]

    protocol = {
        "context_lengths": lengths,
        "batch_sizes": batch_sizes,
        "decode_tokens": args.decode_tokens,
        "prefill_repeats": args.prefill_repeats,
        "memory_budget_gb": args.memory_budget_gb,
        "try_batches": args.try_batches,
        "backend": backend_name(model),
    }
    with ExitStack() as stack:
        hf = baseline_side(model)
        sides = {
            name: stack.enter_context(method_side(name, model, config, args.calibration_file))
            for name, config in methods.items()
        }
        run = open_efficiency_run(args, sides, {"id": text.name, "sha256": text.sha256}, protocol)
        if not score_samples(
            run,
            samples,
            lambda batch: [measure(args, [hf, sides[cell["method"]]], ids, cell) for cell in batch],
            unit="cell",
            running=last_speedup,
        ):
            return
    records = [run.samples[sample["id"]] for sample in samples]
    finish_run(run, records, metric_of(records), len(records) < len(cells), write_report)
    report(records, run.folder)


def check_flags(args: argparse.Namespace) -> None:
    check_positive(args, "limit", "decode_tokens", "prefill_repeats")
    if args.memory_budget_gb is not None and not 0 < args.memory_budget_gb < float("inf"):
        raise UserError(f"--memory_budget_gb must be more than 0, not {args.memory_budget_gb}")
    if args.try_batches and args.memory_budget_gb is None:
        raise UserError("--try_batches needs --memory_budget_gb GB")
    if args.device_map is not None or distributed.world_size() > 1:
        raise UserError("efficiency is measured by one process on one device: no --device_map, no torchrun")


def open_efficiency_run(args: argparse.Namespace, sides: dict[str, Side], dataset: dict, protocol: dict):
    handles = {name: handle_of(side.model) for name, side in sides.items()}
    if len(handles) > 1:
        protocol = protocol | {
            "quant": {name: handle.config.to_dict() for name, handle in handles.items()},
            "fingerprint": "+".join(handle.fingerprint for handle in handles.values()),
        }
    return open_run(args, "efficiency", ",".join(sides), next(iter(handles.values())), dataset, **protocol)


def measure(args: argparse.Namespace, sides: list[Side], ids, cell: dict) -> dict:
    tokens = batch_of_text(ids, cell["batch_size"], cell["context_length"] + total_steps(args.decode_tokens))
    record = measure_cell(sides, tokens, cell, args.decode_tokens, args.prefill_repeats) | circumstances(sides[1])
    if args.memory_budget_gb is not None:
        add_largest_batches(record, int(args.memory_budget_gb * 1e9), sides if args.try_batches else (), ids)
    return record


def report(records: list[dict], folder: Path) -> None:
    for record in records:
        print(line_of(record))
    print(f"{len(records)} cells, {folder / 'efficiency.csv'}")


def score_again(folder: str) -> None:
    records: list[dict] = []

    def metric(found: list[dict]) -> tuple[list[dict], dict]:
        records.extend(found)
        return found, metric_of(found)

    rescore(folder, "efficiency", metric, write_report)
    report(records, Path(folder))


if __name__ == "__main__":
    main()
