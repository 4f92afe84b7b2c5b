"""Where every kernel is launched: on the device of its tensors, and given up for good where it cannot run."""

from __future__ import annotations

import warnings

import torch

unusable: dict[tuple, str] = {}  # (kernel, device, constants, dtypes) → why


class Unusable(Exception):
    """A kernel does not compile for this shape, or does not fit the GPU; nothing was launched, so torch can do it."""


def start(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """``kernel[grid](*arguments, **constants)`` on the device of the first argument; an empty grid is no launch.

    Raises:
        Unusable: the kernel was refused for these constants and dtypes, now (with a warning) or before.
    """
    if 0 in grid:
        return
    if unusable and _key(kernel, arguments, constants) in unusable:
        raise Unusable
    try:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)
    except Exception as error:  # of triton, ptxas or the driver, each with classes of its own
        reason = unusable[_key(kernel, arguments, constants)] = _reason(error)
        where = f"{kernel.__name__} does not run on {arguments[0].device}, torch is slower and does: {reason}"
        warnings.warn(f"RotateKV's Triton kernel {where}", RuntimeWarning, stacklevel=4)
        raise Unusable from error


def _reason(error: BaseException) -> str:
    """One line. Triton says where in a kernel, and what only in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1].strip()}"


def _key(kernel, arguments: tuple, constants: dict) -> tuple:
    dtypes = tuple(x.dtype for x in arguments if isinstance(x, torch.Tensor))
    return kernel.__name__, arguments[0].device, tuple(constants.items()), dtypes
