"""How the kernels in C++ are called."""

from __future__ import annotations

import ctypes

import torch

from rotatekv.kernels.cpu.build import load_library

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # what C++ calls them


def call_library(library: str, arguments: ctypes.Structure, instruction_set: str | None) -> None:
    loaded = load_library(library, instruction_set)
    if loaded is None:
        raise RuntimeError("RotateKV's CPU kernel is not available")
    if message := loaded.entry(ctypes.byref(arguments)):
        raise ValueError(message.decode())
