"""RotateKV+'s maps of keys and values: those whose rounding noise costs attention's output least, by second moments.

With a the attention weights and o the output of a head, an error s_n of the score of token n moves the output by
``Σ a_n·(v_n − o)·s_n``, an error e_n of its value by ``Σ a_n·e_n``, and the layer's output by W times that, W the
head's part of the output projection. Errors of different tokens are independent, so their squares add up, each with its
factor: a_n²·|W·(v_n − o)|² for scores, a_n² for values. Those factors weigh the second moments of queries, and WᵀW.
docs/beyond.md says what a plain mean over all queries and tokens costs, most of which attend to each other very little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from rotatekv.cache.sinks import largest_magnitude
from rotatekv.errors import UserError
from rotatekv.families import find_text_model, output_projection
from rotatekv.kernels.hadamard import hadamard_matrix
from rotatekv.kernels.transform_coding import FRAME, GROUP
from rotatekv.patching.watching import Attended, stream_attention
from rotatekv.rope import KeyFrames, LayerRope, Positions

FIRST_TOKENS = 16  # of a window, that do not count: the sinks among them are kept in 16 bits and are unlike the rest
RECENT_TOKENS = 32  # before a query, taken as its recent window: 64 by RotateKV+'s presets, fewer in sliding layers
QUERY_STEP = 4  # every fourth query is asked
RIDGE = 0.1  # of a second moment's mean eigenvalue, added to all of them
LEAST_VARIANCE = 1e-8  # of what is coded: a map has 16 bits, in which a factor of 1e5 is infinite
_OF_LAYER = ("key_map", "key_mean", "key_cost", "value_map", "value_mean", "value_cost")


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


@dataclass
class Moments:
    """Sums over the tokens and queries of one layer, float64, on the CPU.

    Args:
        heads: H_kv. head_dim: D. rope: of the layer.
        read: (H, D, D), the squares of the output projection's part for each head: how the layer's output sees an error
            of attention's.

    Attributes:
        places: (H_kv, FRAME, D), keys turned back by their frame's first position, by place in the frame.
        counts: (FRAME,), how many. keys: (H_kv, D, D), their squares.
        queries: (H_kv, D, D), squares of the queries that share a head, turned back by each frame they see, weighted.
        values: (H_kv, D). value_squares: (H_kv, D, D).
        value_weights: (H,), Σ a_n² of the queries. asked: how many queries of a head.
    """

    heads: int
    head_dim: int
    rope: LayerRope | None
    read: torch.Tensor
    asked: int = 0
    places: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        heads, dim = self.heads, self.head_dim
        self.places, self.counts = _zeros(heads, FRAME, dim), _zeros(FRAME)
        self.keys, self.queries, self.value_squares = (_zeros(heads, dim, dim) for _ in range(3))
        self.values, self.value_weights = _zeros(heads, dim), _zeros(len(self.read))

    @classmethod
    def like(cls, attended: Attended) -> Moments:
        heads, _, dim = attended.key.shape[1:]
        read = torch.eye(dim, dtype=torch.float64, device="cpu").expand(attended.query.shape[1], dim, dim)
        projection = output_projection(attended.module)
        if projection is not None:
            of_head = projection.double().cpu().unflatten(1, (-1, dim)).transpose(0, 1)  # (H, hidden_size, D)
            read = of_head.transpose(1, 2) @ of_head
        return cls(heads, dim, attended.rope, read)

    def add(self, attended: Attended, sink_threshold: float) -> None:
        """Take in a window, (1, T) tokens; sinks do not count, they are kept in 16 bits."""
        counted = largest_magnitude(attended.hidden_states)[0] <= sink_threshold  # (T,)
        counted[:FIRST_TOKENS] = False
        self._add_tokens(attended, counted)
        for head in range(self.heads):
            self._add_queries(attended, counted, head)
        self.asked += len(range(0, counted.shape[0], QUERY_STEP))

    def _add_tokens(self, attended: Attended, counted: torch.Tensor) -> None:
        no_mean = KeyFrames(FRAME, torch.zeros(self.heads, self.head_dim, dtype=torch.float32, device="cpu"))
        keys = no_mean.enter(attended.key, self.rope, attended.positions, 0)[0][:, counted].double().cpu()
        values = attended.value[0][:, counted].double().cpu()  # (H_kv, T, D)
        place = counted.nonzero()[:, 0].cpu() % FRAME
        self.places.index_add_(1, place, keys)
        self.counts += torch.bincount(place, minlength=FRAME)
        self.keys += keys.transpose(1, 2) @ keys
        self.values += values.sum(1)
        self.value_squares += values.transpose(1, 2) @ values

    def _add_queries(self, attended: Attended, counted: torch.Tensor, head: int) -> None:
        """Those that share a head, turned back by each frame that they see."""
        repeat = len(self.read) // self.heads
        shared = slice(head * repeat, (head + 1) * repeat)
        queries = attended.query[0, shared, ::QUERY_STEP].float()  # (H / H_kv, T_q, D)
        read = self.read[shared].float().to(queries.device)
        of_scores, of_values = _weights(attended, counted, queries, head, read)
        for start, weights in zip(range(0, counted.shape[0], FRAME), of_scores, strict=True):
            turned = queries
            if self.rope is not None:
                (cos, sin), _ = attended.positions.frame_tables(self.rope, start, start + 1, FRAME, queries.device)
                turned = self.rope.turn(queries[None], (cos, -sin))[0]
            weighted = (turned * weights.sqrt().unsqueeze(-1)).flatten(0, 1)  # (H / H_kv · T_q, D)
            self.queries[head] += (weighted.T @ weighted).double().cpu()
        self.value_weights[shared] += of_values.double().cpu()

    def statistics(self) -> dict[str, torch.Tensor]:
        """Maps (H_kv, D, D), means (H_kv, D) and costs of keys (H_kv, D / 16) and values (H_kv,)."""
        count, dim = self.counts.sum().clamp_min(1), self.head_dim
        mean, centres = self._key_means()
        cross = centres.transpose(1, 2) @ self.places
        square = centres.transpose(1, 2) @ (centres * self.counts.unsqueeze(-1))
        keys = (self.keys - cross - cross.transpose(1, 2) + square) / count
        value_mean = self.values / count
        values = self.value_squares / count - value_mean.unsqueeze(2) @ value_mean.unsqueeze(1)
        read = (self.read * self.value_weights[:, None, None]).unflatten(0, (self.heads, -1)).sum(1)  # (H_kv, D, D)
        asked = max(self.asked, 1)
        key_maps, key_costs = zip(*map(best_map, keys, self.queries / asked, [GROUP] * self.heads), strict=True)
        value_maps, value_costs = zip(*map(best_map, values, read / asked, [dim] * self.heads), strict=True)
        value_cost = torch.cat(value_costs)  # (H_kv,)
        found = (torch.stack(key_maps), mean, torch.stack(key_costs), torch.stack(value_maps), value_mean, value_cost)
        return dict(zip(_OF_LAYER, found, strict=True))

    def _key_means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the keys before RoPE, (H_kv, D), and that mean turned to each place of a frame, (H_kv, FRAME, D)."""
        heads, dim = self.heads, self.head_dim
        if self.rope is None:
            mean = self.places.sum(1) / self.counts.sum().clamp_min(1)
            return mean, mean.unsqueeze(1).expand(-1, FRAME, -1)
        positions = Positions(torch.arange(FRAME, dtype=torch.int32, device="cpu")[None])
        device = self.rope.model.frequencies(self.rope.kind).device
        _, (cos, sin) = positions.frame_tables(self.rope, 0, FRAME, FRAME, device)
        before = self.rope.turn(self.places.to(device, torch.float32)[None], (cos, -sin))[0].double().cpu()
        mean = before.sum(1) / self.counts.sum().clamp_min(1)
        repeated = mean.to(device, torch.float32)[None, :, None].expand(1, heads, FRAME, dim)
        return mean, self.rope.turn(repeated, (cos, sin))[0].double().cpu()


def _weights(
    attended: Attended, counted: torch.Tensor, queries: torch.Tensor, head: int, read: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What errors do to the layer's output: of a frame's scores, (frames, H / H_kv, T_q), and of values, (H / H_kv,).

    ``read`` (H / H_kv, D, D) is that of ``Moments``; the values' factor is without it. Tokens in a query's recent
    window have none.
    """
    keys, values = attended.key[0, head].float(), attended.value[0, head].float()  # (T, D)
    tokens = len(keys)
    scaling = attended.options.get("scaling") or keys.shape[1] ** -0.5
    scores = (queries @ keys.T * scaling).masked_fill(~attended.sees[::QUERY_STEP], -torch.inf)
    weights = scores.softmax(-1)  # (H / H_kv, T_q, T)
    output = weights @ values
    seen_values, seen_output = values @ read, output @ read  # (H / H_kv, T, D), (H / H_kv, T_q, D)
    of_values = (seen_values * values).sum(-1).unsqueeze(1)
    of_output = (seen_output * output).sum(-1, keepdim=True)
    distances = of_values - 2 * (seen_output @ values.T) + of_output  # of v − o
    place = torch.arange(tokens, dtype=torch.int64, device=keys.device)
    squares = weights.square() * (counted & (place <= place[::QUERY_STEP, None] - RECENT_TOKENS))
    frames = -(-tokens // FRAME)
    of_scores = torch.nn.functional.pad(squares * distances.clamp_min(0), (0, frames * FRAME - tokens))
    return of_scores.unflatten(-1, (frames, FRAME)).sum(-1).movedim(-1, 0), squares.sum(dim=(1, 2))


def best_map(
    second_moment: torch.Tensor, metric: torch.Tensor, group: int, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head's map and what noise 1 in all components of each group costs.

    With U·e·Uᵀ the eigenvalues (falling) of Q^½·S·Q^½, y = Uᵀ·Q^½·x has noise that counts as it is. Groups of
    components of y are balanced by e^(−¼), mixed by a Hadamard matrix and brought to variance 1. No other map of a
    group onto components that are rounded alike costs less.

    Args:
        second_moment: S, of what is coded, metric: Q, of what reads it; (D, D) float64.
        group: components that have the same bits.

    Returns:
        A (D, D), and (D / group,), float64.
    """
    dim = len(metric)
    eye = torch.eye(dim, dtype=torch.float64, device="cpu")
    second_moment = second_moment + max(ridge * second_moment.trace().item() / dim, LEAST_VARIANCE) * eye
    metric = metric + (ridge * metric.trace() / dim + 1e-30) * eye
    strengths, axes = torch.linalg.eigh(metric)
    root = axes * strengths.sqrt() @ axes.T
    variances, axes = torch.linalg.eigh(root @ second_moment @ root)
    variances, axes = variances.flip(0).clamp_min(1e-30), axes.flip(1)
    groups = variances.sqrt().view(-1, group)  # (D / group, group)
    spread = groups.mean(1)  # variance of a component, once balanced
    balanced = ((axes.T @ root) / variances[:, None] ** 0.25).view(-1, group, dim)
    mixed = hadamard_matrix(group).double() @ balanced / spread.sqrt()[:, None, None]
    return mixed.flatten(0, 1), groups.sum(1).square() / group


def collect_transforms(
    model: nn.Module, windows: Iterable[torch.Tensor], sink_thresholds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``Moments.statistics`` of every layer, (num_hidden_layers, ...) each; zeros for a layer without attention.

    Args:
        model: not patched. windows: token ids, (1, T) each. sink_thresholds: (num_hidden_layers, 1).

    Raises:
        UserError: no window has more than 16 tokens.
    """
    text_model = find_text_model(model)
    found: dict[int, Moments] = {}

    def take(attended: Attended) -> None:
        of_layer = found.setdefault(attended.layer, Moments.like(attended))
        of_layer.add(attended, sink_thresholds[attended.layer].item())

    stream_attention(model, text_model, windows, take)
    if not any(moments.counts.sum() for moments in found.values()):
        raise UserError(f"the calibration text has no window of more than {FIRST_TOKENS} tokens")
    rows = {number: moments.statistics() for number, moments in found.items()}
    none = {name: torch.zeros_like(x) for name, x in next(iter(rows.values())).items()}
    layers = [rows.get(number, none) for number in range(len(text_model.layers))]
    return {name: torch.stack([layer[name] for layer in layers]) for name in none}
