"""``PPL_evaluation.py --save_*``: from the flags to capture files of one window."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rotatekv.capture.files import CaptureInfo, write_capture
from rotatekv.capture.hooks import KINDS, CaptureRequest, capture_bytes, capture_window
from rotatekv.cli import add_switch, model_flags, preset_from_args
from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.evals.texts import Text, cut_windows, load_text
from rotatekv.evals.tokens import bos_of_windows, check_windows, context_length
from rotatekv.families import attention_modules, check_supported, find_text_model
from rotatekv.models.text import load_model
from rotatekv.patching.patch import build_methods, first_geometry
from rotatekv.statistics import model_slug

_COMPARED = ("rtn", "rotatekv")  # the methods of ``quantization_error``
_LARGEST = 2 * 10**9  # bytes written without --force
_HELP = {
    "k_pre_rope": "keys before RoPE",
    "k_post_rope": "keys after RoPE",
    "k_rotated": "keys after grouped-head rotation, and after reordering",
    "massive_activations": "per layer (all unless --save_layers), the largest hidden-state entries and their tokens",
    "attention_scores": "attention maps of --save_heads",
    "quantization_error": "per layer (all unless --save_layers) and token, key and value error of RTN and RotateKV",
}


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "captures", "Save tensors of one full-precision window for visualize/, and end. No other flag is needed."
    )
    for kind in KINDS:
        add_switch(group, f"save_{kind}", _HELP[kind])
    group.add_argument("--save_layers", help="layer numbers (0,7,29) or all (default: a middle layer)")
    group.add_argument("--save_heads", help="query heads (0,3) or all (default: the first of each of up to 4 KV heads)")
    group.add_argument("--save_sample", type=int, default=0, help="number of the window, from 0 (default: 0)")
    group.add_argument("--save_dir", default="save_tensors", help="default: save_tensors, a folder per model in it")
    add_switch(group, "force", "save more than 2 GB")


def wanted_kinds(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if getattr(args, f"save_{kind}"))


def save_captures(args: argparse.Namespace) -> None:
    """Run the model in full precision on one window and write what the flags ask for.

    Raises:
        UserError: a layer, head or window that is not there, over 2 GB without ``--force``, or a quantizing method.
    """
    if args.method not in (None, "FP16") or any(getattr(args, name) for name in PRESETS if name != "FP16"):
        raise UserError("captures are of the full-precision model: leave --method out, or pass --method FP16")
    if args.save_sample < 0:
        raise UserError(f"--save_sample must be at least 0, not {args.save_sample}")
    text = _text_within_reach(args)
    model, tokenizer = load_model(**model_flags(args))
    text_model = find_text_model(model)
    check_supported(text_model)
    ids = _window(model, tokenizer, text, args)
    check_windows(model, [ids], "--PPL_seq_length")
    request = _request(args, model, text_model)
    _check_size(capture_bytes(text_model, ids.shape[1], request), args.force)
    captured = capture_window(text_model, ids, request)
    folder = Path(args.save_dir) / model_slug(args.model)
    for kind, tensors in captured.items():
        info = _info(kind, args, text, tokenizer, text_model, ids, request)
        path = write_capture(folder, info, tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        print(f"{path}  {size / 1e6:.1f} MB, layers {', '.join(map(str, info.layers))}")


def _text_within_reach(args: argparse.Namespace) -> Text:
    """The text asked for; without ``--dataset``, WikiText-2, or the embedded essays where it is out of reach."""
    if args.dataset is not None or args.data_dir is not None:
        return load_text(args.dataset or "wikitext2", args.data_dir)
    try:
        return load_text("wikitext2")
    except UserError:
        text = load_text("essays")
        print(f"WikiText-2 is out of reach: capturing a window of {text.name} instead", file=sys.stderr)
        return text


def _window(model, tokenizer, text: Text, args: argparse.Namespace) -> torch.Tensor:
    windows = cut_windows(tokenizer, text, args.PPL_seq_length, context_length(model), bos_of_windows(model))
    if args.save_sample >= len(windows):
        raise UserError(
            f"{text.name} has {len(windows)} windows of {args.PPL_seq_length} tokens: "
            f"--save_sample {args.save_sample} is not one of them"
        )
    return windows[args.save_sample]


def _request(args: argparse.Namespace, model, text_model) -> CaptureRequest:
    kinds, first = wanted_kinds(args), first_geometry(text_model)
    known = [number for number, attention in enumerate(attention_modules(text_model)) if attention is not None]
    layers = _numbers("save_layers", args.save_layers, known, [known[len(known) // 2]])
    count, key_heads = text_model.config.num_attention_heads, first.num_key_value_heads
    first_heads = range(0, min(4, key_heads) * (count // key_heads), count // key_heads)
    heads = _numbers("save_heads", args.save_heads, range(count), first_heads)
    everywhere = tuple(known) if args.save_layers is None else layers
    rotation: tuple = ()
    codecs: dict[str, tuple] = {}
    if "k_rotated" in kinds:
        config = _config(args, "RotateKV2")[1]
        if not config.Grouped_Head_Key_Rotation:
            raise UserError(
                "--save_k_rotated saves keys that are rotated before RoPE, which --Grouped_Head_Key_Rotation False "
                "does not do: pass --head_group_num 1 for single heads"
            )
        rotation = build_methods(model, text_model, config, args.calibration_file)
    if "quantization_error" in kinds:
        for preset in PRESETS:
            if PRESETS[preset].method in _COMPARED:
                name, config = _config(args, preset)
                codecs[name] = build_methods(model, text_model, config, args.calibration_file)
    return CaptureRequest(kinds, layers, everywhere, heads, rotation, codecs)


def _config(args: argparse.Namespace, preset: str) -> tuple[str, QuantConfig]:
    """A preset with the flags that override it, but its own bits; its name has a ``*`` where a flag changed it."""
    rest = {name: None for name in PRESETS} | {"method": preset, "k_bits": None, "v_bits": None}
    rest["num_sink_entries"] = None  # the sinks are found once, for all methods
    if PRESETS[preset].method == "rtn":  # rotates nothing
        rest |= {name: None for name in ("head_group_num", "Grouped_Head_Key_Rotation", "Outlier_Aware_Key_Rotation")}
    return preset_from_args(argparse.Namespace(**{**vars(args), **rest}))


def _numbers(flag: str, asked: str | None, known: Sequence[int], default: Sequence[int]) -> tuple[int, ...]:
    if asked is None:
        return tuple(default)
    if asked == "all":
        return tuple(known)
    try:
        numbers = sorted({int(part) for part in asked.split(",")})
    except ValueError:
        raise UserError(f"--{flag} takes numbers separated by commas, or all, not {asked!r}") from None
    if not set(numbers) <= set(known):
        has = f"0 … {len(known) - 1}" if len(known) == known[-1] + 1 else ", ".join(map(str, known))
        raise UserError(f"--{flag} {asked}: the model has {has}")
    return tuple(numbers)


def _check_size(sizes: dict[str, int], force: bool) -> None:
    total = sum(sizes.values())
    if total > _LARGEST and not force:
        parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sizes.items())
        raise UserError(
            f"that is {total / 1e9:.2f} GB ({parts}): ask for fewer --save_layers or --save_heads, or pass --force"
        )


def _info(kind, args, text: Text, tokenizer, text_model, ids: torch.Tensor, request: CaptureRequest) -> CaptureInfo:
    geometry = first_geometry(text_model)
    every_head = tuple(range(text_model.config.num_attention_heads))
    return CaptureInfo(
        kind=kind,
        model=args.model,
        text=text.name,
        text_sha256=text.sha256,
        window=args.save_sample,
        tokens=ids.shape[1],
        layers=request.layers_of(kind),
        heads=request.heads if kind == "attention_scores" else every_head,
        num_attention_heads=len(every_head),
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
        heads_per_group=request.rotation[0].heads_per_group if request.rotation else 1,
        token_texts=tuple(tokenizer.decode([token]) for token in ids[0].tolist()),
    )
