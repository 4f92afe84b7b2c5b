"""RotateKV+'s calibration against few lines on what each attention got: thresholds, second moments, costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_folder, tiny_text, token_ids
from families import FAMILIES, find_decoder
from families import token_ids as family_ids
from oracle import watching
from test_family_presets import CodecCache

import calibrate_reorder
from rotatekv import PRESETS, UserError, load_model, patch_model
from rotatekv.calibration.plus import collect_sink_thresholds, divergence, in_predictions, log_probabilities
from rotatekv.calibration.transform import FIRST_TOKENS, QUERY_STEP, RECENT_TOKENS, best_map, collect_transforms
from rotatekv.families import find_text_model, layer_geometry
from rotatekv.kernels.transform_coding import FRAME, GROUP, NOISE
from rotatekv.methods import build_method
from rotatekv.methods.rotatekv_plus import VALUE_NOISE, RotateKVPlus
from rotatekv.patching.watching import Attended, stream_attention
from rotatekv.statistics import CalibrationTarget, load_statistics

LAYERS, HEADS, DIM = 2, 3, 16


def attended_of(model, windows) -> dict[int, list[Attended]]:
    found: dict[int, list[Attended]] = {}
    stream_attention(model, find_text_model(model), windows, lambda x: found.setdefault(x.layer, []).append(x))
    return found


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(T, D) float64, each row by its (T, rotary_dim / 2) angles; pairs of channels as complex numbers."""
    half = angles.shape[1]
    pairs = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, x[:, 2 * half :]], dim=1)


def moments(model, windows, layer: int, head: int, threshold: float):
    """Of one head, pair by pair: mean and covariance of its keys in their frames, what reads them, and its values'."""
    frequencies = find_text_model(model).rotary_emb.inv_freq.double()
    projection = find_text_model(model).layers[layer].self_attn.o_proj.weight.double()
    keys, places, values, queries, weights = [], [], [], [], {}
    asked = 0
    for attended in attended_of(model, windows)[layer]:
        tokens = attended.key.shape[2]
        repeat = attended.query.shape[1] // attended.key.shape[1]
        counted = attended.hidden_states[0].abs().amax(-1) <= threshold
        counted[:FIRST_TOKENS] = False
        key, value = attended.key[0, head].double(), attended.value[0, head].double()
        places += (torch.arange(tokens) % FRAME)[counted].tolist()
        before = turned(key, -torch.arange(tokens)[:, None] * frequencies)
        keys.append(before[counted])
        values.append(value[counted])
        for shared in range(head * repeat, (head + 1) * repeat):
            for asks in range(0, tokens, QUERY_STEP):
                query = attended.query[0, shared, asks].double()
                attention = (key[: asks + 1] @ query * attended.options["scaling"]).softmax(0)
                output = attention @ value[: asks + 1]
                for token in range(asks - RECENT_TOKENS + 1):
                    if counted[token]:
                        seen = turned(query[None], -torch.tensor([[token // FRAME * FRAME]]) * frequencies)[0]
                        moved = projection[:, shared * DIM : shared * DIM + DIM] @ (value[token] - output)
                        queries.append(seen * attention[token] * moved.norm())
                        weights[shared] = weights.get(shared, 0.0) + attention[token].square()
        asked += len(range(0, tokens, QUERY_STEP))
    keys, values, queries = torch.cat(keys), torch.cat(values), torch.stack(queries)
    mean = keys.mean(0)
    angles = torch.tensor(places)[:, None] * frequencies
    in_frames = turned(keys - mean, angles)
    read = sum(
        w * projection[:, s * DIM : s * DIM + DIM].T @ projection[:, s * DIM : s * DIM + DIM]
        for s, w in weights.items()
    )
    return mean, in_frames.T @ in_frames / len(keys), queries.T @ queries / asked, values, read / asked


def test_maps_are_those_of_the_definition(tiny):
    """Two windows, of one frame and of two; one token in ten is massive."""
    windows = [token_ids(1, 40, 1), token_ids(1, FRAME + 30, 2)]
    thresholds = torch.stack(
        [
            torch.cat([x.hidden_states[0].abs().amax(-1) for x in parts]).quantile(0.9)
            for parts in attended_of(tiny, windows).values()
        ]
    )[:, None]
    found = collect_transforms(tiny, windows, thresholds)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    whole, rows = (LAYERS, HEADS, DIM, DIM), (LAYERS, HEADS, DIM)
    costs = {"key_cost": (LAYERS, HEADS, DIM // GROUP), "value_cost": (LAYERS, HEADS)}
    assert shapes == {"key_map": whole, "key_mean": rows, "value_map": whole, "value_mean": rows} | costs
    for layer, head in ((0, 0), (1, 2)):
        mean, keys, queries, values, read = moments(tiny, windows, layer, head, thresholds[layer].item())
        of_head = {name: x[layer, head].double() for name, x in found.items()}
        torch.testing.assert_close(of_head["key_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_head["value_mean"], values.mean(0), rtol=1e-5, atol=1e-6)
        for name, group, pair in (("key", GROUP, (keys, queries)), ("value", DIM, (values.T.cov(correction=0), read))):
            want, cost = best_map(*pair, group)
            torch.testing.assert_close(of_head[f"{name}_cost"].view(-1), cost, rtol=1e-3, atol=0)
            for of_map in (noise_of, variance_of):  # eigenvectors may have other signs
                ours = of_map(of_head[f"{name}_map"], *pair)
                torch.testing.assert_close(ours, of_map(want, *pair), rtol=2e-3, atol=0)


def noise_of(map_: torch.Tensor, second_moment: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """What noise 1 in all components costs."""
    back = torch.linalg.inv(map_)
    return (back.T @ metric @ back).trace()


def variance_of(map_: torch.Tensor, second_moment: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return (map_ @ second_moment @ map_.T).trace()


def test_a_text_of_short_windows_is_one_line(tiny):
    with pytest.raises(UserError, match="no window of more than 16 tokens") as error:
        collect_transforms(tiny, [token_ids(1, 16)], torch.full((LAYERS, 1), 1e9))
    assert "\n" not in str(error.value)


def test_thresholds_leave_one_token_in_512(any_family):
    windows = [token_ids(1, 700, seed) for seed in (1, 2)]
    found = collect_sink_thresholds(any_family, find_text_model(any_family), windows)
    for layer, parts in attended_of(any_family, windows).items():
        sizes = torch.cat([x.hidden_states[0].abs().amax(-1) for x in parts]).sort(descending=True).values
        assert found[layer].item() == sizes[3]  # 1400 / 512 is three
    few = collect_sink_thresholds(any_family, find_text_model(any_family), [windows[0][:, :40]])
    sizes = attended_of(any_family, [windows[0][:, :40]])[0][0].hidden_states[0].abs().amax(-1)
    assert few[0] == sizes.sort().values[-2]  # at least one


# --- what noise costs in the predictions ---------------------------------------------------------------------------


class OneLayer(CodecCache):
    """Only one layer's keys or values are as the codec gives them back; ``layer`` None: those of all layers."""

    layer: int | None = 0
    part = "key"

    def decoded(self, method, layer, keys, values, positions):
        of_codec = super().decoded(method, layer, keys, values, positions)
        exact = keys, values
        measured = ("key", "value").index(self.part) if self.layer in (layer, None) else None
        return tuple(of_codec[kind] if kind == measured else exact[kind] for kind in (0, 1))


def test_costs_are_the_divergence_of_one_layer_at_a_time_over_the_noise_foretold():
    model, window = FAMILIES["llama"].build(), family_ids(1, 150)
    statistics = collect_transforms(model, [family_ids(1, 90, 1)], torch.full((2, 1), 1e9))
    statistics |= {"sink_threshold": torch.full((2, 1), 1e9)}
    found = in_predictions(model, [window], statistics)
    with torch.no_grad():
        stock = model(window, use_cache=False).logits[0].log_softmax(-1)
    config = PRESETS["RotateKV2+"]
    geometry = layer_geometry(find_decoder(model).layers[0].self_attn)

    def codecs(part: str) -> list:
        """With 2 bits a number for the part, split over its groups or heads as a plan does."""
        other = "value_cost" if part == "key" else "key_cost"
        budget = (
            3 / 2 + 8 / 16
        )  # the other has 1 bit: values all, keys in their strongest group, here the only one; scales
        found = []
        for layer in (0, 1):
            one = {name: x[layer : layer + 1] for name, x in statistics.items()}
            one[other] = torch.zeros_like(one[other])
            planned = RotateKVPlus.plan(replace(config, bits=budget), one, [geometry])
            assert planned[f"{part}_bits"].double().mean() == 2
            found.append(build_method(config, geometry, {name: x[0] for name, x in planned.items()}))
        return found

    def measured(part: str, layer: int | None) -> float:
        cache = OneLayer(model, "llama", codecs(part))
        cache.layer, cache.part = layer, part
        with watching(cache), torch.no_grad():
            steps = [model(window[:, t : t + 1], past_key_values=cache).logits[0] for t in range(150)]
        got = torch.cat(steps).log_softmax(-1)
        return ((stock.exp() * (stock - got)).sum() / 150).item()

    for part in ("key", "value"):
        alone = [measured(part, layer) for layer in (0, 1)]
        together = measured(part, None) / sum(alone)  # what all layers do at once is no sum
        assert min(alone) > 1e-3
        for layer, codec in enumerate(codecs(part)):
            cost = statistics[f"{part}_cost"][layer].double()
            if part == "key":
                noise = (cost * torch.tensor(NOISE)[codec.key_transform.bits]).sum()
            else:
                noise = (cost * torch.tensor(VALUE_NOISE)[codec.value_transform.bits[:, 0] - 1]).sum()
            want = cost * together * alone[layer] / noise
            torch.testing.assert_close(found[f"{part}_cost"][layer].double(), want, rtol=0.03, atol=0)
    with torch.no_grad():  # unpatched again
        assert torch.equal(model(window, use_cache=False).logits[0].log_softmax(-1), stock)


def test_what_no_prediction_hears_costs_nothing(tiny):
    """Values of a layer whose output projection is zero, and its keys."""
    with torch.no_grad():
        tiny.model.layers[0].self_attn.o_proj.weight.zero_()
    windows = [token_ids(1, 200)]
    statistics = collect_transforms(tiny, windows, torch.full((LAYERS, 1), 1e9))
    statistics |= {"sink_threshold": torch.full((LAYERS, 1), 1e9)}
    found = in_predictions(tiny, windows, statistics)
    for name in ("key_cost", "value_cost"):
        assert found[name].isfinite().all() and (found[name] >= 0).all()
        assert found[name][0].max() < 1e-4 * found[name][1].min()
    geometries = [layer_geometry(layer.self_attn) for layer in tiny.model.layers]
    planned = RotateKVPlus.plan(replace(PRESETS["RotateKV2+"], bits=2.25), found, geometries)
    assert (planned["key_bits"][0] == 1).all() and (planned["value_bits"][0] == 1).all()
    assert planned["key_bits"][1].min() > 1 and planned["value_bits"][1].max() > 1


def test_a_models_divergence_from_itself_is_none_and_from_others_that_of_all_words(tiny):
    window = token_ids(1, 1100)  # more than are taken at once
    wanted = list(log_probabilities(tiny, window))
    assert [len(part) for part in wanted] == [512, 512, 76]
    assert divergence(tiny, [(window, wanted)]) == 0.0
    with torch.no_grad():
        first = tiny(window).logits[0].log_softmax(-1)
        tiny.lm_head.weight.mul_(0.9)
        second = tiny(window).logits[0].log_softmax(-1)
    want = (first.exp() * (first - second)).sum().item() / 1100
    assert divergence(tiny, [(window, wanted)]) == pytest.approx(want, rel=1e-3)


def test_calibrate_reorder_makes_the_file(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(tiny_text(300))
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(folder), "--dataset", "text.txt", "--seq_length", "100", "--statistics", "plus"]
    calibrate_reorder.main(flags)
    line = "2 layers × 3 heads × 16 × 16, maps of keys and values and what their noise costs"
    assert line in capsys.readouterr().out
    path = tmp_path / "reorder_indices" / "tiny-llama.plus.safetensors"
    found = load_statistics("plus", CalibrationTarget(str(folder), LAYERS, HEADS, DIM), path)
    assert found["key_map"].dtype == torch.float16 and all((found[f"{x}_cost"] > 0).all() for x in ("key", "value"))
    model, _ = load_model(str(folder))
    ids = token_ids(1, 150)
    with torch.no_grad():
        stock = model(ids).logits
        difference = {}
        for preset in ("RTN2", "RotateKV2+", "RotateKV4+"):
            with patch_model(model, preset):  # found by the model's name
                difference[preset] = (model(ids).logits - stock).square().mean()
    assert difference["RTN2"] > difference["RotateKV2+"] > difference["RotateKV4+"]
