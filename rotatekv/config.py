"""What to quantize and how: the frozen ``QuantConfig`` and the presets the scripts name with ``--method``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace

from rotatekv.errors import UserError

SUPPORTED_BITS = (2, 3, 4)
LEAST_BITS, MOST_BITS = 1.0, 4.5  # on average, of a budget
SINK_SELECTIONS = ("detected", "first", "massive")


def _flag(default, text: str):
    """A field with its flag's help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class QuantConfig:
    """Every choice of one run's KV cache. Each field is a flag of the scripts, and ``--help`` shows what is said here.

    Names are the paper's and its repository's flags. A field that means nothing to ``method`` keeps its preset's value.

    Raises:
        UserError: a value outside its range.
    """

    # The codec, a file in rotatekv/methods/. It has no flag of its own: --method names a preset.
    method: str = "rotatekv"
    k_bits: int = _flag(2, "bits per key number: 2, 3 or 4")
    v_bits: int = _flag(2, "bits per value number: 2, 3 or 4")
    k_groupsize: int | None = _flag(
        None,
        "key channels of a token that share a scale, a divisor of num_key_value_heads * head_dim; KIVI: tokens of a "
        "channel, any number (32 where none is given)",
    )
    v_groupsize: int | None = _flag(None, "value channels of a token that share a scale, a divisor of head_dim")
    k_clip_ratio: float = _flag(1.0, "factor on a key group's maximum and minimum, in (0, 1] (paper: 0.8 at 2 bits)")
    v_clip_ratio: float = _flag(1.0, "factor on a value group's maximum and minimum, in (0, 1]")
    head_group_num: int = _flag(
        4,
        "key heads rotated together, at most: the largest divisor of num_key_value_heads up to it with a Hadamard "
        "matrix; 1 rotates each head alone",
    )
    Grouped_Head_Key_Rotation: bool = _flag(
        True, "rotate grouped heads before RoPE; False: each head after RoPE, as in QuaRot"
    )
    Outlier_Aware_Key_Rotation: bool = _flag(True, "reorder the rotated key channels with calibrated indices")
    Attention_Sink_Aware: bool = _flag(True, "keep some tokens unquantized, the attention sinks")
    num_sink_entries: int = _flag(
        20, "largest hidden-state entries of a layer and sequence that name those tokens (paper: 20)"
    )
    sink_selection: str = _flag(
        "detected",
        "which tokens: detected, those with massive activations (paper); first, the first num_sink_entries tokens of "
        "a sequence (KVQuant); massive, any token with an entry above a calibrated threshold (RotateKV+)",
    )
    residual_length: int = _flag(
        0, "most recent tokens kept unquantized (KIVI: up to k_groupsize - 1 more; RotateKV+: up to 15 more)"
    )
    residual_bits: int = _flag(
        16, "bits per number of those tokens: 16, or 8 with a scale for 32 channels of a token (RotateKV+)"
    )
    bits: float | None = _flag(
        None,
        "bits per packed number, tokens' scales included, of keys and values together, on average over the layers "
        "(RotateKV+)",
    )
    quantize_prefill: bool = _flag(
        True,
        "the first call's queries see keys and values as they decode (paper); False: exact ones, as in KIVI and "
        "transformers; what is stored of them is the same",
    )

    def __post_init__(self) -> None:
        for choice in fields(self):
            self._check_type(choice.name, getattr(self, choice.name), choice.type.split(" ")[0])
        for name in ("k_bits", "v_bits"):
            if getattr(self, name) not in SUPPORTED_BITS:
                raise UserError(f"{name} must be 2, 3 or 4, not {getattr(self, name)}")
        for name in ("k_groupsize", "v_groupsize"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"{name} must be at least 1, not {size}")
        for name in ("k_clip_ratio", "v_clip_ratio"):
            ratio = getattr(self, name)
            if not (math.isfinite(ratio) and 0.0 < ratio <= 1.0):
                raise UserError(f"{name} must lie in (0, 1], not {ratio}")
        if self.head_group_num < 1:
            raise UserError(f"head_group_num must be at least 1 head, not {self.head_group_num}")
        if self.num_sink_entries < 1:
            raise UserError("num_sink_entries must be at least 1; --Attention_Sink_Aware False keeps no sinks")
        if self.sink_selection not in SINK_SELECTIONS:
            raise UserError(f"sink_selection must be one of {', '.join(SINK_SELECTIONS)}, not {self.sink_selection!r}")
        if self.bits is not None and not LEAST_BITS <= self.bits <= MOST_BITS:  # not NaN either
            raise UserError(f"bits must lie in [{LEAST_BITS}, {MOST_BITS}], not {self.bits}")
        if self.residual_length < 0:
            raise UserError(f"residual_length must be 0 or more tokens, not {self.residual_length}")
        if self.residual_bits not in (8, 16):
            raise UserError(f"residual_bits must be 8 or 16, not {self.residual_bits}")

    @staticmethod
    def _check_type(name: str, value: object, kind: str) -> None:
        if value is None and (name.endswith("groupsize") or name == "bits"):
            return
        kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind != "bool"):
            raise UserError(f"{name} must be of type {kind}, not {value!r}")

    def to_dict(self) -> dict:
        """By name; without what later versions added where it means nothing, so that earlier runs are found again."""
        neutral = {"quantize_prefill": True, "residual_bits": 16}
        return {name: value for name, value in asdict(self).items() if value != neutral.get(name)}


def baseline(method: str, bits: int, **changes) -> QuantConfig:
    """A preset of a method that has none of RotateKV's parts: no grouped rotation, no reordering, no sinks."""
    plain = QuantConfig(
        method,
        k_bits=bits,
        v_bits=bits,
        head_group_num=1,
        Grouped_Head_Key_Rotation=False,
        Outlier_Aware_Key_Rotation=False,
        Attention_Sink_Aware=False,
    )
    return replace(plain, **changes)


PRESETS: dict[str, QuantConfig] = {}  # by name; each method's file in rotatekv/methods/ adds its own


def resolve_config(config: str | QuantConfig) -> QuantConfig:
    """A preset's name or a config → the config.

    Raises:
        UserError: no preset of that name.
    """
    if isinstance(config, QuantConfig):
        return config
    if not isinstance(config, str) or config not in PRESETS:
        raise UserError(f"unknown method {config!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[config]
