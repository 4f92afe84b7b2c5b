"""Perplexity of a model with a quantized KV cache, on WikiText-2, the embedded essays or a text of your own.

With no data and no network:  python PPL_evaluation.py --dataset essays --method RotateKV2
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from tqdm import tqdm

import calibrate_reorder
from rotatekv import load_model
from rotatekv.capture.flags import add_capture_arguments, save_captures, wanted_kinds
from rotatekv.cli import add_switch, check_positive, evaluation_parser, method_from_args, model_flags, preset_from_args
from rotatekv.errors import UserError
from rotatekv.evals.perplexity import final_hidden_states, perplexity, score_window
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples, summary
from rotatekv.evals.texts import cut_windows, load_text
from rotatekv.evals.tokens import bos_of_windows, check_windows, context_length
from rotatekv.external import use_method
from rotatekv.methods import method_class
from rotatekv.scripts import exit_on_user_error

if TYPE_CHECKING:
    import torch


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "windows")
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--dataset", help="wikitext2 (default), essays (the even-numbered embedded ones), or a text file"
    )
    group.add_argument("--PPL_seq_length", type=int, default=2048, help="tokens per window (default: 2048)")
    group.add_argument(
        "--chunk_size", type=int, help="feed each window through the cache this many tokens at a time (default: all)"
    )
    add_switch(
        group,
        "divergence",
        "compare predictions with the unquantized model's: Kullback-Leibler divergence, nats a token (default: False)",
    )
    add_switch(group, "generate_for_calibration", "calibrate for the method instead, as calibrate_reorder.py does")
    add_capture_arguments(parser)
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.rescore is not None:
        return report(rescore(args.rescore, "ppl", metric_of), args.rescore)
    if args.generate_for_calibration:
        return calibrate_reorder.main(calibration_flags(args))
    check_positive(args, "limit", "chunk_size")
    if args.PPL_seq_length < 2:
        raise UserError(f"--PPL_seq_length must be at least 2 (a token and its successor), not {args.PPL_seq_length}")
    if wanted_kinds(args):
        return save_captures(args)
    name, quant_config = method_from_args(args)
    text = load_text(args.dataset or "wikitext2", args.data_dir)
    model, tokenizer = load_model(**model_flags(args))
    windows = cut_windows(tokenizer, text, args.PPL_seq_length, context_length(model), bos_of_windows(model))
    check_windows(model, windows, "--PPL_seq_length")

    dataset = {"id": text.name, "sha256": text.sha256}
    protocol = {"PPL_seq_length": args.PPL_seq_length, "chunk_size": args.chunk_size}
    samples = [{"id": number, "window": window} for number, window in enumerate(windows)][: args.limit]
    unquantized: dict[int, torch.Tensor] = {}
    if args.divergence:
        protocol["divergence"] = True  # earlier runs without it are found again
        bar = tqdm(samples, desc="unquantized", unit="window")
        unquantized = {sample["id"]: final_hidden_states(model, sample["window"]) for sample in bar}
    with use_method(model, quant_config, args.calibration_file) as handle:
        run = open_run(args, "ppl", name, handle, dataset, **protocol)
        if not score_samples(
            run,
            samples,
            lambda batch: [
                score_window(model, sample["window"], args.chunk_size, unquantized.get(sample["id"]))
                for sample in batch
            ],
            unit="window",
            running=lambda records: {"ppl": f"{perplexity([record['nll'] for record in records]):.3f}"},
        ):
            return
    records = [run.samples[sample["id"]] for sample in samples]
    report(finish_run(run, *metric_of(records), len(records) < len(windows)), run.folder)


def metric_of(records: list[dict]) -> tuple[list[dict], dict]:
    metric = {"ppl": perplexity([record["nll"] for record in records])}
    if "kl" in records[0]:
        metric["kl"] = mean(math.nan if record["kl"] is None else record["kl"] for record in records)
    return records, metric


def report(metrics: dict, folder: str | Path) -> None:
    config = metrics["config"]
    print(f"{metrics['n']} windows of {config['PPL_seq_length']} tokens, {Path(folder) / 'metrics.json'}")
    metric = metrics["metric"]
    divergence = f", divergence {metric['kl']:.4f}" if metric.get("kl") is not None else ""
    print(f"{config['dataset']} perplexity: {metric['ppl']:.4f}{divergence}  {summary(metrics)}")


def calibration_flags(args: argparse.Namespace) -> list[str]:
    """The flags of this command that calibrate_reorder.py knows too."""
    names = ["model", "dtype", "device", "device_map", "attn_implementation", "data_dir", "dataset", "head_group_num"]
    values = {name: getattr(args, name) for name in names} | {"output": args.calibration_file}
    config = preset_from_args(args)[1]
    values["statistics"] = method_class(config).statistics_kind(config)
    overwrite = ["--overwrite"] if args.overwrite else []
    return overwrite + [
        part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))
    ]


if __name__ == "__main__":
    main()
