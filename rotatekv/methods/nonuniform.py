"""Non-uniform levels of KVQuant (arXiv 2401.18079, nuqX): rounding to them, and choosing them by k-means."""

from __future__ import annotations

import torch

_SMALLEST_SCALE = 2.0**-24  # smallest positive float16
_LARGEST = 65504.0  # largest float16
_EMPTY_BIN = 1e-12  # of all mass: what a bin without numbers weighs, so that every cluster has a middle


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The index of the level nearest to each number, uint8; beyond the ends, the first or the last.

    Args:
        levels: (2^bits,), ascending.
    """
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def split_values(x: torch.Tensor, outliers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, its outliers and the middle and half-width of the range of its other numbers.

    Args:
        x: (..., C) float32. outliers: how many numbers of a token are outliers, fewer than C.

    Returns:
        channels (..., outliers) int64, those farthest from the token's median; offset, scale (..., 1) float16.
    """
    # PAPER: the upper and the lower 0.5 % of a token are its outliers; here it is as many, on whichever side they lie.
    distance = (x - x.median(dim=-1, keepdim=True).values).abs()
    channels = distance.topk(outliers, dim=-1).indices
    top = x.scatter(-1, channels, -torch.inf).amax(-1, keepdim=True)
    bottom = x.scatter(-1, channels, torch.inf).amin(-1, keepdim=True)
    offset = ((top + bottom) / 2).clamp(-_LARGEST, _LARGEST).half()
    scale = ((top - bottom) / 2).clamp(_SMALLEST_SCALE, _LARGEST).half()
    return channels, offset, scale


class LevelHistogram:
    """Weighted numbers in [-1, 1], counted in bins, and the levels that serve them best.

    Its size does not grow with the numbers. ``mass`` and ``moment`` are (bins,) float64, Σ w and Σ w·x of each bin.
    """

    def __init__(self, bins: int = 1024):
        self.mass = torch.zeros(bins, dtype=torch.float64, device="cpu")
        self.moment = torch.zeros(bins, dtype=torch.float64, device="cpu")

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Count numbers of weight ≥ 0, of one shape; those outside [-1, 1] are left out."""
        inside = x.abs() <= 1
        x, weight = x[inside].double().cpu(), weight[inside].double().cpu()
        bins = len(self.mass)
        where = ((x + 1) * (bins / 2)).long().clamp_(max=bins - 1)
        self.mass.index_add_(0, where, weight)
        self.moment.index_add_(0, where, weight * x)

    def levels(self, counts: tuple[int, ...]) -> list[torch.Tensor]:
        """For each number of levels, those of least Σ w·(x − level)²; ascending, (count,) float32.

        One-dimensional k-means, solved exactly over the bins by dynamic programming.
        """
        # AUTHORS: scikit-learn's k-means from one random start, which ends in a local optimum of the same sum.
        bins = len(self.mass)
        middles = (torch.arange(bins, dtype=torch.float64, device="cpu") + 0.5) * (2 / bins) - 1
        total = self.mass.sum()
        spare = _EMPTY_BIN * (total if total > 0 else total.new_ones(()))
        mass, moment = self.mass + spare, self.moment + spare * middles
        before_mass, before_moment, before_square = (
            torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in (mass, moment, moment**2 / mass)
        )  # (bins + 1,)

        def between(x: torch.Tensor) -> torch.Tensor:
            return x[None, :] - x[:, None]  # (start, end): the sum over bins start … end − 1

        edges = torch.arange(bins + 1, dtype=torch.int64, device="cpu")
        starts, ends = edges[:, None], edges[None, :]
        cost = between(before_square) - between(before_moment) ** 2 / between(before_mass)
        cost = torch.where(starts < ends, cost, torch.inf)  # of one cluster
        best, choices = cost[0], []  # best[j]: the bins before j in as many clusters as there are choices, and one
        for _ in range(max(counts) - 1):
            best, choice = (best[:, None] + cost).min(dim=0)
            choices.append(choice)
        found = []
        for count in counts:
            cuts = [bins]
            for choice in reversed(choices[: count - 1]):
                cuts.append(int(choice[cuts[-1]]))
            cuts = torch.tensor([0, *reversed(cuts)], dtype=torch.int64, device="cpu")
            sums = [x[cuts[1:]] - x[cuts[:-1]] for x in (before_moment, before_mass)]
            found.append((sums[0] / sums[1]).float())
        return found
