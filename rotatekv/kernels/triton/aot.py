"""Compile the kernels for GPUs that are not here and read what they take: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatekv.kernels.triton.attention import exact_kernel, merge_kernel, split_kernel
from rotatekv.kernels.triton.dequantize import PRECISION, dequantize_kernel
from rotatekv.kernels.triton.launch import shape_constants
from rotatekv.kernels.triton.plan import factor, power_of_two
from rotatekv.kernels.triton.quantize import quantize_kernel

_POINTERS = {
    "*i32": ("low", "key_low", "value_low", "order", "group_of_channel", "exact_lanes", "first", "columns"),
    "*fp16": ("scale", "scales", "key_scale", "value_scale", "exact_keys", "exact_values"),
    "*i8": ("zero", "zeros", "key_zero", "value_zero"),
    "*i64": ("offsets",),
    "*fp32": ("x", "queries", "left", "right", "partner", "coarse_cos", "coarse_sin", "fine_cos", "fine_sin", "parts",
              "tops", "totals", "out"),
    "fp32": ("clip", "factor", "attention_scaling", "norm"),
}  # fmt: skip
_TYPES = {name: kind for kind, names in _POINTERS.items() for name in names}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target.

    Attributes:
        registers: per thread. spills: bytes of stores and loads. shared: bytes per block, Triton's and static.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class ModelShape:
    """What a model's kernels are specialized for; repeat is H / H_kv."""

    kv_heads: int
    head_dim: int
    rotation_width: int
    repeat: int
    bits: int = 2
    query_tokens: int = 1
    unrotate_values: bool = True


def measure(shape: ModelShape, capability: int) -> list[Usage]:
    """All kernels of one model, compiled for sm_``capability``."""
    return [_compile(*job, shape.bits, capability) for job in _jobs(shape)]


def _jobs(shape: ModelShape) -> list[tuple]:
    """(kernel, constexprs, warps, other options) of each launch, as launch.py and its neighbours make them."""
    dim, channels, half = shape.head_dim, shape.kv_heads * shape.head_dim, shape.head_dim // 2
    plan = factor(shape.rotation_width, dim)
    attention = {"C": channels, **shape_constants(plan, shape.repeat, shape.query_tokens, half)}
    packed = {"KEY_GROUPS": shape.kv_heads, "VALUE_GROUPS": shape.kv_heads, "KEY_BITS": shape.bits,
              "VALUE_BITS": shape.bits, "EXACT": True}  # fmt: skip
    wide = factor(shape.rotation_width, dim, half)
    dequantize = {"C": channels, "GROUPS": shape.kv_heads, "BITS": shape.bits, "HALF": half,
                  "PRECISION": PRECISION, **wide.constants()}  # fmt: skip
    head = factor(dim if shape.unrotate_values else 0, dim)
    quantize = {"C": channels, "GROUP": dim, "GROUP_PAD": power_of_two(dim), "BITS": shape.bits, "ORDERED": True}
    return [
        (quantize_kernel, quantize, 4, {"enable_fp_fusion": False}),
        (dequantize_kernel, dequantize, wide.warps, {}),
        (split_kernel, {**packed, **attention}, plan.warps, {}),
        (exact_kernel, attention, plan.warps, {}),
        (merge_kernel, {**head.constants(), "PRECISION": PRECISION}, 4, {}),
    ]


def _compile(kernel, constants: dict, warps: int, options: dict, bits: int, capability: int) -> Usage:
    names = kernel.arg_names
    given = {name: value for name, value in constants.items() if name in names}
    high = "*i16" if bits == 3 else "*i32"
    types = {name: _TYPES.get(name, high if name.endswith("high") else "i32") for name in names}
    signature = {name: "constexpr" if name in given else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, given, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})
    registers, spills, static = _assemble(compiled.asm["ptx"], capability)
    return Usage(kernel.__name__, capability, warps, registers, spills, compiled.metadata.shared + static)


def _assemble(ptx: str, capability: int) -> tuple[int, int, int]:
    """``ptxas -v``: registers per thread, spilled bytes, static shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    architecture = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"-arch={architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    stack = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", said))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    static = sum(int(n) for n in re.findall(r"(\d+) bytes smem", said))
    return registers, spills + stack, static
