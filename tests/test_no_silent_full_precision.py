"""No way of calling a patched model gets around the quantized cache: shown with a codec that zeroes everything."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, token_ids
from transformers import AutoTokenizer, DynamicCache, StaticCache, pipeline

import rotatekv.methods
from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model, unpatch_model
from rotatekv.methods.fp16 import FP16

ZEROS = replace(PRESETS["FP16"], method="zeros")
ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)


class Zeros(FP16):
    """Every key and value comes back as 0, so attention adds nothing and no token can see another one."""

    def encode_keys(self, channels):
        return {"raw": torch.zeros_like(channels)}

    encode_values = encode_keys


@pytest.fixture(autouse=True)
def zeros_method(monkeypatch):
    monkeypatch.setitem(rotatekv.methods.METHODS, "zeros", Zeros)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny"))


@contextmanager
def without_attention(model):
    """The reference for ``Zeros``, with nothing of rotatekv in it: every attention output is 0."""
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


WAYS_TO_FORWARD = {
    "model(ids)": lambda model, ids: model(ids).logits,
    "model(input_ids=ids)": lambda model, ids: model(input_ids=ids).logits,
    "use_cache=False": lambda model, ids: model(ids, use_cache=False).logits,
    "use_cache=True": lambda model, ids: model(ids, use_cache=True).logits,
    "return_dict=False": lambda model, ids: model(ids, return_dict=False)[0],
    "return_dict=False, use_cache=False": lambda model, ids: model(ids, return_dict=False, use_cache=False)[0],
    "past_key_values=None": lambda model, ids: model(ids, past_key_values=None).logits,
    "inner model": lambda model, ids: model.lm_head(model.model(ids).last_hidden_state),
    "inner model, no cache": lambda model, ids: model.lm_head(model.model(ids, use_cache=False).last_hidden_state),
    "inputs_embeds": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)).logits,
    "labels": lambda model, ids: model(ids, labels=ids).logits,
    "attention_mask": lambda model, ids: model(ids, attention_mask=torch.ones_like(ids)).logits,
    "position_ids": lambda model, ids: model(ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0)).logits,
    "train mode": lambda model, ids: model.train()(ids).logits,
    "get_decoder": lambda model, ids: model.lm_head(model.get_decoder()(input_ids=ids).last_hidden_state),
}


@pytest.mark.parametrize("way", WAYS_TO_FORWARD)
def test_every_forward_goes_through_the_codec(way):
    model, ids, call = tiny_model("llama"), token_ids(2), WAYS_TO_FORWARD[way]
    with torch.no_grad():
        stock = call(model, ids)
        with without_attention(model):
            expected = call(model, ids)
        with patch_model(model, ZEROS):
            zeroed = call(model, ids)
        after = call(model, ids)
    torch.testing.assert_close(zeroed, expected)
    assert (zeroed - stock).abs().max() > 0.1
    assert torch.equal(after, stock)


def test_the_codec_is_in_the_way_in_every_family(any_family):
    ids = token_ids()
    with torch.no_grad():
        with without_attention(any_family):
            expected = any_family(ids).logits
        with patch_model(any_family, ZEROS):
            torch.testing.assert_close(any_family(ids).logits, expected)


WAYS_TO_GENERATE = {
    "greedy": {},
    "use_cache=True": {"use_cache": True},
    "use_cache=False": {"use_cache": False},
    "beam search": {"num_beams": 3},
    "beam search without cache": {"num_beams": 3, "use_cache": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS_TO_GENERATE)
def test_every_way_to_generate_goes_through_the_codec(way):
    model, ids = tiny_model("llama"), token_ids()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **WAYS_TO_GENERATE[way]}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def generate():
        torch.manual_seed(0)
        return model.generate(ids, **options)

    stock = generate()
    with without_attention(model):
        expected = generate()
    with patch_model(model, ZEROS):
        zeroed = generate()
    assert torch.equal(zeroed.sequences, expected.sequences)
    torch.testing.assert_close(zeroed.logits, expected.logits)
    assert not torch.allclose(zeroed.logits[0], stock.logits[0], atol=0.1)
    if options.get("use_cache") is False:
        assert zeroed.past_key_values is None
    else:
        assert isinstance(zeroed.past_key_values, RotateKVCache)


def test_a_text_generation_pipeline_goes_through_the_codec(folder):
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(folder)
    model.generation_config.max_length = None

    def run():
        text = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return text("w3 w14 w15 w92 w65", max_new_tokens=10, do_sample=False)[0]["generated_text"]

    stock = run()
    with without_attention(model):
        expected = run()
    with patch_model(model, ZEROS):
        zeroed = run()
    assert zeroed == expected != stock


def test_an_lm_eval_client_goes_through_the_codec(folder):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(folder)
    client = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=64)
    asked = [("w3 w14 w15", " w92 w65 w35"), ("w8 w9 w7 w93", " w23 w84")]
    scored = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    until = {"until": ["w999"], "max_gen_toks": 6, "do_sample": False}
    written = [Instance("generate_until", {}, ("w3 w14 w15 w92", until), 0)]

    def run():
        scores = client.loglikelihood(scored, disable_tqdm=True)
        client.cache_hook = type(client.cache_hook)(None)
        return [score for score, _ in scores], client.generate_until(written, disable_tqdm=True)

    stock_scores, stock_text = run()
    with without_attention(model):
        expected_scores, expected_text = run()
    with patch_model(model, ZEROS):
        scores, text = run()
    assert scores == pytest.approx(expected_scores, abs=1e-4) and text == expected_text
    assert scores != pytest.approx(stock_scores, abs=0.1) and text != stock_text


FOREIGN_CACHES = {
    "empty DynamicCache": lambda model: DynamicCache(),
    "DynamicCache of the config": lambda model: DynamicCache(config=model.config),
    "filled DynamicCache": lambda model: _filled(model, DynamicCache(config=model.config)),
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "legacy tuple": lambda model: tuple((torch.zeros(1, 3, 2, 16),) * 2 for _ in range(2)),
}


def _filled(model, cache):
    with torch.no_grad():
        model(token_ids(1, 5), past_key_values=cache)
    return cache


@pytest.mark.parametrize("kind", FOREIGN_CACHES)
def test_another_cache_class_is_refused(kind, tiny):
    cache = FOREIGN_CACHES[kind](tiny)
    with patch_model(tiny, ROTATEKV2):
        for call in (tiny, tiny.model):
            with pytest.raises(UserError, match=f"takes no {type(cache).__name__}"):
                call(token_ids(), past_key_values=cache)
        with pytest.raises((UserError, ValueError), match=r"takes no|[Tt]uple"):
            tiny.generate(token_ids(), past_key_values=cache, max_new_tokens=3)
        with pytest.raises(UserError, match="takes no"):
            tiny(token_ids(), past_key_values=cache, use_cache=False)
    assert not isinstance(cache, tuple) or len(cache) == 2


@pytest.mark.parametrize("where", ["argument", "generation_config"])
@pytest.mark.parametrize("name", ["static", "dynamic", "offloaded", "quantized"])
def test_cache_implementation_is_refused(name, where, tiny):
    with patch_model(tiny, ROTATEKV2):
        options = {"cache_implementation": name} if where == "argument" else {}
        if where == "generation_config":
            tiny.generation_config.cache_implementation = name
        with pytest.raises(UserError, match=rf"cache_implementation='{name}' is not possible") as error:
            tiny.generate(token_ids(), max_new_tokens=3, **options)
    assert "\n" not in str(error.value)


def test_continuous_batching_is_refused(tiny):
    """It brings a paged cache of its own and only logs what a forward raises."""
    with patch_model(tiny, ROTATEKV2):
        with pytest.raises(UserError):
            tiny.generate(token_ids(), max_new_tokens=3, cache_implementation="paged")
        with pytest.raises(UserError):
            tiny.generate_batch(token_ids().tolist(), max_new_tokens=3)


def test_use_cache_false_quantizes_and_returns_no_cache(tiny):
    ids = token_ids()
    with torch.no_grad():
        stock = tiny(ids).logits
        with patch_model(tiny, ROTATEKV2):
            kept, dropped = tiny(ids), tiny(ids, use_cache=False)
            assert torch.equal(kept.logits, dropped.logits) and not torch.allclose(kept.logits, stock, atol=0.1)
            assert isinstance(kept.past_key_values, RotateKVCache) and kept.past_key_values.get_seq_length() == 12
            assert dropped.past_key_values is None
            assert tiny.model(ids, use_cache=False).past_key_values is None
            as_tuple = tiny(ids, use_cache=False, return_dict=False)
            assert not any(isinstance(item, RotateKVCache) for item in as_tuple)
            tiny.config.use_cache = False
            assert tiny(ids).past_key_values is None
            tiny.config.use_cache = True


def test_a_cache_of_another_config_is_refused_and_one_of_an_equal_config_taken(tiny):
    ids = token_ids()
    with patch_model(tiny, ROTATEKV2):
        cache = tiny(ids).past_key_values
    for other in (
        replace(ROTATEKV2, k_bits=4),
        replace(ROTATEKV2, quantize_prefill=False),
        replace(ROTATEKV2, v_clip_ratio=0.9),
        PRESETS["FP16"],
        PRESETS["RTN2"],
    ):
        with patch_model(tiny, other):
            with pytest.raises(UserError, match="another config"):
                tiny(ids[:, :1], past_key_values=cache)
            with pytest.raises(UserError, match="another config"):
                tiny.generate(torch.cat([ids, ids], dim=1), past_key_values=cache, max_new_tokens=2)
    with patch_model(tiny, QuantConfig(**ROTATEKV2.to_dict())):
        tiny(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 13


def test_a_cache_of_another_models_shape_is_refused():
    small, deep = tiny_model("llama"), tiny_model("llama", num_hidden_layers=3)
    patch_model(small, ROTATEKV2)
    with patch_model(deep, ROTATEKV2), pytest.raises(UserError, match="another config, model"):
        deep(token_ids(), past_key_values=RotateKVCache.for_model(small))


def test_positional_arguments_after_the_ids_are_refused_rather_than_lost(tiny):
    with patch_model(tiny, ROTATEKV2), pytest.raises(UserError, match="by name"):
        tiny.model(token_ids(), torch.ones(1, 12, dtype=torch.long))


def bytes_of_every_tensor_reachable(model) -> int:
    """Storages of all tensors in the __dict__ of every module: parameters, buffers, and whatever was parked there."""
    storages: dict[int, int] = {}

    def visit(thing, depth):
        if type(thing).__name__ == "ModelRope":
            return  # cos and sin of positions: one table a model, no keys or values
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif depth and isinstance(thing, dict):
            for item in thing.values():
                visit(item, depth - 1)
        elif depth and isinstance(thing, (list, tuple, set)):
            for item in thing:
                visit(item, depth - 1)
        elif depth and not isinstance(thing, torch.nn.Module) and hasattr(thing, "__dict__"):
            visit(vars(thing), depth - 1)

    for module in model.modules():
        visit(vars(module), 12)
    return sum(storages.values())


@pytest.mark.parametrize("preset", ["FP16", "RTN2", "RotateKV2", "KIVI2", "QuaRot2", "TurboQuant2"])
def test_nothing_is_parked_on_the_patched_modules(preset, tiny):
    config = replace(PRESETS[preset], Outlier_Aware_Key_Rotation=False, residual_length=4 * (preset != "FP16"))
    config = replace(config, v_groupsize=16) if preset == "KIVI2" else config
    stock = bytes_of_every_tensor_reachable(tiny)
    with patch_model(tiny, config), torch.no_grad():
        tiny(token_ids())
        groups = 2 * 48 * 4 * (preset != "FP16")  # each channel's group, int32, of keys and values, per layer
        signs_and_levels = (16 + 4 + 4) * 4  # float32
        own = {"TurboQuant2": signs_and_levels, "KIVI2": groups // 2}.get(preset, groups)  # KIVI: of values alone
        assert bytes_of_every_tensor_reachable(tiny) == stock + 2 * own
        before, names = bytes_of_every_tensor_reachable(tiny), [set(vars(module)) for module in tiny.modules()]
        kept = tiny(token_ids(2, 300)).past_key_values
        tiny.generate(token_ids(2, 200), max_new_tokens=20, num_beams=2)
        tiny(token_ids(2, 300), use_cache=False)
        with pytest.raises(RuntimeError):
            tiny(token_ids(3, 1), past_key_values=RotateKVCache.for_model(tiny), attention_mask=torch.ones(3, 99, 2))
        assert bytes_of_every_tensor_reachable(tiny) == before
        assert [set(vars(module)) for module in tiny.modules()] == names
        assert kept.nbytes() > 0 and not kept._positions._made and kept.token_mask is None


def test_patching_twice_and_unpatching_the_unpatched_are_refused(tiny):
    with pytest.raises(UserError, match="not patched"):
        unpatch_model(tiny)
    with pytest.raises(UserError, match="not patched"):
        RotateKVCache.for_model(tiny)
    patch_model(tiny, ROTATEKV2)
    for target in (tiny, tiny.model):
        with pytest.raises(UserError, match="patched already"):
            patch_model(target, "FP16")
    unpatch_model(tiny)
    with pytest.raises(UserError, match="not patched"):
        unpatch_model(tiny)


def test_a_patched_inner_model_refuses_the_cache_an_unpatched_generate_makes(tiny):
    """Patching ``model.model`` alone leaves generate's own DynamicCache: refused, not silently used."""
    with patch_model(tiny.model, ROTATEKV2), pytest.raises(UserError, match="takes no DynamicCache"):
        tiny.generate(token_ids(), max_new_tokens=3)
