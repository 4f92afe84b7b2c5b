"""Each query sees its own recent window, however many tokens come in one call."""

from dataclasses import replace

import pytest
import torch
from conftest import left_padding, logits, tiny_model, token_ids
from kernel_cases import random_bands
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rotatekv import patch_model
from rotatekv.cache.cache import RotateKVCache
from rotatekv.cache.prefill import attend_in_pieces, attend_in_two
from rotatekv.cache.window import FlushedTokens, FlushPolicy, Window, WindowForm
from rotatekv.config import PRESETS
from rotatekv.kernels import cpu
from rotatekv.kernels.attention_parts import attend_to_bands_reference
from rotatekv.kernels.cpu import build

NO_SINKS = {"Attention_Sink_Aware": False}
CONFIGS = {
    "RotateKV2": replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, residual_length=9, **NO_SINKS),
    "RTN2": replace(PRESETS["RTN2"], residual_length=5),
    "KIVI2": replace(PRESETS["KIVI2"], k_groupsize=16, v_groupsize=16, residual_length=6),
    "KIVI2 without window": replace(PRESETS["KIVI2"], k_groupsize=8, v_groupsize=16, residual_length=0),
    "TurboQuant2": replace(PRESETS["TurboQuant2"], residual_length=7),
}


# Hugging Face's eager attention in float64 gives NaN for padding: its mask's −1.8e308 meets a float32 softmax.
@pytest.mark.parametrize("attention, padding", [("sdpa", 0), ("sdpa", 11), ("eager", 0)])
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_chunks_and_decoding_are_one(name, attention, padding, monkeypatch):
    """In float64 and torch alone, so that hardly a number is tipped over a rounding tie."""
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    monkeypatch.setattr("rotatekv.cache.prefill.QUERIES_AT_ONCE", 32)
    model, tokens = tiny_model("llama").double(), 62
    model.set_attn_implementation(attention)
    ids, mask, first = token_ids(2, tokens), left_padding(tokens, padding, 0), max(padding, 1) + 1
    with patch_model(model, CONFIGS[name]):
        decoded = logits(model, None, ids, (first, *[1] * (tokens - first)), mask)
    for chunks in ((tokens,), (20, 1, tokens - 21), (16, 16, 16, tokens - 48)):
        with patch_model(model, CONFIGS[name]):
            other = logits(model, None, ids, chunks, mask)
        difference = (other - decoded)[mask.bool()].abs()
        assert difference.median() < 1e-6 and difference.mean() < 1e-3


@pytest.mark.parametrize("new, length, packed", [(300, 0, 0), (40, 60, 32), (1, 60, 32), (5, 70, 64)])
def test_every_query_attends_as_if_it_were_the_last(new, length, packed):
    """Against one plain attention for each query, over keys put together by hand."""
    generator = torch.Generator().manual_seed(1)
    window, total = FlushPolicy(20, 16, packed), length + new
    exact, decoded = (torch.randn(2, 3, total, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.randn(2, 6, new, 8, generator=generator, dtype=torch.float64)
    hidden = torch.rand(2, 1, new, total, generator=generator) < 0.2  # the caller's mask, causal besides
    hidden |= torch.ones(new, total, dtype=torch.bool).triu(length + 1)
    hidden[..., 0] = False
    end = max((total - 20) // 16 * 16, packed)
    cached = torch.cat([decoded[:, :, :end], exact[:, :, end:]], dim=2)
    flushed = FlushedTokens(window, exact[:, :, packed:end], exact[:, :, packed:end])
    module = nn.Module()
    module.num_key_value_groups = 2
    for mask in (~hidden, torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -1e30)):
        got, _ = attend_in_pieces(sdpa_attention_forward, flushed, True, None, module, query, cached, cached, mask)
        for i in range(new):
            edge = max((length + i + 1 - 20) // 16 * 16, packed)
            seen = torch.cat([decoded[:, :, :edge], exact[:, :, edge:]], dim=2).repeat_interleave(2, dim=1)
            want = scaled_dot_product_attention(query[:, :, i : i + 1], seen, seen, ~hidden[:, :, i : i + 1])
            torch.testing.assert_close(got[:, i : i + 1], want.transpose(1, 2))


ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04}  # of sums of numbers about 1


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(
    "residual, step", [(0, 16), (0, 128), (16, 1), (32, 16), (32, 1), (100, 16), (9, 5), (100, 128)]
)
@pytest.mark.parametrize("new, length", [(1, 47), (33, 100), (300, 333), (600, 0)])
def test_flash_attention_and_a_band_are_the_pieces(residual, step, new, length, dtype):
    """Against the pieces in float64, of batches and of one to eight query heads for each of keys."""
    generator = torch.Generator().manual_seed(new)
    groups, batch = {1: 8, 5: 3}.get(step, 1 + new % 2), 1 + new % 3 % 2
    for already in (0, step):  # a crop may have left more tokens packed
        policy = FlushPolicy(
            residual, step, min(max(length - residual, 0) // step * step + already, length // step * step)
        )
        total, end = length + new, policy.packed_of(length + new)
        exact, decoded = torch.randn(2, 2, batch, 2, total, 16, generator=generator).to(dtype)  # keys and values
        query = torch.randn(batch, 2 * groups, new, 16, generator=generator).to(dtype)
        keys, values = torch.cat([decoded[..., :end, :], exact[..., end:, :]], dim=-2)
        old = exact[..., policy.packed : end, :]
        module = nn.Module()
        module.num_key_value_groups = groups
        in_pieces = FlushedTokens(policy, *old.double()), True, None, module
        heads = query.double(), keys.double(), values.double()
        want, _ = attend_in_pieces(sdpa_attention_forward, *in_pieces, *heads, None)
        got = attend_in_two(FlushedTokens(policy, *old), query, keys, values, 16**-0.5)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=ERRORS[dtype], rtol=0)


@pytest.mark.parametrize("instruction_set", cpu.available_instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, dim, queries", [(2, 16, 16), (6, 64, 16), (8, 48, 2), (16, 128, 19)])
def test_the_kernel_attends_to_bands_as_torch_does(heads, dim, queries, dtype, instruction_set):
    if build._load("bands", "portable") is None:
        pytest.skip("no g++")
    made = random_bands(torch.Generator().manual_seed(heads), heads, dim, queries, dtype)
    for older in (made["older"], None):
        step, (got, want) = {**made, "older": older}, torch.empty(2, 2, 3 * queries, heads, dim)
        cpu.attend_to_bands(**step, output=got, threads=2, instruction_set=instruction_set)
        wide = {"query": step["query"].float(), "heads": tuple(x.float() for x in step["heads"])}
        attend_to_bands_reference(**{**step, **wide}, output=want)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "message, change",
    [
        ("a column is not there", lambda x: {"bands": replace(x["bands"], columns=x["bands"].columns + 9)}),
        ("multiples of 16", lambda x: {"bands": replace(x["bands"], is_seen=x["bands"].is_seen[..., :8].contiguous())}),
        ("are not 3 blocks", lambda x: {"query": x["query"][:, :, 1:]}),
        ("is needed, not", lambda x: {"heads": (x["heads"][0], x["heads"][1][:, :, 1:])}),
        ("dense", lambda x: {"query": x["query"].mT.contiguous().mT}),
        ("is not read", lambda x: {"query": x["query"].double()}),
        ("multiple of 16", lambda x: random_bands(torch.Generator(), 4, 40, 16, torch.float32)),
    ],
)
def test_wrong_bands_are_refused(message, change):
    if not cpu.available():
        pytest.skip("no g++")
    made = random_bands(torch.Generator().manual_seed(1), 4, 64, 16, torch.float32)
    made |= change(made)
    with pytest.raises(ValueError, match=message):
        cpu.attend_to_bands(**made, output=torch.empty(made["query"].transpose(1, 2).shape))


def test_eager_weights_are_those_of_whole_tokens():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with patch_model(model, CONFIGS["KIVI2"]), torch.no_grad():
        weights = model(token_ids(2, 150), output_attentions=True).attentions[0]
    assert weights.shape[-2:] == (150, 150) and not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


def test_a_sliding_window_leaves_out_what_its_mask_hides():
    generator = torch.Generator().manual_seed(3)
    policy, new, length, window = FlushPolicy(20, 16, 32), 300, 60, 40
    keys, old = torch.randn(1, 2, length + new, 8, generator=generator), torch.randn(1, 2, 304, 8, generator=generator)
    query = torch.randn(1, 2, new, 8, generator=generator)
    mask = torch.ones(new, length + new, dtype=torch.bool).tril(length).triu(length + 1 - window)[None, None]
    seen, whole = [], []
    for most_seen, counts in ((window, seen), (None, whole)):

        def attend(module, query, key, value, mask, counts=counts):
            counts.append(key)
            return sdpa_attention_forward(module, query, key, value, mask)

        flushed = FlushedTokens(policy, old, old)
        counts.append(attend_in_pieces(attend, flushed, True, most_seen, nn.Module(), query, keys, keys, mask)[0])
    torch.testing.assert_close(seen.pop(), whole.pop())
    assert whole[-1].shape[2] - seen[-1].shape[2] == length + 256 + 1 - window  # before those of the last piece's first


def test_which_windows_differ():
    assert not FlushPolicy(0, 1).differs(10, 50)  # no window at all
    assert not FlushPolicy(4, 1).differs(10, 1) and FlushPolicy(4, 1).differs(10, 2)
    assert not FlushPolicy(4, 16).differs(20, 15) and FlushPolicy(4, 16).differs(20, 16)
    assert not FlushPolicy(4, 16, packed=64).differs(40, 20)  # cropped: as much stays packed


@pytest.mark.parametrize("quantize_prefill", [True, False])
def test_tokens_that_left_a_window_are_held_for_their_layers_turn_alone(quantize_prefill):
    """All layers' together would be the cache in full precision."""
    model, config, held = tiny_model(), replace(CONFIGS["KIVI2"], quantize_prefill=quantize_prefill), []
    with patch_model(model, config), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        first, second = cache.layers
        model.model.layers[1].register_forward_pre_hook(lambda *args: held.append(first.flushed))
        for ids in token_ids(1, 90).split((60, 30), dim=1):
            model(ids, past_key_values=cache)
    assert held == [None, None] and first.packed.length == second.packed.length == 80


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim, group", [(64, 32), (56, 8), (16, 16)])
def test_eight_bits_round_to_the_largest_of_a_group(dtype, dim, group):
    """An outlier costs only those beside it; zeros stay zeros, the largest numbers finite."""
    x = torch.randn(2, 3, 7, dim)
    x[0, 0, 0, 3], x[0, 0, 1], x[0, 0, 2] = 1e4, 0.0, 6.5e4
    got = Window.of(x, x, None, WindowForm(dtype, 8, 8)).keys
    assert got.dtype == dtype and got.isfinite().all()
    largest = x.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, -1, group).flatten(-2)
    bound = largest * (0.51 / 127 + 2 * torch.finfo(dtype).eps) + 1e-6
    assert ((got.float() - x).abs() <= bound).all()
    assert (got.float() - x)[0, 0, 0, group:].abs().max() < 0.05 if dim > group else True
    held = Window.of(x, x, None, WindowForm(dtype, 8, 8)).held
    assert sum(part.nbytes for part in held.values()) == 2 * x.numel() * (1 + 2 / group)
