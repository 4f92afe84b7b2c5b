"""The decode kernels compiled for GPUs that are not here: what they take, what bounds them, how long they should.

    python benchmarks/gpu_kernels.py --capability 80,89,90     # docs/gpu.md shows what it prints

The launches are the package's own, for a LLaMA-3-8B layer (32 query heads, 8 KV heads × 128, bfloat16, one new token)
with sinks. Instructions are read from the machine code and weighted with how often they run: no run, no clock.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tree is enough, nothing need be installed

import torch

from benchmarks.sass import Count, count_all, count_loop
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.decode_attention import DecodeOptions, ExactTokens
from rotatekv.kernels.layout import BLOCK, allocate_blocks
from rotatekv.kernels.rope_tables import RopeTables
from rotatekv.kernels.transform_coding import FRAME, Transform, allocate_planes
from rotatekv.kernels.triton.coded_queries import COLUMNS_TILE, ROWS_TILE
from rotatekv.kernels.triton.dry_run import Compiled, DryRun
from rotatekv.kernels.triton.query_tables import MEANS

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 300
KEY_BITS, VALUE_BITS = (4, 4, 2, 2, 1, 1, 1, 1), (2,) * 8  # of a head's groups, RotateKV2+
CHUNK = 4  # planes of a dot, for heads of 128
METHODS = ("RotateKV2+", "QuaRot2", "RTN2", "RotateKV2")
CONTEXTS, BATCHES = (8192, 32768, 131072), (1, 8, 32)


@dataclass(frozen=True)
class Card:
    """From public specifications. cycles_per_product: of a quarter multiprocessor, for 16 × 8 × 16 in float16 added in
    float32; an H100's own rate is twice that of an A100, but not for these products of one warp."""

    name: str
    multiprocessors: int
    gigahertz: float
    terabytes: float
    cycles_per_product: int
    shared_kib: int


CARDS = {
    80: Card("A100", 108, 1.41, 2.04, 8, 164),
    89: Card("RTX 4090", 128, 2.52, 1.01, 32, 100),
    90: Card("H100", 132, 1.755, 3.35, 8, 228),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one card. count: for 16 tokens of a KV head, over all warps. bytes: read for them."""

    method: str
    compiled: Compiled
    count: Count
    bytes: float

    def programs(self, card: Card) -> int:
        """That fit a multiprocessor, of 64 K registers, and at most 2048 threads."""
        threads = 32 * self.compiled.warps
        registers = -(-self.compiled.registers // 8) * 8
        return min(
            65536 // (threads * registers), card.shared_kib * 1024 // (self.compiled.shared + 1024), 2048 // threads
        )

    def cycles(self, card: Card) -> tuple[float, float, float]:
        """Of a multiprocessor, if nothing else bounded it: instructions, shared memory, tensor cores."""
        return self.count.instructions / 4, self.count.shared, self.count.products * card.cycles_per_product / 4


def decode(method: str) -> None:
    """One step over an empty cache of that form."""
    queries = torch.zeros(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    seen = torch.zeros(1, dtype=torch.int32)
    rope = RopeTables.build(10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), TOKENS)
    options, blocks = DecodeOptions(HEAD_DIM, 2, 2, HEAD_DIM**-0.5), -(-TOKENS // BLOCK)
    zero = torch.zeros(1, dtype=torch.int32)
    of_token = torch.zeros(1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    if method == "RotateKV2+":
        transforms = (_transform(KEY_BITS, True), _transform(VALUE_BITS, False))
        options = replace(options, rope=rope, key_transform=transforms[0], value_transform=transforms[1])
        keys, values = (allocate_planes(x, 1, blocks, torch.device("cpu")) for x in transforms)
        groups = None
    else:
        keys, values = (allocate_blocks(1, blocks, KV_HEADS * HEAD_DIM, KV_HEADS, 2) for _ in range(2))
        groups = torch.arange(KV_HEADS * HEAD_DIM, dtype=torch.int32) // HEAD_DIM
    if method == "RotateKV2":
        options = replace(options, rope=rope, rotation_width=4 * HEAD_DIM)
    if method == "QuaRot2":
        options = replace(options, rotation_width=HEAD_DIM, unrotate_values=True)
    exact = ExactTokens(zero, zero, of_token, of_token) if method.startswith("Rotate") else None
    kernels.decode_attention(queries, keys, values, groups, seen, seen, TOKENS - 1, TOKENS, options, exact)


def _transform(bits: tuple[int, ...], words_of_tokens: bool) -> Transform:
    maps, mean = torch.eye(HEAD_DIM).repeat(KV_HEADS, 1, 1), torch.zeros(KV_HEADS, HEAD_DIM)
    of_groups = torch.tensor(bits).repeat(KV_HEADS, 1)
    return Transform(maps, mean, of_groups, torch.ones(of_groups.shape), words_of_tokens=words_of_tokens)


def rows(method: str, capability: int) -> list[Row]:
    """The kernels whose time grows with the context."""
    with DryRun(capability, resources=True) as dry:
        decode(method)
    if dry.refused:
        raise RuntimeError(f"{method} for sm_{capability}: {dry.refused}")
    return [row for compiled in dry.compiled if (row := _row(method, compiled)) is not None]


def _row(method: str, compiled: Compiled) -> Row | None:
    constants, name = dict(compiled.shape), compiled.kernel
    scales = 2 * 1 if method.endswith("+") else 2 * 3
    of_cache = BLOCK * (HEAD_DIM * 4 / 8 + scales)
    pairs, singles = (-(-sum(x) // CHUNK) for x in ([b // 2 for b in KEY_BITS], [b % 2 for b in KEY_BITS]))
    if name == "coded_split_kernel":
        low, middle, single = (any(x) for x in zip(*((b > 1, b > 3, b % 2) for b in VALUE_BITS), strict=True))
        turn = count_loop(compiled.instructions(), (pairs, singles), (low, middle, single))
        return Row(method, compiled, _for_block(turn, compiled, constants["TOKENS"]), of_cache)
    if name == "coded_queries_kernel" and method.endswith("+"):  # of others one frame serves all tokens
        columns = MEANS + BLOCK * (pairs + singles) * CHUNK
        program = count_all(compiled.instructions(), math.ceil(columns / COLUMNS_TILE))
        written = 2 * (4 * MEANS + 2 * (columns - MEANS)) * HEADS / KV_HEADS * BLOCK / FRAME  # and read again
        return Row(method, compiled, _for_block(program, compiled, ROWS_TILE * KV_HEADS / HEADS * FRAME), written)
    if name == "grouped_split_kernel":
        turn = count_loop(compiled.instructions())
        return Row(method, compiled, _for_block(turn, compiled, constants["TOKENS"]), of_cache)
    if name == "split_kernel":
        turn = count_loop(compiled.instructions())
        return Row(method, compiled, _for_block(turn, compiled, BLOCK * constants["G"]), of_cache)
    return None


def _for_block(turn: Count, compiled: Compiled, tokens: float) -> Count:
    """What a turn of a program does for so many tokens of a KV head, for 16 of them."""
    return turn.times(compiled.warps * BLOCK / tokens)


def microseconds(of_method: list[Row], card: Card, context: int, batch: int) -> tuple[float, float, float]:
    """A layer's step: the kernels', each bound by the slowest of what it does; reading the cache; reading bfloat16."""
    blocks = batch * KV_HEADS * context / BLOCK
    of_cycles = 1e-3 / (card.multiprocessors * card.gigahertz)
    of_bytes = 1e-6 / card.terabytes
    total = sum(max(max(row.cycles(card)) * of_cycles, row.bytes * of_bytes) for row in of_method) * blocks
    least = max(row.bytes for row in of_method if "split" in row.compiled.kernel) * of_bytes * blocks
    return total, least, BLOCK * HEAD_DIM * 2 * 2 * of_bytes * blocks


def kernel_table(of_card: dict[str, list[Row]], card: Card) -> str:
    lines = [
        f"| {card.name} | registers | spills | shared, bytes | programs | instructions | a number | cycles: issue | "
        "shared | tensor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, of_method in of_card.items():
        for row in of_method:
            x, cycles = row.compiled, row.cycles(card)
            number = row.count.instructions * 32 / (2 * HEAD_DIM * BLOCK)
            lines.append(
                f"| {method} {x.kernel} | {x.registers} | {x.spills} | {x.shared} | {row.programs(card)} | "
                f"{row.count.instructions:.0f} | {number:.1f} | {' | '.join(f'{c:.0f}' for c in cycles)} |"
            )
    return "\n".join(lines)


def time_table(of_card: dict[str, list[Row]], card: Card) -> str:
    lines = [
        f"| {card.name}, microseconds a layer | {' | '.join(of_card)} | packed bytes | bfloat16 bytes |",
        "|---" * (len(of_card) + 3) + "|",
    ]
    for context in CONTEXTS:
        for batch in BATCHES:
            found = [microseconds(x, card, context, batch) for x in of_card.values()]
            times = [x[0] for x in found] + [found[0][1], found[0][2]]
            lines.append(f"| {context // 1024}k × {batch} | {' | '.join(f'{x:.0f}' for x in times)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--capability", default="80,89,90")
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    for capability in map(int, arguments.capability.split(",")):
        of_card = {method: rows(method, capability) for method in arguments.methods.split(",")}
        for table in (kernel_table, time_table):
            print(table(of_card, CARDS[capability]), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
