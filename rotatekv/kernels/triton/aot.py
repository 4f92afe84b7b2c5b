"""Compile the kernels for GPUs that are not here and read what they take: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rotatekv.kernels.triton.attention import exact_kernel, merge_kernel, split_kernel
from rotatekv.kernels.triton.dequantize import PRECISION, dequantize_kernel
from rotatekv.kernels.triton.launch import STAGES, shape_constants
from rotatekv.kernels.triton.plan import factor, power_of_two
from rotatekv.kernels.triton.quantize import quantize_kernel

_POINTERS = {
    "*i32": ("low", "key_low", "value_low", "order", "group_of_channel", "exact_lanes", "first", "columns"),
    "*fp16": ("scale", "scales", "key_scale", "value_scale", "exact_keys", "exact_values"),
    "*i8": ("zero", "zeros", "key_zero", "value_zero"),
    "*i64": ("offsets",),
    "*fp32": ("x", "queries", "left", "right", "partner", "coarse_cos", "coarse_sin", "fine_cos", "fine_sin", "parts",
              "tops", "totals", "out", "key_factor", "key_offset"),
    "fp32": ("clip", "factor", "attention_scaling", "norm", "offset_norm"),
}  # fmt: skip
_TYPES = {name: kind for kind, names in _POINTERS.items() for name in names}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target.

    Attributes:
        registers: per thread. spills: bytes of stack and local memory per thread. shared: bytes per block.
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
    plus: bool = False  # scales in the fine format, keys with factors and offsets


def measure(shape: ModelShape, capability: int) -> list[Usage]:
    """All kernels of one model, compiled for sm_``capability``."""
    return [_compile(*job, shape, capability) for job in _jobs(shape)]


def _jobs(shape: ModelShape) -> list[tuple]:
    """(kernel, constexprs, warps, other options) of each launch, as launch.py and its neighbours make them."""
    dim, channels, half = shape.head_dim, shape.kv_heads * shape.head_dim, shape.head_dim // 2
    plan = factor(shape.rotation_width, dim)
    attention = {"C": channels, "AFFINE": shape.plus, **shape_constants(plan, shape.repeat, shape.query_tokens, half)}
    packed = {"KEY_GROUPS": shape.kv_heads, "VALUE_GROUPS": shape.kv_heads, "KEY_BITS": shape.bits,
              "VALUE_BITS": shape.bits, "EXACT": True}  # fmt: skip
    wide = factor(shape.rotation_width, dim, half)
    dequantize = {"C": channels, "GROUPS": shape.kv_heads, "BITS": shape.bits, "HALF": 0 if shape.plus else half,
                  "AFFINE": shape.plus, "PRECISION": PRECISION, **wide.constants()}  # fmt: skip
    head = factor(dim if shape.unrotate_values else 0, dim)
    quantize = {
        "C": channels,
        "GROUP": dim,
        "GROUP_PAD": power_of_two(dim),
        "BITS": shape.bits,
        "ORDERED": not shape.plus,
    }
    return [
        (quantize_kernel, quantize, 4, {"enable_fp_fusion": False}),
        (dequantize_kernel, dequantize, wide.warps, {}),
        (split_kernel, {**packed, **attention}, plan.warps, {"num_stages": STAGES}),
        (exact_kernel, attention, plan.warps, {"num_stages": STAGES}),
        (merge_kernel, {**head.constants(), "PRECISION": PRECISION}, 4, {}),
    ]


def _compile(kernel, constants: dict, warps: int, options: dict, shape: ModelShape, capability: int) -> Usage:
    names = kernel.arg_names
    given = {name: value for name, value in constants.items() if name in names}
    high = "*i16" if shape.bits == 3 else "*i32"
    types = {name: _TYPES.get(name, high if name.endswith("high") else "i32") for name in names}
    if shape.plus:
        types |= dict.fromkeys(("scale", "scales", "key_scale", "value_scale"), "*u8")
    signature = {name: "constexpr" if name in given else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, given, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(kernel.__name__, capability, warps, registers, spills, compiled.metadata.shared)


def _resources(binary: bytes) -> tuple[int, int]:
    """``cuobjdump -res-usage``: registers per thread, and bytes of stack and local memory, where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(binary)
        command = [str(tool), "-res-usage", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


MODELS = {
    "smollm2": ModelShape(3, 64, 192, 3),
    "8x128": ModelShape(8, 128, 512, 4),
    "smollm2, 3 bits, 4 queries": ModelShape(3, 64, 192, 3, bits=3, query_tokens=4),
    "8x128, 4 bits, 4 queries": ModelShape(8, 128, 512, 4, bits=4, query_tokens=4),
    "4x96, 3 bits": ModelShape(4, 96, 384, 2, bits=3),
    "smollm2, plus": ModelShape(3, 64, 192, 3, plus=True),
    "8x128, plus": ModelShape(8, 128, 512, 4, plus=True),
}

if __name__ == "__main__":  # python -m rotatekv.kernels.triton.aot smollm2 80
    for usage in measure(MODELS[sys.argv[1]], int(sys.argv[2])):
        print(*vars(usage).values(), sep=",")
