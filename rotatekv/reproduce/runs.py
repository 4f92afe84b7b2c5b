"""Runs behind the cells of reproduce.py: finding a finished one by its config, starting a missing one."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rotatekv.cli import evaluation_parser, preset_from_args
from rotatekv.config import QuantConfig
from rotatekv.errors import UserError
from rotatekv.evals.results import config_hash, read_metrics
from rotatekv.external import EXTERNAL
from rotatekv.families import find_text_model, layer_geometry
from rotatekv.methods import LayerGeometry, method_class
from rotatekv.models.text import ALIASES, known_weights, load_skeleton
from rotatekv.models.vision import RANDOM_LLAVA, VISION_ALIASES
from rotatekv.patching.patch import plan_fingerprint
from rotatekv.reproduce.plan import Calibration, Cell
from rotatekv.statistics import has_statistics, model_slug

ROOT = Path(__file__).resolve().parents[2]  # the scripts lie here: in a checkout, and beside an installed package
_SEED = 0
_GENERATE = ("gsm8k", "longbench", "needle", "milebench")
_UNKNOWN_WEIGHTS = "of an older version, which did not note the weights: remove its folder to run it again"


@dataclass(frozen=True)
class Outcome:
    """What a cell shows.

    Args:
        status: ``done``, ``not run`` or ``failed``.
        metrics: what metrics.json holds; None unless done. folder: the run's.
        reason: one line, where it failed, cannot be run here, or is of unknown weights.
    """

    status: str = "not run"
    metrics: dict | None = None
    folder: str = ""
    reason: str = ""


class Runs:
    """The runs under one ``--output_dir``.

    A finished run is taken for a cell where all that the cell's flags decide stands in its config, its weights are
    those the model has today, and its fingerprint is the one the model's shape and today's reorder indices give; of
    several (another dtype, say) the newest. Where a model's config is out of reach neither is compared. A run of a
    version that did not note its weights is taken where there is no other, and the table says so.
    """

    def __init__(self, output_dir: str | Path, limit: int | None = None, dtype: str = "auto"):
        self.output_dir, self.limit, self.dtype = Path(output_dir), limit, dtype

    @staticmethod
    @functools.cache
    def skeleton(model: str):
        """The model on the meta device; None where its config is out of reach, or it is made at random."""
        return None if model == RANDOM_LLAVA else load_skeleton(VISION_ALIASES.get(model, model))

    def weights(self, model: str) -> str | None:
        """Those the model has today; None where they are out of reach."""
        skeleton = self.skeleton(model)
        return None if skeleton is None else known_weights(skeleton)

    def geometry(self, model: str) -> LayerGeometry | None:
        skeleton = self.skeleton(model)
        return None if skeleton is None else layer_geometry(find_text_model(skeleton).layers[0].self_attn)

    def calibrated(self, cell: Cell, flags: tuple[str, ...]) -> Cell:
        """The cell, with a calibration of its own where its method needs statistics that the model has none of.

        Args:
            flags: what calibrate_reorder.py shares with the evaluations (``--data_dir``, ``--device``, …).
        """
        if cell.calibration is not None or cell.method in EXTERNAL or cell.model == RANDOM_LLAVA:
            return cell
        _, quant = _method_of(cell)
        name = {**ALIASES, **VISION_ALIASES}.get(cell.model, cell.model)
        kind = method_class(quant).statistics_kind(quant)
        if kind is None or has_statistics(kind, name):
            return cell
        return replace(cell, calibration=Calibration(kind, ("--model", cell.model, "--statistics", kind, *flags)))

    def command(self, cell: Cell) -> list[str]:
        """Script and flags, as they stand behind ``python``."""
        calibration = [] if cell.calibration is None else ["--calibration_file", str(self.calibration_file(cell))]
        return [cell.script, *cell.flags, *calibration, "--output_dir", str(self.output_dir), "--resume"]

    def calibration_file(self, cell: Cell) -> Path:
        flags = cell.calibration
        assert flags is not None
        known = [flags.flags, *filter(None, [self.weights(cell.model)])]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
        return self.output_dir / "tables" / "calibration" / f"{model_slug(cell.model)}-{flags.name}-{key}.safetensors"

    def calibration_command(self, cell: Cell) -> list[str] | None:
        """What makes a cell's reorder indices; None where it needs none, or they are there."""
        if cell.calibration is None or self.calibration_file(cell).is_file():
            return None
        return ["calibrate_reorder.py", *cell.calibration.flags, "--output", str(self.calibration_file(cell))]

    def find(self, cell: Cell) -> Outcome:
        """The finished run of a cell: ``done``, ``failed`` where it came to no number, or ``not run``, with the reason
        where it cannot be run here."""
        if cell.calibration is not None and not self.calibration_file(cell).is_file():
            return Outcome()
        wanted = self.wanted(cell)
        found = [
            ("weights" in metrics["config"], metrics.get("started", ""), str(path.parent), metrics)
            for path in (self.output_dir / cell.task / model_slug(cell.model)).glob("*/metrics.json")
            if (metrics := _read_run(path.parent)) is not None and self._fits(metrics, wanted, cell.task)
        ]
        if found:
            knows_weights, _, folder, metrics = max(found, key=lambda run: run[:3])
            value = metrics["metric"].get(cell.metric)
            if value is None or not math.isfinite(value):
                return Outcome("failed", folder=folder, reason=metrics.get("reason", f"{cell.metric} is {value}"))
            return Outcome("done", metrics, folder, "" if knows_weights else _UNKNOWN_WEIGHTS)
        if cell.method in EXTERNAL:
            try:
                EXTERNAL[cell.method].package_version()
            except UserError as error:
                return Outcome(reason=str(error))
        return Outcome()

    def wanted(self, cell: Cell) -> dict:
        """The fields of config.json that the cell's flags decide."""
        wanted = {"task": cell.task, "seed": _SEED, "attn_implementation": "sdpa", **dict(cell.protocol)}
        if self.dtype != "auto":
            wanted["dtype"] = self.dtype
        if (weights := self.weights(cell.model)) is not None:
            wanted["weights"] = weights
        if cell.method in EXTERNAL:
            return wanted | {"method": cell.method, "quant": EXTERNAL[cell.method].settings(), "external": True}
        name, quant = _method_of(cell)
        wanted |= {"method": name, "quant": quant.to_dict()}
        skeleton = self.skeleton(cell.model)
        if skeleton is not None:
            wanted["model"] = skeleton.name_or_path
            calibration_file = self.calibration_file(cell) if cell.calibration is not None else None
            try:
                wanted["fingerprint"] = plan_fingerprint(skeleton, quant, calibration_file)
            except UserError:
                wanted["fingerprint"] = None  # no run of it can be there; the script will say why
        return wanted

    def run(self, cell: Cell, log: Path) -> Outcome:
        """Start what the cell needs, as processes of its own, and find its run."""
        for command in (self.calibration_command(cell), self.command(cell)):
            if command is not None and (reason := _start(command, log)):
                return Outcome("failed", reason=reason)
        found = self.find(cell)
        if found.status == "done":
            return found
        return Outcome("failed", reason=f"the script ended well, but left no run that fits: see {log}")

    def _fits(self, metrics: dict, wanted: dict, task: str) -> bool:
        config = json.loads(json.dumps(metrics["config"]))
        if isinstance(config.get("quant"), dict):
            config["quant"].pop("package", None)
        if task in _GENERATE and "decoding" not in config:
            return False  # of a version that decoded as the checkpoint's generation config said
        as_json = json.loads(json.dumps(wanted))
        config.setdefault("weights", as_json.get("weights"))
        return all(config.get(name) == value for name, value in as_json.items()) and self._holds_enough(metrics, task)

    def _holds_enough(self, metrics: dict, task: str) -> bool:
        if not metrics.get("partial", True):
            return True
        if self.limit is None:
            return False
        if task in ("ppl", "gsm8k", "needle"):  # there --limit counts samples; elsewhere records of each task
            return metrics["n"] >= self.limit
        limit = re.search(r"--limit[ =](\d+)", metrics.get("argv", ""))
        return limit is not None and int(limit[1]) >= self.limit


def _method_of(cell: Cell) -> tuple[str, QuantConfig]:
    """What the script makes of the cell's flags; not of an external method."""
    return preset_from_args(evaluation_parser("", "").parse_known_args(list(cell.flags))[0])


def shown(command: Sequence[str]) -> str:
    return shlex.join(["python", *command])


def _start(command: Sequence[str], log: Path) -> str:
    """Run a script of ours to its end → why it failed, in one line; empty where it did not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # we were interrupted: what the script finished is on disk
                process.terminate()
                process.wait()
    if code == 0:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace"))]
    last = next((line for line in reversed(lines) if line), "no output")
    said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), last)
    return f"killed by signal {-code}" if code < 0 else said


def _read_run(folder: Path) -> dict | None:
    """A run's metrics.json; None where it is damaged or its config is not the one its folder is named after."""
    try:
        metrics = read_metrics(folder) or {}
    except UserError:
        return None
    whole = {"n", "avg_bits", "cache_bytes_per_token", "seconds"} <= set(metrics)
    return metrics if whole and config_hash(metrics["config"]) == folder.name else None
