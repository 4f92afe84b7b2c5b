"""One part of ``gpu_check.py`` as it runs: its time, and what it reports."""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rotatekv.errors import UserError


@dataclass
class Part:
    """One part as it runs: its options, its deadline, and the rows it has found so far.

    Args:
        name: ``kernels 9/3x64``: the kind of part, and the shape it is for.
        rows: a file, to which each row goes as a line of JSON.
    """

    name: str
    options: argparse.Namespace
    seconds: float
    rows: Path
    failures: int = 0

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.dry = self.options.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda")

    def row(self, **columns) -> None:
        """Print and keep one finding."""
        columns = {name: _finite(value) for name, value in columns.items()}
        shown = "  ".join(f"{name} {_short(value)}" for name, value in columns.items())
        print(f"[{self.name}] {shown}", flush=True)
        with open(self.rows, "a") as file:
            file.write(json.dumps(columns) + "\n")

    def check(self, case: str, error: float, bound: float, **columns) -> None:
        """A finding that must not exceed ``bound``; NaN does."""
        is_right = self.dry or error <= bound
        self.failures += not is_right
        verdict = "compiled" if self.dry else "right" if is_right else "WRONG"
        self.row(case=case, error=0.0 if self.dry else error, bound=bound, verdict=verdict, **columns)

    def cases(self, cases: Iterable) -> Iterator:
        """The cases that there is time for."""
        cases = list(cases)
        for number, case in enumerate(cases):
            if time.monotonic() > self.deadline:
                return self.row(left_out=len(cases) - number, reason="out of time")
            yield case

    @contextmanager
    def case(self, name: str):
        """What is raised inside, and a warning that torch stands in for a kernel, is this case's failure."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                self.failures += 1
                self.row(case=name, verdict="FAILED", reason=_reason(error)[:300])
                if self.options.traceback:
                    traceback.print_exc()
        for line in {str(warning.message) for warning in said if "kernel" in str(warning.message)}:
            self.failures += 1
            self.row(case=name, verdict="FELL BACK", reason=line[:300])


def _reason(error: BaseException) -> str:
    """One line, of what was behind a compiler's error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _finite(value):
    """JSON knows no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def heads_of(shape: str) -> tuple[int, int, int]:
    """``9/3x64`` → query heads, key/value heads, head_dim.

    Raises:
        UserError: it is not of that form.
    """
    try:
        heads, rest = shape.split("/")
        kv_heads, head_dim = rest.split("x")
        return int(heads), int(kv_heads), int(head_dim)
    except ValueError:
        raise UserError(f"--shapes {shape}: write it as query heads/key-value heads x head_dim, 32/8x128") from None
