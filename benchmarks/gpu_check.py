"""What a GPU does with this package, in a few minutes and from nothing but the tree: right numbers, times, memory.

    python benchmarks/gpu_check.py --output results/gpu_check.json
    python benchmarks/gpu_check.py --dry_run          # no GPU: the launches are compiled, and numbers mean nothing

Weights and caches are random and made on the card. Each part is a process of its own with a time budget, so that what
fails, hangs or breaks the card's context costs the others nothing; it prints as it goes. Parts:

    environment   versions, the card, and its bandwidth by a copy (bytes read + written)
    kernels       quantize, dequantize and decode attention against float64, one process for each shape of heads
    models        a small Llama patched with every preset: Triton against torch on the same device
    layer         one decode step of one layer: fused, and torch's attention in bfloat16
    llama         the shape of LLaMA-3-8B, with as many layers as fit: the stock model and the patched one in turn

The exit status is the number of parts that failed, 0 for none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tree is enough, nothing need be installed

import torch

from benchmarks.gpu_check_part import Part, heads_of
from rotatekv import PRESETS
from rotatekv.errors import UserError
from rotatekv.files import write_output

if TYPE_CHECKING:
    from rotatekv.kernels.triton.dry_run import DryRun

# query heads / key/value heads × head_dim
SHAPES = ("9/3x64", "32/8x128", "32/32x128", "14/2x64", "8/1x256")
# What a layer's keys and values may look like to a kernel: benchmarks/decode_attention.py, and bits.
FORMS = ("RotateKV2", "RotateKV2+", "QuaRot2", "RTN2", "RotateKV4", "RotateKV3", "RTN4")
SHARES = {"environment": 0.07, "kernels": 0.38, "models": 0.38, "layer": 0.20, "llama": 0.35}  # of --minutes
TOGETHER = ("kernels", "models")  # most of their time is the compiler's
_GRACE = 10  # seconds beyond its budget until a part is killed


def stages(parts: list[str], shapes: list[str]) -> list[list[str]]:
    """The processes to run, those of a stage at the same time."""
    together = [f"kernels {shape}" for shape in shapes] if "kernels" in parts else []
    together += ["models"] if "models" in parts else []
    found = [[name] for name in SHARES if name in parts and name not in TOGETHER]
    place = 1 if "environment" in parts else 0
    return [*found[:place], *([together] if together else []), *found[place:]]


def run_part(part: Part) -> None:
    """The process of one part; its exit status is 1 where something failed."""
    from benchmarks import gpu_check_parts

    kind, _, shape = part.name.partition(" ")
    torch.manual_seed(0)
    dry: DryRun | nullcontext = nullcontext()
    if part.dry:
        from rotatekv.kernels.triton import dry_run

        torch.set_num_threads(1)
        dry = dry_run.DryRun(part.options.capability)
    else:
        os.environ["ROTATEKV_BACKEND"] = "triton"
    with dry, torch.no_grad(), part.case(kind):
        gpu_check_parts.PARTS[kind](part, *([shape] if shape else []))
    if not isinstance(dry, nullcontext):
        part.row(launches=dict(dry.launches), compiled=len(dry.compiled), needless=len(dry.needless()))
    sys.stdout.flush()
    os._exit(bool(part.failures))  # not the parent's clean-up; a broken CUDA context may hang in its own


def run_stage(names: list[str], options: argparse.Namespace, folder: Path) -> list[dict]:
    """Run parts at the same time, each up to its budget → what each found."""
    context, running = multiprocessing.get_context("fork"), []
    for name in names:
        seconds = 60 * options.minutes * SHARES[name.split(" ")[0]]
        part = Part(name, options, seconds, folder / f"{len(os.listdir(folder))}.jsonl")
        part.rows.touch()
        process = context.Process(target=run_part, args=(part,))
        process.start()
        running.append((part, process, time.monotonic()))
    return [_joined(*entry) for entry in running]


def _joined(part: Part, process, started: float) -> dict:
    process.join(max(started + part.seconds + _GRACE - time.monotonic(), 0))
    verdict = {0: "right", 1: "failed"}.get(process.exitcode, f"died ({process.exitcode})")
    if process.exitcode is None:
        process.kill()
        process.join()
        verdict = "killed: out of time"
    rows = [json.loads(line) for line in part.rows.read_text().splitlines()]
    found = {"part": part.name, "verdict": verdict, "seconds": round(time.monotonic() - started, 1), "rows": rows}
    print(f"== {part.name}: {verdict}, {found['seconds']} s, {len(rows)} rows", flush=True)
    return found


def table(parts: list[dict]) -> str:
    """One line a part, with its first failure."""
    lines = [f"{'part':22} {'rows':>5} {'seconds':>8}  verdict"]
    for part in parts:
        bad = [row for row in part["rows"] if row.get("verdict") in ("WRONG", "FAILED", "FELL BACK")]
        first = f": {bad[0]['case']} {bad[0].get('reason', '')}".rstrip() if bad else ""
        lines.append(f"{part['part']:22} {len(part['rows']):5} {part['seconds']:8}  {part['verdict']}{first}")
    return "\n".join(lines)


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", default=",".join(SHARES), help="comma-separated")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of kernels; models: the first, layer: two")
    parser.add_argument("--forms", default=",".join(FORMS), help="of kernels and layer")
    parser.add_argument("--presets", default=",".join(PRESETS), help="of models, and those of llama among them")
    parser.add_argument("--lengths", default="8192,32768,131072", help="of layer, cached tokens")
    parser.add_argument("--context", type=int, default=8192, help="of llama, tokens of the prompt")
    parser.add_argument("--minutes", type=float, default=5.3, help="for all parts")
    parser.add_argument("--dry_run", action="store_true", help="compile on a machine without a GPU, launch nothing")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU that --dry_run compiles for")
    parser.add_argument("--traceback", action="store_true", help="print one for each failure")
    parser.add_argument("--output", default=None, help="JSON file")
    args = parser.parse_args(argv)
    for flag, known in (("parts", SHARES), ("forms", FORMS), ("presets", PRESETS)):
        for name in getattr(args, flag).split(","):
            if name not in known:
                raise UserError(f"--{flag} {name}: choose from {', '.join(known)}")
    for shape in args.shapes.split(","):
        heads_of(shape)
    if not args.dry_run and not (torch.backends.cuda.is_built() and _has_gpu()):
        raise UserError("no CUDA GPU here: --dry_run compiles what would run on one")
    return args


def _has_gpu() -> bool:
    """Asked of the driver in another process: CUDA must not begin in the one that forks."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def check(args: argparse.Namespace) -> int:
    """Run the parts asked for → how many failed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for names in stages(args.parts.split(","), args.shapes.split(",")):
            found += run_stage(names, args, Path(folder))
            if args.output:  # after each stage: what is there stays, whatever comes
                card = next((row["card"] for part in found for row in part["rows"] if "card" in row), None)
                content = {"schema": 1, "card": card, "dry_run": args.dry_run, "argv": sys.argv[1:], "parts": found}
                write_output(Path(args.output), (json.dumps(content, indent=1) + "\n").encode())
    failed = sum(part["verdict"] != "right" for part in found)
    print(f"\n{table(found)}\n{failed} of {len(found)} parts failed", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    try:
        return check(read_flags(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
