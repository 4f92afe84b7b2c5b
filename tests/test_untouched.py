"""A patched model stays the model it was: saved, copied, cast, adapted and quantized by other people's tools."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import accelerate
import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rotatekv import PRESETS, RotateKVCache, UserError, patch_model, unpatch_model
from rotatekv.cache.spec import handle_of, is_patched

pytestmark = pytest.mark.usefixtures("one_thread")
ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, num_sink_entries=6)
STEPS = (36, 1, 1, 2)
IDS = torch.randint(8, 128, (2, sum(STEPS)), generator=torch.Generator().manual_seed(0))


def stock_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def logits(model, cache=None) -> torch.Tensor:
    """Of a patched model: a prefill, and steps that attend in the packed cache."""
    cache = RotateKVCache.for_model(model) if cache is None else cache
    with torch.no_grad():
        return torch.cat([model(ids, past_key_values=cache).logits for ids in IDS.split(STEPS, dim=1)], dim=1)


def freshly_patched(model) -> torch.Tensor:
    """``logits`` of a model that is patched for them alone: what all else is compared with."""
    with patch_model(model, ROTATEKV2):
        return logits(model)


def assert_is_stock(model, weights: dict, expected: torch.Tensor) -> None:
    assert not is_patched(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.equal(stock_logits(model), expected)


@pytest.fixture
def weights(tiny) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in tiny.state_dict().items()}


@pytest.fixture
def stock(tiny) -> torch.Tensor:
    """The tiny model's logits."""
    return stock_logits(tiny)


@pytest.fixture
def patched(weights, stock, tiny):
    """The tiny model after its stock logits were noted."""
    patch_model(tiny, ROTATEKV2)
    assert not torch.allclose(logits(tiny), stock, atol=0.01), "nothing was quantized"
    return tiny


# --- files and copies ------------------------------------------------------------------------------------------------


def test_saving_writes_the_stock_models_files(patched, stock, tmp_path):
    tiny_model().save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "patched")
    patched.model.save_pretrained(tmp_path / "inner")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes(), name
    assert "rotatekv" not in (tmp_path / "inner" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", attn_implementation="sdpa").eval()
    assert torch.equal(stock_logits(loaded), stock)
    assert torch.equal(freshly_patched(loaded), logits(patched))


def test_a_state_dict_goes_out_and_in(patched, weights, stock):
    held = patched.state_dict()
    assert held.keys() == weights.keys() and all(torch.equal(held[name], x) for name, x in weights.items())
    with torch.no_grad():
        other = tiny_model()
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = freshly_patched(other)
    assert not torch.equal(logits(patched), expected)
    patched.load_state_dict(other.state_dict())
    assert torch.equal(logits(patched), expected)
    patched.load_state_dict(weights)
    unpatch_model(patched)
    assert_is_stock(patched, weights, stock)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, by_pickle, by_torch], ids=lambda function: function.__name__)
@pytest.mark.parametrize("inner", [False, True])
def test_a_copy_is_patched_with_a_handle_of_its_own(again, inner, patched, weights, stock):
    expected, handle, names = logits(patched), handle_of(patched), [set(vars(x)) for x in tiny_model().modules()]
    other = handle_of(again(patched.model if inner else patched)).model
    assert other is not patched and handle_of(other) is not handle
    assert handle_of(other).spec.fingerprint == handle.spec.fingerprint
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), expected)
    unpatch_model(other)
    assert_is_stock(other, weights, stock)
    assert [set(vars(x)) for x in other.modules()] == names
    assert all(layer.self_attn.config is other.config for layer in other.model.layers)
    assert is_patched(patched) and handle_of(patched) is handle


def test_a_pickled_model_runs_in_another_process(patched, tmp_path):
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(patched))
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    out = model(torch.arange(8, 48).view(1, 40))\n"
        "print(type(out.past_key_values).__name__, out.logits[0, -1].tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    name, numbers = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(" ", 1)
    with torch.no_grad():
        expected = patched(torch.arange(8, 48).view(1, 40)).logits[0, -1]
    assert name == "RotateKVCache"
    torch.testing.assert_close(torch.tensor(json.loads(numbers)), expected)


# --- the config ------------------------------------------------------------------------------------------------------


def test_the_models_config_is_the_same_before_during_and_after(tiny):
    config, before, text = tiny.config, dict(vars(tiny.config)), tiny.config.to_json_string()
    with patch_model(tiny, ROTATEKV2):
        logits(tiny)
        assert tiny.config is config is tiny.model.config
        assert vars(config) == before and config.to_json_string() == text and config._attn_implementation == "sdpa"
    assert vars(config) == before and all(layer.self_attn.config is config for layer in tiny.model.layers)


def test_two_models_of_one_config_object_are_patched_each_alone(tiny, stock):
    other = type(tiny)(tiny.config).eval()
    other.load_state_dict(tiny.state_dict())
    assert other.config is tiny.config
    expected = freshly_patched(tiny)
    with patch_model(tiny, ROTATEKV2):
        assert torch.equal(stock_logits(other), stock)
        with patch_model(other, "RTN4"):
            assert torch.equal(logits(tiny), expected) and not torch.equal(logits(other), expected)
        assert torch.equal(stock_logits(other), stock)
    assert torch.equal(stock_logits(tiny), stock)


def test_the_attention_implementation_is_exchanged_while_patched(patched, stock):
    expected = logits(patched)
    patched.set_attn_implementation("eager")
    torch.testing.assert_close(logits(patched), expected, rtol=1e-3, atol=5e-3)
    with torch.no_grad():
        assert len(patched(IDS, output_attentions=True).attentions) == 2
    patched.set_attn_implementation("sdpa")
    assert torch.equal(logits(patched), expected)
    patched.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="attention 'flex_attention' is not supported"):
        logits(patched)
    patched.set_attn_implementation("eager")
    unpatch_model(patched)
    patched.set_attn_implementation("sdpa")
    assert torch.equal(stock_logits(patched), stock)


# --- dtype, device, modules that are shared or exchanged -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_patched_model_is_cast(dtype, patched):
    patched.to(dtype)
    fresh = tiny_model().to(dtype)
    assert torch.equal(logits(patched), freshly_patched(fresh))
    unpatch_model(patched)
    assert torch.equal(stock_logits(patched), stock_logits(fresh))


def test_a_patched_model_moves_away_and_back(patched, weights, stock):
    """The meta device stands in for a second one: every tensor of the model goes there, and others come back."""
    expected = logits(patched)
    buffers = {name: x.clone() for name, x in patched.named_buffers()}  # inv_freq is in no state_dict
    patched.to("meta")
    assert all(x.is_meta for x in (*patched.parameters(), *patched.buffers()))
    patched.to_empty(device="cpu").load_state_dict(weights)
    for name, buffer in patched.named_buffers():
        buffer.copy_(buffers[name])
    assert torch.equal(logits(patched), expected)
    unpatch_model(patched)
    assert_is_stock(patched, weights, stock)


@pytest.mark.parametrize("shared", ["k_proj", "v_proj", "o_proj"])
def test_weights_that_two_modules_share_stay_shared(shared):
    model, separate = tiny_model(tie_word_embeddings=True), tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    setattr(second, shared, getattr(first, shared))
    separate.load_state_dict(model.state_dict())
    stock = stock_logits(model)
    assert torch.equal(freshly_patched(model), freshly_patched(separate))
    assert getattr(second, shared) is getattr(first, shared)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(stock_logits(model), stock)


def test_a_projection_is_exchanged_while_patched(patched):
    torch.manual_seed(3)
    other, fresh = nn.Linear(96, 48, bias=False), tiny_model()
    patched.model.layers[1].self_attn.k_proj = fresh.model.layers[1].self_attn.k_proj = other
    assert torch.equal(logits(patched), freshly_patched(fresh))
    unpatch_model(patched)
    assert patched.model.layers[1].self_attn.k_proj is other
    assert torch.equal(stock_logits(patched), stock_logits(fresh))


def exchange_layer(model, other) -> None:
    model.model.layers[1] = other.model.layers[1]


def exchange_attention(model, other) -> None:
    model.model.layers[1].self_attn = other.model.layers[1].self_attn


def keep_attention_alone(model, other) -> None:
    other.model.layers[1].self_attn = model.model.layers[1].self_attn
    model.model.layers[1] = other.model.layers[1]


@pytest.mark.parametrize("exchange", [exchange_layer, exchange_attention, keep_attention_alone])
def test_a_layer_exchanged_while_patched_is_refused_until_the_model_is_patched_again(exchange, patched):
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.model.layers[1].parameters():
            parameter.mul_(1.1)
    expected, layers = logits(patched), list(patched.model.layers)
    attention = layers[1].self_attn
    exchange(patched, other)
    with pytest.raises(RuntimeError, match=r"layer.*1.*unpatch_model\(model\) .*before you exchange its layers"):
        logits(patched)
    patched.model.layers[1], layers[1].self_attn = layers[1], attention
    assert torch.equal(logits(patched), expected), "a refusal leaves nothing behind"
    exchange(patched, other)
    unpatch_model(patched)
    for module in (patched.model.layers[1], layers[1]):
        assert not module._forward_pre_hooks and module.self_attn.config._attn_implementation == "sdpa"
    fresh = tiny_model()
    fresh.model.layers[1] = copy.deepcopy(patched.model.layers[1])
    assert torch.equal(freshly_patched(patched), freshly_patched(fresh))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_before_and_after_patching(where, patched, tmp_path):
    """Parameters lie on the meta device but for the moment that they are used."""

    def offload(model):
        if where == "cpu":
            return accelerate.cpu_offload(model, execution_device="cpu")
        return accelerate.disk_offload(model, tmp_path / str(id(model)), execution_device="cpu")

    expected, fresh = logits(patched), tiny_model()
    offload(fresh)
    assert all(x.is_meta for x in fresh.parameters())
    assert torch.equal(freshly_patched(fresh), expected)
    offload(patched)
    assert torch.equal(logits(patched), expected)


def test_a_model_without_weights_is_refused(tiny):
    with pytest.raises(UserError, match="meta device, without weights: load them first"):
        patch_model(tiny.to("meta"), ROTATEKV2)
    assert not is_patched(tiny)


# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(model, seed: int = 1, name: str = "default"):
    """With a LoRA adapter on every projection of the attention, far from 0."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model.eval()
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def test_lora_before_and_after_patching(patched):
    plain, expected = logits(patched), freshly_patched(adapted(tiny_model()))
    assert (expected - plain).abs().max() > 0.1
    model = adapted(patched)
    assert is_patched(model) and torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    unpatch_model(model)
    assert torch.equal(stock_logits(model), stock_logits(adapted(tiny_model())))


def test_lora_is_merged_unmerged_and_switched_while_patched(patched, weights, stock):
    model, fresh = adapted(adapted(patched), 2, "second"), adapted(adapted(tiny_model()), 2, "second")
    for name in ("second", "default"):
        model.set_adapter(name)
        fresh.set_adapter(name)
        assert torch.equal(logits(model), freshly_patched(fresh)), name
    separate = logits(model)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(model, change)()
        getattr(fresh, change)()
        assert torch.equal(logits(model), freshly_patched(fresh)), change
        torch.testing.assert_close(logits(model), separate, rtol=1e-2, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(stock_logits(patched), logits(patched), rtol=0, atol=10)
    torch.testing.assert_close(model.unload().state_dict(), weights, rtol=1e-4, atol=1e-5)  # merging rounds
    unpatch_model(patched)
    torch.testing.assert_close(stock_logits(patched), stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merge_first", [True, False])
def test_lora_merged_before_or_after_unpatching_is_whole(merge_first, patched):
    model, fresh = adapted(patched), adapted(tiny_model())
    expected = stock_logits(fresh.merge_and_unload())
    if merge_first:
        merged = model.merge_and_unload()
        unpatch_model(merged)
    else:
        unpatch_model(model)
        merged = model.merge_and_unload()
    assert torch.equal(stock_logits(merged), expected)


def test_a_peft_model_is_patched_and_generates(tiny):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    inner = copy.deepcopy(tiny)
    with patch_model(adapted(inner).base_model.model, ROTATEKV2):
        expected = inner.generate(input_ids=IDS, **options)
    model = adapted(tiny)
    with patch_model(model, ROTATEKV2):
        made = model.generate(input_ids=IDS, **options)
        assert isinstance(made.past_key_values, RotateKVCache)
        assert torch.equal(made.sequences, expected.sequences)
        again = model.generate(input_ids=made.sequences, past_key_values=made.past_key_values, **options)
        assert again.past_key_values.get_seq_length() == made.sequences.shape[1] + 7
    assert not isinstance(model.generate(input_ids=IDS, **options).past_key_values, RotateKVCache)


# --- weights that are no floating-point parameters -------------------------------------------------------------------


class RoundedLinear(nn.Module):
    """8-bit weights in a buffer, as quantized layers have them: no ``weight`` at all."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes * self.scale)


def by_hand(model) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, RoundedLinear(child))


def by_torchao(model) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def by_quanto(model) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("quantize", [by_hand, by_torchao, by_quanto], ids=lambda function: function.__name__)
def test_quantized_weights_before_and_after_patching(quantize, patched, stock):
    fresh = tiny_model()
    quantize(fresh)
    before = stock_logits(fresh)
    assert not torch.equal(before, stock), "nothing was quantized"
    with patch_model(fresh, "FP16"):
        torch.testing.assert_close(logits(fresh), before, rtol=1e-3, atol=1e-3)
    expected = freshly_patched(fresh)
    assert torch.equal(stock_logits(fresh), before)
    quantize(patched)
    assert torch.equal(logits(patched), expected)
    unpatch_model(patched)
    assert torch.equal(stock_logits(patched), before)
