"""What methods take from a calibration text: all kinds of statistics stored, found and checked.

Each kind of statistics has a file of its own per model, ``reorder_indices/<model><suffix>.safetensors``. A method names
its kind (``KVMethod.statistics_kind``) and gets the tensors of its layer by name. To add tensors to a kind: name them
in ``KINDS`` under a new format, and say in ``load_statistics`` what an older file means.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rotatekv.config import SUPPORTED_BITS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.files import write_output
from rotatekv.kernels.transform_coding import GROUP

_ROOT = Path(__file__).resolve().parent.parent
# The working folder, a checkout (or editable install), an installed wheel.
INDEX_FOLDERS = (Path("reorder_indices"), _ROOT / "reorder_indices", Path(__file__).parent / "reorder_indices")
_CHANNELS = ("channels",)  # H_kv·D


@dataclass(frozen=True)
class Kind:
    """One kind of statistics: what its file is called and holds.

    Args:
        title: for messages. suffix: of the file's name, behind the model's. flags: of calibrate_reorder.py to make it.
        without: how to do without, for messages.
        tensors: name → dtype and shape of each layer's part, in numbers and sizes of ``CalibrationTarget``; the first
            dimension is the layer.
        version: the ``format`` that is written and read.
    """

    title: str
    suffix: str
    flags: str
    without: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
    version: str = "1"

    @property
    def remake(self) -> str:
        return f"make it with calibrate_reorder.py{self.flags}"


KINDS = {
    "reorder": Kind(
        "reorder-indices",
        "",
        "",
        ", or do without (--Outlier_Aware_Key_Rotation False)",
        {"indices": (torch.int32, _CHANNELS)},
    ),
    "kvquant": Kind(
        "KVQuant-statistics",
        ".kvquant",
        " --statistics kvquant",
        "",
        {
            "key_offset": (torch.float32, _CHANNELS),
            "key_scale": (torch.float32, _CHANNELS),
            **{f"{x}_levels{bits}": (torch.float32, (2**bits,)) for x in ("key", "value") for bits in SUPPORTED_BITS},
        },
    ),
    "plus": Kind(
        "RotateKV+-statistics",
        ".plus",
        " --statistics plus",
        "",
        {
            "key_map": (torch.float16, ("heads", "head_dim", "head_dim")),
            "key_mean": (torch.float32, ("heads", "head_dim")),
            "key_cost": (torch.float32, ("heads", "groups")),
            "value_map": (torch.float16, ("heads", "head_dim", "head_dim")),
            "value_mean": (torch.float32, ("heads", "head_dim")),
            "value_cost": (torch.float32, ("heads",)),
            "sink_threshold": (torch.float32, (1,)),
        },
        version="2",
    ),
}


@dataclass(frozen=True)
class CalibrationTarget:
    """The model that statistics are wanted for.

    Args:
        heads: H_kv. head_dim: D. head_group_num: G as used, the heads rotated together.
        weights: as ``calibration_digests`` tells them; empty: unknown.
    """

    model_id: str
    num_layers: int
    heads: int
    head_dim: int
    head_group_num: int = 1
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def groups(self) -> int:
        return self.head_dim // GROUP

    def shape(self, sizes: Sequence[int | str]) -> tuple[int, ...]:
        """Of a tensor of all layers."""
        return self.num_layers, *(size if isinstance(size, int) else getattr(self, size) for size in sizes)


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


def save_statistics(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]
) -> Path:
    """Write a file of one of ``KINDS`` atomically; ``format``, ``statistics`` and ``date`` are filled in.

    Args:
        tensors: (num_hidden_layers, ...) each, those that ``KINDS[kind]`` names.
    """
    path = Path(path)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    filled_in = {"format": KINDS[kind].version, "statistics": kind, "date": date}
    texts = {**filled_in, **{key: str(value) for key, value in metadata.items()}}
    rows = {name: tensors[name].to(dtype).contiguous() for name, (dtype, _) in KINDS[kind].tensors.items()}
    write_output(path, save(rows, metadata=texts))
    return path


def load_statistics(kind: str, target: CalibrationTarget, path: str | Path | None = None) -> dict[str, torch.Tensor]:
    """A kind's tensors by the names that codecs use, (num_hidden_layers, ...) each.

    Args:
        path: a file of ours (reorder indices: or of the authors); ``None`` looks the model up by name.

    Raises:
        UserError: no file, a damaged or foreign one, or one for another model, other weights or another shape.
    """
    path = _existing(kind, target.model_id, target.head_group_num, path)
    if kind == "reorder":
        model = target.model_id, target.num_layers, target.channels, target.head_group_num
        found = load_reorder_indices(*model, path)
        _check_weights(kind, path, found.metadata, target)
        return {"reorder_index": found.indices}
    tensors, metadata = _read_tensors(kind, path)
    _check_model(kind, path, metadata, target.model_id, target.head_group_num)
    _check_weights(kind, path, metadata, target)
    _check_group(kind, path, metadata, target.model_id, target.head_group_num)
    for name, (_, sizes) in KINDS[kind].tensors.items():
        _check_numbers(kind, path, name, tensors[name], target.shape(sizes))
    return tensors


def load_reorder_indices(
    model_id: str, num_layers: int, channels: int, head_group_num: int, path: str | Path | None = None
) -> ReorderIndices:
    """Read and check a model's indices.

    Args:
        head_group_num: G as used, the heads rotated together.
        path: a ``.safetensors`` file of ours or a ``.pt`` of the authors; ``None`` looks the model up by name.

    Raises:
        UserError: no file, a damaged or foreign one, or one for another model, shape or G.
    """
    path = _existing("reorder", model_id, head_group_num, path)
    is_authors = path.suffix in (".pt", ".pth")
    found = _read_authors_tensor(path, (num_layers, channels)) if is_authors else _read_safetensors(path)
    _check(found, path, model_id, num_layers, channels, head_group_num)
    return replace(found, indices=found.indices.long())


def has_statistics(kind: str, model_id: str) -> bool:
    """Whether a model's own statistics are there, shipped or made."""
    return any((folder / file_name(kind, model_id)).is_file() for folder in INDEX_FOLDERS)


def file_name(kind: str, model_id: str) -> str:
    return f"{model_slug(model_id)}{KINDS[kind].suffix}.safetensors"


def _command(kind: str, model_id: str, group: int) -> str:
    """What makes statistics that fit the model as it is configured."""
    needs_group = kind == "reorder" and group != QuantConfig.head_group_num
    group_flag = f" --head_group_num {group}" if needs_group else ""
    return f"calibrate_reorder.py{KINDS[kind].flags} --model {model_id or 'MODEL'}{group_flag}"


def _existing(kind: str, model_id: str, group: int, path: str | Path | None) -> Path:
    path = Path(path) if path is not None else _find(kind, model_id, group)
    if not path.is_file():
        target = path.with_suffix(".safetensors")
        raise UserError(f"no calibration file {path}: make it with {_command(kind, model_id, group)} --output {target}")
    return path


def _find(kind: str, model_id: str, group: int) -> Path:
    title = KINDS[kind].title.replace("-", " ")
    if not model_id:
        raise UserError(f"the model has no name to find its {title} by: pass calibration_file")
    name = file_name(kind, model_id)
    for folder in INDEX_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no {title} for {model_id}: run {_command(kind, model_id, group)}, "
        f"or pass --calibration_file{KINDS[kind].without}"
    )


def _read_tensors(kind: str, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The kind's tensors and the metadata of a file."""
    wanted, made_by = KINDS[kind], KINDS[kind].remake
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != wanted.version or not set(wanted.tensors) <= set(file.keys()):
                raise UserError(f"{path} is not a {wanted.title} file of format {wanted.version}: {made_by}")
            return {name: file.get_tensor(name) for name in wanted.tensors}, metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): {made_by}") from None


def _read_safetensors(path: Path) -> ReorderIndices:
    tensors, metadata = _read_tensors("reorder", path)
    return ReorderIndices(tensors["indices"], metadata, _sha256(path))


def _read_authors_tensor(path: Path, shape: tuple[int, int]) -> ReorderIndices:
    """The authors' ``.pt``: a (L, C) tensor, a list of L rows or a dict of them. It names no model and no G.

    Args:
        shape: (L, C) of the model; others are refused before they are unfolded (a small file can name a huge view).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            content = [content[key] for key in sorted(content, key=lambda key: int(re.sub(r"\D", "", str(key)) or 0))]
        if isinstance(content, (list, tuple)):
            rows = [row if isinstance(row, torch.Tensor) else torch.tensor(row, device="cpu") for row in content]
            found = (len(rows), *{_check_plain_integers(row).numel() for row in rows})
        elif isinstance(content, torch.Tensor):
            rows, found = _check_plain_integers(content), tuple(content.shape)
        else:
            rows, found = [], ()
        if len(found) != 2:
            raise ValueError("no (layers, channels) table of integers")
        _check_shape(path, found, shape)
        indices = torch.stack([row.flatten().long() for row in rows])
    except UserError:
        raise
    except Exception as error:  # torch.load raises a dozen classes on foreign bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no table of reorder indices ({reason}): {_REMAKE}") from None
    return ReorderIndices(indices, {}, _sha256(path))


def _check_plain_integers(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
    if not plain or tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout).split(".")[-1]
        raise ValueError(f"a {kind} tensor of {str(tensor.dtype).split('.')[-1]}, not of plain integers")
    return tensor


def _check_shape(path: Path, shape: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if shape != wanted:
        raise UserError(f"{path} holds indices of shape {shape}, the model needs {wanted}: {_REMAKE}")


def _check(found: ReorderIndices, path: Path, model_id: str, num_layers: int, channels: int, group: int) -> None:
    indices = found.indices
    _check_model("reorder", path, found.metadata, model_id, group)
    if indices.is_floating_point() or indices.is_complex():
        raise UserError(f"{path} holds {indices.dtype} numbers, not indices: {_REMAKE}")
    _check_shape(path, tuple(indices.shape), (num_layers, channels))
    _check_group("reorder", path, found.metadata, model_id, group)
    rows = indices.long().sort(dim=-1).values
    counted = torch.arange(channels, dtype=torch.int64, device="cpu").expand_as(rows)
    if not torch.equal(rows, counted):
        bad = int((rows != counted).any(dim=-1).nonzero()[0, 0])
        raise UserError(f"{path}: row {bad} is not a permutation of 0 … {channels - 1}: {_REMAKE}")


def _check_group(kind: str, path: Path, metadata: Mapping[str, str], model_id: str, group: int) -> None:
    made_with = metadata.get("head_group_num")
    if made_with is not None and made_with != str(group):
        raise UserError(
            f"{path} was made for groups of {made_with} heads, not {group}: "
            f"run {_command(kind, model_id, group)} --output FILE.safetensors and pass it as --calibration_file"
        )


def _check_model(kind: str, path: Path, metadata: Mapping[str, str], model_id: str, group: int) -> None:
    made_for = metadata.get("model")
    if made_for is not None and not _same_model(made_for, model_id):
        raise UserError(
            f"{path} was made for {made_for}, not for {model_id}: "
            f"run {_command(kind, model_id, group)} --output FILE.safetensors and pass it as --calibration_file"
        )


def _check_weights(kind: str, path: Path, metadata: Mapping[str, str], target: CalibrationTarget) -> None:
    """A file that names no weights, or those of a dtype that cannot be compared, is taken by its model's name alone."""
    if any(metadata.get(name, digest) != digest for name, digest in target.weights.items()):
        raise UserError(
            f"{path} was made from other weights than {target.model_id} has now: make it with "
            f"{_command(kind, target.model_id, target.head_group_num)} --output {path} --overwrite"
        )


def _check_numbers(kind: str, path: Path, name: str, rows: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Numbers of the right dtype and shape: finite, scales above zero, costs not below, levels ascending, maps that can
    be undone."""
    made_by, dtype = KINDS[kind].remake, KINDS[kind].tensors[name][0]
    if rows.dtype != dtype:
        raise UserError(f"{path} holds {name} as {rows.dtype}, not {dtype}: {made_by}")
    if tuple(rows.shape) != shape:
        raise UserError(f"{path} holds {name} of shape {tuple(rows.shape)}, the model needs {shape}: {made_by}")
    damaged = not rows.isfinite().all()
    damaged |= "cost" in name and bool((rows < 0).any())
    damaged |= "map" in name and not damaged and _is_singular(rows)
    damaged |= "scale" in name and not bool(((rows > 0) & rows.reciprocal().isfinite()).all())
    damaged |= "levels" in name and bool((rows.diff(dim=-1) < 0).any())
    if damaged:
        raise UserError(f"{path}: {name} is not finite, positive, ascending or undoable as it must be: {made_by}")


def _is_singular(maps: torch.Tensor) -> bool:
    """Whether a map of (L, ..., D, D) cannot be undone; layers without attention have zeros."""
    of_attention = maps[maps.flatten(1).any(1)]
    return bool(torch.linalg.inv_ex(of_attention.float()).info.any())


def _same_model(one: str, other: str) -> bool:
    """Whole names must agree; a bare name, or a path against a Hub id, is held against the last part."""
    comparable = "/" in one and "/" in other and Path(one).is_absolute() == Path(other).is_absolute()
    return one.rstrip("/") == other.rstrip("/") if comparable else model_slug(one) == model_slug(other)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_REMAKE = KINDS["reorder"].remake
