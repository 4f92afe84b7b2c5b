"""Shared models: tiny random ones of every family, and the embedded one, loaded once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rotatekv import RotateKVCache, load_model
from rotatekv.statistics import save_statistics

# tqdm's own lock is shared with forked processes: one killed while it holds the lock would stop every later test.
tqdm.set_lock(threading.RLock())

FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
}
DATA_DIR = Path(os.environ.get("ROTATEKV_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


# Files that take longest come first, so that processes end together (--dist loadfile --no-loadscope-reorder).
LONGEST = ("test_families", "test_triton_kernels", "test_embedded", "test_cpu_kernels", "test_gpu_check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def tiny_model(family: str = "llama", **changes) -> torch.nn.Module:
    """A random causal model of 2 layers, 6 query heads and 3 key/value heads of 16 channels (Hadamard order 48)."""
    options = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    if family == "mistral":
        options["sliding_window"] = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**{**options, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # HF makes them 0 and 1, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def token_ids(rows: int = 1, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """(rows, tokens) of the tiny models' words."""
    return torch.randint(8, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padding(tokens: int, *padding: int) -> torch.Tensor:
    """(B, T) int64, 0 at the first ``padding`` tokens of each row."""
    return (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()


def logits(model, cache, ids: torch.Tensor, chunks: Iterable[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T, V) of the next ``sum(chunks)`` tokens of ``ids``, in one call per chunk.

    Args:
        cache: None: a new one of a patched model. mask: of all tokens; positions are then those of ``generate``.
    """
    cache = RotateKVCache.for_model(model) if cache is None else cache
    start, parts = cache.get_seq_length(), []
    with torch.no_grad():
        for length in chunks:
            now, inputs = slice(start, start + length), {}
            if mask is not None:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                inputs = {"attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
            parts.append(model(ids[:, now], past_key_values=cache, **inputs).logits)
            start += length
    return torch.cat(parts, dim=1)


def random_order(first_seed: int = 3) -> torch.Tensor:
    """Reorder indices of the tiny models, (2, 48) int64."""
    return torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(first_seed + n)) for n in range(2)])


@pytest.fixture(params=FAMILIES)
def any_family(request) -> torch.nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def tiny() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def embedded():
    """The embedded SmolLM2 and its tokenizer. A test that patches it must unpatch it (use ``with patch_model``)."""
    return load_model()


@pytest.fixture
def data_dir() -> Path:
    if not (DATA_DIR / "wikitext2" / "wiki.test.raw").is_file():
        pytest.skip("no local data: set ROTATEKV_TEST_DATA to a folder with wikitext2/wiki.test.raw")
    return DATA_DIR


def save_tiny_folder(folder: Path, family: str = "llama", **changes) -> Path:
    """A tiny model and a word-level tokenizer of 120 words, as a local folder ``--model`` can name."""
    words = {f"w{number}": number + 8 for number in range(120)}
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def tiny_text(tokens: int, seed: int = 0) -> str:
    """``tokens`` words the tiny tokenizer knows, drawn unevenly."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.multinomial(1.0 / torch.arange(1.0, 121.0), tokens, replacement=True, generator=generator)
    return " ".join(f"w{number}" for number in numbers.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny llama and its tokenizer; test files that need another one have a ``folder`` of their own."""
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def save_reorder_indices(path: Path, indices: torch.Tensor, metadata: dict[str, str]) -> Path:
    """A calibration file of these reorder indices, (num_hidden_layers, H_kv·D)."""
    return save_statistics(path, "reorder", {"indices": indices}, metadata)


@pytest.fixture(scope="session")
def statistics(tmp_path_factory):
    """A config → the calibration file it needs for the tiny models, or None."""
    from test_kvquant import random_statistics as kvquant_statistics
    from test_rotatekv_plus import random_statistics as plus_statistics

    folder = tmp_path_factory.mktemp("statistics")
    files = {
        "rotatekv": save_reorder_indices(folder / "order.safetensors", random_order(), {"head_group_num": 3}),
        "kvquant": save_statistics(folder / "kvquant.safetensors", "kvquant", kvquant_statistics(), {}),
        "rotatekv_plus": save_statistics(folder / "plus.safetensors", "plus", plus_statistics(8.0), {}),
    }
    return lambda config: files.get(config.method)


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield
    torch.set_num_threads(before)
