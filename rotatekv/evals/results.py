"""Run records: results/<task>/<model>/<run_id>/{config.json, samples.jsonl, metrics.json}, resumable and atomic."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import weakref
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout

from rotatekv import distributed
from rotatekv.errors import UserError
from rotatekv.files import to_json, write_atomically, write_error, write_json
from rotatekv.statistics import model_slug

SCHEMA = 1
_LOCK = ".lock"
NOT_FINITE = ": try another --dtype (float32), or see whether the model's weights are finite"
_FAILED_DISK = "fix it, then start the same command again with --resume"


class Run:
    """One run's folder. The run id is a hash of its config, so the same command finds it again.

    Args:
        task: ``ppl``, ``gsm8k``, …
        config: all that decides the numbers, as json; not ``--limit``, so that a longer run goes on from a shorter.
        resume: go on with what is there. overwrite: drop it.

    Raises:
        UserError: the run exists and neither is given, the folder cannot be written, it holds another config, or
            another process is at work in it.
    """

    def __init__(self, output_dir: str | Path, task: str, model: str, config: dict, resume: bool, overwrite: bool):
        if resume and overwrite:
            raise UserError("give --resume or --overwrite, not both")
        self.config, self.task = config, task
        self.run_id = config_hash(config)
        self.folder = Path(output_dir) / task / model_slug(model) / self.run_id
        self.started = _now()
        try:
            if distributed.is_main():
                self._open(resume, overwrite)
            distributed.barrier()
            self.samples = self._read_samples(self._path("samples.jsonl"))
        except OSError as error:
            raise write_error(self.folder, error, "choose another --output_dir") from None

    @classmethod
    def of_folder(cls, folder: str | Path, task: str) -> Run:
        """The run, finished or broken off, in its own folder.

        Raises:
            UserError: no run of that task is there, it has no sample yet, it cannot be read or written, or another
                process is at work in it.
        """
        run = cls.__new__(cls)
        run.folder, run.task, run.started = Path(folder), task, _now()
        try:
            run.config = json.loads(run._path("config.json").read_text(encoding="utf-8"))
            found = run.config["task"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} is no run's folder: pass the one that holds config.json") from None
        if found != task:
            raise UserError(f"{folder} is a run of {found}, not of {task}")
        run.run_id = config_hash(run.config)
        run._lock()
        try:
            run._merge_ranks()
            run.samples = run._read_samples(run._path("samples.jsonl"))
        except OSError as error:
            raise UserError(f"cannot read or write {folder} ({error.strerror})") from None
        if not run.samples:
            raise UserError(f"{folder} has no samples yet")
        return run

    def append(self, sample: dict) -> None:
        """Add one finished sample, keyed by its ``id``; it is on disk when this returns.

        A number that json does not know becomes None, and ``reason`` says what it was.
        """
        sample = _as_json(sample)
        alone = distributed.world_size() == 1
        name = "samples.jsonl" if alone else f"samples.rank{distributed.rank()}.jsonl"
        try:
            with open(self._path(name), "a", encoding="utf-8") as file:
                file.write(to_json(sample) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self._path(name), error, _FAILED_DISK) from None
        self.samples[sample["id"]] = sample

    def gather(self) -> bool:
        """Wait for all ranks, then join their samples; True on the rank that is to score them."""
        distributed.barrier()
        if distributed.is_main():
            try:
                self._merge_ranks()
                self.samples = self._read_samples(self._path("samples.jsonl"))
            except OSError as error:
                raise write_error(self._path("samples.jsonl"), error, _FAILED_DISK) from None
        return distributed.is_main()

    def finish(self, **results) -> Path:
        """Write metrics.json; ``results`` are the contract's fields beside those a run knows itself.

        A number that json does not know becomes None, and ``reason`` says what it was. A shorter ``--limit`` does not
        take the place of a longer run's metrics.json, which ``is_shorter`` then says; the same samples scored again
        keep what it says of the run (env, started, argv).
        """
        path, old = self._path("metrics.json"), self._old_metrics()
        count = results.get("n", 0)
        self.is_shorter = old["n"] > count
        if old["n"] == count and not old["partial"]:
            header = {name: value for name, value in old.items() if name != "reason"}
            results["metric"] = {**old["metric"], **results["metric"]}
        else:
            header = self._header()
        self.metrics = {**header, **_as_json(results, NOT_FINITE)}
        try:
            if not self.is_shorter and self.metrics != old:
                write_json(path, self.metrics)
        except OSError as error:
            raise write_error(path, error, _FAILED_DISK) from None
        return path

    def _old_metrics(self) -> dict:
        """What metrics.json holds; less than any run where it is missing or damaged."""
        try:
            old = read_metrics(self.folder) or {}
            return {**old, "n": int(old["n"]), "partial": bool(old["partial"])}
        except (UserError, ValueError, KeyError, TypeError):
            return {"n": -1, "partial": True}

    def rewrite(self, samples: Sequence[dict], first: dict, **results) -> dict:
        """Put ``samples`` and ``results`` in the place of the old; metrics.json keeps what is not among ``results``.

        Args:
            first: further fields for a run that has no metrics.json yet.

        Returns:
            what metrics.json holds now.
        """
        path, old = self._path("metrics.json"), read_metrics(self.folder)
        if old is None:
            old = {**self._header(), **first}
        try:
            self._write_samples(map(_as_json, samples))
            old.pop("reason", None)
            record = _as_json({**old, **results}, NOT_FINITE) | {"rescored": _now()}
            write_json(path, record)
        except OSError as error:
            raise write_error(path, error, "fix it, then --rescore again") from None
        return record

    def _header(self) -> dict:
        return {
            "schema": SCHEMA,
            "task": self.task,
            "config": self.config,
            "env": environment(),
            "started": self.started,
            "argv": shlex.join(sys.argv),
        }

    def _write_samples(self, samples: Iterable[dict]) -> None:
        lines = [to_json(sample) + "\n" for sample in samples]
        write_atomically(self._path("samples.jsonl"), "".join(lines).encode())

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _check_same_config(self) -> None:
        path = self._path("config.json")
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(self.config))
        except (FileNotFoundError, ValueError):
            same = False
        if not same:
            raise UserError(f"{path} is damaged or of another run: --overwrite starts anew")

    def _open(self, resume: bool, overwrite: bool) -> None:
        existing = self._path("config.json").is_file() or self._path("samples.jsonl").is_file()
        if existing and not (resume or overwrite):
            raise UserError(f"the run {self.folder} exists: --resume goes on with it, --overwrite starts anew")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if overwrite:
            # The samples first: a kill among these must leave no old ones for --resume.
            for path in sorted(self.folder.glob("[!.]*"), key=lambda path: not path.name.startswith("samples")):
                path.unlink(missing_ok=True)
        elif existing:
            self._check_same_config()
        write_json(self._path("config.json"), self.config)
        self._merge_ranks()

    def _lock(self) -> None:
        """Keep other processes out as long as this object lives; a process that is killed leaves no lock."""
        lock = FileLock(self._path(_LOCK), is_singleton=True)
        try:
            lock.acquire(timeout=0)
            weakref.finalize(self, lock.release)
            for path in self.folder.glob(".*.*"):  # what a write that was killed left
                path.unlink(missing_ok=True)
        except Timeout:
            raise UserError(
                f"another process is at work in {self.folder}: wait for it, or choose another --output_dir"
            ) from None
        except (OSError, NotImplementedError):
            pass  # a folder that cannot be written says so itself, and a file system may know no locks

    def _rank_files(self) -> list[Path]:
        return sorted(self.folder.glob("samples.rank*.jsonl"))

    def _merge_ranks(self) -> None:
        """Join the ranks' files, of this run or of a killed one with another number of ranks, into samples.jsonl."""
        paths = self._rank_files()
        if not paths:
            return
        samples = self._read_samples(self._path("samples.jsonl"))
        for path in paths:
            samples |= self._read_samples(path)
        self._write_samples(samples.values())
        for path in paths:
            path.unlink()

    def _read_samples(self, path: Path) -> dict:
        """The finished samples by id. A last line torn by a kill is dropped from the file."""
        if not path.is_file():
            return {}
        data = path.read_bytes()
        samples, good = {}, 0
        for line in data.splitlines(keepends=True):
            try:
                sample = json.loads(line)
                samples[sample["id"]] = sample
            except (ValueError, KeyError, TypeError):
                if good + len(line) < len(data):
                    raise UserError(f"{path} is damaged in the middle: --overwrite starts anew") from None
                break
            if not line.endswith(b"\n"):
                del samples[sample["id"]]
                break
            good += len(line)
        if good < len(data):
            write_atomically(path, data[:good])
        return samples


def _as_json(record: dict, hint: str = "") -> dict:
    """The record with None for every NaN and infinity, and a ``reason`` that names them, with ``hint`` behind it."""
    lost: list[str] = []
    record = _without_nan(record, "", lost)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        record["reason"] = f"{', '.join(lost[:3])}{more}{hint}"
    return record


def _without_nan(content, name: str, lost: list[str]):
    if isinstance(content, float) and not math.isfinite(content):
        lost.append(f"{name} is {content}")
        return None
    if isinstance(content, dict):
        return {key: _without_nan(value, f"{name}.{key}".lstrip("."), lost) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value, f"{name}.{number}", lost) for number, value in enumerate(content)]
    return content


def read_metrics(folder: Path) -> dict | None:
    """What metrics.json of a run's folder holds; None where there is none.

    Raises:
        UserError: it is damaged, or no run's.
    """
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict) or not all(isinstance(metrics.get(name), dict) for name in ("config", "metric")):
        raise UserError(f"{path} is damaged: the same command with --resume writes it anew")
    return metrics


def config_hash(config: dict) -> str:
    """12 hex digits of the config's canonical json."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def environment() -> dict:
    """Versions, device and code state that a number depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        call = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
