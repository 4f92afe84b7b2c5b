"""Which calls the fused kernel decodes, and that it gives what the general path gives."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import left_padding, logits, random_order, save_reorder_indices, tiny_model, token_ids

from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model
from rotatekv.kernels import cpu, triton

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")

CPU = torch.device("cpu")
PLAIN = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)
KIVI = replace(PRESETS["KIVI2"], k_groupsize=16, v_groupsize=16, residual_length=6)
CONFIGS = {
    "RotateKV2": PLAIN,
    "RotateKV3": replace(PLAIN, k_bits=3, v_bits=3),
    "RotateKV4, window": replace(PLAIN, k_bits=4, v_bits=4, residual_length=6),
    "K4 V2, no sinks": replace(PLAIN, k_bits=4, Attention_Sink_Aware=False),
    "after RoPE": replace(PLAIN, Grouped_Head_Key_Rotation=False),
    "RTN2": PRESETS["RTN2"],
    "RTN3, window": replace(PRESETS["RTN3"], residual_length=3),
    "QuaRot2": PRESETS["QuaRot2"],
    "QuaRot3": PRESETS["QuaRot3"],
    "KIVI2": KIVI,
    "KIVI4": replace(PRESETS["KIVI4"], v_groupsize=16, residual_length=3),
    "KIVI K3 V4, sinks, no window": replace(KIVI, k_bits=3, v_bits=4, residual_length=0, Attention_Sink_Aware=True),
}


@pytest.fixture
def calls(monkeypatch) -> list:
    """The number of query tokens of every call of the kernel."""
    seen, kernel = [], cpu.decode_attention

    def counting(query, *args):
        seen.append(query.shape[2])
        return kernel(query, *args)

    monkeypatch.setattr(cpu, "decode_attention", counting)
    return seen


def decoded(model, config: QuantConfig, chunks: tuple[int, ...], rows: int = 1, mask: torch.Tensor | None = None):
    """(B, T, V) logits of a text fed in ``chunks`` through one cache."""
    with patch_model(model, config):
        return logits(model, None, token_ids(rows, sum(chunks)), chunks, mask)


def fused_calls(config: QuantConfig, start: int, chunks: tuple[int, ...], packed: int = 0) -> list[int]:
    """The chunks that the kernel attends to: those that leave one recent window to all of their tokens."""
    group, window = config.k_groupsize if config.method == "kivi" else 1, config.residual_length
    fused = []
    for length in chunks:
        seen = [max((n - window) // group * group, packed, 0) for n in (start + 1, start + length)]
        if packed and (seen[0] == seen[1] or (window == 0 and group == 1)):
            fused += [length] * 2  # layers
        start, packed = start + length, seen[1]
    return fused


FAMILIES = ("mistral", "qwen2", "qwen3", "phi3")  # more of them in test_families.py


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in CONFIGS), *product(FAMILIES, ("RotateKV2", "KIVI2"))]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_decoded_logits_are_those_of_the_general_path(family, name, rows, calls, monkeypatch):
    """In float64, so that hardly a number sits on a rounding tie that the kernel's float32 would tip."""
    model, mask = tiny_model(family).double(), left_padding(62, *((7, 0, 19) if rows > 1 else (0,)))
    chunks = (35, 1, 1, 5, 16, 1, 1, 2)
    fused = decoded(model, CONFIGS[name], chunks, rows, mask)
    has_window = CONFIGS[name].method == "kivi" or CONFIGS[name].residual_length
    alone = (7, 0, 19) if rows > 1 and has_window else (0,)  # padded rows, each attended to alone
    expected = [n for left in alone for n in fused_calls(CONFIGS[name], 0, (chunks[0] - left, *chunks[1:]))]
    assert sorted(calls) == sorted(expected) and expected.count(1) >= 8
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    general = decoded(model, CONFIGS[name], chunks, rows, mask)
    assert len(calls) == len(expected)
    difference = (fused - general)[mask.bool()].abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * general.std()


def test_reordered_keys_are_read_in_their_order(tiny, calls, tmp_path, monkeypatch):
    path = save_reorder_indices(tmp_path / "order.safetensors", random_order(), {"head_group_num": 3})
    tiny.name_or_path = "tiny"
    config, results = replace(PRESETS["RotateKV4"], residual_length=4), {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_model(tiny.double(), config, path), torch.no_grad():
            cache = RotateKVCache.for_model(tiny)
            tiny(token_ids(2, 30), past_key_values=cache)
            results[backend] = [tiny(token_ids(2, 1, step), past_key_values=cache).logits for step in range(6)]
    assert len(calls) == 12
    fused, general = (torch.cat(results[backend]) for backend in ("cpu", "reference"))
    assert (fused - general).abs().median() < 5e-4 and (fused - general).abs().mean() < 0.005 * general.std()


@pytest.mark.parametrize("left", [40, 33, 32, 21, 16])
@pytest.mark.parametrize("name", ["KIVI2", "KIVI4"])
def test_cut_groups_of_keys_are_decoded_from_the_window(name, left, tiny, calls, monkeypatch):
    """41 tokens, cut to ``left``: the first tokens of a cut group are exact tokens of the kernel, as is the window."""
    results = {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        with patch_model(tiny.double(), CONFIGS[name]), torch.no_grad():
            cache = RotateKVCache.for_model(tiny)
            tiny(token_ids(2, 41), past_key_values=cache)
            cache.crop(left - 41)
            packed = cache.layers[0].packed.length
            results[backend] = [tiny(token_ids(2, n, n), past_key_values=cache).logits for n in (1, 7, 1, 16)]
            assert cache.layers[0].packed.length > 0
    expected = fused_calls(CONFIGS[name], left, (1, 7, 1, 16), packed)
    assert calls == expected and len(expected) >= (4 if packed else 0)  # with nothing packed, torch attends
    fused, general = (torch.cat(results[backend], dim=1) for backend in ("cpu", "reference"))
    assert (fused - general).abs().median() < 5e-4 and (fused - general).abs().mean() < 0.005 * general.std()


READ = CONFIGS | {
    "K4 V2, groups of 8": replace(PLAIN, k_bits=4, k_groupsize=8, v_groupsize=8),
    "long window": replace(PLAIN, residual_length=400),
    "reordered, window": replace(PRESETS["RotateKV3"], residual_length=5),
}


@pytest.mark.parametrize("name", READ)
def test_a_prefill_reads_its_blocks_with_a_kernel(name, tiny, tmp_path, monkeypatch):
    """The same keys and values as the general path reads from the same cache, sinks and window among them."""
    reads, kernel = [], cpu.dequantize_blocks
    monkeypatch.setattr(cpu, "dequantize_blocks", lambda *a, **b: reads.append(a[1]) or kernel(*a, **b))
    path = save_reorder_indices(tmp_path / "order.safetensors", random_order(), {"head_group_num": 3})
    tiny.name_or_path = "tiny"
    with patch_model(tiny, READ[name], path if READ[name].Outlier_Aware_Key_Rotation else None), torch.no_grad():
        cache = RotateKVCache.for_model(tiny)
        tiny(token_ids(2, 30), past_key_values=cache)
        tiny(token_ids(2, 21, 1), past_key_values=cache)
    group = READ[name].k_groupsize if READ[name].method == "kivi" else 1
    packed = [max(tokens - READ[name].residual_length, 0) // group * group for tokens in (30, 51)]
    assert reads == [tokens for tokens in packed for _ in range(4) if tokens]
    for layer in cache.layers:
        mine_and_general = []
        for backend in ("cpu", "reference"):
            monkeypatch.setenv("ROTATEKV_BACKEND", backend)
            mine_and_general.append(layer.read())
        for mine, general in zip(*mine_and_general, strict=True):
            assert mine.shape == general.shape == (2, 3, 51, 16)
            torch.testing.assert_close(mine, general, rtol=0, atol=1e-6 * general.abs().max().item())


def test_the_reference_backend_reads_without_the_kernel(tiny, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    monkeypatch.setattr(cpu, "dequantize_blocks", lambda *args, **options: pytest.fail("the kernel was called"))
    decoded(tiny, PLAIN, (30, 21))


def generated(model, **options) -> torch.Tensor:
    return model.generate(token_ids(1, 20), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


def test_generate_decodes_with_the_kernel_and_prompt_lookup_too(tiny, calls):
    with patch_model(tiny, PLAIN):
        generated(tiny)
        assert calls == [1] * 8
        calls.clear()
        repeated = token_ids(1, 5).repeat(1, 4)
        tiny.generate(repeated, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
        assert max(calls) > 1


@pytest.mark.parametrize(
    "case",
    [
        "reference backend",
        "eager",
        "17 tokens",
        "prefill",
        "FP16",
        "gradients",
        "a hole",
        "right padding",
        "odd positions",
        "4-D mask",
        "KIVI, groups of 10",
        "KIVI, all in the window",
        "KIVI, Triton",
    ],
)
def test_calls_that_the_kernel_does_not_know_take_the_general_path(case, calls, monkeypatch):
    model = tiny_model(attn_implementation="eager" if case == "eager" else "sdpa")
    if case == "reference backend":
        monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    length, inputs = (17 if case == "17 tokens" else 2), {}
    mask = torch.ones(1, 20 + length, dtype=torch.long)
    if case == "a hole":
        mask[0, 5] = 0
    if case == "right padding":
        mask[0, -1] = 0
    if case in ("a hole", "right padding"):
        inputs["attention_mask"] = mask
    if case == "4-D mask":
        inputs["attention_mask"] = mask[:, None, None, :].bool().expand(1, 1, length, -1)
    if case == "odd positions":
        inputs["position_ids"] = torch.tensor([[40, 41]])
    config = {
        "FP16": "FP16",
        "KIVI, groups of 10": replace(KIVI, k_groupsize=10, residual_length=0),
        "KIVI, all in the window": replace(KIVI, residual_length=22),
        "KIVI, Triton": replace(KIVI, residual_length=0),
    }.get(case, PLAIN)
    if case == "KIVI, Triton":
        monkeypatch.setattr(cpu, "READS_TOKEN_GROUPS", triton.READS_TOKEN_GROUPS)
    with patch_model(model, config), torch.set_grad_enabled(case == "gradients"):
        cache = RotateKVCache.for_model(model)
        model(token_ids(1, 20), past_key_values=cache)
        if case != "prefill":
            model(token_ids(1, length), past_key_values=cache, **inputs)
    assert calls == []


def test_an_unknown_backend_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "fpga")
    with pytest.raises(UserError, match="ROTATEKV_BACKEND=fpga"), patch_model(tiny, PLAIN):
        tiny(token_ids(1, 4))


def test_without_a_compiler_torch_decodes_after_one_warning(tiny, monkeypatch, tmp_path):
    """A compiler that is not there, an empty build cache: the same numbers, one warning."""
    from rotatekv.kernels.cpu import build

    want = decoded(tiny, PLAIN, (20, 1, 1))
    build._load.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("ROTATEKV_CACHE_DIR", str(tmp_path / "empty"))
    try:
        with pytest.warns(RuntimeWarning, match="torch is") as caught:
            got = decoded(tiny, PLAIN, (20, 1, 1))
    finally:
        build._load.cache_clear()
    assert 1 <= sum("torch is" in str(warning.message) for warning in caught) <= 2  # one per library
    assert (got - want).abs().median() < 1e-3


@pytest.mark.parametrize(("variable", "value"), [("ROTATEKV_CPU_KERNEL", "off"), ("CXX", "/nowhere/g++")])
def test_the_cpu_backend_asked_for_but_not_built_is_one_line(variable, value, tiny, monkeypatch, tmp_path):
    from rotatekv.kernels.cpu import build

    monkeypatch.setenv("ROTATEKV_BACKEND", "cpu")
    monkeypatch.setenv("ROTATEKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    build._load.cache_clear(), build.chosen_instruction_set.cache_clear()  # read once
    try:
        with warnings.catch_warnings(), pytest.raises(UserError, match="=cpu needs g"), patch_model(tiny, PLAIN):
            warnings.simplefilter("ignore")
            tiny(token_ids(1, 4))
    finally:
        build._load.cache_clear(), build.chosen_instruction_set.cache_clear()


def test_rope_tables_grow_with_the_sequence_and_are_shared(tiny):
    with patch_model(tiny, PLAIN) as handle:
        first = handle.rope.kernel_tables(None, 10, CPU)
        assert handle.rope.kernel_tables(None, 4096, CPU) is first
        longer = handle.rope.kernel_tables(None, 4097, CPU)
        assert longer.positions >= 8194 and handle.rope.kernel_tables(None, 10, CPU) is longer
        cos, _ = longer.at(torch.tensor([8000]), torch.float64)
        exact = torch.cos(8000 * tiny.model.rotary_emb.inv_freq.double())
        torch.testing.assert_close(cos[0], exact, atol=1e-6, rtol=0)


def scale_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(0.25)


def exchange_data(model):
    model.model.rotary_emb.inv_freq.data.copy_(model.model.rotary_emb.inv_freq * 0.25)


def exchange_buffer(model):
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq * 0.25, persistent=False)


def exchange_module(model):
    model.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    scale_in_place(model)


def scale_attention(model):
    model.model.rotary_emb.attention_scaling = 1.5


def round_to_bfloat16(model):
    model.model.rotary_emb.to(torch.bfloat16)


CHANGES = (scale_in_place, exchange_data, exchange_buffer, exchange_module, scale_attention, round_to_bfloat16)


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernels_rope_follows_the_models(change, calls, monkeypatch):
    config, results = replace(PLAIN, k_bits=4, v_bits=4), {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        model = tiny_model().double()
        with patch_model(model, config), torch.no_grad():
            cache = RotateKVCache.for_model(model)
            model(token_ids(1, 300), past_key_values=cache)
            before = model(token_ids(1, 1), past_key_values=cache).logits
            change(model)
            results[backend] = model(token_ids(1, 1), past_key_values=cache).logits
            assert not torch.allclose(results[backend], before, atol=0.1)
    assert calls == [1] * 4
    torch.testing.assert_close(results["cpu"], results["reference"], rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["FP16", "RTN4", "KIVI4", "RotateKV4, window"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_goes_on_when_the_models_dtype_changes(name, backend, tiny, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    config = CONFIGS.get(name) or PRESETS[name]
    with patch_model(tiny, config), torch.no_grad():
        cache = RotateKVCache.for_model(tiny)
        tiny(token_ids(2, 40), past_key_values=cache)
        want = tiny(token_ids(2, 3, 1), past_key_values=copy.deepcopy(cache)).logits
        tiny.to(torch.bfloat16)
        got = tiny(token_ids(2, 3, 1), past_key_values=cache).logits
    assert got.dtype == torch.bfloat16 and (got.float() - want).abs().mean() < 0.2 * want.std()
