"""RotateKV: a 2-bit KV cache for Hugging Face models by outlier-aware rotations (arXiv 2501.16383)."""

from rotatekv import interrupts  # noqa: F401 (before what takes seconds to import)
from rotatekv.cache.cache import RotateKVCache
from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.models.text import load_model
from rotatekv.patching.patch import patch_model, unpatch_model
from rotatekv.version import __version__

__all__ = [
    "PRESETS",
    "QuantConfig",
    "RotateKVCache",
    "UserError",
    "__version__",
    "load_model",
    "patch_model",
    "unpatch_model",
]
