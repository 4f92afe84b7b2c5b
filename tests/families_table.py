"""The tables of docs/families.md, by what tests/test_families.py compares: python tests/families_table.py, a minute."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from families import FAMILIES, MORE, REFUSED, SUPPORTED, find_decoder
from test_families import PAGE, PLAIN, RUNS, built, error, family_of, fp16_differences, patch_rotatekv2

from rotatekv import UserError, patch_model
from rotatekv.families import find_text_model
from rotatekv.files import write_output
from rotatekv.patching.patch import first_geometry

_SHORT = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}


def layers_of(name: str) -> list[str]:
    config = find_decoder(built(name)).config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding" if getattr(config, "sliding_window", None) else "full"] * config.num_hidden_layers
    return [_SHORT.get(kind, kind) for kind in kinds]


def rope_of(name: str) -> str:
    """RoPE type, how much of a head it turns, which channels it pairs, and layers without."""
    family, rotary = family_of(name), find_decoder(built(name)).rotary_emb
    types = getattr(rotary, "rope_type", "default")
    found = [" and ".join(dict.fromkeys(types.values())) if isinstance(types, dict) else types]
    half = next(buffer for buffer_name, buffer in rotary.named_buffers() if buffer_name.endswith("inv_freq"))
    turned = Fraction(2 * len(half), first_geometry(find_text_model(built(name))).head_dim)
    found += [f"{turned} of a head"] * (turned < 1) + ["interleaved"] * family.interleaved
    return ", ".join(found + [f"none in layer {number}" for number in family.no_rope])


def row_of(name: str, folder: Path, runs: Iterable[str]) -> list[str]:
    fp16 = fp16_differences(name)
    prefill, rest = (f"{x:.0e}" if x else "equal" for x in (fp16.pop("prefill"), max(fp16.values())))
    rotatekv2 = max(error(name, run, partial(patch_rotatekv2, folder)).mean().item() for run in runs)
    geometry = first_geometry(find_text_model(built(name)))
    layers, heads = ", ".join(layers_of(name)), f"{geometry.num_key_value_heads} × {geometry.head_dim}"
    return [name, rope_of(name), layers, heads, prefill, rest, f"{rotatekv2:.0e}"]


def refusal_of(name: str) -> list[str]:
    try:
        patch_model(FAMILIES[name].build(), PLAIN)
    except UserError as error:
        return [name, str(error)]
    raise AssertionError(f"{name} is not refused")


def table(head: str, rows: Iterable[list[str]]) -> str:
    names = head.split(", ")
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))


def main() -> None:
    os.environ["ROTATEKV_BACKEND"] = "reference"
    torch.set_num_threads(1)
    head = "family, RoPE, layers, key heads, FP16 prefill, FP16 after it, RotateKV2"
    with tempfile.TemporaryDirectory() as folder:
        rows = [[*row_of(name, Path(folder), RUNS), f"{FAMILIES[name].fused_layers} of 2"] for name in SUPPORTED]
        more = [row_of(name, Path(folder), ["padded chunks"]) for name in MORE]
    refused = [refusal_of(name) for name in REFUSED]
    tables = {
        "supported": table(f"{head}, kernel", rows),
        "more": table(head, more),
        "refused": table("model, line", refused),
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        page = re.sub(f"(?<={begin}\n).*?(?={end})", text.replace("\\", r"\\") + "\n", page, flags=re.DOTALL)
    write_output(PAGE, page.encode())


if __name__ == "__main__":
    main()
