"""Every operation of the cache, and its bytes: summed independently over storages, and by a formula written by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import save_reorder_indices, tiny_model, token_ids
from transformers import Cache, DynamicCache

from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model
from rotatekv.cache.spec import handle_of

HOLDERS = (
    "RotateKVCache",
    "RotateKVLayer",
    "Positions",
    "TokenStore",
    "BlockStore",
    "PlaneStore",
    "PackedTokens",
    "Window",
    "Sinks",
)
LAYERS, KV_HEADS, DIM = 2, 3, 16
CHANNELS = KV_HEADS * DIM
ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, num_sink_entries=6)
NO_SINKS = replace(ROTATEKV2, Attention_Sink_Aware=False)
CONFIGS = {
    "FP16": PRESETS["FP16"],
    "RTN2": PRESETS["RTN2"],
    "RotateKV2": ROTATEKV2,
    "RotateKV3": replace(ROTATEKV2, k_bits=3, v_bits=3),
    "K4 V2, groups of 8": replace(ROTATEKV2, k_bits=4, k_groupsize=8, v_groupsize=8),
    "window": replace(ROTATEKV2, residual_length=5),
    "long window": replace(ROTATEKV2, residual_length=400),
    "RTN2 with window": replace(PRESETS["RTN2"], residual_length=7),
    "KIVI2": replace(PRESETS["KIVI2"], k_groupsize=6, v_groupsize=16, residual_length=4),
    "KIVI4 without window": replace(PRESETS["KIVI4"], k_groupsize=5, v_groupsize=8, residual_length=0),
    "QuaRot3": PRESETS["QuaRot3"],
    "TurboQuant3": PRESETS["TurboQuant3"],
}


@pytest.fixture(params=CONFIGS)
def patched(request, tiny):
    with patch_model(tiny, CONFIGS[request.param]), torch.no_grad():
        yield tiny


@pytest.fixture
def rotated(tiny):
    with patch_model(tiny, ROTATEKV2), torch.no_grad():
        yield tiny


def filled(model, rows: int = 1, tokens: int = 12, seed: int = 0) -> RotateKVCache:
    cache = RotateKVCache.for_model(model)
    model(token_ids(rows, tokens, seed), past_key_values=cache)
    return cache


def bytes_held(cache) -> int:
    """All storages reachable from the cache's attributes, whole: a view of a large tensor costs the large tensor."""
    storages: dict[int, int] = {}

    def visit(thing):
        if isinstance(thing, torch.Tensor):
            if thing.untyped_storage().nbytes():
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for item in thing.values():
                visit(item)
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                visit(item)
        elif type(thing).__name__ in HOLDERS:
            visit(vars(thing))

    visit(cache)
    return sum(storages.values())


def bytes_by_formula(config: QuantConfig, rows: int, tokens: int, sinks: int, window: int) -> int:
    """Codes in blocks of 16 tokens, a float16 scale and an int8 zero per group, 16-bit windows, sinks, positions.

    KIVI's keys: a scale and a zero per channel and group of tokens. TurboQuant: a float16 norm per token and head.
    """
    positions = rows * tokens * 4
    if config.method == "fp16":
        return LAYERS * rows * tokens * 2 * CHANNELS * 4 + positions  # in the model's dtype, here float32
    packed = -(-(tokens - window) // 16) * 16
    per_token = 0
    for bits, group in ((config.k_bits, config.k_groupsize or DIM), (config.v_bits, config.v_groupsize or DIM)):
        per_token += CHANNELS * bits // 8 + CHANNELS // group * (2 + 1)
    per_layer = rows * (packed * per_token + window * 2 * CHANNELS * 2)
    if config.method == "kivi":  # the values' scales, and the keys' by group
        assert (tokens - window) % config.k_groupsize == 0
        codes = CHANNELS * (config.k_bits + config.v_bits) // 8
        values = packed * (codes + CHANNELS // config.v_groupsize * 3)
        keys = (tokens - window) // config.k_groupsize * CHANNELS * 3
        per_layer = rows * (values + keys + window * 2 * CHANNELS * 2)
    if config.method == "turboquant":
        per_layer = rows * (packed * CHANNELS * (config.k_bits + config.v_bits) // 8 + tokens * 2 * KV_HEADS * 2)
    return LAYERS * per_layer + sinks * (2 * CHANNELS * 2 + 2 * 4) + positions


def sinks_of(cache) -> int:
    return sum(len(layer.sinks.token_index) for layer in cache.layers if layer.sinks is not None)


def window_of(config: QuantConfig, tokens: int, packed: int = 0) -> int:
    """Tokens in the recent window of a cache that has packed so many: ``residual_length``, for KIVI a ragged group."""
    group = config.k_groupsize if config.method == "kivi" else 1
    packed = max(packed, max(tokens - config.residual_length, 0) // group * group)
    return tokens - min(packed, tokens // group * group)


def assert_bytes(cache, rows: int, tokens: int, window: int | None = None) -> None:
    """``window``: tokens in the recent window, unless a crop took some away what ``window_of`` says."""
    assert cache.get_seq_length() == tokens
    window = window_of(cache.config, tokens) if window is None else window
    by_formula = bytes_by_formula(cache.config, rows, tokens, sinks_of(cache), window)
    assert cache.nbytes() == bytes_held(cache) == by_formula
    numbers = LAYERS * 2 * rows * tokens * CHANNELS
    bits = cache.avg_bits()
    assert cache.numbers() == numbers
    assert bits["total"] == pytest.approx(8 * by_formula / numbers)
    assert (bits["k"] + bits["v"]) / 2 + 8 * rows * tokens * 4 / numbers == pytest.approx(bits["total"])


def test_bytes_after_a_prefill_and_after_decoding(patched):
    cache = filled(patched, tokens=40)
    assert_bytes(cache, 1, 40)
    for step in range(1, 81):
        patched(token_ids(1, 1, step), past_key_values=cache)
        if step in (1, 3, 80):
            assert_bytes(cache, 1, 40 + step)


def test_a_reordered_cache_holds_nothing_beside_what_it_counts(tiny, tmp_path):
    """All tensors reachable from it but the codec's, which every cache of the model shares."""
    order = torch.stack([torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(n)) for n in range(LAYERS)])
    path = save_reorder_indices(tmp_path / "order.safetensors", order, {"head_group_num": 3})
    tiny.name_or_path = "tiny"

    def storages(thing, seen) -> dict[int, int]:
        if isinstance(thing, torch.Tensor):
            return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
        if id(thing) in seen or isinstance(thing, torch.nn.Module):
            return {}
        seen.add(id(thing))
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
        parts = [*parts, *getattr(thing, "__dict__", {}).values()]
        return {key: size for part in parts for key, size in storages(part, seen).items()}

    with patch_model(tiny, replace(PRESETS["RotateKV2"], residual_length=3), path) as handle, torch.no_grad():
        cache = filled(tiny, tokens=40)
        shared = storages(handle.spec, set())
        own = {key: size for key, size in storages(cache, set()).items() if key not in shared}
    assert cache.nbytes() == sum(own.values())


def test_bytes_after_generate(patched):
    out = patched.generate(token_ids(2, 20), max_new_tokens=9, min_new_tokens=9, return_dict_in_generate=True)
    assert_bytes(out.past_key_values, 2, 28)


def test_bytes_at_batch_four_and_after_every_operation(patched):
    config = handle_of(patched).config
    cache = filled(patched, rows=4, tokens=23)
    packed = 23 - window_of(config, 23)
    assert_bytes(cache, 4, 23)
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert_bytes(cache, 4, 23)
    cache.crop(-3)  # what was packed stays packed, so the window is three tokens short
    window = window_of(config, 20, packed)
    assert_bytes(cache, 4, 20, window)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    assert_bytes(cache, 3, 20, window)
    cache.batch_repeat_interleave(2)
    assert_bytes(cache, 6, 20, window)
    cache.batch_select_indices(torch.tensor([True, False, False, False, True, False]))
    assert_bytes(cache, 2, 20, window)
    patched(token_ids(2, 3, 5), past_key_values=cache)
    assert_bytes(cache, 2, 23)
    cache.crop(-21)
    assert_bytes(cache, 2, 2, window_of(config, 2, packed))
    patched(token_ids(2, 1, 6), past_key_values=cache)
    assert_bytes(cache, 2, 3, window_of(config, 3, min(packed, 2)))
    cache.reset()
    assert cache.nbytes() == bytes_held(cache) == cache.numbers() == 0
    assert cache.avg_bits() == {"k": 0.0, "v": 0.0, "total": 0.0}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("name", ["FP16", "RotateKV2", "window"])
def test_a_first_call_of_one_token_keeps_only_that_tokens_bytes(family, name):
    """phi3 cuts keys and values out of one tensor: kept as a view, they would keep the queries alive as well."""
    model = tiny_model(family)
    with patch_model(model, CONFIGS[name]), torch.no_grad():
        assert_bytes(filled(model, tokens=1), 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_quantized_bytes_do_not_depend_on_the_models_dtype(dtype):
    model = tiny_model("llama").to(dtype)
    for config in (ROTATEKV2, CONFIGS["window"]):
        with patch_model(model, config), torch.no_grad():
            cache = filled(model, rows=2, tokens=17)
            assert_bytes(cache, 2, 17)
            assert {x.element_size() for x in cache.tensors() if x.is_floating_point()} == {2}


def test_rotatekv2_of_128_channels_per_head_takes_what_the_paper_says():
    """2.1875 bits per number (codes, scale 16 and zero 8 per 128) and the positions' 32 bits per token."""
    shape = {"head_dim": 128, "num_key_value_heads": 2, "num_attention_heads": 2}
    model = tiny_model("llama", **shape)
    with patch_model(model, NO_SINKS), torch.no_grad():
        bits = filled(model, tokens=32).avg_bits()
    assert bits["k"] == bits["v"] == 2 + 24 / 128
    assert bits["total"] == pytest.approx(2 + 24 / 128 + 32 / (2 * LAYERS * 2 * 128))


def test_lengths_and_mask_sizes(rotated):
    cache = RotateKVCache.for_model(rotated)
    assert isinstance(cache, Cache) and len(cache) == LAYERS
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(7, 0) == (7, 0)
    rotated(token_ids(2, 9), past_key_values=cache)
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [9, 9]
    assert cache.get_mask_sizes(4, 1) == (13, 0)
    assert cache.get_max_length() == cache.get_max_length(1) == -1
    assert cache.is_croppable and all(layer.is_croppable and not layer.is_sliding for layer in cache.layers)
    assert not cache.is_compileable


def next_logits(model, cache, rows: int = 1, tokens: int = 2):
    """What the cache's content makes of two more tokens; the cache itself is left alone."""
    with torch.no_grad():
        return model(token_ids(rows, tokens, seed=99), past_key_values=copy.deepcopy(cache)).logits


def assert_same_content(ours, other):
    mine, theirs = list(ours.tensors()), list(other.tensors())
    assert len(mine) == len(theirs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_reset_cache_behaves_like_a_fresh_one(patched):
    cache = filled(patched, rows=2, tokens=15, seed=1)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.positions is None
    out = patched(token_ids(1, 10, 2), past_key_values=cache)
    fresh = RotateKVCache.for_model(patched)
    assert torch.equal(out.logits, patched(token_ids(1, 10, 2), past_key_values=fresh).logits)
    assert_same_content(cache, fresh)


@pytest.mark.parametrize("removed", [1, 4, 6, 11])
def test_crop_leaves_what_the_first_tokens_alone_had_made(removed, tiny):
    """Without sinks (their choice looks at the whole first call) and windows, codes depend on no later token."""
    for config in (NO_SINKS, PRESETS["RTN2"], PRESETS["FP16"], PRESETS["QuaRot2"], PRESETS["TurboQuant2"]):
        with patch_model(tiny, config), torch.no_grad():
            cropped = filled(tiny, rows=2, tokens=12)
            cropped.crop(-removed)
            short = RotateKVCache.for_model(tiny)
            tiny(token_ids(2, 12)[:, : 12 - removed], past_key_values=short)
            assert torch.equal(cropped.positions, short.positions)
            for ours, theirs in zip(cropped.tensors(), short.tensors(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(next_logits(tiny, cropped, 2), next_logits(tiny, short, 2), rtol=1e-3, atol=1e-3)


def test_crop_across_sinks_and_window_keeps_the_rest_as_it_was(tiny):
    with patch_model(tiny, replace(ROTATEKV2, residual_length=5)), torch.no_grad():
        cache = filled(tiny, rows=2, tokens=20)
        before = [(row, column) for row, column in zip(*sink_places(cache.layers[0]), strict=True)]
        window = cache.layers[1].window.keys.clone()
        codes = cache.layers[1].packed.keys.tokens()["codes"].clone()
        cache.crop(-2)  # within the window
        assert torch.equal(cache.layers[1].window.keys, window[:, :, :3])
        assert torch.equal(cache.layers[1].packed.keys.tokens()["codes"], codes)
        cache.crop(-8)  # the rest of the window and five packed tokens
        assert torch.equal(cache.layers[1].packed.keys.tokens()["codes"], codes[:, :10])
        assert cache.layers[1].window.keys.shape == (2, KV_HEADS, 0, DIM)
        after = [(row, column) for row, column in zip(*sink_places(cache.layers[0]), strict=True)]
        assert after == [place for place in before if place[1] < 10] and len(after) < len(before)
        assert cache.positions.shape == (2, 10)
        tiny(token_ids(2, 7, 3), past_key_values=cache)
        assert cache.get_seq_length() == 17 and cache.layers[1].window.keys.shape == (2, KV_HEADS, 5, DIM)
        assert_bytes(cache, 2, 17)


def sink_places(layer) -> tuple[list[int], list[int]]:
    return layer.sinks.batch_index.tolist(), layer.sinks.token_index.tolist()


def test_crop_rules(rotated):
    cache = filled(rotated)
    for target in (cache, cache.layers[0]):
        with pytest.raises(ValueError, match="crop"):
            target.crop(3)
    assert cache.get_seq_length() == 12
    before = [x.clone() for x in cache.tensors()]
    cache.crop(0)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    cache.crop(-12)
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0 and cache.positions is None
    cache.crop(-1)  # nothing to remove: no error, as in a DynamicCache
    out = rotated(token_ids(2, 5), past_key_values=cache)
    assert torch.equal(out.logits, rotated(token_ids(2, 5)).logits)
    cache.crop(-100)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("window", [0, 4])
def test_crop_takes_a_tensor_of_no_dimension(window, tiny):
    """What generate of transformers 5.17 hands in after a rejected candidate."""
    with patch_model(tiny, replace(ROTATEKV2, residual_length=window)):
        by_int, by_tensor = filled(tiny), filled(tiny)
        by_int.crop(-5)
        by_tensor.crop(torch.tensor(-5))
        assert type(by_tensor.get_seq_length()) is int
        assert by_tensor.positions.shape == by_int.positions.shape == (1, 7)
        assert all(torch.equal(a, b) for a, b in zip(by_int.tensors(), by_tensor.tensors(), strict=True))
        assert torch.equal(next_logits(tiny, by_tensor), next_logits(tiny, by_int))
        with pytest.raises(ValueError, match="crop"):
            by_tensor.crop(torch.tensor(3))


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0], [2, 1, 0, 0, 2]])
def test_selecting_rows_moves_everything_of_a_sequence_and_quantizes_nothing(rows, patched, monkeypatch):
    cache = filled(patched, rows=3, tokens=14)
    singles = []
    for row in range(3):
        single = copy.deepcopy(cache)
        single.batch_select_indices(torch.tensor([row]))
        singles.append(single)
    for method in {type(layer.method) for layer in cache.layers}:
        monkeypatch.setattr(method, "encode_keys", None)
        monkeypatch.setattr(method, "encode_values", None)
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(torch.tensor(rows))
    monkeypatch.undo()
    assert_bytes(chosen, len(rows), 14)
    for place, row in enumerate(rows):
        one = copy.deepcopy(chosen)
        one.batch_select_indices(torch.tensor([place]))
        assert_same_content(one, singles[row])
    want = torch.cat([next_logits(patched, singles[row]) for row in rows])
    got = torch.cat(
        [
            patched(token_ids(1, 2, 99).expand(len(rows), -1), past_key_values=copy.deepcopy(chosen)).logits[[place]]
            for place in range(len(rows))
        ]
    )
    assert (got - want).abs().median() < 1e-4


def test_selection_by_bool_by_list_and_repetition_agree(patched):
    cache = filled(patched, rows=3, tokens=9)
    by_index, by_mask, repeated, by_rows = (copy.deepcopy(cache) for _ in range(4))
    by_index.batch_select_indices(torch.tensor([0, 2]))
    by_mask.batch_select_indices(torch.tensor([True, False, True]))
    assert_same_content(by_index, by_mask)
    repeated.batch_repeat_interleave(2)
    by_rows.reorder_cache(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert_same_content(repeated, by_rows)
    for operation in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):  # one layer, as HF may
        one, all_layers = copy.deepcopy(cache), copy.deepcopy(cache)
        argument = 2 if operation == "batch_repeat_interleave" else torch.tensor([2, 1])
        for layer in one.layers:
            getattr(layer, operation)(argument)
        getattr(all_layers, operation)(argument)
        one._positions.set(all_layers.positions)
        assert_same_content(one, all_layers)


def test_operations_on_an_empty_cache_do_nothing(rotated):
    cache = RotateKVCache.for_model(rotated)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_select_indices(torch.tensor([True]))
    cache.batch_repeat_interleave(3)
    cache.crop(-1)
    cache.reset()
    for layer in range(LAYERS):
        cache.layers[layer].offload()
        cache.layers[layer].prefetch()
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert torch.equal(rotated(token_ids(), past_key_values=cache).logits, rotated(token_ids()).logits)


def test_a_deep_copy_is_independent(patched):
    cache = filled(patched)
    twin = copy.deepcopy(cache)
    assert_same_content(cache, twin)
    assert not {x.data_ptr() for x in cache.tensors() if x.numel()} & {x.data_ptr() for x in twin.tensors()}
    before = [x.clone() for x in cache.tensors()]
    patched(token_ids(1, 4, 1), past_key_values=twin)
    twin.crop(-10)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    patched(token_ids(1, 1, 1), past_key_values=cache)


def test_offload_and_prefetch_lose_nothing(patched):
    cache = filled(patched, rows=2)
    before, expected = [x.clone() for x in cache.tensors()], next_logits(patched, cache, 2)
    for layer in range(LAYERS):
        cache.offload(layer)
    assert all(x.device.type == "cpu" for x in cache.tensors())
    for layer in cache.layers:
        layer.prefetch()
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    assert torch.equal(next_logits(patched, cache, 2), expected)


def test_offload_moves_every_tensor_and_prefetch_brings_them_back(rotated):
    cache = filled(rotated, rows=2)
    layer = cache.layers[0]
    layer._move("meta")  # stands in for a second device
    held = [*layer.tensors("keys"), *layer.tensors("values")]
    assert {x.device.type for x in held} == {"meta"} and len(held) == 10


def test_a_cache_needs_a_patched_model(tiny):
    with pytest.raises(UserError, match="not patched"):
        RotateKVCache.for_model(tiny)
    with patch_model(tiny, ROTATEKV2):
        cache, used = RotateKVCache.for_model(tiny), filled(tiny)
    for one in (cache, used):
        with pytest.raises(RuntimeError, match="only works in a model patched with patch_model"):
            tiny(token_ids(), past_key_values=one)
    with pytest.raises(RuntimeError, match="only works in a model patched"):
        cache.layers[0].update(torch.zeros(1, 3, 1, 16), torch.zeros(1, 3, 1, 16))


def test_another_batch_size_than_the_caches_is_refused(rotated):
    with pytest.raises(ValueError, match="holds 2 sequences, the call has 3"):
        rotated(token_ids(3, 1), past_key_values=filled(rotated, rows=2))


def test_a_call_that_failed_half_way_can_be_repeated(rotated):
    """The first decoder layer raises once: positions were noted, no token was stored."""
    cache, twin = filled(rotated), filled(rotated)

    def fail(module, args):
        raise KeyError("once")

    hook = rotated.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        rotated(token_ids(1, 5, 1), past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 12 and cache.positions.shape == (1, 12)
    a, b = (rotated(token_ids(1, 5, 2), past_key_values=one).logits for one in (cache, twin))
    assert torch.equal(a, b)
    assert_same_content(cache, twin)


def stock_heads(model, ids) -> DynamicCache:
    """The unpatched model's own keys, after RoPE, and values."""
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return cache


def test_the_window_is_the_last_tokens_in_16_bits_and_the_rest_is_quantized_as_without(tiny, monkeypatch):
    """In the first layer, whose keys no quantization has touched."""
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    ids = token_ids(2, 23)
    with torch.no_grad():
        stock = stock_heads(tiny, ids).layers[0]
        with patch_model(tiny, NO_SINKS):
            whole = filled_with(tiny, ids).layers[0]
        with patch_model(tiny, replace(NO_SINKS, residual_length=5)):
            cache = filled_with(tiny, ids[:, :19])
            for step in range(5):
                layer, length = cache.layers[0], 19 + step
                last = slice(length - 5, length)
                for held, want in ((layer.window.keys, stock.keys), (layer.window.values, stock.values)):
                    assert held.dtype == torch.float16
                    torch.testing.assert_close(held.float(), want[:, :, last], rtol=1e-3, atol=1e-3)
                for kind in ("keys", "values"):
                    codes = getattr(layer.packed, kind).tokens()["codes"]
                    same = codes == getattr(whole.packed, kind).tokens()["codes"][:, : length - 5]
                    assert codes.shape[1] == length - 5 and same.float().mean() > 0.98  # they were 16 bits in between
                error = (layer.keys - stock.keys[:, :, :length]).abs().amax(dim=(0, 1, 3))
                assert error[-5:].max() < 1e-2 < error[:-5].min()
                if step < 4:  # what leaves the window is packed, in order
                    tiny(ids[:, length : length + 1], past_key_values=cache)


def test_sinks_stay_exact_to_16_bits_and_the_others_do_not(tiny):
    ids = token_ids(2, 24)
    with torch.no_grad():
        stock = stock_heads(tiny, ids).layers
    with patch_model(tiny, ROTATEKV2), torch.no_grad():
        cache = filled_with(tiny, ids)
        for number, layer in enumerate(cache.layers):
            rows, columns = layer.sinks.batch_index.long(), layer.sinks.token_index.long()
            assert 2 <= len(rows) <= 2 * ROTATEKV2.num_sink_entries and set(rows.tolist()) == {0, 1}
            is_sink = torch.zeros(2, 24, dtype=torch.bool)
            is_sink[rows, columns] = True
            if number:
                continue  # the stock model's keys are others from here on
            assert torch.equal(layer.sinks.keys, stock[0].keys[rows, :, columns].half())
            assert torch.equal(layer.sinks.values, stock[0].values[rows, :, columns].half())
            for got, exact in ((layer.keys, stock[0].keys), (layer.values, stock[0].values)):
                error = (got - exact).abs().amax(dim=(1, 3))  # (B, T)
                assert error[is_sink].max() < 1e-2 < error[~is_sink].min()
        before = [layer.sinks.keys.clone() for layer in cache.layers]
        tiny(token_ids(2, 3, 1), past_key_values=cache)
        assert all(torch.equal(a, layer.sinks.keys) for a, layer in zip(before, cache.layers, strict=True))
        assert sink_places(cache.layers[0])[1] == columns_of(tiny, ids)


def columns_of(model, ids):
    """The first layer's sinks named naively from the embeddings."""
    states, columns = model.get_input_embeddings()(ids), []
    for row in states:
        top = row.abs().flatten().topk(ROTATEKV2.num_sink_entries).indices // row.shape[-1]
        columns += sorted(set(top.tolist()))
    return columns


def test_sinks_are_chosen_in_the_first_call_alone(tiny):
    ids = token_ids(1, 30)
    with torch.no_grad():
        tiny.get_input_embeddings().weight[ids[0, 20]] *= 50  # massive, but in the second call
    ids[0, :10] = torch.where(ids[0, :10] == ids[0, 20], 5, ids[0, :10])
    with patch_model(tiny, ROTATEKV2), torch.no_grad():
        at_once = filled_with(tiny, ids)
        assert 20 in sink_places(at_once.layers[0])[1]
        cache = filled_with(tiny, ids[:, :10])
        places = [sink_places(layer) for layer in cache.layers]
        tiny(ids[:, 10:], past_key_values=cache)
        assert [sink_places(layer) for layer in cache.layers] == places
        assert all(column < 10 for layer in cache.layers for column in sink_places(layer)[1])
        cache.crop(-30)  # empty again: the next call is a first one
        tiny(ids, past_key_values=cache)
        assert_same_content(cache, at_once)


def filled_with(model, ids, **inputs):
    cache = RotateKVCache.for_model(model)
    model(ids, past_key_values=cache, **inputs)
    return cache


@pytest.mark.parametrize("kind", ["2-D", "4-D bool", "4-D float"])
def test_padding_is_never_chosen_as_a_sink(kind, tiny):
    ids, mask = token_ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    ids[0, :6], mask[0, :6] = 0, 0
    with torch.no_grad():
        embedding = tiny.get_input_embeddings()
        embedding.padding_idx = None
        embedding.weight[0] = 1000.0
    given = mask
    if kind != "2-D":
        given = torch.ones(16, 16, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None, :]
        if kind == "4-D float":
            given = torch.where(given, 0.0, torch.finfo(torch.float32).min)
    with patch_model(tiny, ROTATEKV2), torch.no_grad():
        padded = filled_with(tiny, ids, attention_mask=given)
        unmasked = filled_with(tiny, ids)
    first_row = [column for row, column in zip(*sink_places(unmasked.layers[0]), strict=True) if row == 0]
    assert set(first_row) <= set(range(6)), "the padding is not massive enough"
    for layer in padded.layers:
        assert all(mask[row, column] for row, column in zip(*sink_places(layer), strict=True))
        assert 0 in sink_places(layer)[0] and 1 in sink_places(layer)[0]


def test_positions_follow_the_caches_operations(rotated):
    positions = torch.stack([torch.arange(5, 17), torch.arange(40, 52)])
    cache = filled_with(rotated, token_ids(2, 12), position_ids=positions)
    assert torch.equal(cache.positions, positions.int())
    cache.crop(-4)
    assert torch.equal(cache.positions, positions[:, :8].int())
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.positions, positions[:, :8].int().repeat_interleave(2, 0))
    cache.reorder_cache(torch.tensor([3, 0]))
    assert torch.equal(cache.positions, positions[[1, 0], :8].int())
    rotated(token_ids(2, 1, 1), past_key_values=cache)  # none given: counted on from the cache's length
    assert cache.positions[:, -1].tolist() == [8, 8]


def test_a_cache_is_a_list_of_decoded_keys_and_values(tiny):
    """As a ``DynamicCache`` is one; FP16's are the stock model's own."""
    stock, ids = DynamicCache(), token_ids(2, 21)
    tiny(ids, past_key_values=stock)
    for name in CONFIGS:
        with patch_model(tiny, CONFIGS[name]), torch.no_grad():
            cache = RotateKVCache.for_model(tiny)
            assert len(cache) == len(list(cache)) == LAYERS and not cache.is_initialized
            assert list(cache) == [(None, None, None)] * LAYERS
            tiny(ids, past_key_values=cache)
            before = cache.nbytes()
            assert cache.is_initialized and len(list(cache)) == LAYERS
            for layer, (keys, values, window), theirs in zip(cache.layers, cache, stock.layers, strict=True):
                assert window is None and torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
                assert keys.shape == values.shape == theirs.keys.shape and keys.dtype == values.dtype == torch.float32
                if name == "FP16":
                    torch.testing.assert_close((keys, values), (theirs.keys, theirs.values))
            assert cache.nbytes() == before
