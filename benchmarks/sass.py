"""Machine code of a kernel counted by what bounds it, from the text of ``cuobjdump -sass``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
# Cycles of a multiprocessor's shared memory for one warp, without bank conflicts: 128 bytes a cycle.
_SHARED = {"LDS": 1, "STS": 1, "LDSM": 4, "STSM": 4, "SHFL": 1}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers
    operands: str
    conditional: bool

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def shared_cycles(self) -> int:
        if self.kind in ("LDS", "STS"):
            return 4 if ".128" in self.name else 2 if ".64" in self.name else 1
        if self.kind in ("LDSM", "STSM"):
            return 4 if self.name.endswith(".4") else 2 if self.name.endswith(".2") else 1
        return _SHARED.get(self.kind, 0)

    @property
    def products(self) -> int:
        """Of 16 × 8 × 16; four warps share one of a warp group."""
        of_group = re.match(r"HGMMA\.64x(\d+)x16", self.name)
        return int(of_group[1]) // 8 if of_group else int(self.name.startswith("HMMA.16816."))


@dataclass(frozen=True)
class Count:
    """What one warp does: instructions, its cycles of shared memory, and products of 16 × 8 × 16 on tensor cores."""

    instructions: float = 0.0
    shared: float = 0.0
    products: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.instructions + other.instructions, self.shared + other.shared, self.products + other.products)

    def times(self, factor: float) -> Count:
        return Count(self.instructions * factor, self.shared * factor, self.products * factor)


def parse(text: str) -> list[Instruction]:
    return [Instruction(int(at, 16), name, rest, bool(on)) for at, on, name, rest in _LINE.findall(text)]


def count(instructions: Sequence[Instruction]) -> Count:
    return Count(*(sum(x) for x in zip(*((1, x.shared_cycles, x.products) for x in instructions), strict=True)))


def count_loop(text: str, inner: Sequence[int] = (), dots: Sequence[int] = (1,)) -> Count:
    """One turn of a kernel's main loop: the one with most instructions.

    Args:
        inner: turns of each loop in it, in the order of addresses.
        dots: how often each of its other stretches of code runs that has dots, and no branch, likewise.

    Raises:
        ValueError: the loop has another number of inner loops or of such stretches.
    """
    code = parse(text)
    start, end = max(_loops(code), key=lambda loop: loop[1] - loop[0])
    of_inner = [loop for loop in _loops(code) if start < loop[0] and loop[1] < end]
    main = [x for x in code if start <= x.address <= end]
    stretches = [
        (stretch[0].address, stretch[-1].address)
        for stretch in _stretches(main)
        if any(x.kind == "HMMA" for x in stretch)
        and not any(first <= stretch[0].address <= last for first, last in of_inner)
    ]
    if len(of_inner) != len(inner) or len(stretches) != len(dots):
        raise ValueError(f"{len(of_inner)} inner loops and {len(stretches)} parts with dots, not {inner} and {dots}")
    total = count(main)
    for (first, last), turns in zip((*of_inner, *stretches), (*inner, *dots), strict=True):
        total += count([x for x in main if first <= x.address <= last]).times(turns - 1)
    return total


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    return sorted({(x.target, x.address) for x in code if x.target is not None and x.target < x.address})


def _stretches(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Code cut at branches and at what they go to."""
    targets = {x.target for x in code}
    found: list[list[Instruction]] = [[]]
    for x in code:
        if x.address in targets and found[-1]:
            found.append([])
        found[-1].append(x)
        if x.kind == "BRA":
            found.append([])
    return [stretch for stretch in found if stretch]


def count_all(text: str, turns: int = 1) -> Count:
    """A whole program whose only loop makes so many turns."""
    code = parse(text)
    end = next((i for i, x in enumerate(code) if x.kind == "EXIT" and not x.conditional), len(code) - 1)
    code = code[: end + 1]
    total = count(code)
    for first, last in _loops(code):
        total += count([x for x in code if first <= x.address <= last]).times(turns - 1)
    return total
