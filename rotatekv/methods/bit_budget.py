"""A budget of bits split over what is to be coded, each bit where it saves most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Numbers that all get the same bits each.

    Args:
        cost: of noise 1. numbers: how many they are. noise: of ``least`` bits, of one more, and so on, falling.
        least: the fewest bits they can have.
    """

    cost: float
    numbers: int
    noise: tuple[float, ...]
    least: int = 0


def allocate(choices: Sequence[Choice], budget: float) -> list[int]:
    """Bits of each, at most ``budget`` in all but where the least ones are more; greedily, ties in order.

    Where ``noise`` falls ever less, as it does, no allocation of the same bits costs less, if all choices have as many
    numbers. Otherwise none costs less that spends fewer by those of the largest choice: its last bit may not fit.
    """
    given = [0] * len(choices)
    left = budget - sum(choice.least * choice.numbers for choice in choices)
    gains = [(_gain(choice, 0), index) for index, choice in enumerate(choices)]
    heapq.heapify(gains)
    while gains:
        _, index = heapq.heappop(gains)
        choice = choices[index]
        if choice.numbers > left:  # a smaller one may still fit
            continue
        given[index] += 1
        left -= choice.numbers
        if given[index] < len(choice.noise) - 1:
            heapq.heappush(gains, (_gain(choice, given[index]), index))
    return [choice.least + more for choice, more in zip(choices, given, strict=True)]


def _gain(choice: Choice, more: int) -> float:
    """Minus what one bit more saves, a bit."""
    return -choice.cost * (choice.noise[more] - choice.noise[more + 1]) / choice.numbers
