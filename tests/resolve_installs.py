"""Resolves what a Linux machine would install, for every supported Python, and writes ``installs.json``.

    python tests/resolve_installs.py        (make resolve; needs uv and PyPI, downloads metadata alone, takes minutes)

``test_install.py`` reads the file. No setting of this machine's pip or uv counts: PyPI alone. PyTorch's CPU build is
not on PyPI, so a wheel of its name and requirements stands in for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from rotatekv.files import write_json

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("installs.json")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FILES = ("requirements.txt", "requirements-dev.txt")
CPU_REQUIRES = (  # of torch 2.13.0+cpu: PyPI's without triton and the CUDA libraries
    "filelock",
    "typing-extensions>=4.10.0",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
)


def resolve(python: str, *arguments: str) -> dict[str, str]:
    """Package → version of ``uv pip compile`` for Linux on x86-64."""
    command = [uv(), "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate", "--no-sources"]
    command += ["--python-version", python, "--python-platform", "x86_64-unknown-linux-gnu", *arguments]
    ours = ("PIP_", "UV_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(command, cwd=ROOT, env=clean, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"Python {python}, {' '.join(arguments)}:\n{done.stderr}")
    return dict(line.split("==") for line in done.stdout.split() if "==" in line)


def uv() -> str:
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise SystemExit("error: uv resolves: pip install uv")
    return found


def cpu_stand_in(folder: Path) -> Path:
    name = "torch-2.13.0+cpu"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in CPU_REQUIRES)
        info = f"{name}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def installs(folder: Path) -> list[dict]:
    constraint = folder / "cpu.txt"
    constraint.write_text("torch==2.13.0+cpu\n")
    cpu = ("--find-links", str(cpu_stand_in(folder)), "--constraint", str(constraint))
    found = []
    for python in PYTHONS:
        last = resolve(python, "--no-deps", "requirements-last.txt")  # what is there already stays
        for torch, options in (("PyPI", ()), ("CPU", cpu)):
            versions = last | resolve(python, *FILES, *options)
            found.append({"python": python, "torch": torch, "command": "make install", "versions": versions})
        versions = resolve(python, "pyproject.toml", "--extra", "evals")
        found.append({"python": python, "torch": "PyPI", "command": "pip install .[evals]", "versions": versions})
    return found


def main() -> None:
    with TemporaryDirectory() as folder:
        found = installs(Path(folder))
    for row in found:
        row["versions"] = dict(sorted(row["versions"].items()))
        shown = " ".join(f"{name} {row['versions'][name]}" for name in ("torch", "transformers", "triton"))
        print(f"Python {row['python']}, {row['torch']} torch, {row['command']}: {shown}")
    write_json(LIST, found)


if __name__ == "__main__":
    main()
