"""How far a piece of work drives memory above where it stood, on CUDA and, where Linux allows, on the CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SLACK = 8 << 20  # bytes by which the peak may stand over the resident size right after a reset


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``, then ``peak.growth``.

    CUDA: ``torch.cuda.max_memory_allocated`` over the allocated bytes at the start. CPU: the kernel's own high-water
    mark of the resident size (VmHWM), set back through ``/proc/self/clear_refs``, over the resident size at the start;
    it misses no short peak, as a sampling thread would, and needs no child process that loads the model again.

    Attributes:
        growth: bytes; None where the platform measures none (not Linux, or the mark cannot be set back).
    """

    def __init__(self, device: torch.device):
        self.device, self.growth = device, None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            _give_free_memory_back()
            self._start = _reset_mark()
        return self

    def __exit__(self, *exc_info) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.growth = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self._start is not None:
            self.growth = max(_status("VmHWM") - self._start, 0)


def measures_peak(device: torch.device) -> bool:
    """Whether ``PeakMemory`` has a number for this device."""
    return device.type == "cuda" or _reset_mark() is not None


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free for the taking now; None where the platform does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _reset_mark() -> int | None:
    """Set the high-water mark back to the resident size and return that, in bytes; None where it stays up."""
    try:
        _CLEAR.write_text("5")
        resident = _status("VmRSS")
        return resident if _status("VmHWM") - resident <= _SLACK else None
    except (OSError, LookupError):
        return None


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise LookupError(name)
    return int(found[1]) * 1024


def _give_free_memory_back() -> None:
    """Freed blocks that the C library holds back would hide that much growth; glibc has a call to return them."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
