"""RotateKV+: its codec against numpy, its bits, massive tokens, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import left_padding, logits, tiny_model, token_ids
from safetensors.torch import save_file

from benchmarks.random_models import random_statistics as random_kind
from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.families import find_text_model
from rotatekv.kernels.transform_coding import FRAME, GROUP, NOISE, STEPS
from rotatekv.methods import LayerGeometry, build_method
from rotatekv.methods.bit_budget import Choice, allocate
from rotatekv.methods.rotatekv_plus import KEYS_GIVEN_BACK, VALUE_NOISE, VALUES_GIVEN_BACK, RotateKVPlus
from rotatekv.statistics import CalibrationTarget, save_statistics

LAYERS, HEADS, DIM = 2, 3, 16
CHANNELS = HEADS * DIM
PLUS = replace(PRESETS["RotateKV2+"], residual_length=16)  # a shorter window: short texts have packed tokens


def random_statistics(threshold: float = 1e9, dim: int = DIM) -> dict[str, torch.Tensor]:
    """Of two layers of three heads; those of the tiny models have one group of components."""
    statistics = random_kind("plus", CalibrationTarget("tiny", LAYERS, HEADS, dim))
    return statistics | {"sink_threshold": torch.full((LAYERS, 1), threshold)}


def planned(statistics: dict[str, torch.Tensor], bits: float = 2.0) -> dict[str, torch.Tensor]:
    geometries = [LayerGeometry(layer, HEADS, statistics["key_mean"].shape[2]) for layer in range(LAYERS)]
    return RotateKVPlus.plan(replace(PLUS, bits=bits), statistics, geometries)


@pytest.fixture
def statistics_file(tmp_path):
    return save_statistics(tmp_path / "tiny.plus.safetensors", "plus", random_statistics(), {})


def run(model, config, path, chunks, mask=None) -> tuple[torch.Tensor, RotateKVCache]:
    ids = token_ids(1 if mask is None else len(mask), sum(chunks))
    with patch_model(model, config, path):
        cache = RotateKVCache.for_model(model)
        return logits(model, cache, ids, chunks, mask), cache


def numpy_codec(x: np.ndarray, map_: np.ndarray, bits: np.ndarray, cost: np.ndarray, given_back: float) -> np.ndarray:
    """One head's centred vectors (T, D) as they read: one scale each, about the root mean square, by the error
    that costs least."""
    bits, cost = (np.repeat(part, GROUP) for part in (bits, cost))  # (D,)
    steps, middle = np.array(STEPS)[bits], 2.0 ** (bits - 1)
    read = np.zeros_like(x)
    for number, y in enumerate(x @ map_.T):  # (D,), of variance 1
        rms = 4 * np.log2(np.mean(y[bits > 0] ** 2))
        least = np.inf
        for stored in range(-4, 12):
            scale = 2 ** ((np.rint(rms) + stored) / 8) * steps
            there = (np.clip(np.floor(y / scale + middle), 0, 2 * middle - 1) + 0.5 - middle) * scale * (bits > 0)
            error = (cost * (bits > 0) * (there - y) ** 2).sum()
            if error < least:
                least, read[number] = error, there
    gain = (1 - np.array((0, *NOISE[1:]))[bits]) ** -given_back
    return (gain * read) @ np.linalg.inv(map_).T


@pytest.mark.parametrize("bits", [1.25, 2.0, 3.5])
def test_keys_and_values_are_mapped_rounded_and_mapped_back(bits):
    statistics = {name: x[0] for name, x in planned(random_statistics(dim=64), bits).items()}
    codec = build_method(replace(PLUS, bits=bits), LayerGeometry(0, HEADS, 64), statistics)
    x = torch.randn(1, HEADS, 40, 64, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    keys = codec.keys_out(codec.decode_keys(codec.encode_keys(codec.keys_in(x))))[0].numpy()
    values = codec.values_out(codec.decode_values(codec.encode_values(codec.values_in(x))))[0].numpy()
    given = {name: rows.double().numpy() for name, rows in statistics.items()}
    key_bits, value_bits = (statistics[name].numpy() for name in ("key_bits", "value_bits"))
    assert len({*key_bits.flatten()}) > 2
    for head in range(HEADS):
        exact = x[0, head].double().numpy()
        want = numpy_codec(exact, given["key_map"][head], key_bits[head], given["key_cost"][head], KEYS_GIVEN_BACK)
        assert_close_but_for_ties(keys[head], want, exact)
        mean, every = given["value_mean"][head], np.ones(64 // GROUP, int)
        want = numpy_codec(exact - mean, given["value_map"][head], every * value_bits[head], every, VALUES_GIVEN_BACK)
        assert_close_but_for_ties(values[head], want + mean, exact)


def assert_close_but_for_ties(found: np.ndarray, want: np.ndarray, exact: np.ndarray) -> None:
    """A number near a tie, of a level or of two scales' errors, may fall the other way in float32."""
    assert np.quantile(np.abs(found - want), 0.95) < 1e-4
    assert np.abs(want - exact).mean() > 0.05, "nothing was rounded"


def test_a_score_is_that_of_the_codes_and_of_a_query_turned_to_the_frame(statistics_file, tiny):
    """No key is turned: ``kernels/transform_coding.py`` has the formula. R by complex numbers."""
    with patch_model(tiny, PLUS, statistics_file), torch.no_grad():
        layer = tiny(token_ids(1, 2 * FRAME + 60)).past_key_values.layers[0]
        found = layer.keys[0].double().numpy()
    codes, scale = (x[0].double().numpy() for x in layer.packed.keys.tokens().values())  # (T, H_kv, D), (T, H_kv)
    coded, frequencies = layer.method.key_transform, find_text_model(tiny).rotary_emb.inv_freq.double().numpy()
    inverse, mean, bits = (x.double().numpy() for x in (coded.inverse, coded.mean, coded.component_bits))
    query = np.random.default_rng(0).normal(size=DIM)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        pairs = (x[: DIM // 2] + 1j * x[DIM // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    for token in (0, 17, FRAME - 1, FRAME, FRAME + 55, 2 * FRAME + 31):
        first = token // FRAME * FRAME
        of_frame = turned(query, -first)
        for head in range(HEADS):
            level = np.where(bits[head] > 0, codes[token, head] + 0.5 - 2.0 ** (bits[head] - 1), 0.0)
            score = 2 ** ((scale[token, head] - 128) / 8) * (of_frame @ inverse[head]) @ level
            score += of_frame @ turned(mean[head], token - first)
            assert query @ found[head, token] == pytest.approx(score, abs=1e-4)


# --- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1.0, 1.75, 2.0, 3.0, 4.5])
def test_a_budget_is_split_over_all_layers_by_cost(bits):
    statistics = random_statistics(dim=64)
    found = planned(statistics, bits)
    choices = [  # a head's strongest group has 1 bit at least
        Choice(cost, GROUP, NOISE[1:], 1) if group == 0 else Choice(cost, GROUP, NOISE)
        for head in statistics["key_cost"].flatten(0, 1).tolist()
        for group, cost in enumerate(head)
    ]
    choices += [Choice(cost, 64, VALUE_NOISE, 1) for cost in statistics["value_cost"].flatten().tolist()]
    both = allocate(choices, (bits - 8 / 64) * 2 * LAYERS * HEADS * 64)  # a byte of scale for 64 numbers
    assert found["key_bits"].shape == (LAYERS, HEADS, 4) and found["value_bits"].shape == (LAYERS, HEADS)
    # Layer by layer, keys first.
    assert sorted(found["key_bits"].flatten().tolist()) == sorted(both[: LAYERS * HEADS * 4])
    assert found["value_bits"].flatten().tolist() == both[LAYERS * HEADS * 4 :] and found["value_bits"].min() >= 1
    spent = (16 * found["key_bits"].sum() + 64 * found["value_bits"].sum()) / (2 * LAYERS * HEADS * 64)
    assert bits - 1 / 6 < spent + 8 / 64 <= bits


def test_bits_are_the_formulas(statistics_file, tiny):
    tokens, config = 200, replace(PLUS, bits=2.5)
    _, cache = run(tiny, config, statistics_file, (tokens,))
    methods = [layer.method for layer in cache.layers]
    given = sum(method.k_bits + method.v_bits for method in methods) / 2 / LAYERS
    assert 2.5 - 1 / 6 < given + 8 / DIM <= 2.5 and len({method.k_bits for method in methods}) == 2
    packed = (tokens - 16) // 16 * 16
    codes = packed * CHANNELS * sum(method.k_bits + method.v_bits for method in methods) / 8
    scales = packed * HEADS * 2  # a byte, keys and values
    window = (tokens - packed) * (2 * (CHANNELS + 2 * HEADS) + 1)  # int8, a scale of 16 bits a head; a flag beside each
    assert cache.nbytes() == codes + LAYERS * (scales + window) + 4 * tokens


def test_more_bits_are_nearer_to_the_model(statistics_file, tiny):
    ids = token_ids(1, 120)
    with torch.no_grad():
        stock = tiny(ids, use_cache=False).logits
    differences = [
        (run(tiny, replace(PLUS, bits=bits), statistics_file, (120,))[0] - stock).square().mean().item()
        for bits in (1.0, 2.0, 3.0, 4.5)
    ]
    assert differences == sorted(differences, reverse=True) and differences[0] > 5 * differences[-1]


# --- massive tokens ------------------------------------------------------------------------------------------------


def test_massive_tokens_stay_exact_whenever_they_come(tmp_path, monkeypatch):
    """One-shot, in chunks and one by one; padding, which is as large, is none."""
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    model = tiny_model().double()
    hidden = model.get_input_embeddings()(token_ids(2, 90)).abs().amax(-1)  # (B, T), the first layer's input
    threshold = hidden.flatten().sort().values[-12].item() - 1e-6
    path = save_statistics(tmp_path / "t.safetensors", "plus", random_statistics(threshold), {})
    mask = left_padding(90, 9, 0)
    whole, cache = run(model, PLUS, path, (90,), mask)
    layers = [alone.layers[0] for alone in cache.parts.caches()]  # padded rows are kept each alone
    assert [layer.packed.length for layer in layers] == [64, 64]
    expected = [(hidden[row, left : left + 64] > threshold).nonzero()[:, 0].int() for row, left in ((0, 9), (1, 0))]
    assert sum(map(len, expected)) > 4
    assert all(torch.equal(layer.sinks.token_index, sinks) for layer, sinks in zip(layers, expected, strict=True))
    for chunks in ((30, 20, 1, 39), (5, 85), (12,) + (1,) * 78):
        parts, other = run(model, PLUS, path, chunks, mask)
        for alone, sinks in zip(other.parts.caches(), expected, strict=True):
            assert torch.equal(alone.layers[0].sinks.token_index, sinks)
        difference = (parts - whole)[mask.bool()].abs()
        assert difference.median() < 1e-6 and difference.mean() < 2e-3


@pytest.mark.parametrize("width", [5, 30, 33])
def test_a_later_calls_short_mask_leaves_the_rest_padding(width, tmp_path, tiny):
    """As Hugging Face's own masks do: the tokens it does not name are unseen, and not stored."""
    path = save_statistics(tmp_path / "t.safetensors", "plus", random_statistics(0.0), {})
    for length in (width, 35):
        mask = torch.ones(2, width, dtype=torch.long)
        mask = torch.nn.functional.pad(mask, (0, length - width))
        with patch_model(tiny, PLUS, path), torch.no_grad():
            cache = RotateKVCache.for_model(tiny)
            tiny(token_ids(2, 30), past_key_values=cache)
            found = tiny(token_ids(2, 5, seed=1), attention_mask=mask, past_key_values=cache).logits
        assert cache.get_seq_length() == 35
        for alone in cache.parts.caches():
            assert alone.get_seq_length() == max(width, 30) and alone.layers[0].window.is_massive.all()
        if length == width:
            short = found
    torch.testing.assert_close(short, found)


def test_sinks_survive_a_crop_and_a_beam(tmp_path, tiny):
    hidden = tiny.get_input_embeddings()(token_ids(2, 90)).abs().amax(-1)
    path = save_statistics(tmp_path / "t.safetensors", "plus", random_statistics(hidden.median().item()), {})
    with patch_model(tiny, replace(PLUS, bits=4.5), path), torch.no_grad():
        cache, other = RotateKVCache.for_model(tiny), RotateKVCache.for_model(tiny)
        tiny(token_ids(2, 90), past_key_values=cache)
        cache.crop(-40)  # 50 left: 48 in whole blocks, two in the window
        layer = cache.layers[0]
        assert layer.packed.length == 48 and layer.window.is_massive.shape == (2, 2)
        assert layer.sinks.token_index.max() < 50
        cache.select_rows(torch.tensor([1, 1, 0]))
        assert layer.window.is_massive.shape[0] == 3
        tiny(token_ids(2, 90)[:, :50], past_key_values=other)
        rows = torch.tensor([1, 1, 0])
        more = token_ids(3, 40, seed=5)
        got = tiny(more, past_key_values=cache).logits
        other.select_rows(rows)
        want = tiny(more, past_key_values=other).logits
    # Two tokens of the cut block decode once more: their codes may differ, the rest is the same.
    assert (got - want).abs().median() < 0.1 * want.std()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, damage",
    [
        ("key_map", lambda x: x * float("nan")),
        ("key_map", lambda x: x * (torch.arange(DIM) > 0)),
        ("value_map", lambda x: x[..., :-1]),
        ("key_mean", lambda x: x * float("nan")),
        ("key_mean", lambda x: x[:, :-1]),
        ("key_cost", lambda x: -x),
        ("key_cost", lambda x: x.repeat(1, 1, 2)),
        ("value_mean", lambda x: x[:, :, None]),
        ("value_cost", lambda x: x / 0),
        ("sink_threshold", lambda x: x[:1]),
    ],
)
def test_a_damaged_file_is_one_line(name, damage, tmp_path, tiny):
    statistics = random_statistics()
    statistics[name] = damage(statistics[name])
    path = save_statistics(tmp_path / "bad.safetensors", "plus", statistics, {})
    with pytest.raises(UserError, match=name) as error:
        patch_model(tiny, PLUS, path)
    assert "\n" not in str(error.value) and "calibrate_reorder.py --statistics plus" in str(error.value)


@pytest.mark.parametrize("older", ["format", "key_map"])
def test_a_file_of_the_first_format_is_made_anew(older, tmp_path, tiny):
    metadata = {"format": "1"} if older == "format" else {}
    path = save_statistics(tmp_path / "old.safetensors", "plus", random_statistics(), metadata)
    if older == "key_map":
        save_file({"key_scale": torch.ones(LAYERS, CHANNELS)}, path, metadata={"format": "2"})
    line = r"is not a RotateKV\+-statistics file of format 2: make it with calibrate_reorder\.py --statistics plus$"
    with pytest.raises(UserError, match=line) as error:
        patch_model(tiny, PLUS, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": None}, "needs a number of bits: --bits 2.0"),
        ({"k_bits": 4}, "set --bits, not --k_bits or --v_bits"),
        ({"v_bits": 3}, "set --bits, not --k_bits or --v_bits"),
        ({"bits": 0.5}, r"bits must lie in \[1.0, 4.5\], not 0.5"),
        ({"bits": float("nan")}, "bits must lie in"),
        ({"bits": "2"}, "bits must be of type float"),
        ({"v_groupsize": 8}, "no use for v_groupsize"),
        ({"Grouped_Head_Key_Rotation": True}, "no use for Grouped_Head_Key_Rotation"),
    ],
)
def test_flags_without_sense_are_one_line(changes, message, statistics_file, tiny):
    with pytest.raises(UserError, match=message) as error:
        patch_model(tiny, replace(PLUS, **changes), statistics_file)
    assert "\n" not in str(error.value)


def test_head_dimensions_that_are_no_whole_groups_are_one_line(statistics_file):
    with pytest.raises(UserError, match="codes 16 components at a time, head_dim 24 has others") as error:
        patch_model(tiny_model(head_dim=24), PLUS, statistics_file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"bits": 2.5}, {"sink_selection": "massive"}])
@pytest.mark.parametrize("preset", ["RTN2", "KIVI2", "TurboQuant2"])
def test_other_methods_refuse_its_flags(preset, changes, tiny):
    with pytest.raises(UserError, match=next(iter(changes))):
        patch_model(tiny, replace(PRESETS[preset], **changes))
