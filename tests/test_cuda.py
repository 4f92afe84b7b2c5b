"""A smoke test on a GPU; not run where none is. Everything else is tested on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from rotatekv import RotateKVCache, load_model, patch_model
from rotatekv.kernels import triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no GPU here")


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m", device="cuda")[0]


@pytest.mark.parametrize("method", ["RotateKV2", "RotateKV4", "RTN4"])
def test_triton_decodes_as_the_reference_path(model, method, monkeypatch):
    ids = torch.arange(100, 420, device="cuda").view(2, 160)
    results = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_model(model, method), torch.no_grad():
            cache = RotateKVCache.for_model(model)
            model(ids[:, :150], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(150, 160)]
        results[backend] = torch.cat(steps, dim=1)
    difference = (results["triton"] - results["reference"]).abs().median()
    assert difference < (0.5 if method == "RotateKV2" else 0.25) * results["reference"].std()


def test_generate_uses_triton(model, monkeypatch):
    calls, kernel = [], triton.decode_attention
    monkeypatch.setattr(triton, "decode_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    with patch_model(model, "RotateKV2"):
        out = model.generate(
            torch.arange(100, 164, device="cuda").view(1, 64), max_new_tokens=8, min_new_tokens=8,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert isinstance(out.past_key_values, RotateKVCache) and len(calls) == 7 * len(model.model.layers)


@pytest.mark.parametrize("placement", [["--device", "cuda"], ["--device_map", "auto"]])
def test_perplexity_on_the_gpu(placement, tmp_path):
    import PPL_evaluation

    flags = ["--dataset", "essays", "--limit", "1", "--PPL_seq_length", "512", "--method", "RotateKV4"]
    PPL_evaluation.main([*flags, *placement, "--output_dir", str(tmp_path)])
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert 10 < metrics["metric"]["ppl"] < 60
