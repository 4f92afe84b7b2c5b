"""Triton's interpreter, as the cases that run under it need it: imported before any kernel runs."""

from __future__ import annotations

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor, *scope) -> None:
    """Up to 3.6, triton's interpreter takes int() of an array of one number, which numpy 2.4 refuses."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_for_numpy
