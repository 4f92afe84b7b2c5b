"""What ``patch_model`` leaves on a model, and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from rotatekv.cache.spec import CacheSpec, is_patched
from rotatekv.config import QuantConfig
from rotatekv.patching.changes import Changes
from rotatekv.rope import ModelRope


@dataclass
class PatchHandle:
    """What ``patch_model`` did to a model. ``with patch_model(...) as handle:`` undoes it at the end.

    Attributes:
        fingerprint: as ``plan_fingerprint`` tells it; the cache's knows the weights too.
    """

    model: nn.Module
    text_model: nn.Module
    held_spec: CacheSpec
    fingerprint: str
    warned_of_padding: bool = False
    changes: Changes = field(default_factory=Changes, repr=False)

    external = False  # as against HF's own cache: rotatekv/external.py

    @property
    def config(self) -> QuantConfig:
        return self.held_spec.config

    @property
    def rope(self) -> ModelRope | None:
        return next((rope.model for rope in self.held_spec.ropes if rope is not None), None)

    @property
    def spec(self) -> CacheSpec:
        """With the model's own RoPE, as a copied model has another ``rotary_emb``."""
        if self.rope is not None and self.rope.rotary is not self.text_model.rotary_emb:
            rope = ModelRope(self.text_model)
            ropes = tuple(None if layer is None else replace(layer, model=rope) for layer in self.held_spec.ropes)
            self.held_spec = replace(self.held_spec, ropes=ropes)
        return self.held_spec

    def undo(self) -> None:
        """Take everything out."""
        self.changes.undo()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info) -> None:
        if is_patched(self.model):
            self.undo()
