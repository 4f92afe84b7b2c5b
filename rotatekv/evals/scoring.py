"""What several scorers need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The rouge package recurses once a word; under Python's own limit of 1000 a long prediction fails, or scores 0.
_RECURSION = 10_000


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Raise Python's recursion limit for the time of a ROUGE-L."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
