"""patch_model and unpatch_model: nothing is left behind, transforms change nothing, and what cannot work says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import save_reorder_indices, tiny_model, token_ids
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import rotatekv.compat
import rotatekv.methods
from rotatekv import PRESETS, QuantConfig, RotateKVCache, UserError, patch_model, unpatch_model
from rotatekv.methods.rotatekv import RotateKV
from rotatekv.methods.stores import TokenStore

ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)


def logits(model, ids=None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2) if ids is None else ids, **options).logits


def refusal(model, config=ROTATEKV2) -> str:
    """The one line patch_model refuses with; the model must be as it was."""
    before = [(module, set(vars(module)), len(module._forward_pre_hooks)) for module in model.modules()]
    weights = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as error:
        patch_model(model, config)
    assert "\n" not in str(error.value)
    assert all(set(vars(module)) == names and len(module._forward_pre_hooks) == n for module, names, n in before)
    now = dict(model.named_parameters())
    assert all(now[name] is kept and kept.data_ptr() == pointer for name, (kept, pointer) in weights.items())
    return str(error.value)


# --- restoring -------------------------------------------------------------------------------------


def snapshot(model):
    parameters = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    names = [set(vars(module)) for module in model.modules()]
    configs = [vars(module).get("config") for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return parameters, names, configs, hooks


def assert_as_before(model, before):
    assert_same_weights(model, before[0])
    names, configs, hooks = before[1:]
    assert [set(vars(module)) for module in model.modules()] == names
    assert all(vars(m).get("config") is config for m, config in zip(model.modules(), configs, strict=True))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def assert_same_weights(model, parameters):
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    for name, (parameter, pointer, values) in parameters.items():
        assert now[name] is parameter and parameter.data_ptr() == pointer, name
        assert torch.equal(parameter, values), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["RotateKV2", "RTN2", "FP16"])
def test_unpatching_restores_the_very_same_weights_and_logits(preset, dtype, any_family):
    model = any_family.to(dtype)
    stock, before = logits(model), snapshot(model)
    for _ in range(2):
        patch_model(model, replace(PRESETS[preset], Outlier_Aware_Key_Rotation=False))
        patched = logits(model)
        model.generate(token_ids(), max_new_tokens=3)
        assert_same_weights(model, before[0])
        unpatch_model(model)
        assert torch.equal(patched, stock) == (preset == "FP16")
        assert_as_before(model, before)
        assert torch.equal(logits(model), stock)


def test_the_handle_is_a_context_manager_that_undoes_itself_after_an_error_too(tiny):
    stock, before = logits(tiny), snapshot(tiny)
    with pytest.raises(ZeroDivisionError), patch_model(tiny, ROTATEKV2) as handle:
        assert handle.config == ROTATEKV2
        raise ZeroDivisionError
    assert_as_before(tiny, before)
    with patch_model(tiny, ROTATEKV2):
        unpatch_model(tiny)  # early, by hand: the end of the block finds nothing to do
    assert_as_before(tiny, before)
    assert torch.equal(logits(tiny), stock)


def test_an_error_within_a_forward_leaves_a_model_that_still_works_and_unpatches(tiny):
    before = snapshot(tiny)
    with patch_model(tiny, ROTATEKV2):
        expected = logits(tiny)
        with pytest.raises(IndexError):
            tiny(torch.tensor([[500]]))  # not in the vocabulary
        assert torch.equal(logits(tiny), expected)
    assert_as_before(tiny, before)


def test_only_this_instance_is_patched():
    one, other = tiny_model("llama"), tiny_model("llama")
    stock = logits(other)
    with patch_model(one, ROTATEKV2):
        assert torch.equal(logits(other), stock)
        with patch_model(other, PRESETS["RTN2"]):
            assert not torch.equal(logits(one), logits(other))
        assert torch.equal(logits(other), stock)


def test_unpatching_through_the_inner_model_undoes_the_whole(tiny):
    before = snapshot(tiny)
    patch_model(tiny, ROTATEKV2)
    unpatch_model(tiny.model)
    assert_as_before(tiny, before)


def test_a_cache_stays_valid_under_a_later_patch_with_an_equal_config(tiny):
    ids = token_ids(1, 20)
    with patch_model(tiny, ROTATEKV2), torch.no_grad():
        whole = RotateKVCache.for_model(tiny)
        tiny(ids[:, :15], past_key_values=whole)
        cache = tiny(ids[:, :15]).past_key_values
        expected = tiny(ids[:, 15:], past_key_values=whole).logits
    with patch_model(tiny, QuantConfig(**ROTATEKV2.to_dict())), torch.no_grad():
        assert torch.equal(tiny(ids[:, 15:], past_key_values=cache).logits, expected)


def test_other_reorder_indices_make_another_cache(tiny, tmp_path):
    tiny.name_or_path = "org/Tiny"
    files = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(48, generator=generator) for _ in range(2)])
        metadata = {"model": "org/Tiny", "head_group_num": 3}
        files.append(save_reorder_indices(tmp_path / f"{seed}.safetensors", order, metadata))
    with patch_model(tiny, "RotateKV2", files[0]):
        cache = tiny(token_ids()).past_key_values
    with patch_model(tiny, "RotateKV2", files[1]), pytest.raises(UserError, match="calibration"):
        tiny(token_ids(1, 1), past_key_values=cache)
    with patch_model(tiny, "RotateKV2", files[0]):
        tiny(token_ids(1, 1), past_key_values=cache)


# --- transforms ------------------------------------------------------------------------------------


class Unrounded(RotateKV):
    """RotateKV with every transform and no rounding: its logits and the stock model's must agree."""

    key_format = value_format = None  # no kernel reads plain tensors

    def encode_keys(self, channels):
        return {"raw": channels.clone()}

    def decode_keys(self, packed):
        return packed["raw"].clone()

    def key_store(self):
        return TokenStore()

    encode_values, decode_values, value_store = encode_keys, decode_keys, key_store


@pytest.mark.parametrize(
    ("reorder", "changes"),
    [(reorder, changes) for reorder in (False, True) for changes in ({}, {"head_group_num": 1})]
    + [(False, {"Grouped_Head_Key_Rotation": False})],  # there is nothing to reorder after RoPE
)
def test_all_transforms_and_no_rounding_give_the_stock_logits(reorder, changes, any_family, tmp_path, monkeypatch):
    monkeypatch.setitem(rotatekv.methods.METHODS, "rotatekv", Unrounded)
    config = replace(ROTATEKV2, Attention_Sink_Aware=False, Outlier_Aware_Key_Rotation=reorder, **changes)
    order = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    any_family.name_or_path = "org/Tiny"
    metadata = {"model": "org/Tiny", "head_group_num": config.head_group_num if config.head_group_num == 1 else 3}
    file = save_reorder_indices(tmp_path / "tiny.safetensors", order, metadata)
    stock = logits(any_family)
    with patch_model(any_family, config, file):
        cache = RotateKVCache.for_model(any_family)
        chunks = token_ids(2).split((7, 4, 1), dim=1)
        found = torch.cat([logits(any_family, chunk, past_key_values=cache) for chunk in chunks], dim=1)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=2e-4)


def test_transforms_in_bfloat16_stay_within_bfloat16s_own_rounding(any_family, monkeypatch):
    monkeypatch.setitem(rotatekv.methods.METHODS, "rotatekv", Unrounded)
    exact = logits(any_family)
    any_family.to(torch.bfloat16)
    own_error = (logits(any_family).float() - exact).abs().mean()
    with patch_model(any_family, replace(ROTATEKV2, Attention_Sink_Aware=False)):
        found = logits(any_family).float()
    assert (found - exact).abs().mean() < 2 * own_error


# --- gradients and compilation ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROTATEKV2, PRESETS["RTN2"], PRESETS["FP16"]], ids=str)
def test_a_forward_under_grad_works_and_its_backward_says_why_not(config, any_family):
    with patch_model(any_family, config):
        out = any_family(token_ids(), labels=token_ids())
        torch.testing.assert_close(out.logits, logits(any_family, token_ids()), rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="no gradients through a quantized KV cache"):
            out.loss.backward()
    any_family.zero_grad()
    any_family(token_ids(), labels=token_ids()).loss.backward()  # as stock again
    assert all(p.grad is not None for p in any_family.model.layers.parameters())


def test_gradients_to_the_embeddings_alone_are_refused_too(tiny):
    tiny.requires_grad_(False)
    embeddings = tiny.get_input_embeddings()(token_ids()).clone().requires_grad_(True)
    with patch_model(tiny, ROTATEKV2), pytest.raises(RuntimeError, match="no gradients"):
        tiny(inputs_embeds=embeddings).logits.sum().backward()


def test_the_cache_holds_no_graph(tiny):
    with patch_model(tiny, ROTATEKV2):
        cache = tiny(token_ids()).past_key_values
        assert not any(tensor.requires_grad for tensor in cache.tensors())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_refused_with_what_to_do(use_reentrant, tiny):
    tiny.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tiny.train()
    with patch_model(tiny, ROTATEKV2), pytest.raises(RuntimeError, match="gradient checkpointing off"):
        tiny(token_ids())
    tiny.eval()
    with patch_model(tiny, ROTATEKV2):
        logits(tiny)


# --- what is refused, what works -------------------------------------------------------------------


def test_flash_attention_is_refused_in_one_line(tiny):
    tiny.config._attn_implementation = "flash_attention_2"
    line = refusal(tiny)
    assert "flash_attention_2" in line and "sdpa" in line


def test_a_window_the_config_names_but_no_layer_uses_is_fine():
    model = tiny_model("qwen2", use_sliding_window=False, sliding_window=4)
    stock = logits(model)
    with patch_model(model, "FP16"):
        assert torch.equal(logits(model), stock)


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64, "factor": 8.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", rope("dynamic", factor=2.0)),
        ("phi3", rope("longrope", **LONGROPE)),
        ("llama", rope("longrope", **LONGROPE)),
    ],
)
def test_rope_whose_frequencies_change_with_the_length_is_refused(family, changes):
    line = refusal(tiny_model(family, **changes))
    assert repr(changes["rope_parameters"]["rope_type"]) in line and "llama3" in line


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes", [rope("linear", factor=4.0), rope("llama3", **LLAMA3)])
def test_fixed_rope_scaling_gives_the_stock_logits(changes):
    model, ids = tiny_model("llama", **changes), token_ids(1, 90)
    stock = logits(model, ids)
    assert not torch.allclose(stock, logits(tiny_model("llama"), ids), atol=1e-2), "the scaling does nothing"
    with patch_model(model, "FP16"):
        assert torch.equal(logits(model, ids), stock)
    with patch_model(model, replace(PRESETS["RotateKV4"], Outlier_Aware_Key_Rotation=False)):
        assert (logits(model, ids) - stock).abs().median() < 0.5 * stock.abs().median()


def test_a_model_without_rope_is_refused():
    line = refusal(AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)))
    assert "GPT2LMHeadModel has no decoder with rotary attention" in line


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_an_unsupported_version_is_named(package, tiny, monkeypatch):
    monkeypatch.setattr(getattr(rotatekv.compat, package), "__version__", "1.13.1")
    assert f"{package} 1.13.1 is not supported: pip install '{package}>=" in refusal(tiny)


@pytest.mark.parametrize("config", ["RotateKV5", "rotatekv2", ""])
def test_an_unknown_preset_is_refused(config, tiny):
    assert "RotateKV2" in refusal(tiny, config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k_groupsize": 5}, "48"),
        ({"v_groupsize": 12}, "16"),
        ({"v_groupsize": 48}, "16"),
        ({"method": "nothing"}, "unknown method"),
        ({"method": "fp16"}, "FP16"),
        ({"Outlier_Aware_Key_Rotation": True, "Grouped_Head_Key_Rotation": False}, "both"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_before_anything_changes(changes, named, tiny):
    assert named in refusal(tiny, replace(ROTATEKV2, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [ROTATEKV2, replace(ROTATEKV2, residual_length=3), PRESETS["RTN2"]], ids=str)
def test_half_precision_models_work(config, dtype, any_family):
    exact = logits(any_family)
    model = any_family.to(dtype)
    with patch_model(model, config):
        out = logits(model)
        generated = model.generate(token_ids(), max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        cache = generated.past_key_values
    assert out.dtype == dtype and out.isfinite().all() and torch.stack(generated.logits).isfinite().all()
    assert (out.float() - exact).abs().mean() < exact.abs().mean(), "further from the model than zeros are"
    assert {x.dtype for layer in cache.layers for x in layer.packed.keys} == {torch.int32, torch.float16, torch.int8}
    if config.residual_length:
        assert cache.layers[0].window.keys.dtype == dtype


# --- other people's wrappers -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROTATEKV2, PRESETS["FP16"]], ids=["RotateKV2", "FP16"])
def test_a_model_with_accelerates_hooks_is_patched_beneath_them_and_restored(config, tiny):
    accelerate = pytest.importorskip("accelerate")
    with patch_model(tiny, config):
        expected = logits(tiny)
    stock = logits(tiny)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(tiny, device_map, force_hooks=True)
    for layer in tiny.model.layers:  # a hook on the attention itself, as a map that splits layers makes
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.AlignDevicesHook("cpu"), append=True)
    before, beneath = snapshot(tiny), tiny.model.layers[0].self_attn._old_forward
    assert torch.equal(logits(tiny), stock)
    with patch_model(tiny, config):
        assert torch.equal(logits(tiny), expected)
        assert isinstance(tiny(token_ids()).past_key_values, RotateKVCache)
    assert_as_before(tiny, before)
    assert tiny.model.layers[0].self_attn._old_forward == beneath
    assert torch.equal(logits(tiny), stock)
    accelerate.hooks.remove_hook_from_submodules(tiny)
    assert torch.equal(logits(tiny), stock)


def tiny_llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        initializer_range=0.3,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=127, attn_implementation="sdpa")
    return LlavaForConditionalGeneration(config).eval()


def test_a_vision_language_models_text_model_is_patched_and_its_vision_tower_left_alone():
    model = tiny_llava()
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = token_ids(1, 12).clamp(max=126)
    with_image = torch.cat([ids[:, :4], torch.full((1, 4), 127), ids[:, 4:]], dim=1)
    stock, stock_image = logits(model, ids), logits(model, with_image, pixel_values=image)
    before = snapshot(model)
    with patch_model(model, "FP16"), torch.no_grad():
        torch.testing.assert_close(logits(model, ids), stock)
        torch.testing.assert_close(logits(model, with_image, pixel_values=image), stock_image)
    with patch_model(model, ROTATEKV2), torch.no_grad():
        out = model(ids)
        assert isinstance(out.past_key_values, RotateKVCache) and out.past_key_values.get_seq_length() == 12
        assert not torch.allclose(out.logits, stock, atol=1e-2)
        seen = model(with_image, pixel_values=image)
        assert seen.past_key_values.get_seq_length() == 16
        made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
        assert isinstance(made.past_key_values, RotateKVCache) and made.past_key_values.get_seq_length() == 15
        with pytest.raises(UserError, match="cache_implementation"):
            model.generate(ids, max_new_tokens=4, cache_implementation="static")
        with pytest.raises(UserError, match="takes no DynamicCache"):
            model(ids, past_key_values=transformers.DynamicCache())
        assert RotateKVCache.for_model(model).get_seq_length() == 0
    assert_as_before(model, before)
    assert torch.equal(logits(model, ids), stock)
