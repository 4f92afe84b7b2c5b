"""The check of the presets at calibration: the error of the scores, and models whose keys have large biases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text, token_ids
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import calibrate_reorder
from rotatekv import PRESETS
from rotatekv.calibration.score_errors import LARGE_ERROR, describe, presets_for, score_errors
from rotatekv.patching.patch import build_methods

PER_TOKEN = [f"{name}{bits}" for name in ("RTN", "QuaRot", "TurboQuant", "RotateKV") for bits in (2, 3, 4)]
# RotateKV2+ is neither: with heads of 16 channels a quarter of its bits are scales.
BY_CHANNEL = ["KIVI2", "KIVI4", "KVQuant2", "KVQuant3", "KVQuant4", "RotateKV3+", "RotateKV4+"]


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One head's key to the nearest of 2^bits levels between its ends, with a float16 scale."""
    low = x.min()
    scale = ((x.max() - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def naive_error(model, ids: torch.Tensor, layer: int, bits: int) -> float:
    """One pair of a query and a token after another, from Hugging Face's own projections."""
    seen = {}
    attention = model.model.layers[layer].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[0]}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
        cos, sin = model.model.rotary_emb(seen["q_proj"], torch.arange(ids.shape[1])[None])
    for hook in hooks:
        hook.remove()
    query, key = (seen[name].unflatten(-1, (-1, 16)).transpose(0, 1)[None] for name in ("q_proj", "k_proj"))
    query, exact = apply_rotary_pos_emb(query, key, cos, sin)
    _, content = apply_rotary_pos_emb(query, key - key.mean(2, keepdim=True), cos, sin)
    wrong = whole = 0.0
    for head in range(6):
        for asked in range(0, ids.shape[1], 8):
            for token in range(asked + 1):
                k = exact[0, head // 2, token]
                wrong += float(query[0, head, asked] @ (rounded(k, bits) - k)) ** 2
                whole += float(query[0, head, asked] @ content[0, head // 2, token]) ** 2
    return (wrong / whole) ** 0.5


@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_is_that_of_every_pair(bits):
    model, ids = tiny_model("llama"), token_ids(1, 33)
    methods = build_methods(model, model.model, PRESETS[f"RTN{bits}"])
    errors = score_errors(model, [ids], {"RTN": methods})["RTN"]
    assert errors.tolist() == pytest.approx([naive_error(model, ids, layer, bits) for layer in (0, 1)], rel=1e-3)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_plain_model_is_not_warned_of_at_four_bits():
    model = tiny_model("llama")
    codecs, others = presets_for(model)
    assert {"RTN2", "QuaRot2", "TurboQuant4"} <= codecs.keys() and "plus" in others["RotateKV2+"]
    errors = score_errors(model, [token_ids(1, 200), token_ids(1, 200, 1)], codecs)
    four = {name: of_layers for name, of_layers in errors.items() if name.endswith("4")}
    assert len(four) == 3 and not any("warning" in line for line in describe(four))
    assert errors["RTN2"].min() > 3 * errors["RTN4"].max()
    assert "warning: RTN2: " in describe({"RTN2": 2 * errors["RTN2"], "RTN4": errors["RTN4"]})[-1]


@pytest.fixture
def biased(tmp_path, monkeypatch) -> torch.nn.Module:
    """A tiny qwen2 with large key biases in channels that RoPE hardly turns; calibrate_reorder.py loads it."""
    model = tiny_model("qwen2", head_dim=32, hidden_size=192)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.zero_()[[14, 47, 78]] = torch.tensor([1500.0, -1200.0, 900.0])
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_folder(tmp_path / "words"))
    model.name_or_path = "tiny-qwen2"
    monkeypatch.setattr(calibrate_reorder, "load_model", lambda **flags: (model, tokenizer))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(700))
    return model


def calibrated(capsys, statistics: str) -> tuple[dict[str, float], str]:
    """The worst layer's error of each preset, and all that was said."""
    flags = ["--model", "tiny-qwen2", "--dataset", "text.txt", "--seq_length", "300", "--statistics", statistics]
    calibrate_reorder.main(flags)
    out = capsys.readouterr().out
    rows = re.findall(r"^([A-Za-z]+\d\+?) +[\d.]+  \d+: ([\d.]+)", out, flags=re.MULTILINE)
    return {name: float(error) for name, error in rows}, out


def test_large_key_biases_are_warned_of_where_keys_are_rounded_per_token(biased, capsys):
    errors, out = calibrated(capsys, "reorder")
    assert "not checked: KVQuant2 (no statistics of the kind kvquant)" in out and "RotateKV2" in errors
    calibrated(capsys, "plus")
    errors, out = calibrated(capsys, "kvquant")
    assert errors.keys() == PRESETS.keys() - {"FP16"} and "not checked" not in out
    warned = re.search("^warning: (.*): in some layers the error is above 50%", out, flags=re.MULTILINE)[1].split(", ")
    assert set(warned) - {"RotateKV2+"} == set(PER_TOKEN)
    assert all(errors[name] > LARGE_ERROR for name in PER_TOKEN), errors
    assert all(errors[name] < LARGE_ERROR for name in BY_CHANNEL), errors
