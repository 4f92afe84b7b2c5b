"""Calibrate a model on a text: RotateKV's reorder indices, RotateKV+'s maps, or KVQuant's ranges and levels.

Reorder indices are the argsort of the summed, rotated pre-RoPE keys, one forward pass. RotateKV+'s statistics are
what makes an activation massive and the maps of keys and values, two passes, and what noise costs in each layer, two
passes a layer over 1024 tokens of each of the last four windows, which the maps have not seen. KVQuant's statistics
take two passes, one of them with gradients, and more memory.

At the end each preset that has its statistics is tried on the first tokens of two windows: a table of the relative
error of the attention scores, with a warning where it is large (rotatekv/calibration/score_errors.py). For RotateKV+
the noise that its statistics foretell stands beside what was measured.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from rotatekv import QuantConfig, load_model
from rotatekv.calibration.kvquant import collect_key_ranges, collect_levels
from rotatekv.calibration.plus import collect_sink_thresholds, compare_foretold, in_predictions
from rotatekv.calibration.reorder import collect_key_sums, indices_from_key_sums
from rotatekv.calibration.score_errors import check_presets
from rotatekv.calibration.transform import collect_transforms
from rotatekv.cli import add_model_arguments, check_positive, make_parser, model_flags
from rotatekv.errors import UserError
from rotatekv.evals.texts import load_text, tokenize, windows_of
from rotatekv.evals.tokens import bos_of_windows, check_windows, context_length
from rotatekv.families import check_supported, find_text_model
from rotatekv.models.text import ALIASES, model_revision
from rotatekv.models.weights import calibration_digests
from rotatekv.patching.patch import first_geometry, resolved_head_group
from rotatekv.scripts import exit_on_user_error
from rotatekv.statistics import KINDS, file_name, save_statistics

if TYPE_CHECKING:
    import torch


COST_WINDOWS, COST_TOKENS = 4, 1024  # the last windows, and their first tokens, on which noise is measured


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--statistics",
        default="reorder",
        choices=list(KINDS),
        help="reorder (RotateKV's indices; default), plus (RotateKV+) or kvquant",
    )
    parser.add_argument(
        "--dataset",
        default="essays",
        help="essays (the odd-numbered embedded ones; default), wikitext2 (validation), or a text file",
    )
    parser.add_argument("--data_dir", help="folder with wikitext2/wiki.valid.raw (default: the Hub)")
    parser.add_argument(
        "--calibration_tokens",
        type=int,
        default=32768,
        help="tokens to read (default: 32768; fewer if the text is shorter)",
    )
    parser.add_argument(
        "--seq_length", type=int, help="tokens per window (default: 2048, or the model's context where that is less)"
    )
    parser.add_argument(
        "--head_group_num", type=int, default=4, help="key heads rotated together, at most (default: 4)"
    )
    parser.add_argument("--output", help="file to write (default: reorder_indices/<model>[.plus|.kvquant].safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)


def check_output(path: Path, overwrite: bool) -> None:
    """Before minutes of calibration: may this file be written?"""
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path} must end in .safetensors")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: pass --overwrite, or another --output FILE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --output") from None


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_positive(args, "calibration_tokens", "seq_length")
    if args.seq_length == 1:
        raise UserError("--seq_length must be at least 2 (a token and its successor), not 1")
    usual = Path("reorder_indices") / file_name(args.statistics, ALIASES.get(args.model, args.model))
    output = Path(args.output) if args.output else usual
    check_output(output, args.overwrite)
    config = QuantConfig(head_group_num=args.head_group_num)
    text = load_text(args.dataset, args.data_dir, calibration=True)
    model, tokenizer = load_model(**model_flags(args))
    text_model = find_text_model(model)
    check_supported(text_model)
    group = resolved_head_group(text_model, config) if args.statistics == "reorder" else 1  # others rotate no groups
    width = group * first_geometry(text_model).head_dim
    ids = tokenize(tokenizer, text)[:, : args.calibration_tokens]
    if not ids.numel():
        raise UserError(f"the text {args.dataset} has no tokens")
    length = min(args.seq_length or min(2048, context_length(model)), ids.shape[1])
    windows = list(windows_of(ids, length, bos_of_windows(model)))
    check_windows(model, windows, "--seq_length")

    metadata = {
        "model": model.name_or_path,
        "revision": model_revision(model) or "none",
        "dataset": text.name,
        "dataset_sha256": text.sha256,
        "tokens": length * len(windows),
        **calibration_digests(text_model),
    }
    compared: list[str] = []
    if args.statistics == "kvquant":
        tensors = kvquant_statistics(model, text_model, windows)
        layers, channels = tensors["key_offset"].shape
        made = f"{layers} layers × {channels} channels, levels for 2, 3 and 4 bits"
    elif args.statistics == "plus":
        tensors, compared = plus_statistics(model, text_model, windows)
        layers, heads, dim = tensors["key_mean"].shape
        made = f"{layers} layers × {heads} heads × {dim} × {dim}, maps of keys and values and what their noise costs"
    else:
        tensors = {"indices": reorder_indices(model, text_model, windows, width)}
        metadata |= {"head_group_num": group, "order": width}
        layers, channels = tensors["indices"].shape
        made = f"{layers} layers × {channels} channels, {group} heads per group"
    print(f"{save_statistics(output, args.statistics, tensors, metadata)}: {made}")
    print(f"calibrated on {metadata['tokens']} tokens of {text.name}")
    print("\n".join([*check_presets(model, windows, args.statistics, output), *compared]))


def reorder_indices(model, text_model, windows: list, width: int) -> torch.Tensor:
    key_sums = collect_key_sums(model, text_model, progress(windows, "calibrate"))
    return indices_from_key_sums(key_sums, width)


def plus_statistics(model, text_model, windows: list) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The statistics, and lines that compare what they foretell with what is measured."""
    threshold = collect_sink_thresholds(model, text_model, progress(windows, "sinks"))
    held = max(min(COST_WINDOWS, len(windows) // 4), 1)
    fitted, held_out = windows[:-held] or windows, windows[-held:]  # maps look better than they are on their text
    found = collect_transforms(model, progress(fitted, "maps"), threshold) | {"sink_threshold": threshold}
    found |= {name: found[name].half() for name in ("key_map", "value_map")}  # as the file has them
    few = [window[:, :COST_TOKENS] for window in held_out]
    found |= in_predictions(model, few, found, partial(tqdm, desc="costs", unit="layer"))
    return found, compare_foretold(model, few, found)


def kvquant_statistics(model, text_model, windows: list) -> dict[str, torch.Tensor]:
    counted = sum(window.shape[1] - 1 for window in windows)
    offset, scale = collect_key_ranges(model, text_model, progress(windows, "key ranges"), counted)
    levels = collect_levels(model, text_model, progress(windows, "gradients"), offset, scale)
    return {"key_offset": offset, "key_scale": scale, **levels}


def progress(windows: list, stage: str) -> tqdm:
    return tqdm(windows, desc=stage, unit="window")


if __name__ == "__main__":
    main()
