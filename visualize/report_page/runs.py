"""Reads run folders for the report: json only, and what is damaged becomes a line instead of a crash."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.evals.results import read_metrics

TASK_ORDER = ("ppl", "gsm8k", "longbench", "needle", "milebench")
_RUN_FILES = ("config.json", "metrics.json", "samples.jsonl")


@dataclass
class RunRecord:
    """One run as its folder tells it. ``metrics`` is None for a run that was broken off."""

    folder: Path
    task: str
    config: dict
    metrics: dict | None
    samples: list[dict] = field(default_factory=list)
    settings: str = ""

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        return _text(self.config.get("method")) or "unknown method"

    @property
    def model(self) -> str:
        return _text(self.config.get("model")) or self.folder.parent.name or "unknown model"

    @property
    def dataset(self) -> str:
        return _text(self.config.get("dataset"))

    @property
    def environment(self) -> dict:
        return _mapping(self._of("env"))

    @property
    def started(self) -> datetime | None:
        return moment(self._of("started"))

    @property
    def scores(self) -> dict[str, float | None]:
        """The task's metrics, nested ones under ``outer/inner``; None for what is no number."""
        return {name: number(value) for name, value in flat(_mapping(self._of("metric"))).items()}

    @property
    def reason(self) -> str:
        """Why a run that came to its end has no number; empty for one that has."""
        return _text(self._of("reason"))

    @property
    def state(self) -> str:
        if self.metrics is None:
            return "unfinished"
        if self.reason:
            return "no result"
        return "partial" if self._of("partial") else "complete"

    def measured(self, *names: str) -> float | None:
        """A number of metrics.json, by its path of keys."""
        value = self._of(names[0])
        for name in names[1:]:
            value = _mapping(value).get(name)
        return number(value)

    def command(self) -> str:
        """The command that made the run, ready to paste; empty where it is not known."""
        argv = _text(self._of("argv"))
        processes = number(self.environment.get("world_size")) or 1
        launcher = "python" if processes <= 1 else f"torchrun --nproc_per_node {processes:.0f}"
        return f"{launcher} {argv}" if argv else ""

    def device(self) -> str:
        gpu, threads = _text(self.environment.get("gpu")), number(self.environment.get("threads"))
        return gpu or ("CPU" if threads is None else f"CPU, {threads:.0f} threads")

    def _of(self, name: str):
        return (self.metrics or {}).get(name)


def collect_runs(inputs: Iterable[Path]) -> tuple[list[RunRecord], list[str]]:
    """Every run under the folders, in an order that does not depend on the file system, and what could not be read."""
    runs: list[RunRecord] = []
    problems: list[str] = []
    for folder in _run_folders(inputs):
        run = _read_run(folder, problems)
        if run is not None:
            runs.append(run)
    runs.sort(key=_place)
    for task in {run.task for run in runs}:
        _name_settings([run for run in runs if run.task == task])
    return runs, problems


def number(value) -> float | None:
    """A json number; None for anything else, one too large for a float included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def moment(text) -> datetime | None:
    """An ISO time as UTC."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)


def flat(content: dict, prefix: str = "", joint: str = "/") -> dict:
    """A nested json object as one level, its keys joined; an empty object has no entry."""
    found: dict = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}{joint}", joint)
        else:
            found[f"{prefix}{name}"] = value
    return found


def natural(text: str) -> list:
    """Sort key under which ``task/10`` comes after ``task/9``: text and numbers take turns in it."""
    parts = re.split(r"(\d{1,18})", text, flags=re.ASCII)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _run_folders(inputs: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for root in inputs:
        for name in _RUN_FILES:
            for path in root.rglob(name):
                found.setdefault(path.parent.resolve(), path.parent)
    return sorted(found.values())


def _read_run(folder: Path, problems: list[str]) -> RunRecord | None:
    """None for a folder of something else, and for a run whose json is damaged, which ``problems`` then names."""
    try:
        metrics, config = read_metrics(folder), _read_config(folder / "config.json")
    except UserError as error:
        problems.append(f"{error}; this run is left out")
        return None
    samples = _read_samples(folder, problems)
    if config is None:
        config = metrics["config"] if metrics else {}
    if metrics is None and not config:
        problems.append(f"{folder} has samples but no config.json")
        return None
    if metrics is None and "task" not in config and not samples:
        return None  # a model's config.json, say
    task = _text((metrics or {}).get("task")) or _text(config.get("task")) or folder.parent.parent.name or "unknown"
    return RunRecord(folder, task, config, metrics, samples)


def _read_config(path: Path) -> dict | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: the same command with --overwrite writes it anew")
    return config


def _read_samples(folder: Path, problems: list[str]) -> list[dict]:
    """All samples in the order of their ids, those of ranks that were killed included."""
    found: dict[str, dict] = {}
    for path in [folder / "samples.jsonl", *sorted(folder.glob("samples.rank*.jsonl"))]:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror}): its samples are left out")
            continue
        for place, line in enumerate(lines, start=1):
            sample = _sample_of(line)
            if sample is not None:
                found[str(sample["id"])] = sample
            elif place < len(lines):  # a torn last line is what a kill leaves, and no damage
                problems.append(f"{path}: line {place} is damaged and left out")
    return [found[name] for name in sorted(found, key=natural)]


def _sample_of(line: bytes) -> dict | None:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return sample if isinstance(sample, dict) and "id" in sample else None


def _place(run: RunRecord) -> tuple:
    known = TASK_ORDER.index(run.task) if run.task in TASK_ORDER else len(TASK_ORDER)
    names = list(PRESETS)
    preset = _preset_name(run)
    method = names.index(preset) if preset in PRESETS else len(names)
    started = run.started.isoformat() if run.started else ""
    return known, run.task, run.model, run.dataset, method, run.method, started, str(run.folder)


def _preset_name(run: RunRecord) -> str:
    return run.method.removesuffix("*")


def _name_settings(runs: list[RunRecord]) -> None:
    """What sets a run apart from its preset and from the task's other runs, which the method's name does not say."""
    beside = {"task", "model", "method", "quant", "fingerprint", "weights", "dataset", "dataset_sha256"}
    names = sorted({name for run in runs for name in run.config} - beside)
    varying = [name for name in names if len({_canonical(run.config.get(name)) for run in runs}) > 1]
    for run in runs:
        protocol = {name: run.config[name] for name in varying if run.config.get(name) is not None}
        changes = _preset_changes(run) | protocol
        run.settings = ", ".join(f"{name} {_brief(value)}" for name, value in changes.items())
    alike: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        alike.setdefault((run.model, run.dataset, run.method, run.settings), []).append(run)
    for group in alike.values():
        for name in ("weights", "fingerprint"):
            prints = [_text(run.config.get(name))[:8] for run in group]
            for run, own in zip(group, prints, strict=True):
                if own and len(set(prints)) > 1:
                    run.settings = ", ".join(filter(None, [run.settings, f"{name} {own}"]))


def _preset_changes(run: RunRecord) -> dict:
    preset, quant = PRESETS.get(_preset_name(run)), _mapping(run.config.get("quant"))
    if preset is None:
        return {}
    usual = preset.to_dict()
    return {name: value for name, value in quant.items() if name in usual and value != usual[name]}


def _brief(value, most: int = 40) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True)


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value) -> str:
    return "" if value is None else str(value)
