"""Every family of the table: FP16 is the stock model, and RotateKV2 is the oracle, whatever is done with the cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache as cached
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import left_padding, logits, save_reorder_indices
from families import FAMILIES, MORE, REFUSED, SUPPORTED, Family, random_orders, token_ids
from oracle import OracleCache, watching
from torch import nn
from transformers import DynamicCache

from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model
from rotatekv.cache.record import MOST_CROPPED
from rotatekv.kernels import cpu

pytestmark = pytest.mark.usefixtures("one_thread")
ROTATEKV2 = replace(PRESETS["RotateKV2"], num_sink_entries=5)
PLAIN = replace(ROTATEKV2, Outlier_Aware_Key_Rotation=False)  # needs no calibration
NO_COMPILER = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the CPU kernels are not built")
TOKENS, PADDING = 56, 7  # longer than the windows; of a second row
PAGE = Path(__file__).parent.parent / "docs/families.md"
MARGIN = 2e-6  # float32 is as near to float64, in steps of the rounding


def family_of(name: str) -> Family:
    return FAMILIES.get(name) or MORE[name]


@cached
def built(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return family_of(name).build(dtype)


def patch_rotatekv2(folder: Path, model: nn.Module, config: QuantConfig = ROTATEKV2):
    """``patch_model(model, config)`` with the oracle's reorder indices."""
    orders = save_reorder_indices(folder / "order.safetensors", random_orders(model), {})
    return patch_model(model, config, orders)


@pytest.fixture
def patched(tmp_path):
    return partial(patch_rotatekv2, tmp_path)


def prefilled(model: nn.Module, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits(model, cache, ids, (TOKENS,), mask)


def decoded(model: nn.Module, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits(model, cache, ids, (TOKENS - 4, 1, 1, 1, 1), mask)


def in_chunks(model: nn.Module, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits(model, cache, ids, (30, 14, 1, 1, 10), mask)


def cropped(model: nn.Module, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Six tokens that are taken back, twice, as assisted generation does."""
    cache.activate_past_recording()
    parts = [logits(model, cache, ids, (40,), mask)]
    for start in (40, 48):
        logits(model, cache, ids.roll(1, dims=1), (6,), mask)
        cache.crop(-6)
        parts.append(logits(model, cache, ids, (8,), mask))
        assert cache.get_seq_length() == start + 8
    return torch.cat(parts, dim=1)


class NoBeamMoved(AssertionError):
    """A text on which beam search shows nothing."""


def beams(model: nn.Module, cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of the beams' steps, (steps, rows · beams, V)."""
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "output_logits": True}
    generated = model.generate(
        ids[:, :48], attention_mask=mask[:, :48], past_key_values=cache, return_dict_in_generate=True, **options
    )
    if generated.beam_indices[:, :8].unique().numel() <= len(ids):
        raise NoBeamMoved
    return torch.stack(generated.logits)


ONE, PADDED = left_padding(TOKENS, 0), left_padding(TOKENS, 0, PADDING)
RUNS = {
    "decode": (decoded, ONE),
    "padded chunks": (in_chunks, PADDED),
    "crop": (cropped, ONE),
    "beams": (beams, PADDED),
}


@cached
def expected(name: str, run: str):
    """Model, ids, the oracle's cache, its and the stock model's logits of a text in which no number lies near a tie of
    the rounding: one that fell the other way in float32 would move all that comes after it."""
    (step, mask), model = RUNS[run], built(name, family_of(name).widest)
    for seed in range(100):
        ids = token_ids(len(mask), TOKENS, seed)
        with watching(OracleCache(model, family_of(name), random_orders(model))) as cache, suppress(NoBeamMoved):
            want = step(model, cache, ids, mask)
            if cache.margin > MARGIN:
                return model, ids, cache, want, step(model, DynamicCache(config=model.config), ids, mask)
    raise AssertionError("no text without ties")


def fp16_differences(name: str) -> dict[str, float]:
    """The largest |ours − the stock model's| logit of each run, in units of the logits' standard deviation."""
    model = built(name, torch.float32)
    cases = {"prefill": (prefilled, ONE), **RUNS}

    def all_of(new_cache: Callable, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {run: step(model, new_cache(), ids[: len(mask)], mask) for run, (step, mask) in cases.items()}

    for seed in range(100):
        with suppress(NoBeamMoved):
            ids = token_ids(2, TOKENS, seed)
            stock = all_of(lambda: DynamicCache(config=model.config), ids)
            break
    else:
        raise AssertionError("no text on which a beam moves")
    with patch_model(model, "FP16"):
        ours = all_of(lambda: RotateKVCache.for_model(model), ids)
    differences = {}
    for run, want in stock.items():
        real = cases[run][1].bool() if run != "beams" else ...
        differences[run] = ((ours[run] - want)[real].abs().max() / want[real].std()).item()
    return differences


@pytest.mark.parametrize("name", [*SUPPORTED, *MORE])
def test_fp16_is_the_stock_model(name):
    """Bit for bit; where a layer's window slides, but for a prefill, to 1e-5: whole blocks add up in another order."""
    slides = any(DynamicCache(config=built(name).config).is_sliding)
    differences = fp16_differences(name)
    assert differences.pop("prefill") == 0 and all(found <= 1e-5 * slides for found in differences.values())


@pytest.mark.parametrize("name", SUPPORTED)
def test_16_bit_models_are_taken(name):
    """With eager attention too. What FP16 then differs by is far less than what 16 bits do to the model."""
    model, ids, mask = FAMILIES[name].build(torch.bfloat16), token_ids(2, TOKENS), PADDED
    slides = any(DynamicCache(config=model.config).is_sliding)
    for attention in {model.config._attn_implementation, "eager"}:
        model.set_attn_implementation(attention)
        stock = in_chunks(model, DynamicCache(config=model.config), ids, mask)[0].float()
        with patch_model(model, "FP16"):
            ours = in_chunks(model, RotateKVCache.for_model(model), ids, mask)[0].float()
        assert (ours - stock).std() <= 0.01 * slides * stock.std()


def test_the_docs_have_a_row_for_every_family():
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {*FAMILIES, *MORE} <= {*rows}


def error(name: str, run: str, patched, check: Callable | None = None) -> torch.Tensor:
    """|ours − the oracle's| logits of RotateKV2, in units of what its quantization changes."""
    model, ids, oracle, want, stock = expected(name, run)
    step, mask = RUNS[run]
    with patched(model):
        cache = RotateKVCache.for_model(model)
        got = step(model, cache, ids, mask)
        if check is not None:
            check(cache, oracle)
    real = mask.bool() if run != "beams" else ...
    unit = (want - stock)[real].std()
    assert unit > 0.02 * stock[real].std(), "nothing was quantized"
    return ((got - want).abs() / unit)[real]


# Crops and beams are the cache's: a family of each kind of layers and window is enough for every day.
KINDS_OF_LAYERS = ("llama", "mistral, sliding", "gemma3", "gpt_oss", "cohere2", "qwen3_next", "lfm2")
ALIKE = [
    pytest.param(name, run, marks=[] if name in KINDS_OF_LAYERS else pytest.mark.slow)
    for name, run in product(SUPPORTED, ("crop", "beams"))
]


@pytest.mark.parametrize(("name", "run"), [*product(SUPPORTED, ("decode", "padded chunks")), *ALIKE])
def test_rotatekv2_is_the_oracle(name, run, patched, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    found = error(name, run, patched, assert_same_cache)
    assert found.median() < 2e-5 and found.max() < 0.01  # a sink may differ in its last place


@pytest.mark.parametrize("bits", [3, 4])
def test_rotatekv_of_more_bits_is_the_oracle(bits, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    model, ids = built("llama"), token_ids(2, TOKENS, seed=0)
    with watching(OracleCache(model, FAMILIES["llama"], random_orders(model), bits=bits, clip=1.0)) as oracle:
        want = in_chunks(model, oracle, ids, PADDED)[PADDED.bool()]
    assert oracle.margin > MARGIN, "take another seed"
    config = replace(PRESETS[f"RotateKV{bits}"], num_sink_entries=5)
    with patch_rotatekv2(tmp_path, model, config):
        got = in_chunks(model, RotateKVCache.for_model(model), ids, PADDED)[PADDED.bool()]
    assert (got - want).abs().median() < 2e-5 and (got - want).abs().max() < 0.01


@pytest.mark.parametrize("name", MORE)
def test_rotatekv2_is_the_oracle_in_more_families(name, patched, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    found = error(name, "padded chunks", patched, assert_same_cache)
    assert found.median() < 2e-5 and found.max() < 0.01  # a sink may differ in its last place


@NO_COMPILER
@pytest.mark.parametrize("run", ["decode", "padded chunks"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_kernels_give_what_torch_gives(name, run, patched, monkeypatch):
    """The fused kernel rounds values to bfloat16."""
    monkeypatch.setenv("ROTATEKV_BACKEND", "cpu")
    calls, kernel = [], cpu.decode_attention
    monkeypatch.setattr(cpu, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    found = error(name, run, patched)
    assert found.median() < 2e-5 and found.mean() < 1e-3
    assert len(calls) == 4 * family_of(name).fused_layers


def assert_same_cache(cache: RotateKVCache, oracle: OracleCache) -> None:
    assert cache.is_initialized and len(cache) == len(oracle)
    for ours, theirs, kept in zip(cache.layers, oracle.layers, cache, strict=True):
        if getattr(theirs, "keys", None) is None:  # no attention
            assert type(ours) is type(theirs)
            continue
        assert torch.equal(kept[0], ours.keys) and torch.equal(kept[1], ours.values)
        assert_same_tokens(ours, theirs)


def assert_same_tokens(ours, theirs) -> None:
    """Keys and values as attention sees them; a sliding layer's window, in whole blocks."""
    window, held = getattr(theirs, "sliding_window", None), ours.keys.shape[2]
    assert ours.get_seq_length() == theirs.get_seq_length()
    if window is None:
        assert held == ours.get_seq_length()
    else:
        spare = 16 + (MOST_CROPPED if theirs.record_past else 0)
        assert min(window - 1, ours.get_seq_length()) <= held < window - 1 + spare
        assert (ours.get_seq_length() - held) % 16 == 0
    seen = theirs.keys.shape[2]
    for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        difference = (one[:, :, held - seen :] - other).abs()
        assert difference.median() < 1e-5 and difference.quantile(0.99) < 0.01


def as_it_is(model: nn.Module) -> list:
    """All that a module holds, by identity, and every weight's values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    held = [
        ({name: id(x) for name, x in vars(module).items()}, [list(getattr(module, kind, ())) for kind in hooks])
        for module in model.modules()
    ]
    return [held, {name: x.clone() for name, x in model.state_dict().items()}]


def assert_as_before(model: nn.Module, before: list) -> None:
    held, weights = as_it_is(model)
    assert held == before[0] and weights.keys() == before[1].keys()
    assert all(torch.equal(x, before[1][name]) for name, x in weights.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_is_as_before(name):
    model = family_of(name).build()
    before = as_it_is(model)
    with pytest.raises(UserError, match=family_of(name).refused) as error:
        patch_model(model, PLAIN)
    assert "\n" not in str(error.value)
    assert_as_before(model, before)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_patched_family_is_as_before_when_it_is_unpatched(name):
    model = family_of(name).build()
    before = as_it_is(model)
    with patch_model(model, PLAIN):
        model.generate(token_ids(1, 30), max_new_tokens=2)
        assert as_it_is(model)[1].keys() == before[1].keys()
    assert_as_before(model, before)


@pytest.mark.parametrize("name", ["llava llama", "llava mistral"])
def test_an_image_in_the_prompt(name, patched, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    model, ids = built(name), token_ids(2, TOKENS)
    ids[:, 5:9] = model.config.image_token_index
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(cache) -> torch.Tensor:
        with torch.no_grad():
            first = model(ids[:, :40], pixel_values=image, past_key_values=cache).logits
        return torch.cat([first, logits(model, cache, ids, (1, 15))], dim=1)

    stock = run(DynamicCache(config=model.config))
    with watching(OracleCache(model, family_of(name), random_orders(model))) as oracle:
        want = run(oracle)
    with patch_model(model, "FP16"):
        torch.testing.assert_close(run(RotateKVCache.for_model(model)), stock)
    with patched(model):
        difference = (run(RotateKVCache.for_model(model)) - want).abs() / (want - stock).std()
    assert difference.median() < 2e-5 and difference.mean() < 1e-2
    image.mul_(-1)
    assert not torch.allclose(run(DynamicCache(config=model.config)), stock), "the image does not matter"
