"""The Triton kernels: equal to torch under the interpreter, and compiled for GPUs without spills. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

TESTS = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may take
SMALL_LIMIT = 99 * 1024  # of sm_86 and sm_89
KERNELS = ("quantize", "dequantize", "split", "exact", "merge")
COMPILED = [
    ("smollm2", 80), ("smollm2", 90), ("8x128", 80), ("8x128", 90), ("smollm2, 3 bits, 4 queries", 90),
    ("8x128, 4 bits, 4 queries", 80), ("4x96, 3 bits", 80), ("smollm2, plus", 80), ("8x128, plus", 90),
]  # fmt: skip
FEWEST_CASES = {"attention": 20, "quantize": 7, "dequantize": 20, "model": 5}


def _environment(**changes: str) -> dict[str, str]:
    """One thread, as several threads cost more than they bring on tiny tiles."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**kept, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, str]:
    """Every case of interpreted_triton.py, run in a process where triton interprets: name → what failed, or ""."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", f"--junitxml={report}",
               "--rootdir", str(TESTS.parent), str(TESTS / "interpreted_triton.py")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=_environment(TRITON_INTERPRET="1"), timeout=300, cwd=report.parent
    )
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    cases = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases[case.get("name")] = "".join((child.text or child.get("message")) for child in case)
    return cases


@pytest.mark.parametrize("kernel", FEWEST_CASES)
def test_triton_kernel_equals_torch(interpreted, kernel):
    cases = {name: failure for name, failure in interpreted.items() if name.startswith(f"test_{kernel}")}
    assert len(cases) >= FEWEST_CASES[kernel]
    failed = [f"{name}\n{failure}" for name, failure in cases.items() if failure]
    assert not failed, "\n\n".join(failed)[-5000:]


def test_triton_refuses_damaged_arguments(interpreted):
    assert interpreted["test_damaged_arguments_are_refused"] == ""


def test_triton_is_not_imported_with_the_package():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it fails
        "import rotatekv, rotatekv.kernels.triton as kernels\n"
        "assert not kernels.available('cpu') and not kernels.available('cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment(), timeout=120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, int], subprocess.CompletedProcess]:
    """Each case compiled in a process of its own, two side by side: whoever imported triton before may have had it
    interpret."""

    def compile_case(case: tuple[str, int]) -> subprocess.CompletedProcess:
        cache = str(tmp_path_factory.mktemp("cache"))
        command = [sys.executable, "-m", "rotatekv.kernels.triton.aot", case[0], str(case[1])]
        environment = _environment(TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="1")
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMPILED, pool.map(compile_case, COMPILED), strict=True))


@pytest.mark.parametrize(("model", "capability"), COMPILED)
def test_triton_compiles_ahead_of_time_without_spills(model, capability, compiled):
    done = compiled[model, capability]
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [f"{name}_kernel" for name in KERNELS]
    for name, _, _, registers, spills, shared in rows:
        assert int(spills) == 0, f"{name} spills {spills} bytes"
        assert 0 < int(registers) <= 255
        limit = SMALL_LIMIT if model.startswith("smollm2") else SHARED_LIMIT[capability]
        assert int(shared) <= limit, f"{name} takes {shared} bytes of shared memory"
