"""A row of a padded batch is that row alone, a packed document is that document alone, and a caller's mask decides."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
from conftest import left_padding, logits, tiny_model, token_ids

from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model
from rotatekv.cache.cache import _token_mask
from rotatekv.methods import KVMethod, LayerGeometry
from rotatekv.methods.rtn import RTN
from rotatekv.patching.patch import patch_with_methods

STEPPED = ("FP16", "RTN2", "KIVI2", "QuaRot2", "TurboQuant2", "KVQuant2", "RotateKV2", "RotateKV2+")  # one a method
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def small(name: str) -> QuantConfig:
    """A preset; KIVI's with groups and a window for heads of 16 channels and short texts."""
    kivi = {"k_groupsize": 16, "v_groupsize": 16, "residual_length": 20}
    return replace(PRESETS[name], **kivi) if name.startswith("KIVI") else PRESETS[name]


def padded(rows: int, tokens: int, padding: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return token_ids(rows, tokens), left_padding(tokens, *padding)


def named(model) -> torch.nn.Module:
    model.name_or_path = "tiny"
    return model.double()


@pytest.fixture
def torch_alone(monkeypatch):
    """In float64 and torch alone, no number is tipped over a rounding tie."""
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")


# --- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_rows_of_a_padded_batch_are_those_rows_alone(name, statistics, torch_alone):
    model, config, padding, prompt = named(tiny_model()), small(name), (21, 0, 4), 70
    steps = 20 if name in STEPPED else 3
    ids, mask = padded(3, prompt + steps, padding)
    with patch_model(model, config, statistics(config)):
        batch = logits(model, None, ids, (prompt,) + (1,) * steps, mask)
        for row, left in enumerate(padding):
            alone = logits(model, None, ids[row : row + 1, left:], (prompt - left,) + (1,) * steps)
            torch.testing.assert_close(batch[row : row + 1, left:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_attention_groups_from_the_first_token(family, attention, torch_alone):
    """Chunks with a row that is all padding at first, and a crop into a group; eager gives weights, float32 for it."""
    model, config = tiny_model(family, attn_implementation=attention), small("KIVI4")
    ids, mask = padded(3, 60, (13, 0, 4))
    with patch_model(model, config), torch.no_grad():
        batch = logits(model, None, ids, (9, 40, 8, 1, 1, 1), mask)
        for row, left, chunks in ((0, 13, (36, 8, 1, 1, 1)), (1, 0, (9, 40, 8, 1, 1, 1)), (2, 4, (5, 40, 8, 1, 1, 1))):
            alone = logits(model, None, ids[row : row + 1, left:], chunks)
            difference = (batch[row : row + 1, left:] - alone).abs()
            assert difference.median() < 1e-4 and difference.mean() < 0.01 * alone.std()


@pytest.mark.parametrize("name", ["RotateKV2", "KVQuant2"])
def test_a_row_that_is_all_padding_at_first_gets_its_sinks_later(name, statistics, torch_alone):
    model, config = named(tiny_model()), small(name)
    ids, mask = padded(2, 60, (13, 0))
    with patch_model(model, config, statistics(config)):
        batch = logits(model, None, ids, (9, 40, 10, 1), mask)
        torch.testing.assert_close(batch[:1, 13:], logits(model, None, ids[:1, 13:], (36, 10, 1)), rtol=0, atol=1e-6)
        torch.testing.assert_close(batch[1:], logits(model, None, ids[1:], (9, 40, 10, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["KIVI2", "RotateKV2+", "RotateKV2"])
def test_crops_beams_and_later_padding_keep_rows_as_they_are_alone(name, statistics, torch_alone):
    model, config, left = named(tiny_model()), small(name), 13
    ids, mask = padded(2, 90, (left, 0))

    def run(rows, mask, first, later):
        """60 tokens from ``first`` on, the last 11 of them dropped, and 30 more from ``later`` on."""
        cache, ids_of = RotateKVCache.for_model(model), ids[rows]
        kept = torch.cat([mask[:, first:49], mask[:, 60 + later :]], 1)
        for tokens, seen in ((ids_of[:, first:60], mask[:, first:60]), (ids_of[:, 60 + later :], kept)):
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=seen, position_ids=positions, past_key_values=cache)
            if seen is not kept:
                cache.crop(-11)
        return cache, out.logits[:, -1]

    with patch_model(model, config, statistics(config)), torch.no_grad():
        mask[1, 60:64] = 0  # padding in a later call, of the row that had none
        cache, batch = run([0, 1], mask, 0, 0)
        _, first = run([0], torch.ones_like(mask[:1]), left, 0)
        _, second = run([1], torch.ones_like(mask[:1]), 0, 4)
        torch.testing.assert_close(batch, torch.cat([first, second]), rtol=0, atol=1e-6)
        assert cache.get_seq_length() == 79 and cache.positions.shape == (2, 79)
        assert cache.nbytes() == sum(x.numel() * x.element_size() for x in cache.tensors())
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        more = torch.cat([torch.cat([mask[:, :49], mask[:, 60:]], 1), torch.ones(2, 1, dtype=torch.long)], 1)[[1, 1, 0]]
        positions = more.sum(1, keepdim=True) - 1
        moved = model(ids[[1, 1, 0], :1], attention_mask=more, position_ids=positions, past_key_values=cache).logits
        assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("done", [(), (30, 1)], ids=["first call", "third call"])
def test_a_call_of_padded_rows_that_fails_can_be_made_again(done, layer, torch_alone):
    model, chunks = named(tiny_model()), (*done, 20, 1)
    ids, mask = padded(2, sum(chunks), (7, 0))

    def step(cache, start, length):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start : start + length]
        inputs = {"attention_mask": mask[:, : start + length], "position_ids": positions}
        return model(ids[:, start : start + length], past_key_values=cache, **inputs).logits

    def fail(*_):
        raise KeyboardInterrupt

    with patch_model(model, small("KIVI2")), torch.no_grad():
        want, cache = logits(model, None, ids, chunks, mask), RotateKVCache.for_model(model)
        for start, length in zip((0, 30), done, strict=False):
            step(cache, start, length)
        hook = model.model.layers[layer].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            step(cache, sum(done), 20)
        hook.remove()
        assert cache.get_seq_length() == sum(done)
        got = torch.cat([step(cache, sum(done), 20), step(cache, sum(done) + 20, 1)], 1)
    torch.testing.assert_close(got, want[:, sum(done) :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["KIVI2", "RotateKV2+"])
def test_the_fused_kernels_decode_padded_rows_as_torch_does(name, statistics, monkeypatch):
    ids, mask = padded(3, 76, (21, 0, 4))
    found = {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("ROTATEKV_BACKEND", backend)
        model, config = named(tiny_model()), small(name)
        with patch_model(model, config, statistics(config)):
            found[backend] = logits(model, None, ids, (60,) + (1,) * 16, mask)[mask.bool()]
    difference = (found["cpu"] - found["reference"]).abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * found["reference"].std()


@pytest.mark.parametrize("name", ["KIVI2", "RotateKV2+", "RotateKV2"])
def test_generate_gives_each_row_of_a_padded_batch_its_own_text(name, statistics, torch_alone):
    model, config = named(tiny_model()), small(name)
    ids, mask = padded(2, 40, (9, 0))
    ids[0, :9] = 0
    for options in ({}, {"num_beams": 3}):
        with patch_model(model, config, statistics(config)):
            options |= {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
            both = model.generate(ids, attention_mask=mask, **options)[:, 40:]
            first, second = model.generate(ids[:1, 9:], **options)[:, 31:], model.generate(ids[1:], **options)[:, 40:]
        assert torch.equal(both, torch.cat([first, second]))


# --- packed batches ------------------------------------------------------------------------------------------------


LENGTHS = ((31, 1, 40), (50, 22))


def packed_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = token_ids(2, 72)
    return ids, torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])


def documents_alone(model, ids) -> torch.Tensor:
    rows = [torch.cat([model(x).logits for x in row[None].split(n, 1)], 1) for row, n in zip(ids, LENGTHS, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("name", PRESETS)
def test_packed_documents_are_those_documents_alone(name, statistics, torch_alone):
    """Sinks, windows and groups included."""
    model, config = named(tiny_model()), small(name)
    ids, positions = packed_batch()
    with patch_model(model, config, statistics(config)), torch.no_grad():
        alone = documents_alone(model, ids)
        for use_cache in (False, True):
            out = model(ids, position_ids=positions, use_cache=use_cache)
            torch.testing.assert_close(out.logits, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batches_of_every_family_are_the_stock_models(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    ids, positions = packed_batch()
    options = {"position_ids": positions, "use_cache": False, "output_attentions": attention == "eager"}
    with torch.no_grad():
        stock = model(ids, **options)
        with patch_model(model, "FP16"):
            ours = model(ids, **options)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=2e-4)
    if attention == "eager":
        for a, b in zip(ours.attentions, stock.attentions, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_cache_that_a_packed_batch_filled_says_that_it_cannot_go_on(tiny):
    ids, positions = packed_batch()
    with patch_model(tiny, "RTN2"), torch.no_grad():
        cache = tiny(ids, position_ids=positions).past_key_values
        assert cache.get_seq_length() == 72 and cache.nbytes() > 0
        with pytest.raises(UserError, match="position_ids that restart"):
            tiny(ids[:, :1], past_key_values=cache)
        cache.reset()
        tiny(ids[:, :1], past_key_values=cache)


def test_positions_that_do_not_restart_are_no_packed_batch(tiny):
    """As in transformers: a mask, a cache handed in, or positions that only skip some while the cache is kept."""
    ids, positions = token_ids(1, 12), torch.cat([torch.arange(5), torch.arange(9, 16)])[None]
    restart = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        for options in (
            {"position_ids": positions},
            {"position_ids": positions, "use_cache": False},
            {"position_ids": restart, "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        ):
            stock = tiny(ids, **options).logits
            with patch_model(tiny, "FP16"):
                torch.testing.assert_close(tiny(ids, **options).logits, stock, rtol=1e-4, atol=2e-4)
        with patch_model(tiny, "FP16"):
            cache = RotateKVCache.for_model(tiny)
            tiny(ids, position_ids=restart, past_key_values=cache)
            assert cache.parts is None


# --- a caller's own mask ---------------------------------------------------------------------------------------------


def own_masks(tokens: int) -> dict[str, torch.Tensor]:
    """(B, 1 or H, T, T) bool: a prefix that sees itself whole, blocks, a tree, one mask a head."""
    causal, block = torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.arange(tokens) // 13
    prefix = causal | (torch.arange(tokens) < 20)
    tree = causal.clone()
    tree[30:, 10:24], tree[24:30, 5:9] = False, False
    heads = torch.stack([causal, prefix, tree] * 2)
    named = {"prefix": prefix, "blocks": block[:, None] == block, "tree": tree, "heads": heads[None]}
    return {name: x if x.dim() == 4 else x.expand(2, 1, -1, -1) for name, x in named.items()}


def added(mask: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


class Kept(RTN):
    """Packs numbers as they are, so that only the recent window's 16 bits set it apart from the stock model."""

    key_format = value_format = None
    key_store = value_store = KVMethod.key_store

    def encode_keys(self, channels):
        return {"raw": channels}

    def decode_keys(self, tokens):
        return tokens["raw"]

    encode_values, decode_values = encode_keys, decode_keys


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["prefix", "blocks", "tree", "heads"])
def test_the_mask_decides_what_is_seen_whatever_the_window(name, attention):
    model, config = tiny_model(attn_implementation=attention), replace(PRESETS["RTN2"], residual_length=5)
    ids, mask = token_ids(2, 50), own_masks(50)[name]
    methods = [Kept(config, LayerGeometry(layer, 3, 16)) for layer in range(2)]
    kinds = [added(mask, torch.finfo(torch.float32).min), added(mask, -torch.inf)]
    for given in kinds + ([mask] if attention == "sdpa" else []):
        with torch.no_grad():
            stock = model(ids, attention_mask=given).logits
            with patch_with_methods(model, config, methods):
                ours = model(ids, attention_mask=given).logits
                cache = RotateKVCache.for_model(model)
                first = model(ids[:, :30], attention_mask=given[:, :, :30, :30], past_key_values=cache).logits
                then = model(ids[:, 30:], attention_mask=given[:, :, 30:], past_key_values=cache).logits
        assert (ours - stock).abs().max() < 0.02 * stock.std()
        if not mask.triu(1).any():  # else the first chunk's tokens see some that are not there yet
            assert (torch.cat([first, then], 1) - stock).abs().max() < 0.02 * stock.std()


@pytest.mark.parametrize("name", ["KIVI2", "RotateKV2+", "RTN2"])
def test_a_causal_mask_given_as_four_dimensions_changes_nothing(name, statistics, torch_alone):
    model, config = named(tiny_model()), replace(small(name), residual_length=6)
    ids, mask = token_ids(2, 60), own_masks(60)["tree"]
    causal = torch.ones_like(mask).tril()
    with patch_model(model, config, statistics(config)), torch.no_grad():
        plain, given = model(ids).logits, model(ids, attention_mask=causal).logits
        torch.testing.assert_close(given, plain, rtol=0, atol=1e-6)
        assert not torch.allclose(model(ids, attention_mask=mask).logits, plain)


def test_a_mask_in_a_dict_is_that_mask(torch_alone):
    model, ids, mask = named(tiny_model("qwen2")), token_ids(2, 50), own_masks(50)["prefix"]
    with patch_model(model, small("KIVI2")), torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask={"full_attention": mask}).logits, want)
        causal = model(ids, attention_mask={"full_attention": None}).logits
        torch.testing.assert_close(causal, model(ids).logits)
        assert not torch.allclose(causal, want)


@pytest.mark.parametrize("name", ["RTN2", "RotateKV2", "KIVI2"])
def test_a_callers_mask_of_all_tokens_where_a_window_has_slid(name, torch_alone):
    model, config = families.FAMILIES["gemma3"].build().double(), small(name)
    config = replace(config, Outlier_Aware_Key_Rotation=False, residual_length=6)
    ids, got = families.token_ids(2, 56), []
    with patch_model(model, config), torch.no_grad():
        cache = RotateKVCache.for_model(model)
        for start, stop in ((0, 50), (50, 55), (55, 56)):
            query, key = torch.arange(start, stop)[:, None], torch.arange(stop)
            seen = (key <= query)[None, None].expand(2, -1, -1, -1)
            masks = {"full_attention": seen, "sliding_attention": seen & (query - key < families.WINDOW)}
            got.append(model(ids[:, start:stop], attention_mask=masks, past_key_values=cache).logits)
        assert cache.layers[0].dropped
        torch.testing.assert_close(torch.cat(got, 1), logits(model, None, ids, (50, 5, 1)), rtol=0, atol=1e-9)


def test_sdpa_told_not_to_be_causal_sees_all_tokens_whatever_the_window(tiny):
    config = replace(PRESETS["RTN2"], residual_length=5)
    methods = [Kept(config, LayerGeometry(layer, 3, 16)) for layer in range(2)]
    with torch.no_grad():
        stock = tiny(token_ids(2, 50), is_causal=False).logits
        with patch_with_methods(tiny, config, methods):
            ours = tiny(token_ids(2, 50), is_causal=False).logits
        assert (ours - stock).abs().max() < 0.02 * stock.std()
        assert not torch.allclose(stock, tiny(token_ids(2, 50)).logits)


def test_padding_in_a_mask_of_any_kind():
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool).tril(2)
    mask[0, :, :, :3] = False
    want = torch.tensor([[False, True, True, True], [True] * 4])
    slopes = -8.0 * (1 + (torch.arange(2, 6)[:, None] - torch.arange(6)).abs())
    kinds = [added(mask, hidden) for hidden in (-1e4, -torch.inf, torch.finfo(torch.float32).min)]
    for given in (mask, *kinds, added(mask, -6e4).half(), slopes + added(mask, -1e9)):
        assert torch.equal(_token_mask(given, 2, (2, 6)), want)
