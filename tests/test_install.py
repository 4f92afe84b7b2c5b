"""What pip is asked for against what it resolves to (``installs.json``), and the versions taken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rotatekv import UserError, compat
from rotatekv.compat import SUPPORTED, check_version
from rotatekv.kernels import triton as triton_kernels

ROOT = Path(__file__).parents[1]
INSTALLS = json.loads((ROOT / "tests" / "installs.json").read_text())
FILES = ("requirements.txt", "requirements-dev.txt", "requirements-last.txt")
BRINGS = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}  # PyPI's torch → its triton


def name_of(row: dict) -> str:
    return f"{row['python']} {row['torch']} {row['command']}"


def pyproject(field: str) -> list[str]:
    """The strings of a list in pyproject.toml (Python 3.10 has no TOML reader)."""
    found = re.search(rf"^{field} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return re.findall(r'"([^"]+)"', found[1])


def asked(row: dict) -> list[Requirement]:
    """The requirements that hold for a row's Python on Linux."""
    if row["command"] == "make install":
        lines = [line for file in FILES for line in (ROOT / file).read_text().splitlines() if line[:1].isalpha()]
    else:
        lines = [*pyproject("dependencies"), *pyproject("evals")]
    system = {"python_version": row["python"], "sys_platform": "linux", "platform_system": "Linux"}
    found = map(Requirement, lines)
    return [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate(system)]


def series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_every_python_is_resolved_with_either_torch():
    pythons = [line.rpartition(" ")[2] for line in pyproject("classifiers")]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    listed = [(row["python"], row["torch"], row["command"]) for row in INSTALLS]
    kinds = [("PyPI", "make install"), ("CPU", "make install"), ("PyPI", "pip install .[evals]")]
    assert listed == [(python, *kind) for python in pythons for kind in kinds]


@pytest.mark.parametrize("row", INSTALLS, ids=name_of)
def test_what_is_asked_for_is_what_was_resolved(row):
    """``make resolve`` renews the list after a change of the requirements."""
    wrong = [str(r) for r in asked(row) if not r.specifier.contains(row["versions"][canonicalize_name(r.name)])]
    assert wrong == []


@pytest.mark.parametrize("row", INSTALLS, ids=name_of)
def test_triton_is_what_torch_brings_and_all_of_it_is_tested(row):
    versions = {package: series(row["versions"][package]) for package in SUPPORTED}
    if row["torch"] == "PyPI":
        assert versions["triton"] == BRINGS[versions["torch"]]
    for package, version in versions.items():
        first, last = SUPPORTED[package].tested
        assert compat.series(first) <= compat.series(version) <= compat.series(last), package


def test_triton_is_asked_for_after_torch_alone():
    """With torch it would be chosen first, and PyPI's torch takes one version only."""
    for file in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        assert not re.search(r"^\W*triton", (ROOT / file).read_text(), re.M), file


def test_the_versions_stand_alike_in_pyproject():
    for package in ("torch", "transformers"):
        assert f"{package}{SUPPORTED[package].specifier}" in pyproject("dependencies")


def test_a_wheel_asks_for_nothing_that_it_does_not_import():
    """The report page's jinja2 is a checkout's, in requirements.txt. accelerate is what --device_map needs."""
    texts = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *ROOT.glob("rotatekv/**/*.py"))]
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", "\n".join(texts), re.M))
    assert {Requirement(line).name for line in pyproject("dependencies")} - imported == {"accelerate"}


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.5.1"),
        ("torch", "1.13.1+cu117"),
        ("torch", "3.0.0"),
        ("transformers", "4.57.1"),
        ("transformers", "5.15.1"),
        ("transformers", "6.0.0.dev0"),
        ("triton", "3.1.0"),
        ("triton", "4.0.0"),
    ],
)
def test_a_version_outside_the_limits_is_one_line_with_what_to_install(package, version):
    with pytest.raises(UserError) as caught:
        check_version(package, version)
    wanted = SUPPORTED[package].specifier
    assert str(caught.value) == f"{package} {version} is not supported: pip install '{package}{wanted}'"


@pytest.mark.parametrize(("package", "version"), [("torch", "2.99.0+cu130"), ("transformers", "5.99.1.dev0")])
def test_an_untested_version_is_one_warning(package, version):
    check_version.cache_clear()
    with pytest.warns(RuntimeWarning, match=re.escape(f"not tested with {package} {version}")) as caught:
        check_version(package, version)
        check_version(package, version)
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("package", SUPPORTED)
def test_tested_versions_pass_without_a_word(package):
    check_version.cache_clear()
    for version in SUPPORTED[package].tested:
        check_version(package, f"{version}.9+cu130")


def test_an_old_triton_is_one_warning_and_torch_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_kernels._available.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton kernels are not used, torch is: triton 3.2.0") as caught:
            assert [triton_kernels.available("cuda") for _ in range(2)] == [False, False]
        assert len(caught) == 1
        monkeypatch.setattr(sys.modules["triton"], "__version__", "3.6.0")
        triton_kernels._available.cache_clear()
        assert triton_kernels.available("cuda")
    finally:
        triton_kernels._available.cache_clear()


def test_make_install_names_the_python_it_needs(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what an older one answers when asked for its version
    old.chmod(0o755)
    command = ["make", "install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10 or newer is needed: make PYTHON=python3.11" in done.stdout
    assert not (tmp_path / "venv").exists()
