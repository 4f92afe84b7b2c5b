"""Run records: results/<task>/<model>/<run_id>/{config.json, samples.jsonl, metrics.json}, resumable and atomic."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from rotatekv import distributed
from rotatekv.calibration import model_slug
from rotatekv.errors import UserError
from rotatekv.files import write_atomically, write_json

SCHEMA = 1


class Run:
    """One run's folder. The run id is a hash of its config, so the same command finds it again.

    Args:
        task: ``ppl``, ``gsm8k``, …
        config: all that decides the numbers, as json; not ``--limit``, so that a longer run goes on from a shorter.
        resume: go on with what is there. overwrite: drop it.

    Raises:
        UserError: the run exists and neither is given, the folder cannot be written, or it holds another config.
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
            raise UserError(f"cannot write {self.folder} ({error.strerror}): choose another --output_dir") from None

    @classmethod
    def of_folder(cls, folder: str | Path, task: str) -> Run:
        """The run, finished or broken off, in its own folder; no process may be at work on it.

        Raises:
            UserError: no run of that task is there, it has no sample yet, or it cannot be read or written.
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
        try:
            run._merge_ranks()
            run.samples = run._read_samples(run._path("samples.jsonl"))
        except OSError as error:
            raise UserError(f"cannot read or write {folder} ({error.strerror})") from None
        if not run.samples:
            raise UserError(f"{folder} has no samples yet")
        return run

    def append(self, sample: dict) -> None:
        """Add one finished sample, keyed by its ``id``; it is on disk when this returns."""
        alone = distributed.world_size() == 1
        name = "samples.jsonl" if alone else f"samples.rank{distributed.rank()}.jsonl"
        try:
            with open(self._path(name), "a", encoding="utf-8") as file:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self._path(name)} ({error.strerror}): mend it, then --resume") from None
        self.samples[sample["id"]] = sample

    def gather(self) -> bool:
        """Wait for all ranks, then join their samples; True on the rank that is to score them."""
        distributed.barrier()
        if distributed.is_main():
            self._merge_ranks()
            self.samples = self._read_samples(self._path("samples.jsonl"))
        return distributed.is_main()

    def finish(self, **results) -> Path:
        """Write metrics.json; ``results`` are the contract's fields beside those a run knows itself."""
        path = self._path("metrics.json")
        self.metrics = {**self._header(), **results}
        self.replaced = not self._holds_more(results.get("n", 0))
        if self.replaced:
            write_json(path, self.metrics)
        return path

    def _holds_more(self, count: int) -> bool:
        """A shorter ``--limit`` does not take the place of a longer or a complete run's metrics.json."""
        try:
            old = json.loads(self._path("metrics.json").read_text(encoding="utf-8"))
            return old["n"] > count or (old["n"] == count and not old["partial"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def rewrite(self, samples: Sequence[dict], first: dict, **results) -> dict:
        """Put ``samples`` and ``results`` in the place of the old; metrics.json keeps what is not among ``results``.

        Args:
            first: further fields for a run that has no metrics.json yet.

        Returns:
            what metrics.json holds now.
        """
        path = self._path("metrics.json")
        try:
            old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {**self._header(), **first}
            if not isinstance(old, dict):
                raise ValueError("no json object")
            self._write_samples(samples)
            record = {**old, **results, "rescored": _now()}
            write_json(path, record)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read or write {path} ({error})") from None
        return record

    def _header(self) -> dict:
        return {
            "schema": SCHEMA, "task": self.task, "config": self.config, "env": environment(),
            "started": self.started, "argv": shlex.join(sys.argv),
        }  # fmt: skip

    def _write_samples(self, samples: Iterable[dict]) -> None:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
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
        if overwrite:
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
        elif existing:
            self._check_same_config()
        write_json(self._path("config.json"), self.config)
        self._merge_ranks()

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
