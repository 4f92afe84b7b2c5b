"""transformers' own ``QuantizedCache`` as an external baseline: an unpatched model, measured as ours are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from transformers import QuantizedCache

from rotatekv.cache.cache import RotateKVCache
from rotatekv.cache.spec import is_patched
from rotatekv.compat import check_versions
from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.patching.handle import PatchHandle
from rotatekv.patching.patch import patch_model

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_HANDLE = "_rotatekv_external"


@dataclass(frozen=True)
class ExternalConfig:
    """One of HF's caches; the numbers not given are transformers' defaults.

    transformers quantizes post-RoPE keys and values in groups of ``q_group_size`` consecutive channels of one token,
    returns the first call's tokens unquantized, and at every ``residual_length``-th later token unpacks and quantizes
    the whole cache again.

    Args:
        backend: ``quanto`` or ``hqq``, each a package of its own.
        nbits: bits per key and value number.
        axis: 0 for quanto (transformers' default); 1 for hqq, as its own README advises, since its 0 (transformers'
            default here too) would group numbers of different tokens.
        q_group_size: consecutive channels that share a scale and a shift, both in the model's dtype.
        residual_length: recent tokens kept in the model's dtype, at most.

    Raises:
        UserError: a residual_length under 1 (transformers would quantize the whole cache at every token).
    """

    backend: str
    nbits: int
    axis: int
    q_group_size: int = 64
    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.residual_length < 1:
            raise UserError(f"residual_length of HF's cache must be at least 1 token, not {self.residual_length}")

    @property
    def package(self) -> str:
        return PACKAGES[self.backend]

    def to_dict(self) -> dict:
        return {**self.settings(), "package": f"{self.package} {self.package_version()}"}

    def settings(self) -> dict:
        """``to_dict`` without the package's version, so that it needs no package."""
        return {"method": f"HF-{self.backend}", **asdict(self)}

    def package_version(self) -> str:
        """Raises UserError where the backend's package is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            raise UserError(f"HF-{self.backend}{self.nbits} needs {self.package}: pip install {self.package}") from None


EXTERNAL: dict[str, ExternalConfig] = {
    f"HF-{backend}{bits}": ExternalConfig(backend, bits, axis)
    for backend, axis in (("quanto", 0), ("hqq", 1))
    for bits in (2, 4)
}


@dataclass
class ExternalHandle:
    """An unpatched model and the HF cache it is to run with; has what evaluations read of a ``PatchHandle``."""

    model: nn.Module
    config: ExternalConfig
    fingerprint: str
    external = True

    def new_cache(self) -> QuantizedCache:
        """An empty cache.

        Raises:
            UserError: the backend is missing, too old, or does not fit the model.
        """
        config = self.config
        try:
            return QuantizedCache(
                backend=config.backend,
                config=self.model.config,
                nbits=config.nbits,
                axis_key=config.axis,
                axis_value=config.axis,
                q_group_size=config.q_group_size,
                residual_length=config.residual_length,
            )
        except (ImportError, ValueError) as error:
            raise UserError(f"HF's {config.backend} cache cannot be made: {error}") from None

    def __enter__(self) -> ExternalHandle:
        return self

    def __exit__(self, kind, error, trace) -> None:
        delattr(self.model, _HANDLE)
        if isinstance(error, RuntimeError) and _raising_module(trace).split(".")[0] in ("hqq", "optimum"):
            raise UserError(
                f"{self.config.package} cannot pack what HF's cache hands it ({error}): hqq packs "
                f"{8 // self.config.nbits} groups into a byte and takes no token count that leaves one over; "
                "choose another method or length"
            ) from None


def use_method(
    model: nn.Module, config: QuantConfig | ExternalConfig, calibration_file: str | Path | None = None
) -> PatchHandle | ExternalHandle:
    """The method a command names, for a ``with``: ``patch_model``, or the unpatched model beside HF's own cache.

    Inside, ``new_cache(model)`` makes the cache that every call is to be handed.

    Raises:
        UserError: as ``patch_model``; for HF's cache a missing package, a calibration file, or a shape it cannot take.
    """
    if isinstance(config, QuantConfig):
        return patch_model(model, config, calibration_file)
    check_versions()
    if calibration_file is not None:
        raise UserError(f"HF-{config.backend}{config.nbits} is not calibrated: leave out --calibration_file")
    if is_patched(model) or hasattr(model, _HANDLE):
        raise UserError("the model is in use by another method: leave its with block, or unpatch_model(model), first")
    text = model.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim % config.q_group_size:
        raise UserError(
            f"HF-{config.backend}{config.nbits} groups {config.q_group_size} channels, which head_dim {head_dim} is no "
            "multiple of: choose another method"
        )
    identity = {"model": model.name_or_path, "config": config.to_dict(), "layers": text.num_hidden_layers}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    handle = ExternalHandle(model, config, fingerprint)
    handle.new_cache()  # a backend that cannot be made says so before anything runs
    setattr(model, _HANDLE, handle)
    return handle


def new_cache(model: nn.Module) -> RotateKVCache | QuantizedCache:
    """An empty cache of the method the model is in use by.

    Raises:
        UserError: the model is neither patched nor in a ``use_method`` block.
    """
    handle = getattr(model, _HANDLE, None)
    return RotateKVCache.for_model(model) if handle is None else handle.new_cache()


def external_use(cache: QuantizedCache) -> dict:
    """``cache_use`` of HF's cache: what its tensors really take (codes, scales, shifts, recent tokens)."""
    first = cache.layers[0]
    rows, heads, _, head_dim = first._dequantize(first._quantized_keys).shape  # (B, H_kv, T, D)
    tokens = rows * cache.get_seq_length()
    numbers = tokens * heads * head_dim * len(cache.layers)  # of keys; as many of values
    held = {kind: sum(_bytes(layer, kind) for layer in cache.layers) for kind in ("keys", "values")}
    size = held["keys"] + held["values"]
    return {
        "tokens": tokens,
        "cache_bytes": size,
        "k_bits": 8 * held["keys"] / numbers,
        "v_bits": 8 * held["values"] / numbers,
        "total_bits": 4 * size / numbers,
    }


def _raising_module(trace) -> str:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "")


def _bytes(layer, kind: str) -> int:
    parts = (getattr(layer, kind), getattr(layer, f"_quantized_{kind}"))
    return sum(tensor.numel() * tensor.element_size() for tensor in _plain_tensors(parts))


def _plain_tensors(content) -> Iterator[torch.Tensor]:
    """Every plain tensor in nested tuples, dicts and tensor subclasses (quanto's hold packed codes and scales)."""
    if isinstance(content, dict):
        content = tuple(content.values())
    if isinstance(content, torch.Tensor) and hasattr(content, "__tensor_flatten__"):
        names, _ = content.__tensor_flatten__()
        content = tuple(getattr(content, name) for name in names)
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, tuple | list):
        for part in content:
            yield from _plain_tensors(part)
