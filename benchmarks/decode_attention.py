"""One decode step of one layer's attention: the fused kernel over a packed cache against torch over a full one.

Beside it, the write of one token: its key's RoPE undone, key and value rotated, quantized and packed into blocks.

    python benchmarks/decode_attention.py --lengths 8192,32768,131072 --output results/decode_attention.csv

All ways run in turn in one process on ``torch.get_num_threads()`` threads, so that whatever else the machine does
hits them alike; a row gives the 20th, 50th and 80th percentile of milliseconds. ``bandwidth`` is a copy of 1 GiB in
the same run (bytes read + written); a way's GB/s counts the bytes of K and V it must read.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import repeat_kv

from rotatekv.evals import results
from rotatekv.kernels import cpu
from rotatekv.kernels.cpu.build import chosen_instruction_set
from rotatekv.kernels.decode_attention import DecodeOptions
from rotatekv.kernels.layout import BLOCK, Blocks, allocate_blocks
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import GROUP, STEPS, Transform, allocate_planes

# name: query heads, key/value heads, head_dim, heads per rotation group
SHAPES = {"smollm2": (9, 3, 64, 3), "llama-8x128": (32, 8, 128, 4)}


def fused_step(
    shape: tuple[int, int, int, int], tokens: int, bits: int, method: str = "RotateKV", kernels=cpu, device="cpu"
) -> tuple[Callable, int]:
    """The packed decode step of random codes, and the bytes of its keys and values.

    Args:
        method: whose form: ``RotateKV``; ``QuaRot``, heads rotated alone after RoPE; ``RTN``, not rotated.
        kernels: the package of kernels that serves the device.
    """
    heads, kv_heads, dim, group_heads = shape
    channels = kv_heads * dim
    packed = []
    for _ in range(2):
        blocks = allocate_blocks(1, -(-tokens // BLOCK), channels, kv_heads, bits, device)
        for name in ("low", "high"):
            if name in blocks:
                limit = torch.iinfo(blocks[name].dtype)
                blocks[name].random_(limit.min, limit.max)
        blocks["scale"].uniform_(0.5, 1.0)
        blocks["zero"].random_(0, 2**bits)
        packed.append(blocks)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    rope = RopeTables.build(frequencies, tokens).to(device) if method == "RotateKV" else None
    width = {"QuaRot": dim, "RTN": 0}.get(method, group_heads * dim)
    draw = partial(torch.randn, device=device)
    options = DecodeOptions(dim, bits, bits, dim**-0.5, width, rope, width > 0)
    group_of_channel = (torch.randperm(channels, device=device) // dim).int()
    queries, first = draw(1, heads, 1, dim), torch.zeros(1, dtype=torch.int32, device=device)
    size = sum(x.nbytes for blocks in packed for x in blocks.values())
    step = (queries, *packed, group_of_channel, first, first, tokens, tokens, options)
    return lambda: kernels.decode_attention(*step), size


def plus_step(
    shape: tuple[int, int, int, int],
    tokens: int,
    key_bits: tuple[int, ...],
    value_bits: int = 2,
    kernels=cpu,
    device="cpu",
) -> tuple[Callable, int]:
    """The packed decode step over transform-coded keys and values of random codes, and the bytes of both.

    Args:
        key_bits: of a head's groups of components, over and over.
        kernels: the package of kernels that serves the device.
    """
    heads, kv_heads, dim, _ = shape
    of_keys = random_transform(kv_heads, dim, key_bits)
    of_values = replace(random_transform(kv_heads, dim, (value_bits,)), words_of_tokens=False)
    of_keys, of_values = (transform.on(torch.device(device)) for transform in (of_keys, of_values))
    packed = []
    for transform in (of_keys, of_values):
        planes = Blocks(allocate_planes(transform, 1, -(-tokens // BLOCK), torch.device(device)))
        for name in ("pairs", "singles"):
            limit = torch.iinfo(planes[name].dtype)
            planes[name].random_(limit.min, limit.max)
        planes["scale"].random_(120, 136)  # 0.5 … 2
        packed.append(planes)
    rope = RopeTables.build(10000.0 ** (-torch.arange(0, dim, 2) / dim), tokens).to(device)
    options = DecodeOptions(dim, 0, 0, dim**-0.5, rope=rope, key_transform=of_keys, value_transform=of_values)
    first = torch.zeros(1, dtype=torch.int32, device=device)
    step = (torch.randn(1, heads, 1, dim, device=device), *packed, None, first, first, tokens, tokens, options)
    size = sum(x.nbytes for planes in packed for x in planes.values())
    return lambda: kernels.decode_attention(*step), size


def random_transform(kv_heads: int, dim: int, bits: tuple[int, ...]) -> Transform:
    """A random map to components for which 4, 2, 1 and 1 bits are best; a tenth of the mean's channels are large."""
    of_group = torch.tensor(bits).repeat(-(-dim // (GROUP * len(bits))))[: dim // GROUP].repeat(kv_heads, 1)
    rotation = torch.linalg.qr(torch.randn(kv_heads, dim, dim))[0]
    spread = torch.tensor([3.0, 1.0, 0.63, 0.63]).repeat_interleave(GROUP).repeat(dim // GROUP)[:dim]
    deviation = spread * torch.tensor(STEPS)[of_group].repeat_interleave(GROUP, 1)
    mean = torch.randn(kv_heads, dim) * torch.where(torch.rand(dim) < 0.1, 10.0, 1.0)
    return Transform(rotation / deviation.unsqueeze(-1), mean, of_group, torch.ones(of_group.shape))


def plus_write_step(shape: tuple[int, int, int, int], key_bits: tuple[int, ...]) -> tuple[Callable, int]:
    """Writes one block's 16 tokens' keys and values as RotateKV+ does, and its bytes."""
    _, kv_heads, dim, _ = shape
    transforms = random_transform(kv_heads, dim, key_bits), random_transform(kv_heads, dim, (2,))
    transforms = transforms[0], replace(transforms[1], words_of_tokens=False)
    heads = torch.randn(1, BLOCK, kv_heads, dim).transpose(1, 2)
    planes = [Blocks(allocate_planes(transform, 1, 1, heads.device)) for transform in transforms]
    turns = tuple(torch.randn(1, BLOCK, dim // 2) for _ in range(4))

    def write() -> None:
        for transform, packed, of in zip(transforms, planes, (turns, None), strict=True):
            cpu.quantize_into_frames(heads, packed, 0, transform, of)

    return write, sum(x.nbytes for packed in planes for x in packed.values())


def write_step(shape: tuple[int, int, int, int], bits: int) -> tuple[Callable, int]:
    """Writes one token's key and value as RotateKV does, and the bytes of a block's 16 tokens."""
    _, kv_heads, dim, group_heads = shape
    channels = kv_heads * dim
    heads = torch.randn(1, 1, kv_heads, dim).transpose(1, 2)
    keys, values = (allocate_blocks(1, 1, channels, kv_heads, bits) for _ in range(2))
    order, unrope = torch.randperm(channels).int(), (torch.randn(1, 1, dim // 2), torch.randn(1, 1, dim // 2))

    def write() -> None:
        cpu.quantize_into_blocks(heads, keys, 5, bits, dim, 0.9, order, group_heads * dim, unrope)
        cpu.quantize_into_blocks(heads, values, 5, bits, dim, 0.9, None, dim)

    return write, sum(x.nbytes for blocks in (keys, values) for x in blocks.values())


def torch_steps(shape: str, tokens: int) -> dict[str, tuple[Callable, int]]:
    """Torch over post-RoPE keys and values in full: name → step, bytes."""
    heads, kv_heads, dim, _ = SHAPES[shape]
    q = torch.randn(1, heads, 1, dim, dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, tokens, dim, dtype=torch.bfloat16) for _ in range(2))
    in_float32 = [x.float() for x in (q, k, v)]
    sdpa, repeat = torch.nn.functional.scaled_dot_product_attention, heads // kv_heads
    size = k.nbytes + v.nbytes

    def repeated(q: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        """As transformers does where it does not hand ``enable_gqa`` on."""
        return sdpa(q, *(repeat_kv(x, repeat) for x in kv))

    return {
        "sdpa bf16": (lambda: sdpa(q, k, v, enable_gqa=True), size),
        "sdpa bf16 repeat_kv": (lambda: repeated(q, k, v), size),
        "sdpa fp32": (lambda: sdpa(*in_float32, enable_gqa=True), 2 * size),
        "sdpa fp32 repeat_kv": (lambda: repeated(*in_float32), 2 * size),
        "grouped bf16 matmul": (lambda: grouped_attention(q, k, v), size),
    }


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The fastest way found in torch: the query heads of a key/value head are the rows of one matmul."""
    dim = q.shape[-1]
    rows = q[0, :, 0].view(k.shape[1], -1, dim)  # (H_kv, H / H_kv, D)
    scores = rows @ k[0].transpose(1, 2) * dim**-0.5  # (H_kv, H / H_kv, T)
    return (torch.softmax(scores.float(), -1).to(v.dtype) @ v[0]).view(q.shape)


def milliseconds(steps: dict[str, Callable], seconds: float, least: int) -> dict[str, list[float]]:
    """Times of each step, run in turn until ``seconds`` are over and each ran ``least`` times; by round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def environment() -> dict[str, str | int]:
    found = results.environment()
    return {
        "device": cpu_name(),
        "threads": found["threads"],
        "instruction_set": chosen_instruction_set(),
        "torch": found["torch"],
        "python": found["python"],
        "commit": (found["git_commit"] or "")[:7],
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def row_of(shape: str, tokens: int, way: str, times: list[float], size: int) -> dict:
    p20, p50, p80 = (percentile(times, share) for share in (0.2, 0.5, 0.8))
    return {
        "shape": shape,
        "tokens": tokens,
        "way": way,
        "p20_ms": f"{p20:.4f}",
        "p50_ms": f"{p50:.4f}",
        "p80_ms": f"{p80:.4f}",
        "runs": len(times),
        "megabytes": f"{size / 1e6:.2f}",
        "GB/s": f"{size / p50 / 1e6:.2f}",
    }


def bandwidth_row() -> dict:
    source, target = torch.ones(2**28), torch.empty(2**28)  # 1 GiB each
    times = milliseconds({"copy": lambda: target.copy_(source)}, 1.0, 5)["copy"]
    return row_of("-", 0, "bandwidth", times, source.nbytes + target.nbytes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--lengths", default="8192,32768,131072", help="cached tokens")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape and length")
    parser.add_argument("--fused_only", action="store_true", help="without torch's ways")
    parser.add_argument("--output", default=None, help="csv file")
    args = parser.parse_args(argv)
    if not cpu.available():
        return 2
    rows = [bandwidth_row() | {"by_fused": ""}]
    for shape in args.shapes.split(","):
        for tokens in map(int, args.lengths.split(",")):
            fused = {f"fused {args.bits}-bit": fused_step(SHAPES[shape], tokens, args.bits)}
            fused["RotateKV+, keys 2 bits"] = plus_step(SHAPES[shape], tokens, (2,))
            fused["RotateKV+, keys 4 2 1 1"] = plus_step(SHAPES[shape], tokens, (4, 2, 1, 1))
            fused["write of one token"] = write_step(SHAPES[shape], args.bits)
            fused["RotateKV+, write of 16"] = plus_write_step(SHAPES[shape], (4, 2, 1, 1))
            steps = fused if args.fused_only else {**fused, **torch_steps(shape, tokens)}
            times = milliseconds({name: step for name, (step, _) in steps.items()}, args.seconds, 5)
            first = next(iter(times.values()))
            for name, found in times.items():
                ratio = percentile([a / b for a, b in zip(found, first, strict=True)], 0.5)  # of the same round
                rows.append(row_of(shape, tokens, name, found, steps[name][1]) | {"by_fused": f"{ratio:.2f}"})
                print(f"{shape:12} {tokens:7} {name:20} {percentile(found, 0.5):9.3f} ms  {ratio:6.2f}×", flush=True)
    machine = environment()
    rows = [{**row, **machine} for row in rows]
    print(f"bandwidth of a copy: {rows[0]['GB/s']} GB/s; {machine}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
