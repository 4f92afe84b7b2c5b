"""Run the package's launches through triton's JIT for a GPU that is not here: compiled as there, and nothing launched.

Under ``DryRun`` the Triton kernels take CPU tensors. What a GPU refuses is refused: arguments that triton specializes,
dots it does not take, more shared memory than the card has, a grid out of bounds. What kernels write is left as it was,
so numbers mean nothing. TRITON_CACHE_DIR keeps what was compiled for the next process.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rotatekv.kernels import triton as kernels
from rotatekv.kernels.triton.start import unusable

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may take, by compute capability
_LARGEST_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel.

    Attributes:
        kernel: its name.
        shape: what it was written for, its constexpr arguments and its tensors' dtypes.
        registers: per thread. spills: bytes of stack and local memory per thread. shared: bytes per program.
        binary: the cubin.
    """

    kernel: str
    shape: tuple
    warps: int
    registers: int
    spills: int
    shared: int
    binary: bytes = field(repr=False)

    def instructions(self) -> str:
        """Its machine code, as ``cuobjdump -sass`` writes it."""
        return _cuobjdump("-sass", self.binary)


class DryRun(AbstractContextManager):
    """``with DryRun(90) as dry:`` and the calls in it are compiled for sm_90; one at a time, and not nested.

    Args:
        capability: a key of ``SHARED_MEMORY``.
        resources: read registers and spills of each kernel, for which triton's wheel must have ``cuobjdump``.

    Attributes:
        launches: how often each kernel was launched.
        compiled: every variant launched, in the order of their first launch.
        refused: kernel → why it did not compile or fit; torch did its work, as on a GPU.
    """

    def __init__(self, capability: int, resources: bool = False):
        if capability not in SHARED_MEMORY:
            raise ValueError(f"capability {capability}: choose one of {', '.join(map(str, SHARED_MEMORY))}")
        if kernels.interpreted():
            raise RuntimeError("TRITON_INTERPRET is set: a dry run needs triton's compiler, so unset it")
        self.capability, self.resources = capability, resources
        self.launches: Counter[str] = Counter()
        self._variants: dict[str, Compiled] = {}
        self._refused: dict[str, str] = {}
        self._undo: ExitStack | None = None

    def __enter__(self) -> DryRun:
        with ExitStack() as stack:
            held = vars(driver)  # the property would look for a GPU; up to triton 3.4 there is none
            stack.callback(driver.set_active, held.get("_active", held.get("active")))
            stack.callback(kernels.set_dry, False)
            stack.enter_context(patch.dict(os.environ, ROTATEKV_BACKEND="triton"))
            stack.enter_context(patch.dict(unusable, clear=True))
            driver.set_active(_Driver(self))
            kernels.set_dry(True)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._refused = self.refused
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    @property
    def refused(self) -> dict[str, str]:
        return self._refused if self._undo is None else {key[0]: reason for key, reason in unusable.items()}

    @property
    def compiled(self) -> list[Compiled]:
        return list(self._variants.values())

    def needless(self) -> list[str]:
        """Kernels compiled more than once for one shape; there should be none."""
        by_shape: Counter[tuple] = Counter()
        for variant in self.compiled:
            by_shape[variant.kernel, variant.shape] += 1
        return [f"{count} variants of {kernel} for {shape}" for (kernel, shape), count in by_shape.items() if count > 1]

    def _launch(self, source, metadata, *grid_and_arguments) -> None:
        grid = grid_and_arguments[:3]
        if not all(0 < size <= limit for size, limit in zip(grid, _LARGEST_GRID, strict=True)):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument (grid {grid})")
        self.launches[source.name] += 1

    def _load(self, source, metadata, binary: bytes) -> None:
        constants = {path[0]: value for path, value in source.constants.items()}
        shape = []
        for i, parameter in enumerate(source.fn.params):
            kind = source.signature[parameter.name]
            if parameter.is_constexpr:
                shape.append((parameter.name, constants[i]))
            elif kind.startswith("*"):
                shape.append((parameter.name, kind))
        registers, spills = _resources(binary) if self.resources else (0, 0)
        self._variants[metadata.hash] = Compiled(
            source.name, tuple(shape), metadata.num_warps, registers, spills, metadata.shared, binary
        )


class _Driver:
    """What triton's JIT asks of a driver. Each has a device of its own: triton keeps loaded kernels by device."""

    numbers = count(1000)

    def __init__(self, run: DryRun):
        self.run, self.utils, self._device = run, self, next(self.numbers)
        self._source: tuple = ()  # of the kernel that is compiled, and its metadata

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.run.capability, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.run.capability] * 1024, "multiprocessor_count": 132}

    def launcher_cls(self, source, metadata):
        self._source = source, metadata
        return partial(self.run._launch, source, metadata)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, most threads of a program)"""
        source, metadata = self._source
        self.run._load(source, metadata, binary)
        return name, name, 0, 0, 1024


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory, where spills go."""
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", binary))}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _cuobjdump(flag: str, binary: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(binary)
        command = [str(tool), flag, str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
