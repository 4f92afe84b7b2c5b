"""The tables of docs/families.md, by what tests/test_families.py compares: python tests/families_table.py, a minute."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path

os.environ["ROTATEKV_BACKEND"] = "reference"

import torch
from families import FAMILIES, REFUSED, SUPPORTED
from test_families import PLAIN, RUNS, built, error, fp16_differences, patch_rotatekv2

from rotatekv import UserError, patch_model
from rotatekv.families import attention_modules, find_text_model, layer_geometry
from rotatekv.files import write_output

PAGE = Path(__file__).parent.parent / "docs/families.md"
_SHORT = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear attention"}


def layers_of(name: str) -> str:
    """Such as ``sliding, full; 2 × 16``: kinds of the layers; key heads × channels."""
    text_model = find_text_model(built(name))
    geometry = layer_geometry(next(x for x in attention_modules(text_model) if x is not None))
    window = "sliding" if getattr(text_model.config, "sliding_window", None) else "full"
    kinds = getattr(text_model.config, "layer_types", None) or [window]
    kinds = ", ".join(dict.fromkeys(_SHORT.get(kind, kind) for kind in kinds))
    return f"{kinds}; {geometry.num_key_value_heads} × {geometry.head_dim}"


def row_of(name: str, folder: Path) -> str:
    family, fp16 = FAMILIES[name], fp16_differences(name)
    prefill, rest = (f"{x:.0e}" if x else "equal" for x in (fp16.pop("prefill"), max(fp16.values())))
    rotatekv2 = max(error(name, run, partial(patch_rotatekv2, folder)).mean().item() for run in RUNS)
    kernel = f"{family.fused_layers} of {find_text_model(built(name)).config.num_hidden_layers}"
    cells = name, family.rope, layers_of(name), prefill, rest, f"{rotatekv2:.0e}", kernel
    return f"| {' | '.join(cells)} |"


def refusal_of(name: str) -> str:
    try:
        patch_model(FAMILIES[name].build(), PLAIN)
    except UserError as error:
        return f"| {name} | {FAMILIES[name].rope} | {error} |"
    raise AssertionError(f"{name} is not refused")


def tables() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        supported = [row_of(name, Path(folder)) for name in SUPPORTED]
    head = (
        "| family | RoPE | layers; key heads × channels | FP16, prefill | FP16, the rest | RotateKV2 | kernel |",
        "|---|---|---|---|---|---|---|",
    )
    refused = ["| model | RoPE | line |", "|---|---|---|", *map(refusal_of, REFUSED)]
    return {"supported": "\n".join((*head, *supported)), "refused": "\n".join(refused)}


def main() -> None:
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        page = re.sub(f"{begin}.*?{end[1:]}", lambda _: begin + table + end, page, flags=re.DOTALL)  # noqa: B023
    write_output(PAGE, page.encode())


if __name__ == "__main__":
    main()
