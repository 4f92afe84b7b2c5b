"""How the tree hangs together, from its imports alone: python tests/structure.py

A room is a file, an arrow an import of one room by another (those under TYPE_CHECKING count). A room stands one floor
above the highest room that it imports. An arrow back closes a circle.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FOLDERS = {".": "*.py", "rotatekv": "**/*.py", "visualize": "**/*.py", "benchmarks": "**/*.py"}
ROOT = Path(sys.argv[1] if __name__ == "__main__" and sys.argv[1:] else Path(__file__).parents[1])
ROOMS = {
    path.relative_to(ROOT): path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob(FOLDERS[folder])
}
TREES = {room: ast.parse(text) for room, text in ROOMS.items()}
NAMES = {".".join(room.with_suffix("").parts).removesuffix(".__init__"): room for room in ROOMS}


def imported(tree: ast.Module) -> set[Path]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [whole if whole in NAMES else node.module for whole in wholes]
    return {NAMES[name] for name in found if name in NAMES}


def climb(room: Path, way: tuple[Path, ...]) -> int:
    """The room's floor; ``way`` leads to it."""
    if room in way:
        CIRCLES.append((*way[way.index(room) :], room))
        return 0
    if room not in FLOORS:
        FLOORS[room] = 1 + max((climb(other, (*way, room)) for other in sorted(ARROWS[room])), default=0)
    return FLOORS[room]


ARROWS = {room: imported(tree) - {room} for room, tree in TREES.items()}
FLOORS: dict[Path, int] = {}
CIRCLES: list[tuple[Path, ...]] = []
for start in sorted(ROOMS):
    climb(start, ())
DEFINITIONS = [(room, node) for room in ROOMS for node in ast.walk(TREES[room]) if isinstance(node, ast.FunctionDef)]
FILE_LINES = {str(room): len(text.splitlines()) for room, text in ROOMS.items()}
FUNCTION_LINES = {f"{room}:{node.name}": node.end_lineno - node.lineno + 1 for room, node in DEFINITIONS}
STATEMENTS = {f"{room}:{node.name}": sum(isinstance(x, ast.stmt) for x in ast.walk(node)) for room, node in DEFINITIONS}

if __name__ == "__main__":
    arrows = sum(map(len, ARROWS.values()))
    print(f"{len(ROOMS)} rooms on {max(FLOORS.values())} floors, {arrows} arrows, {len(CIRCLES)} arrows back")
    print(*(" → ".join(map(str, circle)) for circle in CIRCLES), sep="\n", end="\n" if CIRCLES else "")
    for lines, what in ((FILE_LINES, "file"), (FUNCTION_LINES, "function")):
        print(f"longest {what}: {max(lines, key=lines.__getitem__)}, {max(lines.values())} lines")
    most = max(STATEMENTS, key=STATEMENTS.__getitem__)
    print(f"most statements in a function: {most}, {STATEMENTS[most]}")
