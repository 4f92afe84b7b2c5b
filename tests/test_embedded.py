"""What only a trained model shows, on the embedded one; all in this file, so that one process loads it once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import calibrate_reorder
import PPL_evaluation
from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.capture.files import read_capture
from rotatekv.compat import CACHE_NAME
from rotatekv.evals.perplexity import perplexity, score_window
from rotatekv.evals.texts import load_text, tokenize, windows_of
from rotatekv.families import find_text_model
from rotatekv.kernels import cpu
from rotatekv.models.weights import calibration_digests

PROMPT, STEPS = 64, 16


def round_to_bfloat16(module: torch.nn.Module, args: tuple) -> tuple:
    return (args[0].bfloat16().to(args[0].dtype),)


def decode(model, start: RotateKVCache, tokens: torch.Tensor) -> torch.Tensor:
    """(STEPS, vocabulary) logits of the tokens, each after the ones before it."""
    cache = copy.deepcopy(start)
    return torch.stack([model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in tokens])


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")
@pytest.mark.parametrize("method", ["RotateKV2", "RotateKV2+"])
def test_the_fused_kernel_costs_less_than_attention_in_bfloat16(embedded, method, monkeypatch):
    """Which token is the likeliest is no measure: the layers amplify a rounding of 1e-4 until codes are other ones, in
    the reference path alone too, so that tokens part after some steps, at other steps on another CPU."""
    model, tokenizer = embedded
    text = tokenize(tokenizer, load_text("essays", None))
    length = PROMPT + PRESETS[method].residual_length  # else nothing is packed
    prompt, tokens = text[:, :length], text[0, length : length + STEPS]
    with patch_model(model, method), torch.no_grad():
        monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
        start = RotateKVCache.for_model(model)
        model(prompt, past_key_values=start)
        reference = decode(model, start, tokens)
        hooks = [x.self_attn.o_proj.register_forward_pre_hook(round_to_bfloat16) for x in model.model.layers]
        rounded = decode(model, start, tokens)
        for hook in hooks:
            hook.remove()
        monkeypatch.setenv("ROTATEKV_BACKEND", "cpu")
        fused = decode(model, start, tokens)
    error, allowed = ((x - reference).abs().mean(-1) for x in (fused, rounded))  # (STEPS,)
    assert error[0] > 0  # it is another path
    assert error.median() < allowed.median() and error.mean() < 1.5 * allowed.mean()


def test_rotatekv2_beats_plain_rounding(embedded):
    model, tokenizer = embedded
    window = next(windows_of(tokenize(tokenizer, load_text("essays")), 256))
    nll = {}
    for name in ("FP16", "RTN2", "RotateKV2"):
        with patch_model(model, name):
            nll[name] = score_window(model, window)["nll"]
    assert perplexity([nll["FP16"]]) < perplexity([nll["RotateKV2"]]) < perplexity([nll["RTN2"]]) / 5


def test_cache_bytes_are_the_formulas(embedded):
    """By the memory formula of the docs, ≤ 0.175 of 16 bits, also while decoding and at batch 4."""
    model, _ = embedded
    torch.manual_seed(0)
    ids = torch.randint(100, 40000, (1, 1024))
    with patch_model(model, "RotateKV2"), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        model.model(input_ids=ids, **{CACHE_NAME: cache})
        for step in range(9):
            tokens = 1024 + step
            sinks = sum(len(layer.sinks.token_index) for layer in cache.layers)
            packed = -(-tokens // 16) * 16  # whole blocks
            formula = packed * (30 * 2 * 192 * 2 / 8 + 30 * 2 * 3 * 3) + 4 * tokens + sinks * (4 * 192 + 8)
            held = sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors())
            assert cache.nbytes() == held == formula
            assert cache.nbytes() <= 0.175 * tokens * 30 * 2 * 192 * 2
            assert cache.avg_bits()["total"] == pytest.approx(8 * held / (tokens * 30 * 2 * 192))
            if step < 8:
                model.model(input_ids=ids[:, step : step + 1], **{CACHE_NAME: cache})
        one_row = cache.nbytes()
        cache.batch_repeat_interleave(4)
        assert cache.nbytes() == 4 * one_row


def test_the_shipped_files_name_the_embedded_weights(embedded):
    digests = calibration_digests(find_text_model(embedded[0]))
    paths = sorted((Path(calibrate_reorder.__file__).parent / "reorder_indices").glob("smollm2-135m*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert digests.items() <= file.metadata().items()


def test_the_essays_stand_in_for_a_dataset_out_of_reach_and_it_says_so(embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rotatekv.capture.flags.load_model", lambda **flags: embedded)
    PPL_evaluation.main(["--save_massive_activations", "True", "--PPL_seq_length", "64", "--save_dir", str(tmp_path)])
    assert "WikiText-2 is out of reach" in capsys.readouterr().err
    found = read_capture(tmp_path / "smollm2-135m", "massive_activations")
    assert found.info.text == "essays/even" and found.info.layers == tuple(range(30))
    # The paper's premise, on the real model: in deep layers the first token towers over all others.
    assert found.get(20, "token_maximum").argmax() == 0 and 0 in found.get(20, "sinks")
    assert found.get(20, "token_maximum")[0] > 100 * found.get(20, "median")
