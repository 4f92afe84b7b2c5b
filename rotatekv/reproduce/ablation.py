"""The rows of the ablation table: the paper's four steps, and each choice alone against RotateKV2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rotatekv.config import PRESETS, QuantConfig
from rotatekv.errors import UserError
from rotatekv.methods import LayerGeometry
from rotatekv.methods.rotatekv import RotateKV, key_heads_per_group
from rotatekv.reproduce.plan import Calibration, Cell, Options, ppl_cell

METHOD, NOT_CALIBRATED = "RotateKV2", ("--Outlier_Aware_Key_Rotation", "False")
_NO_CLIP = ("--k_clip_ratio", "1.0", "--v_clip_ratio", "1.0")
_NO_SINKS = ("--Attention_Sink_Aware", "False")
_BARE = (*_NO_CLIP, *_NO_SINKS, *NOT_CALIBRATED)
_TEXTS, _LENGTHS = ("essays", "wikitext2"), (2048, 8192, 32768)

# label, flags, the paper's row: cumulatively, as in its ablation.
_STEPS = (
    ("rotation, per head after RoPE", (*_BARE, "--Grouped_Head_Key_Rotation", "False"), "rotation"),
    ("+ grouped heads before RoPE", _BARE, "grouped heads"),
    ("+ sinks", (*_NO_CLIP, *NOT_CALIBRATED), "sinks"),
    ("+ reordering", _NO_CLIP, "reordering"),
    ("+ clip 0.8 = RotateKV2", (), ""),
)


@dataclass(frozen=True)
class _Row:
    """A row of the table. ``paper`` names the paper's row; ``dataset`` is another than the table's."""

    group: str
    label: str
    flags: tuple[str, ...] = ()
    method: str = METHOD
    paper: str = ""
    calibration: Calibration | None = None
    dataset: str | None = None


def ablation_cells(
    model: str, options: Options, figures: dict, geometry: LayerGeometry | None, calibration_flags: tuple[str, ...]
) -> list[Cell]:
    """All cells of one model.

    Args:
        geometry: the model's; None where it is out of reach, so that rows it cannot have are left in, and fail.
        calibration_flags: what calibrate_reorder.py shares with the evaluations (``--data_dir``, ``--device``, …).
    """
    found = []
    for row in _rows(geometry):
        calibration = row.calibration
        if calibration is not None:
            calibration = replace(calibration, flags=("--model", model, *calibration.flags, *calibration_flags))
        cell = ppl_cell(model, row.method, options, flags=row.flags, dataset=row.dataset)
        paper = figures.get(("ablation", model, row.paper))
        cell = replace(cell, table="ablation", group=row.group, label=row.label)
        found.append(replace(cell, calibration=calibration, paper=paper))
    return found


def _rows(geometry: LayerGeometry | None) -> Iterator[_Row]:
    yield _Row("steps", "plain rounding", method="RTN2")
    for label, flags, paper in _STEPS:
        yield _Row("steps", label, flags, paper=paper)
    for size in (32, 64, 96, 128):
        # Values share a scale within a head; a size that no head holds is for the keys alone.
        values = ("--v_groupsize", str(size)) if geometry is None or geometry.head_dim % size == 0 else ()
        if _fits(geometry, QuantConfig(k_groupsize=size)):
            label = f"{size} channels" if values else f"{size} channels (keys alone)"
            yield _Row("group size", label, ("--k_groupsize", str(size), *values), paper=f"g = {size}")
    yield from _head_rows(geometry)
    for count in (0, 5, 20, 40):
        yield _Row("sinks", f"{count} entries", ("--num_sink_entries", str(count)) if count else _NO_SINKS)
    for count in (5, 20):
        flags = ("--sink_selection", "first", "--num_sink_entries", str(count))
        yield _Row("sinks", f"first {count} tokens", flags)
    for ratio in (0.7, 0.8, 0.9, 1.0):
        yield _Row("clip ratio", f"{ratio}", _clips(ratio, ratio))
    for text in _TEXTS:
        for length in _LENGTHS:
            yield _Row("calibration", f"{text}, {length} tokens", calibration=_calibration(text, length))
    for text in _TEXTS:
        label = f"{text}, {_LENGTHS[-1]} tokens, measured on the essays"
        yield _Row("calibration", label, calibration=_calibration(text, _LENGTHS[-1]), dataset="essays")
    for k_bits, v_bits in ((2, 3), (3, 2), (2, 4), (4, 2), (3, 4), (4, 3)):
        clips = _clips(*(PRESETS[f"RotateKV{bits}"].k_clip_ratio for bits in (k_bits, v_bits)))
        yield _Row(
            "bits", f"keys {k_bits}, values {v_bits}", ("--k_bits", str(k_bits), "--v_bits", str(v_bits), *clips)
        )


def _head_rows(geometry: LayerGeometry | None) -> Iterator[_Row]:
    for heads in (1, 2, 3, 4):
        config = QuantConfig(head_group_num=heads)
        if geometry is not None and key_heads_per_group(config, geometry) != heads:
            continue  # no such group in this model: it would be a smaller one's row again
        flags = ("--head_group_num", str(heads))
        calibration = Calibration(f"{heads}-heads", (*flags, "--dataset", "essays"))
        yield _Row("heads per group", f"{heads} heads", flags, calibration=calibration)
        yield _Row("heads per group", f"{heads} heads, no reordering", (*flags, *NOT_CALIBRATED))


def _calibration(text: str, length: int) -> Calibration:
    return Calibration(f"{text}-{length}", ("--dataset", text, "--calibration_tokens", str(length)))


def _clips(keys: float, values: float) -> tuple[str, ...]:
    return ("--k_clip_ratio", str(keys), "--v_clip_ratio", str(values))


def _fits(geometry: LayerGeometry | None, config: QuantConfig) -> bool:
    """Whether the model's keys can have these groups."""
    if geometry is None:
        return True
    try:
        RotateKV(replace(config, Outlier_Aware_Key_Rotation=False), geometry)
    except UserError:
        return False
    return True
