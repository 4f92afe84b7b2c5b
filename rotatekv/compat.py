"""The torch, transformers and triton that this package runs with, and what differs between them."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from dataclasses import dataclass

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention

from rotatekv.errors import UserError


@dataclass(frozen=True)
class Versions:
    """Of one package, by the first two numbers: refused below ``oldest`` and from ``below`` on.

    ``tested`` names the first and the last that the tests have run with; outside of it there is one warning.
    """

    oldest: str
    tested: tuple[str, str]
    below: str

    @property
    def specifier(self) -> str:
        """As in pyproject.toml and for pip."""
        return f">={self.oldest},<{self.below}"


SUPPORTED = {
    "torch": Versions("2.6", ("2.6", "2.15"), "3"),
    "transformers": Versions("5.16", ("5.17", "5.24"), "6"),
    "triton": Versions("3.6", ("3.6", "3.9"), "4"),
}

# transformers 5.24 renamed the argument and the output ``past_key_values`` to ``cache``.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def find_cache(kwargs: dict):
    """The cache among a forward's keyword arguments, under either name; None if there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def disable_compiler(reason: str):
    """``torch.compiler.disable(reason=reason)``; torch 2.6 takes no reason."""
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(**({"reason": reason} if takes_reason else {}))


_disabled = disable_compiler("a patched model's attention runs outside of compiled graphs: leave out fullgraph=True")


def outside_compiled_graphs(function):
    """Lengths that change at each call, in-place writes and kernels of our own are no compiler's business.

    A layer of a compiled model has graphs before, between and after them. The compiler's own switch costs microseconds
    a call, so it is in use only where a compiler asks.
    """
    disabled = _disabled(function)

    @functools.wraps(function)
    def outside(*args, **kwargs):
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return outside


def check_versions() -> None:
    """Raises UserError, naming the version, for a torch or transformers that does not do; warns of an untested one."""
    check_version("torch", str(torch.__version__))
    check_version("transformers", transformers.__version__)


@functools.cache  # so that it warns once
def check_version(package: str, version: str) -> None:
    """Raises UserError outside the limits of ``SUPPORTED[package]``, warns outside what is tested."""
    known, found = SUPPORTED[package], series(version)
    if not series(known.oldest) <= found < series(known.below):
        raise UserError(f"{package} {version} is not supported: pip install '{package}{known.specifier}'")
    first, last = known.tested
    if not series(first) <= found <= series(last):
        told = f"RotateKV was not tested with {package} {version} (tested: {first} to {last})"
        warnings.warn(told, RuntimeWarning, stacklevel=3)


def series(version: str) -> tuple[int, ...]:
    """The first two numbers: 5.24.1.dev0 → (5, 24), 6 → (6,)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
