"""KIVI in the cache: tokens leave the window in whole groups, and a crop that cuts a group opens it again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.cache.layer import RotateKVLayer
from rotatekv.cache.sinks import FirstCallSinks
from rotatekv.methods import LayerGeometry, build_method
from rotatekv.methods.stores import PlaneStore

HEADS, DIM, GROUP, WINDOW = 2, 16, 8, 5
CONFIG = replace(PRESETS["KIVI2"], k_groupsize=GROUP, v_groupsize=8, residual_length=WINDOW)


def layer_of(config=CONFIG) -> RotateKVLayer:
    return RotateKVLayer(build_method(config, LayerGeometry(0, HEADS, DIM)))


def states(tokens: int, seed: int = 0, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, HEADS, tokens, DIM, generator=generator)
    return keys.half().float(), values.half().float()


def add(layer: RotateKVLayer, keys: torch.Tensor, values: torch.Tensor):
    return layer.update(keys, values)


@pytest.mark.parametrize("window", [0, 1, WINDOW, 16])
@pytest.mark.parametrize("group", [1, 3, GROUP, 32])
def test_the_window_holds_its_length_and_up_to_a_group_more(window, group):
    layer = layer_of(replace(CONFIG, k_groupsize=group, residual_length=window))
    for tokens in range(1, 80):
        add(layer, *states(1, tokens))
        packed = layer.packed.length
        held = 0 if layer.window is None else layer.window.tokens
        assert layer.get_seq_length() == tokens == packed + held and layer.packed.values.length == packed
        assert packed % group == 0 and (held <= window + group - 1) and (held >= window or packed == 0)


@pytest.mark.parametrize("chunks", [(60,), (1,) * 60, (7, 13, 1, 1, 38), (21, 39)])
def test_codes_do_not_depend_on_the_calls_that_wrote_them(chunks):
    keys, values = states(60)
    layer, at_once = layer_of(), layer_of()
    add(at_once, keys, values)
    for k, v in zip(keys.split(chunks, 2), values.split(chunks, 2), strict=True):
        seen = add(layer, k, v)
    assert all(torch.equal(a, b) for a, b in zip(seen, at_once.read(), strict=True))
    mine, theirs = ([*one.tensors("keys"), *one.tensors("values")] for one in (layer, at_once))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_groups_scales_lie_where_the_layout_says():
    """``scale`` (B, T / g, C) float16 and ``zero`` int8; the planes of ``kernels/layout.py`` for the codes."""
    keys, values = states(53)
    layer = layer_of(replace(CONFIG, k_bits=3))
    add(layer, keys, values)
    held, packed = layer.packed.keys.tensors, 48
    assert {name: (x.dtype, tuple(x.shape)) for name, x in held.items()} == {
        "scale": (torch.float16, (2, 6, 32)),
        "zero": (torch.int8, (2, 6, 32)),
        "low": (torch.int32, (2, 3, 32)),
        "high": (torch.int16, (2, 3, 32)),
    }
    assert all(x.is_contiguous() for x in held.values())
    row, token, head, channel = 1, 29, 1, 11
    at = head * DIM + channel
    low = int(held["low"][row, token // 16, at]) >> 2 * (token % 16) & 3
    code = low | (int(held["high"][row, token // 16, at]) >> token % 16 & 1) << 2
    value = (code - int(held["zero"][row, token // GROUP, at])) * float(held["scale"][row, token // GROUP, at])
    assert float(layer.read()[0][row, head, token, channel]) == pytest.approx(value, rel=1e-6)
    group = keys[row, head, token // GROUP * GROUP :, channel][:GROUP]
    assert abs(value - float(keys[row, head, token, channel])) <= float(group.max() - group.min()) / 7 * 0.51
    assert layer.get_seq_length() == packed + WINDOW


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("left", [1, 7, 8, 9, 31, 32, 39])
def test_a_crop_keeps_what_was_read_and_opens_a_cut_group(left, sinks):
    """45 tokens, 40 of them packed: the kept ones read as before, those of a cut group from the window, in 16 bits."""
    keys, values = states(45)
    layer = layer_of(replace(CONFIG, Attention_Sink_Aware=sinks))
    chosen = FirstCallSinks(torch.tensor([0, 0, 1]), torch.tensor([0, 30, 38])) if sinks else None
    layer.update(keys, values, sinks=chosen)
    before = [x.clone() for x in layer.read()]
    layer.crop(left - 45)
    whole = left // GROUP * GROUP
    assert layer.packed.length == layer.packed.values.length == whole
    assert layer.window.tokens == left - whole
    assert layer.window.keys.dtype == torch.float16 and layer.get_seq_length() == left
    for ours, theirs in zip(layer.read(), before, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, :left], rtol=1e-3, atol=1e-6)
        assert torch.equal(ours[:, :, :whole], theirs[:, :, :whole])
    if sinks and left > 30:
        assert torch.equal(layer.read()[0][0, :, 30], keys[0, :, 30])
        assert left in (32, 39) or torch.equal(layer.window.keys[0, :, 30 - whole], keys[0, :, 30].half())


@pytest.mark.parametrize("left", [3, 20, 37])
def test_tokens_added_after_a_crop_are_grouped_with_those_it_left(left):
    """As a layer that was given what a read returned: the first tokens of an opened group are quantized again."""
    keys, values = states(45)
    layer, again = layer_of(), layer_of()
    add(layer, keys, values)
    layer.crop(left - 45)
    whole = left // GROUP * GROUP
    packed = [x.clone() for x in layer.packed.keys.tokens().values()]
    stored = [x[:, :, whole:left] for x in layer.read()]
    more = states(30, 1)
    got = [x[:, :, whole:] for x in add(layer, *more)]
    want = add(again, *(torch.cat([a.half().float(), b], dim=2) for a, b in zip(stored, more, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert layer.get_seq_length() == left + 30
    for a, b in zip(packed, layer.packed.keys.tokens().values(), strict=True):
        assert torch.equal(a, b[:, : a.shape[1]])


def test_an_emptied_layer_starts_again():
    layer, fresh = layer_of(), layer_of()
    add(layer, *states(45))
    layer.crop(-43)
    assert layer.packed.length == 0 and layer.window.tokens == 2
    layer.crop(-2)
    assert layer.get_seq_length() == 0
    assert all(torch.equal(a, b) for a, b in zip(add(layer, *states(20, 3)), add(fresh, *states(20, 3)), strict=True))


@pytest.mark.parametrize("strategy", [{"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_runs_over_cuts_and_moves(strategy):
    model, ids = tiny_model(), torch.randint(3, 128, (1, 5)).repeat(1, 6)
    config = replace(CONFIG, residual_length=0, v_groupsize=16)
    with patch_model(model, config):
        out = model.generate(ids, max_new_tokens=20, min_new_tokens=20, return_dict_in_generate=True, **strategy)
        cache = out.past_key_values
        assert cache.get_seq_length() >= 49
        for layer in cache.layers:
            assert layer.packed.length % GROUP == 0 and layer.packed.length >= 40


def test_moved_rows_take_their_scales_with_them():
    model, ids = tiny_model().double(), torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(4))
    with patch_model(model, replace(CONFIG, v_groupsize=16)), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        model(ids, past_key_values=cache)
        moved = copy.deepcopy(cache)
        moved.reorder_cache(torch.tensor([2, 0, 0]))
        for ours, theirs in zip(moved.layers, cache.layers, strict=True):
            for a, b in zip(ours.read(), theirs.read(), strict=True):
                assert torch.equal(a, b[[2, 0, 0]])


# --- the store ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 6, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_plane_store_gives_back_what_it_was_given(bits, group):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, 12 * group, 24), dtype=torch.uint8, generator=generator)
    side = torch.randn(2, 12, 3, generator=generator).half()
    store, start = PlaneStore(bits, group), 0
    for rows in (1, 4, 7):
        part = slice(start, start + rows)
        store.append({"codes": codes[:, start * group : (start + rows) * group], "side": side[:, part]})
        start += rows
        assert store.length == start * group
        assert torch.equal(store.tokens()["codes"], codes[:, : store.length])
        assert torch.equal(store.tokens()["side"], side[:, :start])
    store.crop(5 * group)
    assert torch.equal(store.tokens()["codes"], codes[:, : 5 * group]) and store.tokens()["side"].shape[1] == 5
    shorter = PlaneStore(bits, group)
    shorter.append({"codes": codes[:, : 5 * group], "side": side[:, :5]})
    assert all(torch.equal(x, store.tensors[name]) for name, x in shorter.tensors.items())  # cut lanes are zero
    store.append({"codes": codes[:, 5 * group :], "side": side[:, 5:]})
    assert torch.equal(store.tokens()["codes"], codes)


def test_a_plane_store_refuses_parts_of_a_group():
    store = PlaneStore(2, 4)
    with pytest.raises(ValueError, match="whole groups of 4"):
        store.append({"codes": torch.zeros(1, 6, 8, dtype=torch.uint8)})
    store.append({"codes": torch.zeros(1, 8, 8, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="whole groups of 4"):
        store.crop(3)
