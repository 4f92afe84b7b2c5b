"""HF's own QuantizedCache as a baseline: through a stand-in backend always, through quanto and hqq where installed."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, cache_utils

import needle_evaluation
import PPL_evaluation
from rotatekv import external, patch_model
from rotatekv.cli import evaluation_parser, method_from_args, methods_from_args
from rotatekv.compat import CACHE_NAME
from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.evals.generation import complete_inputs
from rotatekv.evals.perplexity import score_window
from rotatekv.external import EXTERNAL, ExternalConfig, new_cache, use_method

HEADS, HEAD_DIM, LAYERS = 3, 64, 2


class StandIn(cache_utils.QuantizedLayer):
    """HF's residual-window logic around a codec of our own: uint8 codes, a float32 scale per head and token."""

    levels = 127.0

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, dict]:
        scale = tensor.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / self.levels
        return ((tensor / scale).round() + 128).to(torch.uint8), {"scale": scale, "axis": axis}

    def _dequantize(self, quantized: tuple[torch.Tensor, dict]) -> torch.Tensor:
        codes, meta = quantized
        return (codes.float() - 128) * meta["scale"]


class Coarse(StandIn):
    levels = 1.0


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", StandIn)
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", Coarse)
    monkeypatch.setattr(external, "version", lambda package: "0.0 (a stand-in)")


@pytest.fixture
def model():
    return tiny_model(head_dim=HEAD_DIM)


def ids_of(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(8, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def stock_nll(model, window: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(window).logits[0, :-1]
    return F.cross_entropy(logits.float(), window[0, 1:]).item()


def nll_over(model, window: torch.Tensor, cache, chunk: int) -> float:
    """Mean loss with a cache of HF's, a chunk at a time; written apart from ``score_window``."""
    with torch.no_grad():
        parts = [model(part, use_cache=True, **{CACHE_NAME: cache}).logits[0] for part in window.split(chunk, dim=1)]
    return F.cross_entropy(torch.cat(parts)[:-1].float(), window[0, 1:]).item()


def parsed(*flags: str) -> argparse.Namespace:
    return evaluation_parser("", "windows").parse_args(list(flags))


def test_one_shot_sees_no_quantization_and_a_streamed_window_does(stand_in, model):
    window = ids_of(96)
    exact = stock_nll(model, window)
    with use_method(model, EXTERNAL["HF-hqq2"]):
        assert score_window(model, window)["nll"] == pytest.approx(exact, rel=1e-5)
        streamed = score_window(model, window, 16)["nll"]
    assert abs(streamed - exact) > 0.01
    coarse = DynamicCache(config=model.config)
    coarse.layers = [Coarse(2, 1, 1, 64, 128) for _ in range(LAYERS)]
    assert streamed == pytest.approx(nll_over(model, window, coarse, 16), rel=1e-6)


def test_measured_bytes_are_codes_scales_and_the_recent_window(stand_in, model):
    # 16 + 24 + 24 tokens, a window of at most 40: the first call's 16 are codes, 24 wait, the last 24 make it 48 ≥ 40
    # and all 64 become codes; 24 more wait in float32.
    config = ExternalConfig("quanto", 4, 0, residual_length=40)
    for total, coded in ((16, 16), (40, 16), (64, 64), (88, 64)):
        with use_method(model, config), torch.no_grad():
            cache = new_cache(model)
            for part in ids_of(total).split([16, *[24] * ((total - 16) // 24)], dim=1):
                model(part, use_cache=True, **{CACHE_NAME: cache})
            use = external.external_use(cache)
        one_kind = LAYERS * HEADS * (coded * (HEAD_DIM + 4) + (total - coded) * HEAD_DIM * 4)
        assert use["cache_bytes"] == 2 * one_kind and use["tokens"] == total
        assert use["k_bits"] == use["v_bits"] == use["total_bits"] == 8 * one_kind / (LAYERS * HEADS * total * HEAD_DIM)


def test_a_batch_counts_its_rows(stand_in, model):
    with use_method(model, EXTERNAL["HF-quanto4"]), torch.no_grad():
        cache = new_cache(model)
        model(ids_of(20, rows=3), use_cache=True, **{CACHE_NAME: cache})
        assert external.external_use(cache)["tokens"] == 60
        assert external.external_use(cache)["total_bits"] == 8 * (HEAD_DIM + 4) / HEAD_DIM


def test_generation_takes_hf_cache_and_equals_stock_generation_where_the_codec_is_fine(stand_in, model):
    class Tokenizer:
        pad_token_id = 0

        def decode(self, row, skip_special_tokens):
            return str(row.tolist())

    ids = ids_of(30)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 30:].tolist()
    with use_method(model, EXTERNAL["HF-quanto4"]):
        (record,) = complete_inputs(model, Tokenizer(), inputs, 6)
    assert record["prediction"] == str(stock) and record["tokens"] == 30 + len(stock) - 1
    codes, waiting = 30 * (HEAD_DIM + 4), (len(stock) - 1) * 4 * HEAD_DIM
    assert record["cache_bytes"] == 2 * LAYERS * HEADS * (codes + waiting)


def test_the_model_stays_unpatched_and_is_free_again_afterwards(stand_in, model):
    before = {name: value for name, value in vars(model).items()}
    with use_method(model, EXTERNAL["HF-quanto2"]) as handle:
        assert isinstance(new_cache(model), QuantizedCache) and handle.external
        assert "forward" not in vars(model.model.layers[0].self_attn)
        with pytest.raises(UserError, match="in use by another method"):
            use_method(model, EXTERNAL["HF-quanto2"])
        with patch_model(model, "RTN4"), pytest.raises(UserError, match="takes no QuantizedCache"):
            model(ids_of(4), **{CACHE_NAME: new_cache(model)})
    assert vars(model) == before
    with pytest.raises(UserError, match="not patched"):
        new_cache(model)
    with use_method(model, PRESETS["RTN4"]) as handle, pytest.raises(UserError, match="in use by another"):
        assert not handle.external
        use_method(model, EXTERNAL["HF-quanto2"])


def test_fingerprints_part_what_the_config_parts(stand_in, model):
    configs = [*EXTERNAL.values(), ExternalConfig("quanto", 4, 0, residual_length=32)]
    found = set()
    for config in configs:
        with use_method(model, config) as handle:
            found.add(handle.fingerprint)
    assert len(found) == len(configs)


def test_scripts_mark_the_run_external(stand_in, tmp_path):
    folder = save_tiny_folder(tmp_path / "tiny-llama", head_dim=HEAD_DIM)
    text = tmp_path / "words.txt"
    text.write_text(tiny_text(400), encoding="utf-8")
    shared = ["--model", str(folder), "--output_dir", str(tmp_path / "results"), "--method", "HF-quanto4"]
    PPL_evaluation.main([*shared, "--dataset", str(text), "--PPL_seq_length", "64", "--limit", "2"])
    needle = ["--needle", "w1 w2", "--key_phrase", "w1", "--retrieval_question", "w3"]
    grid = ["--context_lengths", "60", "--depths", "50", "--max_new_tokens", "4"]
    needle_evaluation.main([*shared, "--haystack", str(text), *needle, *grid])
    PPL_evaluation.main([*shared[:-1], "RTN4", "--dataset", str(text), "--PPL_seq_length", "64", "--limit", "2"])
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("results/*/*/*/metrics.json"))]
    marks = {(run["task"], run["config"]["method"]): run["config"].get("external") for run in found}
    assert marks == {("ppl", "HF-quanto4"): True, ("needle", "HF-quanto4"): True, ("ppl", "RTN4"): None}
    (run,) = (run for run in found if run["task"] == "ppl" and run["config"].get("external"))
    # One call, so all is codes: 64 + 4 bytes per head and token.
    assert run["cache_bytes_per_token"] == 2 * LAYERS * HEADS * (HEAD_DIM + 4)
    assert run["config"]["quant"]["package"] == "optimum-quanto 0.0 (a stand-in)"
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[int(word[1:]) + 8 for word in text.read_text().split()[:128]]])
    losses = [stock_nll(stock, window) for window in ids.split(64, dim=1)]
    assert run["metric"]["ppl"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_missing_package_is_one_line_that_names_pip(monkeypatch, capsys, name):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(external, "version", missing)
    with pytest.raises(SystemExit) as end:
        PPL_evaluation.main(["--method", name, "--dataset", "essays"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and f"pip install {EXTERNAL[name].package}" in lines[0]


def test_flags(stand_in):
    name, config = method_from_args(parsed("--method", "HF-hqq4", "--residual_length", "32"))
    assert name == "HF-hqq4*" and config == ExternalConfig("hqq", 4, axis=1, residual_length=32)
    assert method_from_args(parsed("--method", "HF-hqq4"))[0] == "HF-hqq4"
    for flags, message in (
        (("--k_bits", "3"), "leave out --k_bits"),
        (("--residual_length", "0"), "at least 1"),
        (("--RTN2",), "two methods"),
    ):
        with pytest.raises(UserError, match=message):
            method_from_args(parsed("--method", "HF-hqq4", *flags))
    with pytest.raises(UserError, match="not measured here"):
        methods_from_args(argparse.Namespace(**vars(parsed("--method", "HF-hqq4")), methods=None))


def test_what_does_not_fit_is_said(stand_in, model):
    with pytest.raises(UserError, match="head_dim 16"):
        use_method(tiny_model(), EXTERNAL["HF-quanto4"])
    with pytest.raises(UserError, match="leave out --calibration_file"):
        use_method(model, EXTERNAL["HF-quanto4"], "some.safetensors")


def test_a_length_the_backend_cannot_pack_is_one_line(stand_in, model):
    names = {"__name__": "hqq.core.bitpack"}
    exec("def pack(): raise RuntimeError('sizes must match')", names)
    with pytest.raises(UserError, match="hqq packs 4 groups into a byte"), use_method(model, EXTERNAL["HF-hqq2"]):
        names["pack"]()
    with pytest.raises(RuntimeError, match="ours"), use_method(model, EXTERNAL["HF-hqq2"]):
        raise RuntimeError("ours")
    assert not hasattr(model, "_rotatekv_external")


@pytest.mark.parametrize("name", EXTERNAL)
def test_the_real_backends(model, name):
    config = EXTERNAL[name]
    try:
        version(config.package)
    except PackageNotFoundError:
        pytest.skip(f"{config.package} is not installed: pip install {config.package}")
    window = ids_of(300)  # in parts of 60: hqq at 2 bits takes 3 heads × tokens in fours only
    with use_method(model, config):
        one, streamed = score_window(model, window), score_window(model, window, 60)
    # 300 = the first 60, then 180 at the third call after it, then 60 that wait in float32.
    own = QuantizedCache(config.backend, model.config, nbits=config.nbits, axis_key=config.axis, axis_value=config.axis)
    assert streamed["nll"] == pytest.approx(nll_over(model, window, own, 60), rel=1e-5)
    assert one["nll"] == pytest.approx(stock_nll(model, window), rel=1e-5)
    coded_bits = config.nbits + 2 * 32 / 64  # a float32 scale and shift for 64 numbers
    assert one["total_bits"] == pytest.approx(coded_bits)
    assert streamed["total_bits"] == pytest.approx((coded_bits * 240 + 32 * 60) / 300)
