"""A smoke test on a GPU, with random models; the same checks run on the CPU, where a kernel of its own stands in."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_check_part import heads_of
from benchmarks.random_models import patch_random, random_llama
from rotatekv import PRESETS, RotateKVCache, patch_model
from rotatekv.kernels import cpu, triton
from rotatekv.kernels.backend import kernels_on

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no GPU here")
needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")
SHAPES = ["9/3x64", "32/8x128", "14/2x64", "8/1x256"]
PLACES = ["auto", "itself"]


def on_both(cases, on_the_cpu) -> pytest.MarkDecorator:
    """All cases on the GPU; on the CPU those that keep the test from rotting."""
    of_gpu = [pytest.param("cuda", case, marks=needs_gpu) for case in cases]
    of_cpu = [pytest.param("cpu", case, marks=needs_compiler) for case in on_the_cpu]
    return pytest.mark.parametrize(("device", "case"), of_gpu + of_cpu, indirect=["device"])


def fused_kernels(device: str):
    return triton if device == "cuda" else cpu


@pytest.fixture
def device(request) -> str:
    return request.param


@pytest.fixture
def counted(device, monkeypatch) -> list:
    """One entry for each decode step that a fused kernel took."""
    calls, package = [], fused_kernels(device)
    kernel = package.decode_attention
    monkeypatch.setattr(package, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    return calls


def decoded(model, device: str) -> torch.Tensor:
    """Logits of the last of 231 tokens and of 12 more, over the end of a block; the first row is padded."""
    ids = torch.randint(3, 500, (2, 243), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions, cache, found = (mask.cumsum(1) - 1).clamp(min=0), RotateKVCache.for_model(model), []
    for start, end in [(0, 231), *((t, t + 1) for t in range(231, 243))]:
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        )
        found.append(out.logits[:, -1:])
    return torch.cat(found, dim=1)


@on_both(PRESETS, ["RotateKV2", "RotateKV3+", "RTN4"])
def test_kernels_decode_as_the_reference_path(case, device, monkeypatch):
    """One layer, so that no rounding of a later one tips."""
    model = random_llama(6, 3, 32, 1, device=device).requires_grad_(False)
    with patch_random(model, case):
        assert kernels_on(torch.device(device)) is fused_kernels(device)
        fused = decoded(model, device)
        monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
        expected = decoded(model, device)
    # RotateKV+'s kernel rounds queries: here by a sixtieth of what it rounds random keys by, which is all they say.
    assert (fused - expected).norm() < (3e-2 if case.endswith("+") else 1e-2) * expected.norm()


@on_both(SHAPES, SHAPES[:1])
def test_generate_uses_the_kernels(case, device, counted):
    model = random_llama(*heads_of(case), layers=2, device=device, dtype=torch.bfloat16)
    with patch_random(model, "RotateKV2"):
        out = model.generate(
            torch.arange(100, 164, device=device).view(1, 64),
            max_new_tokens=8,
            min_new_tokens=8,
            return_dict_in_generate=True,
        )
    assert isinstance(out.past_key_values, RotateKVCache) and len(counted) == 7 * 2


@on_both(PLACES, PLACES)
def test_a_model_placed_by_accelerate_decodes(case, device, counted, tmp_path):
    random_llama(6, 3, 32, 2).save_pretrained(tmp_path)
    place = device if case == "itself" else "auto"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=place).requires_grad_(False)
    with patch_model(model, "RTN4"), torch.no_grad():
        decoded(model, str(model.device))
    assert len(counted) == 12 * 2
