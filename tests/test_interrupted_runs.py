"""Killed, or stopped by a full disk, at every write of a run: --resume makes what an unbroken run makes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from runs import SCRIPTS, error_line, write_data
from test_efficiency import CELL

import calibrate_reorder
import efficiency_evaluation
import needle_evaluation
import reproduce
from rotatekv import files
from rotatekv.evals import efficiency_figure, needle_figure
from rotatekv.scripts import exit_on_user_error

VOLATILE = ("started", "seconds", "argv", "env")


class Killed(BaseException):
    """As SIGKILL: no handler of ours runs for it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("interrupted"))


@pytest.fixture
def run(name, data, monkeypatch):
    """A script, of the flags behind its own; its model is loaded already, its figures are empty."""
    script = SCRIPTS[name]
    monkeypatch.chdir(data)
    loaded = getattr(script.module, script.load)(script.flags[1])
    monkeypatch.setattr(script.module, script.load, lambda **flags: loaded)
    for figures, draw in ((efficiency_figure, "draw"), (needle_figure, "_draw")):  # these would take most of the time
        monkeypatch.setattr(figures, draw, lambda *_: Figure((1, 1)))
    measured = {**CELL, "k_bits": 2.0, "v_bits": 2.0, "cache_bytes": 100}
    monkeypatch.setattr(efficiency_evaluation, "measure", lambda args, sides, ids, cell: {**measured, **cell})
    return lambda *more: script.module.main([*script.flags, "--RTN2", *map(str, more)])


class Faults:
    """Counts the steps by which files get onto the disk, and fails at one of them.

    A step is a file's sync, before which half of what was written is there, or its renaming.
    """

    def __init__(self, monkeypatch):
        self.seen, self.at, self.error = 0, None, None
        for name in ("fsync", "replace"):
            monkeypatch.setattr(files.os, name, self.around(name, getattr(os, name)))

    def around(self, name: str, real):
        def step(*args):
            self.seen += 1
            if self.seen - 1 == self.at:
                if name == "fsync":
                    os.ftruncate(args[0], max(os.fstat(args[0]).st_size - 9, 0))
                raise self.error
            return real(*args)

        return step

    def arm(self, at: int | None, error: BaseException | None = None) -> None:
        self.seen, self.at, self.error = 0, at, error


@pytest.fixture
def faults(monkeypatch) -> Faults:
    return Faults(monkeypatch)


def disk_error(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


def content(output_dir: Path) -> dict:
    """What a run left, file by file, without what differs from run to run."""
    found: dict = {}
    (folder,) = output_dir.glob("*/*/*/")
    for path in sorted(folder.iterdir()):
        if path.name == ".lock":
            continue
        text = path.read_bytes()
        if path.suffix == ".json":
            text = {name: value for name, value in json.loads(text).items() if name not in VOLATILE}
        elif path.suffix == ".jsonl":
            text = [json.loads(line) | {"seconds": 0} for line in text.splitlines()]
        found[path.name] = text
    return found


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


# The others write the same files as gsm8k, which is killed.
STOPPED = [
    *((name, "killed") for name in SCRIPTS),
    *((name, "failing disk") for name in ("ppl", "needle", "efficiency")),
]


@pytest.mark.parametrize(("name", "what"), STOPPED)
def test_resume_completes_a_run_stopped_at_any_write(name, run, faults, tmp_path, what, capsys):
    writes = SCRIPTS[name].writes
    run("--output_dir", tmp_path / "whole")
    assert faults.seen == writes
    expected = content(tmp_path / "whole")
    for step in range(writes):
        broken = tmp_path / f"{step}"
        number = READ_ONLY if step % 4 == 1 else FULL
        faults.arm(step, Killed() if what == "killed" else disk_error(number))
        capsys.readouterr()
        with pytest.raises(Killed if what == "killed" else SystemExit) as stopped:
            run("--output_dir", broken)
        if what != "killed":
            assert stopped.value.code == 2
            line = error_line(capsys)
            assert line.startswith("error: cannot write ") and os.strerror(number) in line
            assert ("make room" in line and "--resume" in line) if number == FULL else "--" in line
        kept = [line for path in broken.glob("*/*/*/samples.jsonl") for line in path.read_bytes().splitlines(True)]
        faults.arm(None)
        run("--output_dir", broken, "--resume")
        assert content(broken) == expected, f"stopped at step {step}"
        (samples,) = broken.glob("*/*/*/samples.jsonl")
        whole_lines = [line for line in kept if line.endswith(b"\n")]
        assert samples.read_bytes().splitlines(True)[: len(whole_lines)] == whole_lines, "finished samples are lost"


def test_resume_draws_the_figure_that_a_finished_run_lost(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    flags = [*SCRIPTS["needle"].flags, "--RTN2", "--output_dir", str(tmp_path)]
    needle_evaluation.main(flags)
    expected = content(tmp_path)
    (folder,) = tmp_path.glob("*/*/*/")
    for name in ("grid.json", "heatmap.png"):
        (folder / name).unlink()
    needle_evaluation.main([*flags, "--resume", "--limit", "1"])  # a part of the grid is not the run's
    assert not (folder / "heatmap.png").exists()
    needle_evaluation.main([*flags, "--resume"])
    assert content(tmp_path) == expected


def test_a_full_disk_is_one_line_for_calibration_files_and_tables(data, tmp_path, faults, monkeypatch, capsys):
    monkeypatch.chdir(data)
    calibrate = ["--model", "tiny", "--dataset", "words.txt", "--output", str(tmp_path / "x.safetensors")]
    table = ["--models", "tiny", "--dataset", "words.txt", "--methods", "FP16", "--output_dir", str(tmp_path)]
    for script, flags in ((calibrate_reorder, calibrate), (reproduce, table)):
        faults.arm(0, disk_error())
        with pytest.raises(SystemExit) as stopped:
            script.main(flags)
        assert stopped.value.code == 2 and error_line(capsys).startswith("error: cannot write ")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob(".*")), "a half file is left"


def test_a_full_disk_below_any_library_is_one_line(capsys):
    @exit_on_user_error
    def main(argv):
        raise disk_error() if argv == ["full"] else OSError(errno.ENOTDIR, "no disk's fault")

    with pytest.raises(SystemExit) as stopped:
        main(["full"])
    assert stopped.value.code == 2 and "make room" in error_line(capsys)
    with pytest.raises(OSError, match="no disk's fault"):
        main([])
