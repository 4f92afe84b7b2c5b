"""RotateKV+: its codec and its calibration against few-line references, massive tokens, and its kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import left_padding, logits, save_tiny_folder, tiny_model, tiny_text, token_ids

import calibrate_reorder
from rotatekv import PRESETS, RotateKVCache, UserError, load_model, patch_model
from rotatekv.cache.window import FlushPolicy
from rotatekv.calibration.plus import collect_key_factors, collect_sink_thresholds, order_channels, rank_sensitivity
from rotatekv.families import find_text_model
from rotatekv.kernels import cpu
from rotatekv.kernels.hadamard import hadamard_matrix
from rotatekv.methods import LayerGeometry, build_method
from rotatekv.statistics import CalibrationTarget, load_statistics, save_statistics

LAYERS, HEADS, DIM = 2, 3, 16
CHANNELS = HEADS * DIM
PLUS = PRESETS["RotateKV2+"]


def random_statistics(threshold: float = 1e9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "key_mean": torch.randn(LAYERS, CHANNELS, generator=generator),
        "key_scale": torch.rand(LAYERS, CHANNELS, generator=generator) + 0.5,
        "reorder_index": torch.stack([torch.randperm(CHANNELS, generator=generator) for _ in range(LAYERS)]),
        "extra_bit_rank": torch.tensor([[1 / 8, 7 / 8], [5 / 8, 3 / 8]]),
        "sink_threshold": torch.full((LAYERS, 1), threshold),
    }


@pytest.fixture
def statistics_file(tmp_path):
    return save_statistics(tmp_path / "tiny.plus.safetensors", "plus", random_statistics(), {})


def run(model, config, path, chunks, mask=None) -> tuple[torch.Tensor, RotateKVCache]:
    ids = token_ids(1 if mask is None else len(mask), sum(chunks))
    with patch_model(model, config, path):
        cache = RotateKVCache.for_model(model)
        return logits(model, cache, ids, chunks, mask), cache


def numpy_fine(x: np.ndarray, bits: int, clip: float) -> np.ndarray:
    """(T, C), heads of 16 share a scale: the range about its middle, a scale of 4 digits, a zero point in eighths."""
    groups = x.reshape(len(x), -1, DIM)
    middle, reach = (groups.max(-1) + groups.min(-1)) / 2, (groups.max(-1) - groups.min(-1)) / 2 * clip
    exponent = np.floor(np.log2(2 * reach / (2**bits - 1)))
    scale = np.rint(2 * reach / (2**bits - 1) / 2.0 ** (exponent - 3)) * 2.0 ** (exponent - 3)
    zero = np.rint(-(middle - reach) / scale * 8) / 8
    codes = np.clip(np.rint(groups / scale[..., None] + zero[..., None]), 0, 2**bits - 1)
    return ((codes - zero[..., None]) * scale[..., None]).reshape(x.shape)


@pytest.mark.parametrize("preset, bits", [("RotateKV2+", 3), ("RotateKV3+", 4), ("RotateKV4+", 4)])
def test_keys_are_centred_balanced_rotated_reordered_and_back(preset, bits):
    """Layer 0, whose keys come first of all in sensitivity: a bit more, but for RotateKV4+."""
    statistics = {name: x[0] for name, x in random_statistics().items()}
    codec = build_method(PRESETS[preset], LayerGeometry(0, HEADS, DIM), statistics)
    keys = torch.randn(1, HEADS, 40, DIM, generator=torch.Generator().manual_seed(1)) * 2 + 3
    assert codec.k_bits == bits
    got = codec.keys_out(codec.decode_keys(codec.encode_keys(codec.keys_in(keys))))
    mean, scale = (statistics[name].double().numpy() for name in ("key_mean", "key_scale"))
    matrix = hadamard_matrix(CHANNELS).double().numpy()
    channels = keys[0].transpose(0, 1).flatten(1).double().numpy()  # (T, C)
    order, stored = statistics["reorder_index"].numpy(), np.empty_like(channels)
    stored[:, order] = numpy_fine((((channels - mean) * scale) @ matrix.T)[:, order], bits, codec.k_clip_ratio)
    want = (stored @ matrix) / scale + mean
    difference = np.abs(got[0].transpose(0, 1).flatten(1).double().numpy() - want)
    assert np.quantile(difference, 0.95) < 1e-4  # but for ties, of scales too
    assert 0.01 < np.abs(want - channels).mean() < 1


def test_the_factors_make_the_scores_noise_least():
    """The rotation spreads Σ (s·σ)² of noise evenly; divided by s² it costs q² of it in channel c."""
    generator = torch.Generator().manual_seed(0)
    queries, deviations = torch.rand(2, 64, generator=generator, dtype=torch.float64).exp().pow(3)

    def noise(s: torch.Tensor) -> float:
        return (((s * deviations) ** 2).mean() * (queries**2 / s**2).sum()).item()

    best = (queries**2 / deviations**2) ** 0.25
    others = [best * (0.3 * torch.randn(64, generator=generator)).exp() for _ in range(50)] + [torch.ones(64)]
    assert all(noise(best) < noise(other) for other in others)


def test_bits_are_the_formulas(statistics_file, tiny):
    tokens, config = 200, replace(PLUS, extra_bit_share=0.4)
    _, cache = run(tiny, config, statistics_file, (tokens,))
    assert [(m.k_bits, m.v_bits) for m in (x.method for x in cache.layers)] == [(3, 2), (2, 3)]
    packed = (tokens - 16) // 16 * 16
    sides = packed * HEADS * 2 * 2  # a byte of scale and one of zero, keys and values
    codes = packed * CHANNELS * (3 + 2) // 8
    window = (tokens - packed) * (2 * CHANNELS * 2 + 1)  # a flag beside each
    assert cache.nbytes() == LAYERS * (codes + sides + window) + 4 * tokens


@pytest.mark.parametrize(
    "share, bits", [(0.0, [2, 2, 2, 2]), (0.25, [3, 2, 2, 2]), (0.5, [3, 2, 2, 3]), (1.0, [3] * 4)]
)
def test_the_most_sensitive_get_a_bit_more(share, bits, statistics_file, tiny):
    with patch_model(tiny, replace(PLUS, extra_bit_share=share), statistics_file) as handle:
        methods = handle.spec.methods
    assert [x for method in methods for x in (method.k_bits, method.v_bits)] == bits
    assert [m.k_clip_ratio for m in methods] == [pytest.approx(0.9 if m.k_bits == 3 else 0.8) for m in methods]


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
    with patch_model(tiny, PLUS, path), torch.no_grad():
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


# --- kernels -------------------------------------------------------------------------------------------------------


def fused_calls(tokens: int, chunks: tuple[int, ...]) -> int:
    """How many chunks after ``tokens`` the kernel attends to: those with one window, once a block is packed."""
    window, count = FlushPolicy(16, 16), 0
    for length in chunks:
        window = replace(window, packed=window.packed_of(tokens))
        count += window.packed > 0 and not window.differs(tokens, length)
        tokens += length
    return count


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")
@pytest.mark.parametrize(
    ("family", "preset", "rows"),
    [
        ("llama", "RotateKV2+", 1),
        ("llama", "RotateKV4+", 1),
        *((family, "RotateKV2+", 3) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    ],
)
def test_the_fused_kernels_give_the_general_path(family, preset, rows, tmp_path, monkeypatch):
    model = tiny_model(family)
    hidden = model.get_input_embeddings()(token_ids(1, 60)).abs().amax(-1)
    path = save_statistics(tmp_path / "t.safetensors", "plus", random_statistics(hidden.quantile(0.8).item()), {})
    calls, kernel = [], cpu.decode_attention
    monkeypatch.setattr(cpu, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    mask = left_padding(62, *((0, 7, 19) if rows > 1 else (0,)))
    model, config, chunks = model.double(), PRESETS[preset], (40, 1, 1, 3, 16, 1)
    fused, _ = run(model, config, path, chunks, mask)
    expected = LAYERS * sum(fused_calls(chunks[0] - left, chunks[1:]) for left in (0, 7, 19)[:rows])
    assert len(calls) == expected >= LAYERS * 4
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    general, cache = run(model, config, path, chunks, mask)
    caches = cache.parts.caches() if rows > 1 else [cache]
    assert len(calls) == expected and all(len(alone.layers[0].sinks.batch_index) for alone in caches)
    difference = (fused - general)[mask.bool()].abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * general.std()


# --- calibration ---------------------------------------------------------------------------------------------------


def test_factors_and_thresholds_are_those_of_the_definition(any_family):
    model, windows = any_family, [token_ids(1, 40, seed) for seed in (1, 2)]
    text_model, queries, keys, inputs = find_text_model(model), [[], []], [[], []], [[], []]

    def keep(number, kept, part, output):
        heads = output.flatten(2)[0, 16:, part].unflatten(-1, (-1, DIM)).transpose(0, 1)  # (heads, T, D)
        kept[number].append(heads.double())

    hooks = []
    for number, layer in enumerate(text_model.layers):
        attention, whole = layer.self_attn, slice(None)
        if hasattr(attention, "qkv_proj"):  # phi3
            sources = (attention.qkv_proj, slice(0, 96)), (attention.qkv_proj, slice(96, 144))
        else:
            norms = hasattr(attention, "k_norm")  # qwen3
            names = ("q_norm", "k_norm") if norms else ("q_proj", "k_proj")
            sources = tuple((getattr(attention, name), whole) for name in names)
        for kept, (module, part) in zip((queries, keys), sources, strict=True):
            take = partial(keep, number, kept, part)
            hooks.append(module.register_forward_hook(lambda module, args, output, take=take: take(output)))
    hooks += [
        x.register_forward_pre_hook(lambda m, args: inputs[m.self_attn.layer_idx].append(args[0].abs().amax(-1)))
        for x in text_model.layers
    ]
    with torch.no_grad():
        for window in windows:
            model(window, use_cache=False)
    for hook in hooks:
        hook.remove()
    mean, scale = collect_key_factors(model, text_model, windows)
    order = order_channels(model, text_model, windows, mean, scale, CHANNELS)
    thresholds = collect_sink_thresholds(model, text_model, windows)
    for number in range(LAYERS):
        query, key = torch.cat(queries[number], 1), torch.cat(keys[number], 1)  # (H, T, D), (H_kv, T, D)
        torch.testing.assert_close(mean[number].double(), key.mean(1).flatten(), rtol=1e-4, atol=1e-5)
        squares = query.square().mean(1).view(HEADS, -1, DIM).sum(1).flatten()
        want = (squares / key.var(1, correction=0).flatten()) ** 0.25
        want /= want.log().mean().exp()
        torch.testing.assert_close(scale[number].double(), want, rtol=1e-3, atol=1e-5)
        rotated = ((key.transpose(0, 1).flatten(1) - mean[number]) * scale[number]) @ hadamard_matrix(
            CHANNELS
        ).T.double()
        variances = rotated.var(0, correction=0)[order[number]]
        assert (variances.diff() > -1e-4 * variances.max()).all() and variances.max() > 1.5 * variances.min()
        # One token in 512 of 80 is none: but one is above the threshold, the second largest.
        assert thresholds[number] == torch.cat(inputs[number], 1).flatten().sort().values[-2]


def test_the_layer_that_decides_is_the_most_sensitive():
    """Values that the output ignores cost nothing; those it is made of cost most."""
    model = tiny_model()
    layers = find_text_model(model).layers
    with torch.no_grad():
        layers[0].self_attn.o_proj.weight.mul_(0.0)
        layers[1].self_attn.o_proj.weight.mul_(3.0)
    windows, text_model = [token_ids(1, 80)], find_text_model(model)
    mean, scale = collect_key_factors(model, text_model, windows)
    statistics = random_statistics() | {"key_mean": mean, "key_scale": scale}
    rank = rank_sensitivity(model, windows, statistics)
    assert sorted(rank.flatten().tolist()) == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    assert rank[0].min() > rank[1].max()  # layer 0 is not heard at all
    model(windows[0])  # unpatched again


def test_calibrate_reorder_makes_the_file(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(tiny_text(300))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(folder), "--dataset", "text.txt", "--seq_length", "100", "--statistics", "plus"]
    calibrate_reorder.main(flags)
    assert "2 layers × 48 channels, and their order of sensitivity" in capsys.readouterr().out
    path = tmp_path / "reorder_indices" / "tiny-llama.plus.safetensors"
    found = load_statistics("plus", CalibrationTarget(str(folder), LAYERS, CHANNELS, HEADS), path)
    assert found["key_scale"].log().mean(dim=1).abs().max() < 1e-5
    model, _ = load_model(str(folder))
    with patch_model(model, "RotateKV2+"), torch.no_grad():  # found by the model's name
        assert model(token_ids(1, 70)).logits.isfinite().all()


@pytest.mark.parametrize(
    "name, damage",
    [
        ("key_scale", lambda x: -x),
        ("key_mean", lambda x: x * float("nan")),
        ("extra_bit_rank", lambda x: x[:, :1]),
        ("sink_threshold", lambda x: x[:1]),
        ("key_scale", lambda x: x * 1e-40),
        ("key_mean", lambda x: x[:, :-1]),
        ("reorder_index", lambda x: x // 2),
    ],
)
def test_a_damaged_file_is_one_line(name, damage, tmp_path, tiny):
    statistics = random_statistics()
    statistics[name] = damage(statistics[name])
    path = save_statistics(tmp_path / "bad.safetensors", "plus", statistics, {})
    with pytest.raises(UserError, match=name) as error:
        patch_model(tiny, PLUS, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"Grouped_Head_Key_Rotation": False, "Outlier_Aware_Key_Rotation": False}, "before RoPE"),
        ({"k_bits": 4}, "at most"),
        ({"extra_bit_share": 1.5}, "extra_bit_share"),
    ],
)
def test_flags_without_sense_are_one_line(changes, message, statistics_file, tiny):
    with pytest.raises(UserError, match=message) as error:
        patch_model(tiny, replace(PLUS, **changes), statistics_file)
    assert "\n" not in str(error.value)


def test_a_file_for_other_groups_of_heads_is_one_line(tmp_path, tiny):
    path = save_statistics(tmp_path / "one.safetensors", "plus", random_statistics(), {"head_group_num": 1})
    with pytest.raises(UserError, match=r"groups of 1 heads, not 3: run calibrate_reorder\.py --statistics plus"):
        patch_model(tiny, PLUS, path)


@pytest.mark.parametrize("changes", [{"extra_bit_share": 0.1}, {"sink_selection": "massive"}])
@pytest.mark.parametrize("preset", ["RTN2", "KIVI2", "TurboQuant2"])
def test_other_methods_refuse_its_flags(preset, changes, tiny):
    with pytest.raises(UserError, match=next(iter(changes))):
        patch_model(tiny, replace(PRESETS[preset], **changes))
