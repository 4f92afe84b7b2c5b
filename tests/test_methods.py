"""The baselines KIVI, QuaRot and TurboQuant: each codec against a few lines written from its paper, and in a model.

Nothing of ``rotatekv`` computes the expected side. In the model it is Hugging Face's own forward over a cache that
keeps all keys and values exact and hands out what the paper's method would make of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from conftest import left_padding, logits, tiny_model, token_ids
from scipy.linalg import hadamard as sylvester
from scipy.stats import beta
from transformers import DynamicCache

from rotatekv import PRESETS, QuantConfig, UserError, patch_model
from rotatekv.methods import METHODS, LayerGeometry, build_method
from rotatekv.methods.turboquant import sphere_levels

HEADS, DIM, LAYERS = 3, 32, 2
CHANNELS = HEADS * DIM
NAMES = [name for name in PRESETS if name.startswith(("KIVI", "QuaRot", "TurboQuant"))]
GROUP, WINDOW = 8, 5  # tokens, in the models: a window that a short text leaves


def codec_of(name: str, heads: int = HEADS, dim: int = DIM, **changes):
    return build_method(replace(PRESETS[name], **changes), LayerGeometry(0, heads, dim))


def rounded(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """The last dimension is one group: c·max and c·min, float16 scale, integer zero."""
    top, bottom = clip * x.amax(-1, keepdim=True), clip * x.amin(-1, keepdim=True)
    scale = torch.maximum((top - bottom) / (2**bits - 1), bottom.abs() / 127).half().double()
    zero = (-bottom / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def per_token(x: torch.Tensor, bits: int, group: int, clip: float = 1.0) -> torch.Tensor:
    return rounded(x.unflatten(-1, (-1, group)), bits, clip).flatten(-2)


@lru_cache
def best_levels(dim: int, bits: int) -> torch.Tensor:
    """Lloyd's iteration with scipy: for a coordinate x, (x + 1) / 2 follows Beta((D − 1) / 2, (D − 1) / 2)."""
    law, levels = beta((dim - 1) / 2, (dim - 1) / 2), torch.linspace(-1, 1, 2**bits + 2).double()[1:-1] / dim**0.5
    for _ in range(2000):
        edges = torch.cat([torch.tensor([-1.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([1.0])]).double()
        mass = torch.from_numpy(law.cdf((edges.numpy() + 1) / 2)).diff()
        density = torch.from_numpy(law.pdf((edges.numpy() + 1) / 2)) / 2
        levels = -(density * (1 - edges**2) / (dim - 1)).diff() / mass  # ∫ x·p(x) dx in closed form
    return levels


def kivi(keys, values, bits: int, window: int, k_group: int, v_group: int):
    """Algorithm 1 on (B, H, T, D): the first whole groups of tokens; the rest in float16."""
    keys, values = keys.half().double(), values.half().double()
    packed = max(keys.shape[2] - window, 0) // k_group * k_group
    for start in range(0, packed, k_group):
        block = keys[:, :, start : start + k_group].transpose(2, 3)
        keys[:, :, start : start + k_group] = rounded(block, bits).transpose(2, 3)
    values[:, :, :packed] = per_token(values[:, :, :packed], bits, v_group)
    return keys, values


def quarot(x: torch.Tensor, bits: int) -> torch.Tensor:
    matrix = torch.from_numpy(sylvester(x.shape[-1])).double() / x.shape[-1] ** 0.5
    return rounded(x.double() @ matrix, bits, 0.95) @ matrix.T


def turboquant(x: torch.Tensor, bits: int) -> torch.Tensor:
    dim = x.shape[-1]
    signs = torch.randint(2, (dim,), generator=torch.Generator().manual_seed(250419874)) * 2.0 - 1
    rotation = torch.from_numpy(sylvester(dim)).double() / dim**0.5 * signs.double()  # Π = H·diag(signs)
    norm = x.double().norm(dim=-1, keepdim=True)
    levels = best_levels(dim, bits)
    nearest = ((x.double() @ rotation.T / norm).unsqueeze(-1) - levels).abs().argmin(-1)
    return levels[nearest] @ rotation * norm.half().double()


def expected(name: str, keys: torch.Tensor, values: torch.Tensor, window: int, k_group: int = 32, v_group: int = 32):
    bits = int(name[-1])
    if name.startswith("KIVI"):
        return kivi(keys, values, bits, window, k_group, v_group)
    method = quarot if name.startswith("QuaRot") else turboquant
    return method(keys, bits), method(values, bits)


def round_trip(codec, keys: torch.Tensor) -> torch.Tensor:
    return codec.keys_out(codec.decode_keys(codec.encode_keys(codec.keys_in(keys)))).double()


def random_heads(tokens: int = 64, heads: int = HEADS, dim: int = DIM, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + dim)
    return torch.randn(rows, heads, tokens, dim, generator=generator, dtype=torch.float64)


# --- the codecs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_gives_what_its_paper_says(name):
    codec, keys = codec_of(name), (3 * random_heads()).half().double()
    values = (keys.flip(2) - 1).half().double()
    want_keys, want_values = expected(name, keys, values, window=0)
    stored = codec.values_out(codec.decode_values(codec.encode_values(codec.values_in(values))))
    for got, want, exact in ((round_trip(codec, keys), want_keys, keys), (stored, want_values, values)):
        assert (want - exact).abs().mean() > 0.05
        wrong = (got - want).abs() > 1e-4  # float32 against float64: a number on a tie, or a float16 scale's last bit
        assert wrong.double().mean() < 0.01 and (got - want).abs().max() < 2 * (want - exact).abs().max()


def test_the_presets_are_the_papers():
    plain = {"head_group_num": 1, "Grouped_Head_Key_Rotation": False, "Outlier_Aware_Key_Rotation": False}
    plain |= {"Attention_Sink_Aware": False}
    for bits in (2, 3, 4):
        both = plain | {"k_bits": bits, "v_bits": bits}
        clip = {"k_clip_ratio": 0.95, "v_clip_ratio": 0.95}
        assert PRESETS[f"QuaRot{bits}"] == QuantConfig(**{**both, **clip, "method": "quarot"})
        assert PRESETS[f"TurboQuant{bits}"] == QuantConfig(**{**both, "method": "turboquant"})
        sizes = {"k_groupsize": 32, "v_groupsize": 32, "residual_length": 128}
        if bits != 3:
            assert PRESETS[f"KIVI{bits}"] == QuantConfig(**{**both, **sizes, "method": "kivi"})


def test_kivi_a_channel_of_outliers_costs_the_others_nothing_and_per_token_it_does():
    """Section 3.1: outliers keep to few channels of the keys."""
    keys = random_heads(64)
    spiked = keys.clone()
    spiked[..., 5] *= 50
    errors = {}
    for name in ("KIVI2", "RTN2"):
        for kind, x in (("plain", keys), ("spiked", spiked)):
            error = (round_trip(codec_of(name), x) - x).abs()
            errors[name, kind] = torch.cat([error[..., :5], error[..., 6:]], dim=-1).mean()
    assert errors["KIVI2", "spiked"] == errors["KIVI2", "plain"]
    assert errors["RTN2", "spiked"] > 2 * errors["RTN2", "plain"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kivi_errs_by_half_a_step_of_its_own_group_at_most(bits):
    scales = torch.logspace(-2, 1, CHANNELS).double().reshape(HEADS, 1, DIM)
    keys = random_heads(96, rows=1) * scales
    codec = codec_of("KIVI2", k_bits=bits)
    error = (round_trip(codec, keys) - keys).abs().unflatten(2, (-1, 32))  # (1, H, 3, 32, D)
    groups = keys.unflatten(2, (-1, 32))
    step = (groups.amax(3) - groups.amin(3)) / (2**bits - 1)
    float16 = 2**bits * 2.0**-11  # the stored scale may be too small by half its last bit, for all levels
    assert (error.amax(3) <= (0.5 + float16) * step * 1.001).all()
    assert (error.amax(3) > 0.3 * step).double().mean() > 0.9  # so the bound is tight


def test_quarot_is_rotatekv_without_its_parts_up_to_the_clip_ratio():
    off = {"Grouped_Head_Key_Rotation": False, "Outlier_Aware_Key_Rotation": False, "Attention_Sink_Aware": False}
    ours = codec_of("QuaRot3", k_clip_ratio=1.0, v_clip_ratio=1.0)
    other, keys = codec_of("RotateKV3", **off), random_heads(40)
    for codec in (ours, other):
        assert codec.key_width == DIM and not codec.keys_before_rope and codec.fused_decode is not None
    assert torch.equal(round_trip(ours, keys), round_trip(other, keys))
    assert not torch.equal(round_trip(codec_of("QuaRot3"), keys), round_trip(other, keys))


def test_quarot_spreads_outliers_and_saves_error():
    """Incoherence, √D·max|x| / |x| (QuIP), of channels of very different sizes, before and after the rotation."""
    spread = torch.exp(torch.randn(DIM, generator=torch.Generator().manual_seed(1))).double()
    keys, codec = random_heads(64) * spread, codec_of("QuaRot4")

    def incoherence(x):
        return (math.sqrt(DIM) * x.abs().amax(-1) / x.norm(dim=-1)).mean()

    rotated = codec.keys_in(keys).unflatten(-1, (-1, DIM)).double()
    assert incoherence(rotated) < 0.7 * incoherence(keys)
    error = [(round_trip(c, keys) - keys).square().mean() for c in (codec, codec_of("RTN4"))]
    assert error[0] < 0.6 * error[1]


@pytest.mark.parametrize("bits, paper, off", [(1, 0.36, 0.005), (2, 0.117, 0.002), (3, 0.03, 0.005), (4, 0.009, 5e-4)])
def test_turboquant_errs_by_what_theorem_1_says(bits, paper, off):
    """E|x − x̂|² / |x|², in the paper's digits (the exact numbers for D → ∞ are 0.363, 0.1175, 0.0345 and 0.0095)."""
    x = random_heads(2000, heads=1, dim=128, rows=1) * torch.logspace(-3, 2, 2000).double()[:, None]
    if bits == 1:  # no preset: rounding alone, on coordinates that need no rotation
        levels = torch.tensor(sphere_levels(128, 1)).double()
        got = levels[(x > 0).long()] * x.norm(dim=-1, keepdim=True)
    else:
        got = round_trip(codec_of(f"TurboQuant{bits}", heads=1, dim=128), x)
    relative = ((got - x).square().sum(-1) / x.square().sum(-1)).mean().item()
    assert relative == pytest.approx(paper, abs=off)
    assert relative <= math.sqrt(3) * math.pi / 2 / 4**bits


@pytest.mark.parametrize(("dim", "bits"), [(16, 2), (80, 2), (64, 3), (128, 4)])
def test_turboquant_levels_are_the_best_for_a_coordinate_of_the_sphere(dim, bits):
    torch.testing.assert_close(
        torch.tensor(sphere_levels(dim, bits)).double(), best_levels(dim, bits), rtol=1e-4, atol=1e-6
    )


def test_turboquant_codes_do_not_depend_on_a_vectors_length():
    codec, x = codec_of("TurboQuant3"), random_heads(20)
    a, b = (codec.encode_keys(codec.keys_in(y)) for y in (x, 64 * x))
    assert torch.equal(a["codes"], b["codes"]) and torch.equal(64 * a["norm"], b["norm"])
    nothing = codec.encode_keys(codec.keys_in(torch.zeros(1, HEADS, 1, DIM)))
    assert not codec.decode_keys(nothing).any()
    huge = codec.decode_keys(codec.encode_keys(codec.keys_in(1e6 * x)))
    assert huge.isfinite().all()


def test_turboquant_rotates_and_one_channel_alone_is_its_worst_case():
    """Signed Hadamard rows are flat: one channel becomes D numbers ±1/√D, all halfway between two levels."""
    codec, one = codec_of("TurboQuant2", heads=1, dim=128), torch.zeros(1, 1, 1, 128).double()
    one[..., 9] = 5.0
    rotated = codec.keys_in(one).double().flatten()
    torch.testing.assert_close(rotated.abs(), torch.full((128,), 5 / math.sqrt(128)).double(), rtol=1e-5, atol=0)
    assert 20 < (rotated > 0).sum() < 108
    nearest = (best_levels(128, 2) * math.sqrt(128) - 1).abs().min()
    error = (round_trip(codec, one) - one).square().sum() / 25
    assert error.item() == pytest.approx(nearest.item() ** 2, rel=1e-2) == pytest.approx(0.26, abs=0.005)


# --- in a model --------------------------------------------------------------------------------------------------


class ExactCache(DynamicCache):
    """Keeps everything exact and hands out what ``expected`` makes of it, of each row after its ``padding`` tokens."""

    def __init__(self, name: str, config, padding: Sequence[int] = (0,)):
        super().__init__(config=config)
        self.name, self.padding = name, padding

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        both = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not any(self.padding):
            return expected(self.name, *both, WINDOW, GROUP, 16)
        keys, values = (x.clone() for x in both)
        for row, first in enumerate(self.padding):
            here = slice(row, row + 1), slice(None), slice(first, None)
            if first < keys.shape[2]:
                keys[here], values[here] = expected(self.name, keys[here], values[here], WINDOW, GROUP, 16)
        return keys, values


def small(name: str) -> QuantConfig:
    """The preset; KIVI with a group and a window that a short text leaves."""
    shape = {"k_groupsize": GROUP, "v_groupsize": 16, "residual_length": WINDOW}
    return replace(PRESETS[name], **(shape if name.startswith("KIVI") else {}))


def double_model():
    return tiny_model(head_dim=DIM).double()


def assert_equal_but_for_ties(got, want, stock) -> None:
    effect, difference = (want - stock).abs(), (got - want).abs()
    assert effect.mean() > 1e-2, "nothing was quantized"
    assert difference.median() < 2e-4 and difference.mean() < 0.02 * effect.mean()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_chunks_and_decoding_equal_hugging_faces_own_forward(name, padded):
    ours, other = double_model(), double_model()
    padding = (11, 0) if padded else (0, 0)
    ids, mask = token_ids(2, 40), left_padding(40, *padding)
    chunks = (19, 7, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1)
    with patch_model(ours, small(name)):
        got = logits(ours, None, ids, chunks, mask)
    # One by one, so that each query sees its own recent window.
    want = logits(other, ExactCache(name, other.config, padding), ids, [1] * 40, mask)
    stock = logits(other, DynamicCache(config=other.config), ids, chunks, mask)
    assert_equal_but_for_ties(got[mask.bool()], want[mask.bool()], stock[mask.bool()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_equals_hugging_faces_own_beams(name, num_beams):
    ours, other = double_model(), double_model()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": num_beams}
    options |= {"attention_mask": torch.ones(2, 20, dtype=torch.long)}
    with patch_model(ours, small(name)):
        got = ours.generate(token_ids(2, 20), **options, return_dict_in_generate=True)
        assert got.past_key_values.get_seq_length() == 31
    options |= {"past_key_values": ExactCache(name, other.config), "prefill_chunk_size": 1}  # each its own window
    assert torch.equal(got.sequences, other.generate(token_ids(2, 20), **options))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("KIVI")])
def test_prompt_lookup_crops_and_gives_the_plain_tokens(name):
    model, ids = double_model(), token_ids(1, 5).repeat(1, 4)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with patch_model(model, PRESETS[name]):
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("name", NAMES)
def test_measured_bits_are_the_formulas(name):
    model, tokens, rows = double_model(), 300, 2
    with patch_model(model, name), torch.no_grad():
        cache = model(token_ids(rows, tokens)).past_key_values
    bits, numbers = int(name[-1]), tokens * CHANNELS
    if name.startswith("KIVI"):
        packed = (tokens - 128) // 32 * 32  # whole groups, that fill whole blocks
        each = (packed * CHANNELS * (bits + 24 / 32) + (tokens - packed) * CHANNELS * 16) / numbers
    elif name.startswith("QuaRot"):
        each = 304 * CHANNELS * (bits + 24 / DIM) / numbers  # 19 blocks of 16
    else:
        each = (304 * CHANNELS * bits + tokens * HEADS * 16) / numbers
    measured = cache.avg_bits()
    assert measured["k"] == measured["v"] == pytest.approx(each)
    assert measured["total"] == pytest.approx(each + 32 / (2 * LAYERS * CHANNELS))


PRESET_HASHES = {
    "FP16": "a58580ae9526",
    "KIVI2": "0428a0822947",
    "KIVI4": "3304fe28113f",
    "KVQuant2": "4e054db0dca5",
    "KVQuant3": "1a988fa31ff5",
    "KVQuant4": "ff7bd30e45df",
    "QuaRot2": "10a3b066d16e",
    "QuaRot3": "84abd528226c",
    "QuaRot4": "fb6e7fcad4e6",
    "RTN2": "bebbee3f43fb",
    "RTN3": "654482204219",
    "RTN4": "b94c3be97667",
    "RotateKV2": "cdf85409e69c",
    "RotateKV2+": "7ff7dbb29150",
    "RotateKV3": "43e0324400d6",
    "RotateKV3+": "f98f55b1077a",
    "RotateKV4": "cd0c5391b585",
    "RotateKV4+": "96577f4f3d57",
    "TurboQuant2": "bd1e6a7994b1",
    "TurboQuant3": "cdd0e950e2ac",
    "TurboQuant4": "ee3f531c07f0",
}


def test_presets_are_those_that_runs_were_made_with():
    """Runs are found again by their config: a preset that changes needs another name."""
    encoded = {name: json.dumps(config.to_dict(), sort_keys=True).encode() for name, config in PRESETS.items()}
    assert {name: hashlib.sha256(x).hexdigest()[:12] for name, x in encoded.items()} == PRESET_HASHES
    assert list(PRESETS) == sorted(PRESETS) and {config.method for config in PRESETS.values()} == set(METHODS)


@pytest.mark.parametrize(
    "name, flag, value",
    [
        ("KIVI2", "Grouped_Head_Key_Rotation", True),
        ("QuaRot2", "Outlier_Aware_Key_Rotation", True),
        ("QuaRot2", "Grouped_Head_Key_Rotation", True),
        ("TurboQuant2", "k_groupsize", 32),
        ("TurboQuant2", "v_clip_ratio", 0.9),
        ("RTN2", "Outlier_Aware_Key_Rotation", True),
    ],
)
def test_a_flag_without_meaning_is_one_line(name, flag, value):
    with pytest.raises(UserError, match=f"{name[:-1]} has no use for {flag}:") as error:
        codec_of(name, **{flag: value})
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_one_line():
    with pytest.raises(UserError, match="v_groupsize 32 does not divide head_dim 16"):
        codec_of("KIVI2", dim=16)
    assert codec_of("KIVI2", dim=16, v_groupsize=16, k_groupsize=7).tokens_per_flush == 7  # tokens: any number
    for name in ("QuaRot2", "TurboQuant2"):
        with pytest.raises(UserError, match=r"Hadamard.*RTN"):
            codec_of(name, dim=184)
