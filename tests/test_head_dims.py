"""Head dimensions and numbers of heads that are no power of two: every preset, in the kernels and in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from kernel_cases import pack_blocks

from benchmarks.random_models import random_statistics
from rotatekv import PRESETS, RotateKVCache, UserError, patch_model
from rotatekv.families import find_text_model
from rotatekv.kernels import cpu
from rotatekv.kernels.hadamard import base_matrix, hadamard_base, hadamard_matrix, has_hadamard, rotate_channels
from rotatekv.methods import method_class
from rotatekv.patching.patch import resolved_head_group
from rotatekv.statistics import CalibrationTarget, save_statistics

HEAD_DIMS = (56, 72, 88, 100, 104, 112, 120, 144)
needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the kernels are not built")


@pytest.mark.parametrize("order", [4, 8, 12, 20, 28, 36, 44, 52, 60, 76, 100, 124, 244, 364])
def test_paleys_matrices_are_hadamard_matrices(order):
    """28 and 244 are of GF(27) and GF(243), 52 and 100 of GF(25) and GF(49), 36 and 76 of his second construction."""
    matrix = hadamard_matrix(order) * order**0.5
    assert matrix.round().abs().eq(1).all()
    assert torch.equal(matrix.round() @ matrix.round().T, order * torch.eye(order, dtype=torch.float64))


def test_bases_are_the_smallest_that_fit():
    known = {1: 1, 2: 1, 64: 1, 12: 12, 96: 12, 40: 20, 56: 28, 72: 36, 88: 44, 104: 52, 120: 60, 144: 36, 200: 100}
    assert {order: hadamard_base(order) for order in known} == known
    assert [d for d in range(8, 257, 8) if not has_hadamard(d)] == [184, 232]  # 92 and 116 are Williamson's
    assert not has_hadamard(4 * 2039)  # 8156 = 4079·2 − 2 … larger than any base


@needs_compiler
@pytest.mark.parametrize("instruction_set", cpu.available_instruction_sets())
@pytest.mark.parametrize(("head_dim", "heads", "group"), [(72, 2, 2), (100, 1, 1), (30, 2, 0), (112, 3, 3), (88, 3, 1)])
def test_the_cpu_kernel_undoes_any_rotation(head_dim, heads, group, instruction_set):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (2, 21, heads * head_dim), generator=generator).byte()
    scale = torch.rand(2, 21, heads, generator=generator).half()
    zero = torch.randint(0, 4, (2, 21, heads), generator=generator).to(torch.int8)
    groups = torch.arange(heads * head_dim, dtype=torch.int32) // head_dim
    x = (codes.double() - zero.double()[..., groups.long()]) * scale.double()[..., groups.long()]
    if group:
        x = (x.unflatten(-1, (-1, group * head_dim)) @ hadamard_matrix(group * head_dim)).flatten(-2)
    expected = x.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    found = cpu.dequantize_blocks(
        pack_blocks(codes, scale, zero, 2), 21, 2, groups, head_dim, group * head_dim, instruction_set=instruction_set
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_the_fast_product_is_the_matrix():
    for order in (56, 72, 100, 144, 432):
        x = torch.randn(3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
        torch.testing.assert_close(rotate_channels(x, order), x @ hadamard_matrix(order).T, rtol=0, atol=1e-12)
    assert base_matrix(12)[0].eq(1).all()


def shaped(head_dim: int, heads: int) -> torch.nn.Module:
    options = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 16, "num_attention_heads": 2 * heads}
    return tiny_model("llama", **options, num_key_value_heads=heads, head_dim=head_dim, initializer_range=0.2)


def calibrated(model, preset: str, folder):
    """A file of random statistics, where the preset needs one."""
    kind = method_class(PRESETS[preset]).statistics_kind(PRESETS[preset])
    if kind is None:
        return None
    group = resolved_head_group(find_text_model(model), PRESETS[preset])
    model.name_or_path = "tiny"
    tensors = random_statistics(
        kind, CalibrationTarget("tiny", 1, model.config.num_key_value_heads, model.config.head_dim)
    )
    return save_statistics(folder / "s.safetensors", kind, tensors, {"model": "tiny", "head_group_num": group})


def decoded(model, config, file, backend, monkeypatch) -> torch.Tensor:
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    ids = torch.randint(3, 128, (2, 43), generator=torch.Generator().manual_seed(1))
    with patch_model(model, config, file), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([40, 1, 2], dim=1)], dim=1)


@needs_compiler
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_preset_gives_what_torch_gives(head_dim, heads, tmp_path, monkeypatch):
    """In float64, so that hardly a number sits on a rounding tie that the kernel's float32 would tip."""
    model = shaped(head_dim, heads).double()
    with torch.no_grad():
        stock = model(torch.randint(3, 128, (2, 43), generator=torch.Generator().manual_seed(1))).logits
    for preset, config in PRESETS.items():
        if (head_dim, heads) not in ((56, 2), (100, 2)) and preset not in (
            "QuaRot2",
            "TurboQuant2",
            "KVQuant2",
            "RotateKV3",
            "RotateKV2+",
        ):
            continue
        if config.method == "rotatekv_plus" and head_dim % 16:
            with pytest.raises(UserError, match=f"head_dim {head_dim} has others"):
                patch_model(model, config)
            continue
        if config.method == "kivi":  # the preset's groups of 32 values divide none of these heads
            config = told(model, config)
        file = calibrated(model, preset, tmp_path)
        kernel, general = (decoded(model, config, file, backend, monkeypatch) for backend in ("cpu", "reference"))
        assert kernel.isfinite().all(), preset
        assert (kernel - general).abs().mean() < 0.005 * stock.std(), preset
        if preset.endswith("4") and config.method != "kvquant":
            assert (general - stock).abs().mean() < 0.6 * stock.std(), preset


def told(model, config):
    """The config with what its refusal says."""
    with pytest.raises(UserError, match="v_groupsize 32 does not divide head_dim") as refusal:
        patch_model(model, config)
    return replace(config, v_groupsize=int(str(refusal.value).split("--v_groupsize ")[1].split()[0]))
