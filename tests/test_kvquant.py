"""KVQuant: its codec and its calibration against few-line references, its paper's claims, its file's checks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import save_reorder_indices, save_tiny_folder, tiny_model, tiny_text
from safetensors.torch import load_file

import calibrate_reorder
from benchmarks.random_models import random_statistics as random_kind
from rotatekv import PRESETS, RotateKVCache, UserError, load_model, patch_model
from rotatekv import statistics as statistics_module
from rotatekv.cache.sinks import first_tokens
from rotatekv.calibration.kvquant import _with_gradients, collect_key_ranges, collect_levels
from rotatekv.methods import LayerGeometry, build_method
from rotatekv.methods.nonuniform import LevelHistogram, nearest_level
from rotatekv.methods.stores import PlaneStore
from rotatekv.statistics import CalibrationTarget, load_statistics, save_statistics

LAYERS, HEADS, DIM = 2, 3, 16
CHANNELS = HEADS * DIM
TARGET = CalibrationTarget("tiny", LAYERS, HEADS, DIM)


def random_statistics(heads: int = HEADS) -> dict[str, torch.Tensor]:
    """Ranges and uneven levels; the ranges are too narrow for some numbers, so that outliers are clipped."""
    return random_kind("kvquant", replace(TARGET, heads=heads))


@pytest.fixture
def statistics_file(tmp_path):
    return save_statistics(tmp_path / "tiny.kvquant.safetensors", "kvquant", random_statistics(), {})


def codec_of(preset: str, channels: int = CHANNELS):
    statistics = {name: x[0] for name, x in random_statistics(channels // DIM).items()}
    codec = build_method(PRESETS[preset], LayerGeometry(0, channels // DIM, DIM), statistics)
    return codec, {name: x.double().numpy() for name, x in statistics.items()}


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


def with_exact(decoded: np.ndarray, x: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The ceil(1 %) numbers of each row that lie farthest are the float16 of the original."""
    count = int(np.ceil(x.shape[-1] / 100))
    where = np.argsort(-distance, axis=-1)[..., :count]
    np.put_along_axis(decoded, where, np.take_along_axis(x, where, -1).astype(np.float16).astype(float), -1)
    return decoded


def reference_keys(x: np.ndarray, stats: dict, bits: int) -> np.ndarray:
    """Sections 3.1 to 3.4 of the paper, (..., C) float64."""
    scaled = (x - stats["key_offset"]) / stats["key_scale"]
    decoded = nearest(scaled, stats[f"key_levels{bits}"]) * stats["key_scale"] + stats["key_offset"]
    return with_exact(decoded, x, np.abs(scaled))


def reference_values(x: np.ndarray, stats: dict, bits: int) -> np.ndarray:
    distance = np.abs(x - np.sort(x, -1)[..., (x.shape[-1] - 1) // 2, None])  # from the (lower) median
    count = int(np.ceil(x.shape[-1] / 100))
    rest = np.take_along_axis(x, np.argsort(distance, -1)[..., :-count], -1)
    top, bottom = rest.max(-1, keepdims=True), rest.min(-1, keepdims=True)
    offset, scale = (((top + sign * bottom) / 2).astype(np.float16).astype(float) for sign in (1, -1))
    scale = np.maximum(scale, 2.0**-24)  # a constant token
    return with_exact(nearest((x - offset) / scale, stats[f"value_levels{bits}"]) * scale + offset, x, distance)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("channels", [CHANNELS, 240])
def test_codec_equals_the_reference(bits, channels):
    codec, stats = codec_of(f"KVQuant{bits}", channels)
    x = 2 * torch.randn(2, 37, channels, generator=torch.Generator().manual_seed(1))
    x[0, 3, 5] = 100.0
    x[1, 4, 6] = -80.0
    for kind, reference in (("keys", reference_keys), ("values", reference_values)):
        store = getattr(codec, f"{kind[:-1]}_store")()
        for part in x.split([1, 15, 17, 4], dim=1):  # across blocks of 16
            store.add(part, getattr(codec, f"encode_{kind}"))
        decoded = getattr(codec, f"decode_{kind}")(store.tokens())
        np.testing.assert_allclose(decoded.numpy(), reference(x.double().numpy(), stats, bits), atol=2e-6, rtol=1e-5)
        assert decoded[0, 3, 5] == 100.0 and decoded[1, 4, 6] == -80.0


def test_an_outlier_beyond_float16_stays_finite_and_a_constant_token_is_kept():
    codec, _ = codec_of("KVQuant2")
    x = torch.full((1, 2, CHANNELS), 0.25)
    x[0, 1, 7] = 1e6
    values = codec.decode_values(codec.encode_values(x))
    assert values[0, 1, 7] == 65504.0 and (values[0, 0] - 0.25).abs().max() < 1e-6
    assert codec.decode_keys(codec.encode_keys(x)).isfinite().all()


def test_a_store_crops_and_selects_as_plain_tensors_do():
    codec, _ = codec_of("KVQuant3")
    x = torch.randn(3, 40, CHANNELS, generator=torch.Generator().manual_seed(2))
    store = codec.value_store()
    store.add(x, codec.encode_values)
    store.crop(19)
    rows = torch.tensor([2, 0, 2])
    store.select_rows(rows)
    store.add(x[rows, 19:30], codec.encode_values)
    expected, found = codec.encode_values(x[rows, :30]), store.tokens()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    store.crop(19)
    one = PlaneStore(3)
    one.append({name: tensor[:, :19] for name, tensor in expected.items()})
    assert all(torch.equal(store.tensors[name], tensor) for name, tensor in one.tensors.items())  # freed lanes are zero
    held = sum(x.numel() * x.element_size() for x in store)
    assert held == 3 * (2 * 6 * CHANNELS + 19 * 8)  # two blocks of codes; offset, scale, one outlier a token


def weighted_error(x: torch.Tensor, weight: torch.Tensor, levels: torch.Tensor) -> float:
    return (weight * (x - levels[nearest_level(x, levels).long()]) ** 2).sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_levels_beat_even_ones_and_weights_lower_the_weighted_error(bits):
    """Section 3.3: levels follow the distribution, and where the loss is sensitive."""
    generator = torch.Generator().manual_seed(3)
    x = (0.25 * torch.randn(20000, generator=generator)).clamp(-1, 1)
    weight = torch.rand(20000, generator=generator) * (x > 0.2) + 0.01
    found = {}
    for name, weights in (("plain", torch.ones_like(x)), ("weighted", weight)):
        histogram = LevelHistogram()
        for rows in (slice(0, 700), slice(700, None)):
            histogram.add(x[rows], weights[rows])
        (found[name],) = histogram.levels((2**bits,))
    even = torch.linspace(-1, 1, 2**bits)
    ones = torch.ones_like(x)
    assert weighted_error(x, ones, found["plain"]) < 0.6 * weighted_error(x, ones, even)
    assert weighted_error(x, weight, found["weighted"]) < 0.9 * weighted_error(x, weight, found["plain"])
    assert weighted_error(x, weight, found["weighted"]) < 1.01 * lloyd(x, weight, 2**bits)


def lloyd(x: torch.Tensor, weight: torch.Tensor, count: int) -> float:
    """The weighted error of k-means as everybody writes it, the best of a few starts."""
    errors = []
    for seed in range(3):
        levels = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]].sort().values
        for _ in range(60):
            nearest = nearest_level(x, levels).long()
            sums = torch.zeros(2, count).index_add(1, nearest, torch.stack([weight * x, weight]))
            levels = torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-9), levels).sort().values
        errors.append(weighted_error(x, weight, levels))
    return min(errors)


def test_keeping_one_percent_exact_shrinks_the_error():
    """Section 3.4: the outliers of a token would widen the range of all its values."""
    codec, _ = codec_of("KVQuant3", 240)
    torch.manual_seed(4)
    x = torch.distributions.StudentT(3.0).sample((200, 240))
    errors = {}
    for name, outliers in (("with", 3), ("without", 0)):
        codec.outliers = outliers
        errors[name] = (codec.decode_values(codec.encode_values(x[None])) - x).square().mean().item()
    assert errors["with"] < 0.6 * errors["without"]


def quantized_by_hooks(model, bits: int) -> torch.nn.Module:
    """An unpatched twin whose k_proj and v_proj give what the reference makes of their output; no cache."""
    twin = copy.deepcopy(model)
    statistics = random_statistics()
    for layer in twin.model.layers:
        stats = {name: x[layer.self_attn.layer_idx].double().numpy() for name, x in statistics.items()}
        for name, reference in (("k_proj", reference_keys), ("v_proj", reference_values)):

            def replaced(module, args, output, reference=reference, stats=stats):
                x = torch.from_numpy(reference(output.double().numpy(), stats, bits)).float()
                x[:, 0] = output[:, 0].half().float()  # the attention sink
                return x

            getattr(layer.self_attn, name).register_forward_hook(replaced)
    return twin


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("chunk", [40, 7, 1])
def test_a_patched_model_equals_the_reference_in_any_chunks(tiny, statistics_file, bits, chunk):
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = quantized_by_hooks(tiny, bits)(input_ids=ids).logits
        exact = tiny(input_ids=ids).logits
        with patch_model(tiny, f"KVQuant{bits}", statistics_file):
            cache = RotateKVCache.for_model(tiny)
            found = torch.cat([tiny(x, past_key_values=cache).logits for x in ids.split(chunk, dim=1)], dim=1)
            cache.crop(-11)
            again = tiny(ids[:, 29:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(again, expected[:, 29:], atol=2e-3, rtol=1e-3)
    assert (exact - expected).abs().max() > 0.1


def test_left_padding_beams_and_greedy_text_equal_the_reference(tiny, statistics_file):
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(6))
    twin = quantized_by_hooks(tiny, 3)
    ids[0, :4] = 0
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with patch_model(tiny, "KVQuant3", statistics_file), torch.no_grad():
        logits = tiny(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        batch = tiny.generate(ids, attention_mask=mask, **options)
        beams = tiny.generate(ids[1:], num_beams=3, **options)
    with torch.no_grad():
        torch.testing.assert_close(logits[0, 4:], twin(ids[:1, 4:]).logits[0], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(logits[1], twin(ids[1:]).logits[0], atol=2e-3, rtol=1e-3)
        assert batch[0, 4:].tolist() == twin.generate(ids[:1, 4:], use_cache=False, **options)[0].tolist()
        assert beams.tolist() == twin.generate(ids[1:], num_beams=3, use_cache=False, **options).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_measured_bytes_equal_the_formula(tiny, statistics_file, bits):
    tokens, outliers = 45, 1  # 1 % of 48 channels
    with patch_model(tiny, f"KVQuant{bits}", statistics_file), torch.no_grad():
        cache = tiny(torch.arange(3, 3 + tokens)[None]).past_key_values
    codes = 48 * CHANNELS * bits // 8  # whole blocks of 16 tokens
    keys, values = codes + tokens * 4 * outliers, codes + tokens * (4 * outliers + 4)
    sink = 4 * CHANNELS + 8
    assert cache.nbytes() == LAYERS * (keys + values + sink) + 4 * tokens
    found, numbers = cache.avg_bits(), LAYERS * tokens * CHANNELS
    assert found["k"] == pytest.approx(8 * LAYERS * (keys + 2 * CHANNELS + 8) / numbers)
    assert found["v"] == pytest.approx(8 * LAYERS * (values + 2 * CHANNELS) / numbers)


def test_first_tokens_skip_padding():
    mask = torch.tensor([[False, False, True, True], [True, True, True, True], [False, False, False, True]])
    rows, columns = first_tokens(torch.zeros(3, 4, 8), 2, mask)
    assert rows.tolist() == [0, 0, 1, 1, 2] and columns.tolist() == [2, 3, 0, 1, 3]
    assert [x.tolist() for x in first_tokens(torch.zeros(2, 4, 8), 1)] == [[0, 1], [0, 0]]


KEYS_OF = {"llama": ("k_proj", 0), "qwen2": ("k_proj", 0), "qwen3": ("k_norm", 0), "phi3": ("qkv_proj", 96)}


@pytest.mark.parametrize("family", KEYS_OF)
def test_gradients_are_those_of_the_loss(family):
    model = tiny_model(family).double()
    window = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(7))
    found = _with_gradients(model, model.model, window)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    name, start = KEYS_OF[family]
    cases = [("key", name, start), ("value", "qkv_proj" if family == "phi3" else "v_proj", start + 48 * bool(start))]
    for place, (_, module, first) in enumerate(cases):
        for token, channel in ((1, 3), (7, 40)):

            def loss(step, module=module, at=(token, first + channel)):
                def shift(module, args, output):
                    moved = output.clone()
                    moved.flatten(2)[0, at[0], at[1]] += step
                    return moved

                hook = getattr(model.model.layers[0].self_attn, module).register_forward_hook(shift)
                with torch.no_grad():
                    logits = model(input_ids=window).logits[0, :-1]
                hook.remove()
                return torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()

            expected = (loss(1e-2) - loss(-1e-2)) / 2e-2  # the norms round to float32
            assert found[0][place][1][token - 1, channel].item() == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_ranges_and_levels_of_a_text_equal_those_of_all_its_numbers(tiny):
    windows = list(torch.randint(3, 128, (3, 1, 90), generator=torch.Generator().manual_seed(8)))
    kept = {"keys": [], "weights": []}
    for window in windows:
        for name, x in zip(kept, _with_gradients(tiny, tiny.model, window)[1][0], strict=True):
            kept[name].append(x.double().numpy())
    keys, gradients = (np.concatenate(x) for x in kept.values())  # layer 1
    offset, scale = collect_key_ranges(tiny, tiny.model, windows, 3 * 89)
    low, high = np.percentile(keys, [0.5, 99.5], axis=0)
    np.testing.assert_allclose(offset[1], (high + low) / 2, atol=1e-4)
    np.testing.assert_allclose(scale[1], (high - low) / 2, atol=1e-4)
    levels = collect_levels(tiny, tiny.model, windows, offset, scale)["key_levels3"][1]
    scaled = torch.from_numpy((keys - offset[1].numpy()) / scale[1].numpy())
    weight = torch.from_numpy((gradients * scale[1].numpy()) ** 2)
    inside = scaled.abs() <= 1
    x, weight = scaled[inside].float(), (weight[inside] / weight[inside].sum()).float()
    assert weighted_error(x, weight, levels) < 1.02 * lloyd(x, weight, 8)
    unweighted = LevelHistogram()
    unweighted.add(x, torch.ones_like(x))
    assert weighted_error(x, weight, levels) < 0.99 * weighted_error(x, weight, unweighted.levels((8,))[0])


def refused(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load_statistics("kvquant", replace(TARGET, **changes), path)
    assert "\n" not in str(caught.value) and "calibrate_reorder.py --statistics kvquant" in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_model_shape_or_kind_is_refused(statistics_file, tmp_path):
    save_statistics(statistics_file, "kvquant", random_statistics(), {"model": "tiny"})
    loaded = load_statistics("kvquant", TARGET, statistics_file)
    assert all(torch.equal(loaded[name], x) for name, x in random_statistics().items())
    assert "made for tiny, not for org/other" in refused(statistics_file, model_id="org/other")
    assert "(2, 48), the model needs (3, 48)" in refused(statistics_file, num_layers=3)
    assert "(2, 48), the model needs (2, 64)" in refused(statistics_file, heads=4)
    order = torch.arange(CHANNELS).expand(LAYERS, -1)
    indices = save_reorder_indices(tmp_path / "order.safetensors", order, {"head_group_num": 3})
    assert "not a KVQuant-statistics file" in refused(indices)
    with pytest.raises(UserError, match="not a reorder-indices file"):
        load_statistics("reorder", TARGET, statistics_file)
    assert "no calibration file" in refused(tmp_path / "none.safetensors")


@pytest.mark.parametrize("left", [0, 8, 100, -1])
def test_a_truncated_file_is_refused(statistics_file, left):
    statistics_file.write_bytes(statistics_file.read_bytes()[:left])
    refused(statistics_file)


@pytest.mark.parametrize("name, value", [("key_scale", 0.0), ("key_offset", torch.nan), ("value_levels4", 2.0)])
def test_numbers_that_cannot_be_are_refused(tmp_path, name, value):
    tensors = random_statistics()
    tensors[name][1, 0] = value
    assert name in refused(save_statistics(tmp_path / "bad.safetensors", "kvquant", tensors, {}))


def test_other_levels_make_another_cache_and_unused_ones_the_same(tiny, tmp_path):
    prints = []
    for changed in (None, "key_levels2", "value_levels4"):
        tensors = random_statistics()
        if changed:
            tensors[changed][0, 0] -= 0.5
        file = save_statistics(tmp_path / f"{changed}.safetensors", "kvquant", tensors, {})
        with patch_model(tiny, "KVQuant2", file) as handle:
            prints.append(handle.spec.fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("changes", [{"k_groupsize": 16}, {"v_clip_ratio": 0.8}, {"Grouped_Head_Key_Rotation": True}])
def test_flags_without_a_meaning_are_refused_before_a_file_is_looked_for(tiny, changes):
    with pytest.raises(UserError, match=f"leave out {next(iter(changes))}"):
        patch_model(tiny, replace(PRESETS["KVQuant2"], **changes), "none.safetensors")


def test_the_calibrate_command_makes_what_patch_model_finds(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny-llama")
    (tmp_path / "words.txt").write_text(tiny_text(100))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(folder), "--dataset", "words.txt", "--seq_length", "32"]
    calibrate_reorder.main([*flags, "--statistics", "kvquant"])
    path = tmp_path / "reorder_indices" / "tiny-llama.kvquant.safetensors"
    assert "2 layers × 48 channels" in capsys.readouterr().out
    assert {name: tuple(x.shape) for name, x in load_file(path).items()} == {
        name: tuple(x.shape) for name, x in random_statistics().items()
    }
    with patch_model(load_model(str(folder))[0], "KVQuant2") as handle:
        assert torch.equal(handle.spec.methods[1].key_offset, load_file(path)["key_offset"][1])


def test_shipped_statistics_fit_the_embedded_model():
    path = statistics_module._ROOT / "reorder_indices" / "smollm2-135m.kvquant.safetensors"
    tensors = load_statistics("kvquant", CalibrationTarget("smollm2-135m", 30, 3, 64), path)
    assert path.stat().st_size < 100_000
    for name in ("key_levels2", "value_levels4"):
        assert (tensors[name].diff(dim=-1) > 0).all() and tensors[name].abs().max() <= 1
    assert len({tuple(row) for row in tensors["key_levels2"].tolist()}) == 30
