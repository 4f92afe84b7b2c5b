"""Generation on the quantized cache: the stock model's outputs under FP16, and the same operations under RotateKV2.

The RotateKV2 models are float64, so that rounding of the matmuls (which differs between batch shapes) does not push a
number over a quantization boundary: what must be equal then is.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import save_reorder_indices, tiny_model, token_ids

from rotatekv import PRESETS, RotateKVCache, patch_model

TOKENS = 10


def repetitive_ids() -> torch.Tensor:
    """A prompt that repeats, so that prompt lookup has something to propose."""
    return token_ids(1, 5, 7).repeat(1, 4)


def varied_ids() -> torch.Tensor:
    """A prompt of all tokens, so that prompt lookup always has something to propose."""
    return torch.randperm(125, generator=torch.Generator().manual_seed(3)).unsqueeze(0) + 3


def left_padded(lengths: tuple[int, ...] = (5, 12, 9)) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = token_ids(1, length, row + 1)[0], 1
    return ids, mask.long()


def generate(model, ids, seed: int = 0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))  # else generate masks every pad token it finds
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


STRATEGIES = {
    "greedy": {},
    "beam 3": {"num_beams": 3},
    "beam 3, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sampling, three returned": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_fp16_generates_what_the_stock_model_generates(strategy, rows, tiny):
    stock = generate(tiny, token_ids(rows, 14), **STRATEGIES[strategy])
    with patch_model(tiny, "FP16"):
        ours = generate(tiny, token_ids(rows, 14), **STRATEGIES[strategy])
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-4)


def test_fp16_generates_what_the_stock_model_generates_in_every_family(any_family):
    ids, mask = left_padded()
    stock = generate(any_family, ids, attention_mask=mask)
    with patch_model(any_family, "FP16"):
        ours = generate(any_family, ids, attention_mask=mask)
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-4)


def test_fp16_prompt_lookup_crops_the_cache_as_the_stock_model_does(tiny, monkeypatch):
    cropped = []
    crop = RotateKVCache.crop
    monkeypatch.setattr(RotateKVCache, "crop", lambda self, n: (cropped.append(n), crop(self, n))[1])
    stock = generate(tiny, repetitive_ids(), prompt_lookup_num_tokens=3)
    with patch_model(tiny, "FP16"):
        ours = generate(tiny, repetitive_ids(), prompt_lookup_num_tokens=3)
    assert min(cropped) < 0, "nothing was proposed and rejected"
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["greedy", "beam 3"])
def test_fp16_left_padded_rows_equal_the_single_rows(strategy, any_family):
    assert_rows_equal_singles(any_family, "FP16", strategy)


def test_fp16_a_conversation_on_one_cache_equals_the_stock_models(tiny):
    stock, _ = conversation(tiny, None)
    with patch_model(tiny, "FP16"):
        ours, cache = conversation(tiny, RotateKVCache.for_model(tiny))
    assert torch.equal(ours, stock)
    assert cache.get_seq_length() == ours.shape[1] - 1


# --- RotateKV2 ---------------------------------------------------------------------------------------------------


ROTATEKV2 = replace(PRESETS["RotateKV2"], num_sink_entries=6)


def double_model(family: str = "llama"):
    return tiny_model(family).double()


def patch_calibrated(model, folder, config=ROTATEKV2):
    """The preset as it is, with reorder indices made for this model."""
    model.name_or_path = "org/Tiny"
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(48, generator=generator) for _ in range(2)])
    metadata = {"model": "org/Tiny", "head_group_num": 3}
    return patch_model(model, config, save_reorder_indices(folder / "tiny.safetensors", order, metadata))


def assert_rows_equal_singles(model, config, strategy, folder=None) -> None:
    ids, mask = left_padded()
    options = STRATEGIES[strategy]
    with patch_model(model, config) if folder is None else patch_calibrated(model, folder, config):
        batch = generate(model, ids, attention_mask=mask, **options)
        for row in range(3):
            single = generate(model, ids[row : row + 1, mask[row].bool()], **options)
            assert torch.equal(batch.sequences[row, -TOKENS:], single.sequences[0, -TOKENS:])
            if strategy == "greedy":
                got = torch.stack(batch.logits)[:, row]
                torch.testing.assert_close(got, torch.stack(single.logits)[:, 0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strategy", ["greedy", "beam 3"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_left_padded_rows_equal_the_single_rows(family, strategy, tmp_path):
    assert_rows_equal_singles(double_model(family), ROTATEKV2, strategy, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"residual_length": 4}, {"quantize_prefill": False}, {"Attention_Sink_Aware": False}]
)
def test_left_padded_rows_equal_the_single_rows_whatever_is_switched(changes, tmp_path):
    assert_rows_equal_singles(double_model(), replace(ROTATEKV2, **changes), "greedy", tmp_path)


def test_a_padded_rows_cache_holds_the_single_rows_codes(tmp_path):
    model = double_model()
    ids, mask = left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with patch_calibrated(model, tmp_path), torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).past_key_values
        for row in range(3):
            length = int(mask[row].sum())
            single = model(ids[row : row + 1, -length:]).past_key_values
            for ours, theirs in zip(batch.layers, single.layers, strict=True):
                for kind in ("keys", "values"):
                    for name, tensor in getattr(theirs.packed, kind).tokens().items():
                        mine = getattr(ours.packed, kind).tokens()[name][row : row + 1, -length:]
                        assert torch.equal(mine, tensor), (row, name)
                mine = ours.sinks.batch_index == row
                assert (ours.sinks.token_index[mine] - (12 - length)).tolist() == theirs.sinks.token_index.tolist()
                assert torch.equal(ours.sinks.keys[mine], theirs.sinks.keys)
                assert torch.equal(ours.sinks.values[mine], theirs.sinks.values)


def rebuilt(model, sequence, prompt_length) -> RotateKVCache:
    """A cache from scratch with generation's call boundaries: the prompt, then one token per call."""
    cache = RotateKVCache.for_model(model)
    with torch.no_grad():
        model(sequence[:, :prompt_length], past_key_values=cache)
        for step in range(prompt_length, sequence.shape[1] - 1):
            model(sequence[:, step : step + 1], past_key_values=cache)
    return cache


def assert_same_cache(ours, other) -> None:
    """Codes, zeros, positions, sink places equal; float16 numbers up to their last bit (decoding is float32)."""
    mine, theirs = list(ours.tensors()), list(other.tensors())
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        last_bit = {"rtol": 2.0**-10, "atol": 2.0**-24} if a.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, b, **last_bit)


def is_same_cache(ours, other) -> bool:
    try:
        assert_same_cache(ours, other)
    except AssertionError:
        return False
    return True


def row_of(cache, row: int) -> RotateKVCache:
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([row]))
    return one


@pytest.mark.parametrize("changes", [{}, {"residual_length": 4}])
def test_greedy_generations_cache_equals_one_rebuilt(changes, tmp_path):
    model = double_model()
    with patch_calibrated(model, tmp_path, replace(ROTATEKV2, **changes)):
        out = generate(model, token_ids(1, 14))
        assert_same_cache(out.past_key_values, rebuilt(model, out.sequences, 14))


@pytest.mark.parametrize("changes", [{}, {"residual_length": 4}])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_the_winning_beams_cache_equals_one_rebuilt_from_its_tokens(num_beams, changes, tmp_path, monkeypatch):
    """Beam search only moves packed codes: a beam that changed places often still has the codes of its own tokens."""
    model, before_reorder = double_model(), []
    reorder = RotateKVCache.reorder_cache

    def note(cache, beam_idx):
        before_reorder.append(copy.deepcopy(cache))
        reorder(cache, beam_idx)

    with patch_calibrated(model, tmp_path, replace(ROTATEKV2, **changes)):
        with monkeypatch.context() as patch:
            patch.setattr(RotateKVCache, "reorder_cache", note)
            out = generate(model, token_ids(1, 14), num_beams=num_beams)
        places = out.beam_indices[0, :TOKENS]
        assert places.unique().numel() > 1, "the winner never changed places"
        read_last = next((c for c in before_reorder if c.get_seq_length() == 13 + TOKENS), out.past_key_values)
        assert_same_cache(row_of(read_last, int(places[-1])), rebuilt(model, out.sequences, 14))


def test_a_padded_batchs_beams_have_the_logits_of_their_own_tokens(tmp_path):
    """Every beam step's logits are recomputed on a cache rebuilt for that beam alone."""
    model = double_model()
    ids, mask = left_padded((6, 11))
    with patch_calibrated(model, tmp_path), torch.no_grad():
        out = generate(model, ids, attention_mask=mask, num_beams=3)
        for row in range(2):
            sequence = out.sequences[row : row + 1, 11 - int(mask[row].sum()) :]
            length = int(mask[row].sum())
            cache = RotateKVCache.for_model(model)
            logits = [model(sequence[:, :length], past_key_values=cache).logits[0, -1]]
            for step in range(length, sequence.shape[1] - 1):
                logits.append(model(sequence[:, step : step + 1], past_key_values=cache).logits[0, -1])
            for step, expected in enumerate(logits):
                got = out.logits[step][out.beam_indices[row, step]]
                torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"Attention_Sink_Aware": False}])
def test_prompt_lookup_gives_the_plain_greedy_tokens(changes, tmp_path, monkeypatch):
    """Without a window a token's codes do not depend on which call wrote it; rejected tokens leave nothing."""
    cropped = []
    crop = RotateKVCache.crop
    monkeypatch.setattr(RotateKVCache, "crop", lambda self, n: (cropped.append(n), crop(self, n))[1])
    model = double_model()
    with patch_calibrated(model, tmp_path, replace(ROTATEKV2, **changes)):
        plain = generate(model, varied_ids())
        lookup = generate(model, varied_ids(), prompt_lookup_num_tokens=3)
    assert min(cropped) < 0, "nothing was proposed and rejected"
    assert torch.equal(lookup.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(lookup.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-3)
    length = min(lookup.past_key_values.get_seq_length(), plain.past_key_values.get_seq_length())
    for ours, theirs in zip(lookup.past_key_values.layers, plain.past_key_values.layers, strict=True):
        for name, codes in theirs.packed.keys.tokens().items():
            assert torch.equal(ours.packed.keys.tokens()[name][:, :length], codes[:, :length])


def test_chunked_prefill_equals_manual_chunks(tmp_path):
    model, ids = double_model(), token_ids(2, 14)
    with patch_calibrated(model, tmp_path), torch.no_grad():
        out = generate(model, ids, prefill_chunk_size=4)
        cache = RotateKVCache.for_model(model)
        for chunk in ids.split(4, dim=1):
            logits = model(chunk, past_key_values=cache).logits[:, -1]
        for step in range(TOKENS):
            torch.testing.assert_close(out.logits[step], logits.float(), rtol=1e-4, atol=1e-3)
            token = logits.argmax(-1, keepdim=True)
            assert torch.equal(token[:, 0], out.sequences[:, 14 + step])
            if step < TOKENS - 1:
                logits = model(token, past_key_values=cache).logits[:, -1]
        assert_same_cache(out.past_key_values, cache)


def test_returned_sequences_equal_a_batch_of_copies(tmp_path):
    model, ids = double_model(), token_ids(1, 14)
    with patch_calibrated(model, tmp_path):
        out = generate(model, ids, do_sample=True, num_return_sequences=3)
        copies = generate(model, ids.repeat(3, 1), do_sample=True)
        assert torch.equal(out.sequences, copies.sequences)
        assert len({tuple(row.tolist()) for row in out.sequences}) > 1
        for row in range(3):
            assert_same_cache(row_of(out.past_key_values, row), rebuilt(model, out.sequences[row : row + 1], 14))


def test_sampling_is_reproduced_by_its_seed_and_differs_from_the_stock_model(tmp_path):
    model, options = double_model(), {"do_sample": True, "temperature": 1.2}
    stock = generate(model, token_ids(1, 14), seed=3, **options)
    with patch_calibrated(model, tmp_path):
        first, again = (generate(model, token_ids(1, 14), seed=3, **options) for _ in range(2))
        other = generate(model, token_ids(1, 14), seed=4, **options)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    assert not torch.equal(first.sequences, stock.sequences)


def conversation(model, cache):
    """Three turns; each generate gets everything said so far and the cache of the turns before."""
    said = torch.empty(1, 0, dtype=torch.long)
    for turn in range(3):
        said = torch.cat([said, token_ids(1, 4 + turn, 20 + turn)], dim=1)
        out = generate(model, said, past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
        said, cache = out.sequences, out.past_key_values
    return said, cache


@pytest.mark.parametrize("changes", [{}, {"residual_length": 4}])
def test_a_conversation_on_one_cache_equals_calls_with_its_boundaries(changes, tmp_path):
    model = double_model()
    with patch_calibrated(model, tmp_path, replace(ROTATEKV2, **changes)), torch.no_grad():
        said, cache = conversation(model, RotateKVCache.for_model(model))
        by_hand = RotateKVCache.for_model(model)
        position = 0
        for turn in range(3):
            prompt = said[:, position : position + (4 + turn) + (turn > 0)]  # with the last turn's unread token
            logits = model(prompt, past_key_values=by_hand).logits
            position += prompt.shape[1]
            for _ in range(4):
                assert logits[0, -1].argmax() == said[0, position]
                logits = model(said[:, position : position + 1], past_key_values=by_hand).logits
                position += 1
            assert logits[0, -1].argmax() == said[0, position]
        assert_same_cache(cache, by_hand)


def test_an_explicit_cache_and_none_generate_the_same(tmp_path):
    model = double_model()
    with patch_calibrated(model, tmp_path):
        implicit = generate(model, token_ids(2, 14))
        cache = RotateKVCache.for_model(model)
        explicit = generate(model, token_ids(2, 14), past_key_values=cache)
        assert explicit.past_key_values is cache
        assert torch.equal(implicit.sequences, explicit.sequences)
        assert_same_cache(implicit.past_key_values, cache)


def test_no_cache_at_all_generates_what_a_fresh_prefill_per_step_says(tmp_path):
    model, ids = double_model(), token_ids(1, 14)
    with patch_calibrated(model, tmp_path), torch.no_grad():
        out = generate(model, ids, use_cache=False)
        for step in range(TOKENS):
            logits = model(out.sequences[:, : 14 + step]).logits[:, -1]
            torch.testing.assert_close(out.logits[step], logits.float(), rtol=1e-4, atol=1e-3)
