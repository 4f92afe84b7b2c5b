"""The Triton kernels equal torch under triton's interpreter; ``test_dry_run.py`` compiles them. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

TESTS = Path(__file__).parent
FEWEST_CASES = {
    "attention": 27,
    "quantize": 15,
    "dequantize": 18,
    "coded_attention": 32,
    "coded_write": 13,
    "coded_read": 6,
    "grouped_attention": 18,
    "model": 6,
}


def _environment(**changes: str) -> dict[str, str]:
    """One thread, as several threads cost more than they bring on tiny tiles."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**kept, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, str]:
    """Every case of the files, run in a process where triton interprets: name → what failed, or ""."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "--rootdir",
        str(TESTS.parent),
        *(str(TESTS / f"interpreted_{name}.py") for name in ("triton", "coded", "grouped")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=_environment(TRITON_INTERPRET="1"), timeout=900, cwd=report.parent
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


@pytest.mark.parametrize("arguments", ["arguments", "coded_arguments"])
def test_triton_refuses_damaged_arguments(interpreted, arguments):
    assert interpreted[f"test_damaged_{arguments}_are_refused"] == ""


def test_triton_is_not_imported_with_the_package():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it fails
        "import rotatekv, rotatekv.kernels.triton as kernels\n"
        "assert not kernels.available('cpu') and not kernels.available('cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment(), timeout=120)
