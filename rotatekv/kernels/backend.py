"""Which package of fused kernels serves a device: ``kernels.cpu``, ``kernels.triton``, or none, where torch does it.

Both packages offer ``quantize_into_blocks``, ``dequantize_blocks`` and ``decode_attention``, and of transform-coded
tokens ``quantize_into_frames`` and ``read_components``, with the same arguments. They say in ``READS_TOKEN_GROUPS``
whether ``dequantize_blocks`` and ``decode_attention`` read scales per channel over groups of tokens (``layout.py``),
in ``ATTENDS_TO_BANDS`` whether they have ``attend_to_bands``, and in ``READS_HEADS`` whether ``read_heads``.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from rotatekv.errors import UserError
from rotatekv.kernels import cpu, triton

_TRACED = "torch.compile traces the cache: torch decodes there, not the fused kernels; compile the whole model instead"
BACKENDS = ("reference", "cpu", "triton")


def backend() -> str | None:
    """``ROTATEKV_BACKEND``; None where it is not set: ``cpu`` for tensors on the CPU, ``triton`` on a GPU.

    Raises:
        UserError: a backend of another name.
    """
    name = os.environ.get("ROTATEKV_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise UserError(f"ROTATEKV_BACKEND={name} is not a backend: choose {', '.join(BACKENDS)}, or leave it out")
    return name


def kernels_on(device: torch.device) -> ModuleType | None:
    """The fused kernels for tensors of this device; None: plain torch, as asked for or where nothing else runs.

    Raises:
        UserError: the backend asked for does not run on this device.
    """
    asked = backend()
    if asked == "reference":
        return None
    if torch.compiler.is_compiling():  # a patched model does not come here: attention.outside_compiled_graphs
        warnings.warn(_TRACED, stacklevel=2)
        return None
    package: ModuleType
    if (asked or ("cpu" if device.type == "cpu" else "triton")) == "cpu":
        package, runs = cpu, device.type == "cpu" and cpu.available()
        needs = "g++, ROTATEKV_CPU_KERNEL not off, and tensors on the CPU"
    else:
        package, runs, needs = triton, triton.available(device), triton.needs()
    if asked and not runs:
        raise UserError(f"ROTATEKV_BACKEND={asked} needs {needs} (these are on {device}): fix that, or leave it out")
    return package if runs else None


def queries_for(package: ModuleType, queries: torch.Tensor) -> torch.Tensor:
    """Queries as ``package.decode_attention`` takes them: the CPU's in float32, a GPU's in 16 bits too."""
    return (queries if package is triton and queries.dtype.itemsize == 2 else queries.float()).contiguous()
