"""Make the reorder indices of a model: the argsort of its summed, rotated pre-RoPE keys over a calibration text."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from rotatekv import QuantConfig, load_model
from rotatekv.calibration import collect_key_sums, indices_from_key_sums, model_slug, save_reorder_indices
from rotatekv.cli import add_model_arguments, check_positive, exit_on_user_error, make_parser, model_flags
from rotatekv.errors import UserError
from rotatekv.evals.texts import load_text, tokenize, windows_of
from rotatekv.models import ALIASES, model_revision
from rotatekv.patch import check_supported, find_text_model, resolved_head_group


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_arguments(parser)
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
    parser.add_argument("--seq_length", type=int, default=2048, help="tokens per window (default: 2048)")
    parser.add_argument(
        "--head_group_num", type=int, default=4, help="key heads rotated together, at most (default: 4)"
    )
    parser.add_argument("--output", help="file to write (default: reorder_indices/<model>.safetensors)")
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
    output = (
        Path(args.output)
        if args.output
        else Path("reorder_indices") / f"{model_slug(ALIASES.get(args.model, args.model))}.safetensors"
    )
    check_output(output, args.overwrite)
    config = QuantConfig(head_group_num=args.head_group_num)
    text = load_text(args.dataset, args.data_dir, calibration=True)
    model, tokenizer = load_model(**model_flags(args))
    text_model = find_text_model(model)
    check_supported(text_model)
    group = resolved_head_group(text_model, config)
    ids = tokenize(tokenizer, text)[:, : args.calibration_tokens]
    if not ids.numel():
        raise UserError(f"the text {args.dataset} has no tokens")
    length = min(args.seq_length, ids.shape[1])
    windows = list(windows_of(ids, length))

    key_sums = collect_key_sums(model, text_model, tqdm(windows, desc="calibrate", unit="window"))
    width = group * text_model.layers[0].self_attn.head_dim
    indices = indices_from_key_sums(key_sums, width)
    metadata = {
        "model": model.name_or_path, "revision": model_revision(model) or "none", "head_group_num": group,
        "order": width, "dataset": text.name, "dataset_sha256": text.sha256, "tokens": length * len(windows),
    }  # fmt: skip
    path = save_reorder_indices(output, indices, metadata)
    layers, channels = indices.shape
    print(f"{path}: {layers} layers × {channels} channels, {group} heads per group")
    print(f"calibrated on {metadata['tokens']} tokens of {text.name}")


if __name__ == "__main__":
    main()
