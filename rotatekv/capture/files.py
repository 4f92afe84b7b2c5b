"""Captures on disk: one safetensors file per kind, with what the figure's title must say as metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rotatekv.capture.hooks import KINDS, Tensors
from rotatekv.errors import UserError
from rotatekv.files import write_output

FORMAT, FORMAT_VERSION = "rotatekv-capture", "1"
_NUMBERS = ("window", "tokens", "num_attention_heads", "num_key_value_heads", "head_dim", "heads_per_group")


@dataclass(frozen=True)
class CaptureInfo:
    """What was captured; the file's metadata, as json strings.

    Args:
        kind: of ``KINDS``.
        model, text: names for the title; ``text_sha256`` of the whole text.
        window: the window's number in the text; tokens: its length.
        layers: numbers of the layers in the file.
        heads: query heads of attention scores (all of them for other kinds).
        heads_per_group: G, the key heads that are rotated together.
        token_texts: each token as text, in order.
    """

    kind: str
    model: str
    text: str
    text_sha256: str
    window: int
    tokens: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    heads_per_group: int
    token_texts: tuple[str, ...]

    @property
    def where(self) -> str:
        """Model (of a local folder, its name alone) and text, as titles name them."""
        model = Path(self.model).name if Path(self.model).is_absolute() else self.model
        return f"{model}, {self.text} (window {self.window}, {self.tokens} tokens)"

    def metadata(self, tensors: Tensors) -> dict[str, str]:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        header = {"format": FORMAT, "version": FORMAT_VERSION, "shapes": json.dumps(shapes)}
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in vars(self).items()}
        # A file name that is no UTF-8 has lone surrogates, which no header can hold.
        return header | {name: value.encode(errors="replace").decode() for name, value in values.items()}


@dataclass(frozen=True)
class Capture:
    """One file that was read. ``tensors`` are named ``layers.<number>.<what>``."""

    info: CaptureInfo
    tensors: Tensors
    path: Path

    def get(self, layer: int, what: str) -> torch.Tensor:
        """One tensor of one layer, or UserError naming the file."""
        name = f"layers.{layer}.{what}"
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no {what} of layer {layer}: {remake(self.info.kind)}")
        return self.tensors[name]


def write_capture(folder: Path, info: CaptureInfo, tensors: Tensors) -> Path:
    """Write ``<folder>/<kind>.safetensors`` atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / f"{info.kind}.safetensors"
    write_output(path, save(tensors, metadata=info.metadata(tensors)), "--save_dir")
    return path


def read_capture(path: str | Path, kind: str | None = None) -> Capture:
    """Read and check one file of ``write_capture``.

    Args:
        path: the file, or the folder that holds ``<kind>.safetensors``.
        kind: what it must be; None takes any.

    Raises:
        UserError: no file, a damaged or foreign one, or another kind.
    """
    path = Path(path)
    if path.is_dir() and kind is not None:
        path = path / f"{kind}.safetensors"
    if not path.is_file():
        raise UserError(f"no capture {path}: {remake(kind)}")
    try:
        with safe_open(path, framework="pt") as file:
            info = _info_of(file.metadata() or {})
            shapes = json.loads(file.metadata()["shapes"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no capture of ours ({reason}): {remake(kind)}") from None
    if kind is not None and info.kind != kind:
        raise UserError(f"{path} holds {info.kind}, not {kind}: {remake(kind)}")
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise UserError(f"{path} is damaged (shapes are not those of its header): {remake(kind)}")
    _check_tensors(path, info, tensors)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{path} holds numbers that are not finite: {remake(kind)}")
    return Capture(info, tensors, path)


def remake(kind: str | None) -> str:
    """How to make a capture, for error lines."""
    return f"make it with PPL_evaluation.py --save_{kind or 'k_pre_rope'} True"


def _info_of(metadata: dict[str, str]) -> CaptureInfo:
    """ValueError, KeyError or TypeError where the metadata are not ours."""
    if metadata.get("format") != FORMAT:
        raise ValueError("another format")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"format version {metadata.get('version')!r}, this program reads {FORMAT_VERSION}")
    values = {name: json.loads(metadata[name]) for name in CaptureInfo.__dataclass_fields__}
    lists = ("layers", "heads", "token_texts")
    if not all(isinstance(values[name], list) for name in lists):
        raise ValueError("no list where one must be")
    values |= {name: tuple(values[name]) for name in lists}
    info = CaptureInfo(**values)
    numbers = [getattr(info, name) for name in _NUMBERS] + [*info.layers, *info.heads]
    texts = [info.model, info.text, info.text_sha256, *info.token_texts]
    if info.kind not in KINDS or not all(isinstance(text, str) for text in texts):
        raise ValueError("unknown kind, or names that are no text")
    "".join(texts).encode()  # a lone surrogate raises a ValueError
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not info.layers:
        raise ValueError("a count that is no count")
    if len(info.token_texts) != info.tokens:
        raise ValueError("token texts do not match the token count")
    sizes = (info.tokens, len(info.heads), info.num_key_value_heads, info.head_dim, info.heads_per_group)
    if min(sizes) < 1 or info.num_key_value_heads % info.heads_per_group:
        raise ValueError("sizes that no model has")
    return info


def _check_tensors(path: Path, info: CaptureInfo, tensors: Tensors) -> None:
    """UserError unless each layer has the tensors of its kind, of the shapes that the metadata imply."""
    heads, tokens, channels = info.num_key_value_heads, info.tokens, info.num_key_value_heads * info.head_dim
    shapes: dict[str, tuple[int, ...]]
    some: tuple[int, ...] = (-1,)  # any number of entries but none
    keys: dict[str, tuple[int, ...]] = {"keys": (heads, tokens, info.head_dim)}
    entries = {"top_values": some, "top_tokens": some, "top_channels": some, "sinks": some}
    if info.kind == "quantization_error":  # the methods are those of the file
        methods = {what.rpartition(".")[0] for what in _parts(tensors)} or {"RTN2"}
        shapes = {f"{method}.{what}": (tokens,) for method in methods for what in ("keys", "values")}
    else:
        by_kind: dict[str, dict[str, tuple[int, ...]]] = {
            "k_pre_rope": keys,
            "k_post_rope": keys,
            "k_rotated": {"rotated": (tokens, channels)},
            "massive_activations": {"token_maximum": (tokens,), "median": (1,), **entries},
            "attention_scores": {"scores": (len(info.heads), tokens, tokens), "sinks": some},
        }
        shapes = by_kind[info.kind]
        if "reordered" in _parts(tensors):
            shapes = shapes | {"reordered": (tokens, channels)}
    expected = {f"layers.{layer}.{what}": shape for layer in info.layers for what, shape in shapes.items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        reason = "is not there" if name in expected else "does not belong there"
        raise UserError(f"{path} is damaged ({name} {reason}): {remake(info.kind)}")
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        is_list = len(shape) == 1 and shape[0] > 0
        if not (is_list if expected[name] == some else shape == expected[name]):
            raise UserError(f"{path} is damaged ({name} has shape {shape}): {remake(info.kind)}")
        if name.endswith(("sinks", "top_tokens")) and not (tensor.min() >= 0 and tensor.max() < tokens):
            raise UserError(f"{path} is damaged ({name} points outside the window): {remake(info.kind)}")


def _parts(tensors: Tensors) -> set[str]:
    """The part of the tensors' names behind the layer."""
    return {name.split(".", 2)[-1] for name in tensors}
