"""Checks README.md, CONTRIBUTING.md and docs/ against the code: make docs-check, minutes, offline.

tests/test_docs.py runs what is quick: commands parse, files, functions and links are there, tables are those of
docs/results.json. This script also runs what a page marks with an HTML comment in the line before a code block:

    <!-- run -->                             commands or Python that must succeed; DIR is --data_dir
    <!-- printed by: COMMAND; within 4 % --> what COMMAND prints: the same words, and decimals that differ by no more
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from rotatekv.kernels.layout import BLOCK, allocate_blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = ("pip", "git")  # commands of others in the pages
_LAUNCHERS = ("accelerate", "torchrun")


@dataclass(frozen=True)
class Block:
    """A code block of a page, and the words of the HTML comment in the line before it."""

    page: Path
    language: str
    text: str
    mark: str

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, without comments; a backslash goes on with the next line."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else []
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(page, language, text, mark) for mark, language, text in found]


def commands(page: Path) -> list[str]:
    """Every command of a page: the lines of its bash blocks, and the code spans that begin with python or make."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"(?<!`)`((?:python|make|accelerate|torchrun) [^`]+)`(?!`)", _BLOCK.sub("", text))
    in_comments = re.findall(r"<!-- printed by: (.*?);", text)
    whole = (" ".join(span.split()) for span in spans)
    return [line for block in blocks(page) for line in block.commands] + [*whole, *in_comments]


def check_command(command: str) -> None:
    """Raise where a script, module, make target or flag that ``command`` names is not there."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]  # variables of the environment
    if not words or words[0] in _SHELL:
        return
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", _makefile(), re.MULTILINE) for target in targets), command
    elif words[0] in _entry_points():
        _check_flags(importlib.import_module(_entry_points()[words[0]]), words[1:], command)
    elif "-m" in words[:2]:
        _check_flags(importlib.import_module(words[2]), words[3:], command)
    else:
        assert words[0].startswith("python") or words[0] in _LAUNCHERS, f"unknown command: {command}"
        at = next(number for number, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[at]).is_file(), command
        _check_flags(words[at], words[at + 1 :], command)


class _Parsed(BaseException):
    """The flags are right: nothing else is to happen."""


def _check_flags(script: str | ModuleType, argv: list[str], command: str) -> None:
    """By the script's own parser: its ``main`` is called, and left when it has parsed."""
    module = _module(script) if isinstance(script, str) else script
    if not argv and not (hasattr(module, "main") and inspect.signature(module.main).parameters):
        return  # a script without flags
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        parse(parser, args, namespace)
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only):
        try:
            module.main(argv)
        except _Parsed:
            return
        except SystemExit:
            pass
    raise AssertionError(f"{command}: its flags are not those of the script")


@cache
def _module(script: str) -> ModuleType:
    folder, name = (ROOT / script).parent, Path(script).stem
    for path in (str(ROOT), str(folder)):
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module(f"visualize.{name}" if folder.name == "visualize" else name)


@cache
def _makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@cache
def _entry_points() -> dict[str, str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'^(rotatekv-[\w-]+) = "([\w.]+):\w+"$', project, re.MULTILINE))


def named_places(text: str) -> list[tuple[str, str]]:
    """Files of the repository that a text names, each with the ``function`` or ``Class.method`` behind a colon."""
    return re.findall(
        r"\b((?:rotatekv|visualize|tests|benchmarks)/[\w/]+\.(?:py|cpp|h))(?::([A-Za-z_][\w.]*\w))?", text
    )


def attention_table() -> dict[str, list[tuple[str, str]]]:
    """The table in rotatekv/attention.py's docstring: idea → its files and functions."""
    source = (ROOT / "rotatekv" / "attention.py").read_text(encoding="utf-8")
    table: dict[str, list[tuple[str, str]]] = {}
    for idea, file, name in re.findall(r"^ {4}(.*?) +(rotatekv/[\w/]+\.py):([\w.]+)", source, re.MULTILINE):
        table.setdefault(idea.strip() or list(table)[-1], []).append((file, name))
    return table


def files_away(file: str) -> int:
    """How many files one opens from rotatekv/attention.py to ``file``, going by imports; a package's import is of all
    its modules' one step, since methods are found by listing theirs."""
    seen, here, steps = {"rotatekv/attention.py"}, {"rotatekv/attention.py"}, 0
    while file not in here:
        here = {imported for name in here for imported in _imports(name)} - seen
        assert here, f"rotatekv/attention.py does not lead to {file}"
        seen, steps = seen | here, steps + 1
    return steps


def _imports(file: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            path = ROOT / module.replace(".", "/")
            for found in (path.with_suffix(".py"), *(path.glob("*.py") if path.is_dir() else ())):
                if found.is_file() and module.startswith("rotatekv"):
                    yield found.relative_to(ROOT).as_posix()


def check_place(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"there is no {file}"
    if name and path.suffix != ".py":
        assert f"{name}(" in path.read_text(encoding="utf-8"), f"there is no {name} in {file}"
    elif name:
        scope = ast.parse(path.read_text(encoding="utf-8")).body
        for part in name.split("."):
            named = {node.name: node for node in scope if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assert part in named, f"there is no {name} in {file}"
            scope = named[part].body


def check_links(page: Path) -> None:
    """Every relative link leads to a file, and to a heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(to), f"{page.name} links to {target}"


def _anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def kv_cache_gigabytes(method: str, tokens: int, layers: int = 32, heads: int = 8, head_dim: int = 128) -> float:
    """The KV cache of one sequence in LLaMA-3-8B: "bf16", or "RotateKV2" with 20 sinks, from the blocks' layout."""
    channels = heads * head_dim
    if method == "bf16":
        return 2 * 2 * layers * channels * tokens / 1e9
    planes = allocate_blocks(1, -(-tokens // BLOCK), channels, heads, 2, torch.device("meta"))
    packed = 2 * sum(plane.numel() * plane.element_size() for plane in planes.values())  # keys and values
    sinks = 20 * (2 * 2 * channels + 8)  # keys and values in 16 bits, and which tokens they are
    return (layers * (packed + sinks) + 4 * tokens) / 1e9  # the positions are the cache's


def differences(shown: str, printed: str, tolerance: float) -> list[str]:
    """Lines of ``shown`` whose words ``printed`` does not have, or whose decimals differ by more than ``tolerance``."""
    wrong = []
    for line in filter(None, map(str.split, shown.splitlines())):
        alike = partial(_alike, tolerance=tolerance)
        like = [other for other in map(str.split, printed.splitlines()) if other and alike(line[0], other[0])]
        if not any(len(line) == len(other) and all(map(alike, line, other)) for other in like):
            wrong.append(f"{' '.join(line)}   ←→   {' | '.join(' '.join(other) for other in like) or 'nothing'}")
    return wrong


def _alike(word: str, other: str, tolerance: float) -> bool:
    if word.isdigit() and other.isdigit():
        return True  # threads, files, and bytes, which the bits beside them tell
    if not all(re.fullmatch(r"\d+\.\d+", each) for each in (word, other)):
        return word == other
    return abs(float(word) - float(other)) <= tolerance * float(word)


def run(command: str, data_dir: str, folder: str) -> str:
    """What ``command`` prints, with ``folder`` to write to; scripts and files are the checkout's."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command.replace("DIR", data_dir))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def run_page(page: Path, data_dir: str) -> list[str]:
    """Run what the page marks → what failed, or printed something else than the page shows."""
    marked = [block for block in blocks(page) if block.mark]
    python = "\n".join(block.text for block in marked if block.language == "python")
    shown = {}  # command → the block that shows what it prints, and the tolerance in percent
    for block in marked:
        if printed := re.fullmatch(r"printed by: (.*); within (\S+) %", block.mark):
            shown[printed[1]] = block.text, float(printed[2]) / 100
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.py").write_text(python, encoding="utf-8")
        lines = [line for block in marked for line in block.commands]
        for command in [*([f"python {folder}/page.py"] if python else []), *lines, *shown]:
            print(f"{page.name}: {command}", flush=True)
            try:
                printed = run(command, data_dir, folder)
            except AssertionError as error:
                failed.append(str(error))
            else:
                failed += differences(shown[command][0], printed, shown[command][1]) if command in shown else []
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default=str(ROOT.parent / "shared" / "data"), help="what DIR stands for")
    parser.add_argument("--page", help="this one alone, by its name: README.md, usage.md …")
    args = parser.parse_args(argv)
    failed = [line for page in PAGES if args.page in (None, page.name) for line in run_page(page, args.data_dir)]
    print("\n".join(failed) or "every page shows what runs give")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
