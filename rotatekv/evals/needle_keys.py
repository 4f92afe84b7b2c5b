"""Several pass keys for one haystack, each under its own name (RULER's multi-key needles, arXiv 2404.06654)."""

from __future__ import annotations

import random

from rotatekv.errors import UserError

MULTIKEY_NEEDLE = "One of the pass keys for the {name} is: {number}."  # RULER's wording, but for its "magic numbers"
KEY_NAMES = (
    *("harbour", "garden", "library", "castle", "bakery", "station", "museum", "theatre"),
    *("hospital", "tower", "bridge", "market", "school", "church", "farm", "mill"),
)
NEEDLE_KEYS = 4  # by default, as in RULER


def named_keys(draw: random.Random, depth: int, keys: int) -> dict:
    """Pass keys under names, no two alike: the asked one's ``needle``, ``answer``, ``key_phrase`` and ``name``, and of
    the others ``other_keys`` and ``others``, depths and texts.

    The others lie in even steps below the asked one, around the end, each up to a quarter of a step off. More keys
    leave the asked one as it is.
    """
    names = draw.sample(KEY_NAMES, len(KEY_NAMES))
    numbers = [str(number) for number in draw.sample(range(10000, 100000), len(names))]
    shifts = [draw.uniform(-0.25, 0.25) for _ in names]
    needles = [MULTIKEY_NEEDLE.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    depths = [round(depth + (step + shifts[step]) * 100 / keys) % 100 for step in range(1, keys)]
    return {
        "needle": needles[0],
        "name": names[0],
        "answer": numbers[0],
        "key_phrase": numbers[0],
        "others": list(zip(depths, needles[1:keys], strict=True)),
        "other_keys": numbers[1:keys],
    }


def check_keys(needle_type: str, keys: int | None) -> int | None:
    """``--needle_keys``; None is the usual number for ``multikey``, and nothing for the other types.

    Raises:
        UserError: a number for another type, less than two, or more than there are names.
    """
    if needle_type != "multikey":
        if keys is not None:
            raise UserError("--needle_keys is for --needle_type multikey: leave it out")
        return None
    if keys is None:
        return NEEDLE_KEYS
    if not 2 <= keys <= len(KEY_NAMES):
        raise UserError(f"--needle_keys must be from 2 to {len(KEY_NAMES)}, not {keys}")
    return keys
