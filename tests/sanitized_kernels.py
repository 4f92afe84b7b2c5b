"""Runs the kernels on tensors that fill their memory exactly; started under sanitizers by test_cpu_kernels.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from frame_cases import FrameShape, FrameWrite, random_frame_write, random_frames_step
from kernel_cases import Shape, Write, random_bands, random_planes, random_step, random_write

from rotatekv.kernels import cpu
from rotatekv.kernels.cpu.build import load_library
from rotatekv.kernels.layout import allocate_blocks

SHAPES = [
    Shape(tokens=1, rotary_dim=64),
    Shape(batch=2, tokens=17, window=3, sinks=5, rotary_dim=32, padding=(0, 9), value_bits=3, key_bits=4),
    Shape(
        batch=2,
        tokens=290,
        repeat=7,
        kv_heads=4,
        head_dim=80,
        heads_per_group=4,
        rotary_dim=80,
        query_tokens=5,
        key_bits=3,
        value_bits=4,
        value_group=16,
        unrotate_values=True,
        sinks=20,
        window=40,
        padding=(270, 5),
    ),
    Shape(tokens=33, kv_heads=2, head_dim=112, heads_per_group=0, repeat=1),
    Shape(tokens=300, kv_heads=4, head_dim=128, heads_per_group=4, repeat=4, rotary_dim=128, unrotate_values=True),
    Shape(batch=2, tokens=290, repeat=5, kv_heads=2, head_dim=16, heads_per_group=0, tokens_per_scale=48, value_bits=3),
    Shape(tokens=70, window=6, key_bits=3, tokens_per_scale=32, heads_per_group=0, padding=(9,)),
    Shape(batch=2, tokens=90, rotary_dim=64, sinks=5, window=9, key_bits=3, padding=(0, 40)),
    Shape(tokens=70, kv_heads=2, head_dim=80, heads_per_group=2, repeat=5, rotary_dim=32, query_tokens=2),
    Shape(batch=2, tokens=700, rotary_dim=64, sliding_window=300, query_tokens=3, sinks=9, dropped=(16, 0)),
    Shape(batch=2, tokens=40, query_tokens=2, sliding_window=1, window=9, dropped=(0, 5), padding=(38, 9)),
    Shape(tokens=40, window=40, kv_heads=4, head_dim=96, heads_per_group=4, rotary_dim=96),
]


WRITES = [
    Write(kv_heads=6, head_dim=8, tokens=17, start=12, group_size=8, layout="slice", rotary_dim=6),
    Write(batch=2, tokens=33, start=5, bits=3, heads_per_group=3, rotary_dim=64, reorder=True),
    Write(kv_heads=20, head_dim=80, group_size=80, bits=4, heads_per_group=1, dtype=torch.bfloat16),
    Write(kv_heads=2, head_dim=112, group_size=56, tokens=2, heads_per_group=2, dtype=torch.float16, rotary_dim=112),
]


FRAME_SHAPES = [
    FrameShape((2,), Shape(tokens=1, rotary_dim=64)),
    FrameShape((0,), Shape(tokens=40, rotary_dim=0), (0,)),
    FrameShape(
        (4, 2, 1, 0, 5),
        Shape(batch=2, tokens=290, repeat=7, head_dim=80, rotary_dim=24, query_tokens=5, padding=(3, 250)),
        (3, 1, 2),
        48,
    ),
    FrameShape((3, 1), Shape(tokens=300, head_dim=128, rotary_dim=128, sliding_window=200, sinks=20, window=9), (5,)),
    FrameShape((2,), Shape(tokens=70, rotary_dim=64), None),
]
FRAME_WRITES = [
    FrameWrite((2,), tokens=1, start=5, rotary_dim=64),
    FrameWrite((4, 2, 1, 0, 5), batch=2, head_dim=80, tokens=33, start=12, rotary_dim=24, dtype=torch.float16),
    FrameWrite((3, 1), tokens=17, head_dim=128, tokens_first=True, dtype=torch.bfloat16),
    FrameWrite((3, 1, 4), batch=2, tokens=33, start=12, of_values=True),
]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    with ThreadPoolExecutor(2) as pool:  # compile side by side
        list(pool.map(load_library, ("attention", "quantize", "dequantize", "frames", "components", "bands")))
    for shape in SHAPES:
        cpu.decode_attention(**random_step(shape), threads=2)
    for frame_shape in FRAME_SHAPES:
        cpu.decode_attention(**random_frames_step(frame_shape), threads=2)
    for frame_write in FRAME_WRITES:
        made = random_frame_write(frame_write)
        cpu.quantize_into_frames(**made, threads=2)
        tokens = frame_write.start + frame_write.tokens
        out = torch.empty(frame_write.batch, frame_write.kv_heads, tokens, frame_write.head_dim)
        cpu.read_components(made["packed"], tokens, made["transform"], out, threads=2)
        cpu.read_heads(made["packed"], frame_write.tokens, made["transform"], out, made["turns"], threads=2)
    for heads, dim, queries, dtype in (
        (6, 64, 16, torch.float32),
        (4, 48, 3, torch.bfloat16),
        (2, 16, 19, torch.float16),
    ):
        made = random_bands(generator, heads, dim, queries, dtype)
        cpu.attend_to_bands(**made, output=torch.empty(2, 3 * queries, heads, dim), threads=2)
    for write in WRITES:
        cpu.quantize_into_blocks(**random_write(write), threads=2)
    for bits in (2, 3, 4):
        for magnitude in (0.0, 1.0, 1e38, float("inf"), float("nan")):
            blocks = allocate_blocks(2, 2, 48, 3, bits)
            heads = torch.randn(2, 3, 20, 16) * magnitude
            cpu.quantize_into_blocks(heads, blocks, 12, bits, 16)
        for head_dim, width, tokens in ((8, 0, 17), (24, 24, 1), (64, 192, 33), (80, 160, 47)):
            planes = random_planes(2, tokens, 6 * head_dim, bits, 16, generator)
            cpu.dequantize_blocks(planes, tokens, bits, None, head_dim, width, 2, tokens_per_scale=16)
            channels = torch.arange(6 * head_dim, dtype=torch.int32)
            blocks = allocate_blocks(2, 3, 6 * head_dim, 6, bits)
            cpu.dequantize_blocks(blocks, tokens, bits, channels // head_dim, head_dim, width, 2)
    print("clean")


if __name__ == "__main__":
    main()
