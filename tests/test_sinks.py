"""Sink detection against a naive loop over all entries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatekv import RotateKVCache, patch_model
from rotatekv.cache.sinks import detect_sinks, first_tokens
from rotatekv.compat import CACHE_NAME
from rotatekv.config import PRESETS


def naive_sinks(hidden_states: torch.Tensor, num_entries: int, token_mask=None) -> list[tuple[int, int]]:
    sinks = []
    for row in range(hidden_states.shape[0]):
        entries = []
        for token in range(hidden_states.shape[1]):
            if token_mask is None or token_mask[row, token]:
                entries += [(abs(value), token) for value in hidden_states[row, token].tolist()]
        entries.sort(key=lambda entry: -entry[0])
        sinks += [(row, token) for token in sorted({token for _, token in entries[:num_entries]})]
    return sinks


def found(*args) -> list[tuple[int, int]]:
    rows, columns = detect_sinks(*args)
    assert rows.dtype == columns.dtype == torch.int32
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6)),
    num_entries=st.integers(1, 25),
    seed=st.integers(0, 999),
    masked=st.booleans(),
)
def test_sinks_equal_the_naive_loop(shape, num_entries, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:2], generator=generator) < 0.6 if masked else None
    assert found(hidden_states, num_entries, mask) == naive_sinks(hidden_states, num_entries, mask)


def test_several_entries_on_one_token_make_one_sink():
    hidden_states = torch.full((1, 6, 8), 0.1)
    hidden_states[0, 2] = torch.tensor([9.0, -8, 7, -6, 5, -4, 3, -2])
    assert found(hidden_states, 8) == [(0, 2)]


def test_negative_entries_count_by_their_size():
    hidden_states = torch.tensor([[[1.0, 2.0], [-50.0, 0.0], [3.0, 4.0]]])
    assert found(hidden_states, 1) == [(0, 1)]


def test_each_sequence_has_its_own_sinks_in_order():
    hidden_states = torch.zeros(2, 4, 3)
    hidden_states[0, 3, 0], hidden_states[0, 1, 2], hidden_states[1, 0, 1], hidden_states[1, 2, 0] = 5.0, 4.0, 3.0, 2.0
    assert found(hidden_states, 2) == [(0, 1), (0, 3), (1, 0), (1, 2)]


@pytest.mark.parametrize("padding", [1e30, -1e30, float("inf"), float("nan")])
def test_padding_is_never_a_sink_however_large(padding):
    hidden_states = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :4] = False
    padded = hidden_states.masked_fill(~mask.unsqueeze(-1), padding)
    assert found(padded, 5, mask) == naive_sinks(hidden_states, 5, mask)
    assert all(mask[row, column] for row, column in found(padded, 100, mask))


def test_zero_hidden_states_of_real_tokens_still_beat_padding():
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 30] = mask[0, 40] = True
    assert found(torch.zeros(1, 64, 2), 4, mask) == [(0, 30), (0, 40)]


def test_a_sequence_of_padding_alone_has_no_sinks():
    mask = torch.tensor([[False, False], [True, True]])
    assert found(torch.ones(2, 2, 3), 6, mask) == [(1, 0), (1, 1)]


def test_fewer_entries_than_asked_for_makes_every_token_a_sink():
    assert found(torch.randn(2, 3, 4), 20) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_one_token_is_a_sink():
    assert found(torch.randn(1, 1, 96), 20) == [(0, 0)]


def test_detection_leaves_the_hidden_states_and_the_graph_alone():
    hidden_states = torch.randn(1, 4, 3, requires_grad=True)
    before = hidden_states.detach().clone()
    detect_sinks(hidden_states, 2, torch.tensor([[False, True, True, True]]))
    assert torch.equal(hidden_states.detach(), before) and hidden_states.grad is None


def test_first_tokens_skip_the_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    rows, columns = first_tokens(torch.randn(4, 5, 3), 2, mask)
    assert rows.dtype == columns.dtype == torch.int32
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert pairs == [(0, 2), (0, 3), (1, 0), (1, 1), (2, 1), (2, 3), (3, 4)]
    assert len(first_tokens(torch.randn(2, 3, 4), 20)[0]) == 6


def test_the_model_keeps_the_first_tokens_where_the_config_says_so(tiny):
    ids = torch.randint(8, 128, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    config = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, sink_selection="first", num_sink_entries=3)
    with patch_model(tiny, config), torch.no_grad():
        cache = RotateKVCache.for_model(tiny)
        tiny(ids, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache})
    for layer in cache.layers:
        assert layer.sinks.batch_index.tolist() == [0, 0, 0, 1, 1, 1] and layer.sinks.token_index.tolist() == [
            4,
            5,
            6,
            0,
            1,
            2,
        ]
