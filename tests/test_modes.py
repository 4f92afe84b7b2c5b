"""The process's modes and defaults leave the cache alone: inference mode, default dtype and device."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from benchmarks.random_models import patch_random, random_llama
from rotatekv import PRESETS, RotateKVCache

ONE_OF_EACH = [name for name in PRESETS if name.rstrip("+").endswith("2") or name in ("FP16", "KVQuant3", "RotateKV3")]
BEFORE, BETWEEN, AFTER = "prefill inside", "prefill and operations inside", "all but the prefill inside"


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(8, 128, (rows, tokens), generator=generator, device="cpu", dtype=torch.int64)


def run(model, inside: str | None = None) -> torch.Tensor:
    """Logits of a prefill of 37 tokens, and of 3 decode steps after a crop and an exchange of rows."""
    cache, tokens = RotateKVCache.for_model(model), ids(2, 45)
    with torch.inference_mode(inside in (BEFORE, BETWEEN)):
        found = [model(tokens[:, :37], past_key_values=cache).logits]
    with torch.inference_mode(inside in (BETWEEN, AFTER)):
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
    with torch.inference_mode(inside == AFTER):
        found += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(37, 40)]
    cache.crop(-2)
    found.append(model(tokens[:, 40:], past_key_values=cache).logits)
    return torch.cat(found, dim=1).detach()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_calls_inside_and_outside_inference_mode_share_a_cache(preset, backend, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    model = random_llama(6, 3, 32, 1).requires_grad_(False)  # with gradients no kernel attends
    with patch_random(model, preset):
        expected = run(model)
        for inside in (BEFORE, BETWEEN, AFTER):
            torch.testing.assert_close(run(model, inside), expected, rtol=0, atol=0, msg=inside)


def test_a_model_patched_in_inference_mode_trains_and_unpatches_outside():
    model = tiny_model()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.inference_mode():
        handle = patch_random(model, "RotateKV2")
    with handle:
        assert not any(x.is_inference() for x in model.parameters())
        run(model)
    model(ids(1, 8)).logits.sum().backward()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
