"""The flags all scripts share."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import NoReturn

from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.external import EXTERNAL, ExternalConfig
from rotatekv.models.text import ALIASES, DTYPES, EMBEDDED_MODEL, GEMMA_MODEL

DEFAULT_METHOD = "RotateKV2"
METHOD_NAMES = (*PRESETS, *EXTERNAL)
_TYPES = {"int": int, "float": float, "str": str}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class _ShortHelp(argparse.RawDescriptionHelpFormatter):
    """Shows a flag's value as N or X where it is a number, else by the last word of the flag's name."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        numbers: dict = {int: "N", float: "X"}
        return numbers.get(action.type, action.dest.rpartition("_")[2].upper())


def make_parser(description: str) -> argparse.ArgumentParser:
    return _OneLineParser(description=description, allow_abbrev=False, formatter_class=_ShortHelp)


def evaluation_parser(description: str, limit_unit: str, model: str = EMBEDDED_MODEL) -> argparse.ArgumentParser:
    """The flags every evaluation has; ``limit_unit`` is what ``--limit`` counts, ``model`` the default model."""
    parser = make_parser(description)
    add_model_arguments(parser, model)
    add_method_arguments(parser)
    add_run_arguments(parser, limit_unit)
    return parser


def str2bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def add_switch(parser, name: str, help: str, default: bool | None = False) -> None:
    """``--name``, ``--name True`` or ``--name False``."""
    # AUTHORS: type=bool there makes "--FP16 False" true.
    options = {"type": str2bool, "nargs": "?", "const": True, "metavar": "True|False"}
    parser.add_argument(f"--{name}", default=default, help=help, **options)


def add_model_arguments(parser: argparse.ArgumentParser, default: str = EMBEDDED_MODEL) -> None:
    group = parser.add_argument_group("model")
    names = f"{EMBEDDED_MODEL} (embedded), {GEMMA_MODEL} (make gemma), {', '.join(ALIASES)}, "
    names = names if default == EMBEDDED_MODEL else ""
    group.add_argument("--model", default=default, help=f"{names}a Hub id or a local folder (default: {default})")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help=f"default: auto, the checkpoint's own ({EMBEDDED_MODEL}, {GEMMA_MODEL}: float32 on a CPU, else bfloat16)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    group.add_argument("--device_map", choices=["auto"], help="auto spreads the layers over all GPUs")
    group.add_argument("--attn_implementation", default="sdpa", help="sdpa (default) or eager")


def model_flags(args: argparse.Namespace) -> dict:
    """What ``load_model`` takes of the flags ``add_model_arguments`` added."""
    names = ("dtype", "device", "device_map", "attn_implementation")
    return {"name": args.model, **{name: getattr(args, name) for name in names}}


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method", "A preset, then flags that override it.")
    names = f"{', '.join(PRESETS)} (default: {DEFAULT_METHOD}), or transformers' own cache: {', '.join(EXTERNAL)}"
    group.add_argument("--method", metavar="NAME", help=f"one of {names}; a preset is also a flag, --{DEFAULT_METHOD}")
    for name in PRESETS:
        add_switch(group, name, argparse.SUPPRESS)
    group.add_argument(
        "--calibration_file",
        help="what calibrate_reorder.py made for the method (default: reorder_indices/<model>.safetensors; "
        "KVQuant: <model>.kvquant.safetensors, RotateKV+: <model>.plus.safetensors)",
    )
    for choice in fields(QuantConfig):
        if "help" not in choice.metadata:
            continue
        usual = getattr(PRESETS[DEFAULT_METHOD], choice.name)
        default = "head_dim" if usual is None else f"the preset's; {DEFAULT_METHOD}: {usual}"
        text, kind = f"{choice.metadata['help']} (default: {default})", choice.type.split(" ")[0]
        if kind == "bool":
            add_switch(group, choice.name, text, default=None)
        else:
            group.add_argument(f"--{choice.name}", type=_TYPES[kind], help=text)


def add_run_arguments(parser: argparse.ArgumentParser, limit_unit: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    group.add_argument("--data_dir", help="folder with local data sets (default: the Hub)")
    group.add_argument("--limit", type=int, help=f"only the first N {limit_unit} (default: all)")
    group.add_argument("--output_dir", default="results", help="default: results")
    group.add_argument("--resume", action="store_true", help="go on with this run where it stopped")
    group.add_argument("--overwrite", action="store_true", help="start this run anew")
    group.add_argument(
        "--rescore", metavar="DIR", help="score the samples in this run's folder again, without a model, and end"
    )


def method_from_args(args: argparse.Namespace) -> tuple[str, QuantConfig | ExternalConfig]:
    """The preset's name (``*`` behind it where a flag changed it) and the config.

    Raises:
        UserError: an unknown method, two of them, a value out of range, or an external one that is not installed.
    """
    chosen = [name for name in PRESETS if getattr(args, name)]
    if args.method is not None:
        chosen.append(args.method)
    if len(set(chosen)) > 1:
        raise UserError(f"two methods at once: {' and '.join(dict.fromkeys(chosen))}; choose one")
    name = chosen[0] if chosen else DEFAULT_METHOD
    if name not in METHOD_NAMES:
        raise UserError(f"unknown method {name!r}: choose one of {', '.join(METHOD_NAMES)}")
    preset: QuantConfig | ExternalConfig = PRESETS[name] if name in PRESETS else EXTERNAL[name]
    flags = {field.name: getattr(args, field.name, None) for field in fields(QuantConfig)}
    given: dict = {key: value for key, value in flags.items() if value is not None and key != "method"}
    if isinstance(preset, ExternalConfig):
        preset.package_version()
        if foreign := sorted(set(given) - {"residual_length"}):
            raise UserError(f"{name} is HF's own cache: leave out --{', --'.join(foreign)}")
    config = replace(preset, **given)
    return (name if config == preset else f"{name}*"), config


def preset_from_args(args: argparse.Namespace) -> tuple[str, QuantConfig]:
    """As ``method_from_args``, where the model is patched or calibrated.

    Raises:
        UserError: as there, or transformers' own cache was chosen.
    """
    name, config = method_from_args(args)
    if isinstance(config, ExternalConfig):
        raise UserError(f"{name} runs the unpatched model and is not taken here: choose a preset")
    return name, config


def methods_from_args(args: argparse.Namespace) -> dict[str, QuantConfig]:
    """``--methods``, each with the flags that override a preset; without it the one method of ``--method``."""
    found = _methods_from_args(args)
    methods = {name: config for name, config in found.items() if isinstance(config, QuantConfig)}
    if outside := [name for name in found if name not in methods]:
        raise UserError(f"{', '.join(outside)} runs the unpatched model and is not measured here: choose presets")
    return methods


def _methods_from_args(args: argparse.Namespace) -> dict[str, QuantConfig | ExternalConfig]:
    if args.methods is None:
        return dict([method_from_args(args)])
    if args.method is not None:
        raise UserError("give --methods or --method, not both")
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    if not names:
        raise UserError("--methods needs presets: NAME,NAME")
    return dict(method_from_args(argparse.Namespace(**{**vars(args), "method": name})) for name in names)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
