"""Which weights are these? Digests of a checkpoint's files and of a loaded model's parameters, both from samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

# What from_pretrained looks for in a local folder, in its order; the first of the four that is there is what it loads.
_CHECKPOINTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PIECES, _PIECE_BYTES = 4, 64  # read of each tensor of a safetensors file
_PARTS = 1024  # of a file that is not, each read like a tensor
_SAMPLES = 64  # numbers of each parameter


def files_digest(folder: str | Path, file: str | None = None) -> str | None:
    """A digest of the weights in a local folder, wherever it lies and whatever it is called; None where it has none.

    Names, sizes, and some bytes of every tensor: a few thousand short reads for any model, and a layer that was trained
    on changes it.

    Args:
        file: the one file that is loaded (a GGUF); None takes what ``from_pretrained`` would.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    try:
        paths = [folder / file] if file is not None else _weight_files(folder)
        for path in paths:
            _add_file(digest, path)
    except OSError:  # loading the model will say what is wrong
        return None
    return digest.hexdigest()[:32] if paths else None


def weights_digest(module: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """A digest of the parameters: names, shapes and 64 numbers of each; None where they are not all in memory.

    Args:
        dtype: round floating-point numbers to it first; None takes them as they are.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        for tensor in _plain_tensors(parameter.detach()):
            if tensor.is_meta:
                return None
            digest.update(f"{name} {tuple(tensor.shape)} {dtype or tensor.dtype}".encode())
            if tensor.numel():
                digest.update(_sampled_bytes(tensor, dtype))
    return digest.hexdigest()[:32]


def calibration_digests(text_model: nn.Module) -> dict[str, str]:
    """What a calibration file knows its model's weights by: metadata of ``save_statistics``, empty if unknown.

    Statistics hold whatever 16 or 32 bits the same weights are loaded in, so the digest is of rounded numbers. float32
    weights give one for each 16-bit dtype; weights in 16 bits give that dtype's alone, as they cannot be told in the
    other, and weights that a library keeps packed give none.
    """
    if not all(map(_is_plain, text_model.parameters())):
        return {}
    loaded = next(text_model.parameters()).dtype
    known = (loaded,) if loaded in (torch.bfloat16, torch.float16) else (torch.bfloat16, torch.float16)
    digests = {dtype: weights_digest(text_model, dtype) for dtype in known}
    return {f"weights_{str(dtype).removeprefix('torch.')}": digest for dtype, digest in digests.items() if digest}


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and not hasattr(parameter.detach(), "__tensor_flatten__")


def _weight_files(folder: Path) -> list[Path]:
    checkpoint = next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    found = [folder / name for name in _ADAPTERS if (folder / name).is_file()]
    if checkpoint is None:
        return found
    if checkpoint.suffix != ".json":
        return [checkpoint, *found]
    try:
        shards = sorted(set(json.loads(checkpoint.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        shards = []
    return [*(folder / shard for shard in shards), *found]


def _add_file(digest, path: Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{path.name} {size}".encode())
        for begin, end in _spans(file, path, size):
            for piece in range(_PIECES):
                room = max(end - begin - _PIECE_BYTES, 0)
                file.seek(begin + room * piece // (_PIECES - 1))
                digest.update(file.read(min(_PIECE_BYTES, end - begin)))


def _spans(file, path: Path, size: int) -> list[tuple[int, int]]:
    """Where each tensor's bytes lie, and the header; of a file that does not say so, equal parts."""
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(min(start, size) - 8))
            offsets = sorted(tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__")
            return [(0, start), *((start + begin, start + end) for begin, end in offsets if end > begin)]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # no safetensors file after all
    return [(size * part // _PARTS, size * (part + 1) // _PARTS) for part in range(_PARTS)]


def _sampled_bytes(tensor: torch.Tensor, dtype: torch.dtype | None) -> bytes:
    last = tensor.numel() - 1
    places = [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]  # no multiple of a row's length
    sample = tensor.reshape(-1)[torch.tensor(places, dtype=torch.int64, device=tensor.device)]
    sample = sample.to(dtype) if dtype is not None and sample.is_floating_point() else sample
    return sample.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor, or those inside one of a quantizing library's subclasses."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))
