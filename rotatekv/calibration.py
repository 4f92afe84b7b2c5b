"""Reorder indices for Outlier-Aware Rotation (paper section 4.2): made from a calibration text, stored, checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from rotatekv.attention import project_qkv
from rotatekv.errors import UserError
from rotatekv.files import write_atomically
from rotatekv.transforms import heads_to_channels, rotate_channels

FORMAT_VERSION = "1"
_ROOT = Path(__file__).resolve().parent.parent
# The working folder, a checkout (or editable install), an installed wheel.
INDEX_FOLDERS = (Path("reorder_indices"), _ROOT / "reorder_indices", Path(__file__).parent / "reorder_indices")


@dataclass(frozen=True)
class ReorderIndices:
    """One permutation of the rotated key channels per layer.

    Args:
        indices: (num_hidden_layers, H_kv·D) int64; reordered channel ``j`` is rotated channel ``indices[l, j]``.
        metadata: strings: model, revision, head_group_num, order, dataset, dataset_sha256, tokens, date.
    """

    indices: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""


def model_slug(model_id: str) -> str:
    """A model's name as a file name: the last part of its id or path, in lower case."""
    name = re.sub(r"[^a-z0-9._-]+", "-", model_id.rstrip("/").rsplit("/", 1)[-1].lower())
    return name.strip(".") or "model"


def collect_key_sums(model: nn.Module, text_model: nn.Module, windows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum the pre-RoPE keys over all tokens, per layer and channel, in one streamed pass.

    Memory does not grow with the text: rotation is linear, so the sum of rotated keys is the rotated sum.

    Args:
        model: not patched.
        windows: token ids, (1, T) each.

    Returns:
        (num_hidden_layers, H_kv·D) float64.
    """
    attentions = [layer.self_attn for layer in text_model.layers]
    sums: list[torch.Tensor | None] = [None] * len(attentions)

    def add_keys(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        keys = heads_to_channels(project_qkv(attention, hidden_states)[1])  # (B, T, H_kv·D)
        total = keys.double().sum(dim=(0, 1))
        slot = attention.layer_idx
        sums[slot] = total if sums[slot] is None else sums[slot] + total

    hooks = [attention.register_forward_pre_hook(add_keys, with_kwargs=True) for attention in attentions]
    try:
        with torch.no_grad():
            for window in windows:
                text_model(input_ids=window.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if sums[0] is None:
        raise UserError("the calibration text has no window to read")
    return torch.stack([total.cpu() for total in sums])


def indices_from_key_sums(key_sums: torch.Tensor, width: int) -> torch.Tensor:
    """argsort over channels of the signed sum of the rotated keys (ascending, ties in channel order).

    Args:
        key_sums: (num_hidden_layers, H_kv·D).
        width: channels per rotation group, G·D.

    Returns:
        (num_hidden_layers, H_kv·D) int64.
    """
    return torch.argsort(rotate_channels(key_sums.double(), width), dim=-1, stable=True)


def save_reorder_indices(path: str | Path, indices: torch.Tensor, metadata: dict[str, str]) -> Path:
    """Write the indices file atomically; ``format`` and ``date`` are filled in."""
    path = Path(path)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    metadata = {"format": FORMAT_VERSION, "date": date, **{key: str(value) for key, value in metadata.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"indices": indices.to(torch.int32).contiguous()}, metadata=metadata))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --output") from None
    return path


def load_reorder_indices(
    model_id: str,
    num_layers: int,
    channels: int,
    head_group_num: int,
    path: str | Path | None = None,
) -> ReorderIndices:
    """Read and check a model's indices.

    Args:
        head_group_num: G as used, the heads rotated together.
        path: a ``.safetensors`` file of ours or a ``.pt`` of the authors; ``None`` looks the model up by name.

    Raises:
        UserError: no file, a damaged or foreign one, or one for another model, shape or G.
    """
    path = Path(path) if path is not None else _find(model_id, head_group_num)
    if not path.is_file():
        raise UserError(f"no calibration file {path}: make it with calibrate_reorder.py --output {path}")
    found = _read_authors_tensor(path) if path.suffix in (".pt", ".pth") else _read_safetensors(path)
    _check(found, path, model_id, num_layers, channels, head_group_num)
    return replace(found, indices=found.indices.long())


def has_reorder_indices(model_id: str) -> bool:
    """Whether a model's own indices are there, shipped or made."""
    return any((folder / f"{model_slug(model_id)}.safetensors").is_file() for folder in INDEX_FOLDERS)


def _find(model_id: str, head_group_num: int) -> Path:
    if not model_id:
        raise UserError("the model has no name to find its reorder indices by: pass calibration_file")
    name = f"{model_slug(model_id)}.safetensors"
    for folder in INDEX_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no reorder indices for {model_id}: run calibrate_reorder.py --model {model_id}, pass --calibration_file, "
        "or do without (--Outlier_Aware_Key_Rotation False)"
    )


def _read_safetensors(path: Path) -> ReorderIndices:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT_VERSION or "indices" not in set(file.keys()):
                raise UserError(f"{path} is not a reorder-indices file of format {FORMAT_VERSION}: {_REMAKE}")
            indices = file.get_tensor("indices")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): {_REMAKE}") from None
    return ReorderIndices(indices, metadata, _sha256(path))


def _read_authors_tensor(path: Path) -> ReorderIndices:
    """The authors' ``.pt``: a (L, C) tensor, a list of L rows or a dict of them. It names no model and no G."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            content = [content[key] for key in sorted(content, key=lambda key: int(re.sub(r"\D", "", str(key)) or 0))]
        if isinstance(content, (list, tuple)):
            content = torch.stack([torch.as_tensor(row).flatten() for row in content])
        if not isinstance(content, torch.Tensor) or content.is_floating_point() or content.dim() != 2:
            raise ValueError("no (layers, channels) table of integers")
    except Exception as error:  # torch.load raises a dozen classes on foreign bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no table of reorder indices ({reason}): {_REMAKE}") from None
    return ReorderIndices(content.long(), {}, _sha256(path))


def _check(found: ReorderIndices, path: Path, model_id: str, num_layers: int, channels: int, group: int) -> None:
    indices = found.indices
    shape = tuple(indices.shape)
    made_for = found.metadata.get("model")
    if made_for is not None and not _same_model(made_for, model_id):
        raise UserError(f"{path} was made for {made_for}, not for {model_id}: {_REMAKE}")
    if indices.is_floating_point() or indices.is_complex():
        raise UserError(f"{path} holds {indices.dtype} numbers, not indices: {_REMAKE}")
    if len(shape) != 2 or shape != (num_layers, channels):
        raise UserError(f"{path} holds indices of shape {shape}, the model needs {(num_layers, channels)}: {_REMAKE}")
    made_with = found.metadata.get("head_group_num")
    if made_with is not None and made_with != str(group):
        raise UserError(
            f"{path} was made for groups of {made_with} heads, not {group}: "
            f"run calibrate_reorder.py --head_group_num {group} --output FILE and pass --calibration_file FILE"
        )
    rows = indices.long().sort(dim=-1).values
    if not torch.equal(rows, torch.arange(channels).expand_as(rows)):
        bad = int((rows != torch.arange(channels)).any(dim=-1).nonzero()[0, 0])
        raise UserError(f"{path}: row {bad} is not a permutation of 0 … {channels - 1}: {_REMAKE}")


def _same_model(one: str, other: str) -> bool:
    """Whole names must agree; a bare name, or a path against a Hub id, is held against the last part."""
    comparable = "/" in one and "/" in other and Path(one).is_absolute() == Path(other).is_absolute()
    return one.rstrip("/") == other.rstrip("/") if comparable else model_slug(one) == model_slug(other)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_REMAKE = "make it with calibrate_reorder.py"
