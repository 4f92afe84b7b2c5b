"""What changed between the transformers versions this package supports."""

from __future__ import annotations

import inspect

import transformers
from transformers.models.llama.modeling_llama import LlamaAttention

from rotatekv.errors import UserError

SUPPORTED_FROM, SUPPORTED_BELOW = (5, 23), (5, 25)

# transformers 5.24 renamed the argument and the output ``past_key_values`` to ``cache``.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def find_cache(kwargs: dict):
    """The cache among a forward's keyword arguments, under either name; None if there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def check_transformers_version() -> None:
    """Raises UserError, naming the version, outside the supported range."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not SUPPORTED_FROM <= version < SUPPORTED_BELOW:
        raise UserError(
            f"transformers {transformers.__version__} is not supported: pip install 'transformers>=5.23,<5.25'"
        )
