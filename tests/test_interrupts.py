"""Ctrl-C while a script imports: one line and status 130, and nothing is changed for anybody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rotatekv import interrupts

ROOT = Path(__file__).resolve().parents[1]
GUARDED = [path for folder in (ROOT, ROOT / "visualize") for path in sorted(folder.glob("*.py"))]
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in GUARDED if '__name__ == "__main__"' in path.read_text()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Where torch is a module in whose import Ctrl-C is pressed."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\nprint('not interrupted')\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture(autouse=True)
def pythons_own_handler():
    """A process in the background has another: it ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(environment, *command) -> subprocess.CompletedProcess:
    whole = [sys.executable, *command]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(whole, preexec_fn=_as_in_a_shell, **options)


def _as_in_a_shell() -> None:
    """Ctrl-C reaches it, where the tests themselves run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_all_scripts_are_known():
    assert len(SCRIPTS) >= 16 and "PPL_evaluation.py" in SCRIPTS and "visualize/report.py" in SCRIPTS


@pytest.mark.parametrize("command", [[name] for name in SCRIPTS] + [["-m", "rotatekv.demo"]], ids=" ".join)
def test_while_a_script_imports(environment, command):
    done = interrupted(environment, *command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{interrupts.LINE}\n")


def test_elsewhere_it_is_pythons_own(environment, tmp_path):
    (tmp_path / "own_evaluation.py").write_text("import rotatekv")
    for command in (["-c", "import rotatekv"], [str(tmp_path / "own_evaluation.py")]):
        done = interrupted(environment, *command)
        assert done.returncode == -signal.SIGINT and done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in this very process


def test_from_main_on_it_is_an_exception_and_at_the_end_it_is_not(monkeypatch):
    monkeypatch.setattr(interrupts, "_OWN_SCRIPT", True)
    ends = []
    monkeypatch.setattr(interrupts, "_end", lambda *args: ends.append(args))
    try:
        interrupts.end_at_once()
        os.kill(os.getpid(), signal.SIGINT)
        assert len(ends) == 1
        interrupts.raise_again()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_ignored_interrupt_stays_ignored(monkeypatch):
    monkeypatch.setattr(interrupts, "_OWN_SCRIPT", True)
    monkeypatch.setattr(interrupts.signal, "getsignal", lambda number: signal.SIG_IGN)  # nohup, a job in the background
    monkeypatch.setattr(interrupts.signal, "signal", lambda *args: pytest.fail("it was not left alone"))
    interrupts.end_at_once()
    interrupts.raise_again()
