"""The decode kernels take no more than docs/gpu.md says, by the machine code that triton's ptxas makes here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from benchmarks.gpu_kernels import CARDS, kernel_table, rows
from benchmarks.sass import Count, count_all, count_loop

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
PROGRAMS = 3  # the column where more is better
TOLERANCE = 1.02  # of counts: another ptxas schedules otherwise
# A loop with a loop of four in it, and two parts that may be skipped.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x80 ;
        /*0050*/                   LDS.128 R4, [R2] ;
        /*0060*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0070*/              @!P2 BRA 0xa0 ;
        /*0080*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0090*/                   STS.64 [R2], R4 ;
        /*00a0*/              @!P3 BRA 0x10 ;
        /*00b0*/                   EXIT ;
"""


def table(text: str) -> dict[str, list[float]]:
    """Kernel → the numbers of its row."""
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "_kernel |" in line
    ]
    return {name: [float(number) for number in numbers] for name, *numbers in cells}


def of_page(card: str) -> str:
    return PAGE.read_text().split(f"| {card} | registers")[1].split("\n\n")[0]


FAST = ("RotateKV2+", 90)
SAID = sorted(
    {(name.split()[0], capability) for capability, card in CARDS.items() for name in table(of_page(card.name))}
)


@pytest.mark.parametrize(
    ("method", "capability"), [pytest.param(*case, marks=[pytest.mark.slow] * (case != FAST)) for case in SAID]
)
def test_kernels_take_no_more_than_the_page_says(method, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    card = CARDS[capability]
    found, said = table(kernel_table({method: rows(method, capability)}, card)), table(of_page(card.name))
    assert found
    for name, numbers in found.items():
        for column, (now, then) in enumerate(zip(numbers, said[name], strict=True)):
            assert now >= then if column == PROGRAMS else now <= then * TOLERANCE, (name, column, now, then)


@pytest.mark.parametrize("capability", CARDS)
def test_the_page_keeps_the_limits_of_the_kernels(capability):
    """Keys that meet the query as codes: five instructions a number, no spills, two programs, 48 KB; all fit 99 KB."""
    for name, (_, spills, shared, programs, _, a_number, *_) in table(of_page(CARDS[capability].name)).items():
        if "coded_split" in name or "grouped_split" in name:
            assert spills == 0 and shared <= 48 * 1024 and programs >= 2 and a_number <= 5, name
        assert shared <= 99 * 1024, name


def test_code_is_counted_as_often_as_it_runs():
    outer = 10  # instructions of a turn
    assert count_loop(CODE, inner=(1,), dots=(1, 1)) == Count(outer, 4 + 2, 3)
    assert count_loop(CODE, inner=(4,), dots=(1, 1)) == Count(outer + 3 * 2, 6, 6)
    assert count_loop(CODE, inner=(1,), dots=(0, 1)) == Count(outer - 3, 2, 2)
    assert count_loop(CODE, inner=(1,), dots=(1, 0)) == Count(outer - 2, 4, 2)
    with pytest.raises(ValueError, match="1 inner loops and 2 parts"):
        count_loop(CODE, inner=(), dots=(1,))
    straight = "\n".join(line for line in CODE.splitlines() if "BRA" not in line or "0x20" in line)
    assert count_all(straight, turns=3) == Count(9 + 2 * 2, 6, 3 + 2)
