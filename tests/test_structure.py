"""The tree as CONTRIBUTING.md wants it: no circle of imports, small files and functions, paths that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import structure

ROOT = Path(__file__).resolve().parents[1]
TRITON = "rotatekv/kernels/triton/"
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / room for room in structure.ROOMS)]
# CHANGELOG.md may name what is no more.
TEXTS = [path for path in TEXTS if path.name != "CHANGELOG.md"]
A_PATH = re.compile(r"\b(?:rotatekv|visualize|benchmarks|tests|docs)/[\w./]*\w\.(?:py|md|h|cpp|json|png|csv)\b")
PACKAGE = {name for name in structure.FILE_LINES if not name.startswith(("visualize/", "benchmarks/"))}


def over(lines: dict[str, int], most: int, where: str = "") -> dict[str, int]:
    return {name: n for name, n in lines.items() if n > most and name.partition(":")[0] in PACKAGE and where in name}


def test_no_imports_go_in_circles():
    assert structure.CIRCLES == []


def test_folders_of_the_package_import_each_other_one_way():
    """``kernels/backend.py`` starts what lies in the folders below it."""

    def folder(room: Path) -> str:
        return room.parts[1] if len(room.parts) > 2 and room.parts[0] == "rotatekv" else str(room)

    pairs = {(folder(room), folder(other)) for room, others in structure.ARROWS.items() for other in others}
    assert [pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs] == []


def test_files_and_functions_are_small():
    assert over(structure.FILE_LINES, 400) == {}
    lines = over(structure.FUNCTION_LINES, 60)
    assert [name for name in lines if not name.startswith(TRITON)] == []
    assert over(structure.STATEMENTS, 60, TRITON) == {}  # kernels have an argument a line


def test_the_paths_that_texts_name_exist():
    """In the pages, and in the code's docstrings and comments."""
    named = {(path.name, name) for path in TEXTS for name in A_PATH.findall(path.read_text(encoding="utf-8"))}
    assert sorted((text, name) for text, name in named if not (ROOT / name).exists()) == []


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "rotatekv").mkdir()
    (tmp_path / "rotatekv" / "a.py").write_text("from rotatekv import b")
    (tmp_path / "rotatekv" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rotatekv.a import x\ndef f():\n    return 1\n"
    )
    command = [sys.executable, str(ROOT / "tests" / "structure.py"), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "2 rooms on 2 floors, 2 arrows, 1 arrows back"
    assert lines[1] == "rotatekv/a.py → rotatekv/b.py → rotatekv/a.py"
    assert lines[3] == "longest function: rotatekv/b.py:f, 2 lines"
