"""Ctrl-C around ``main`` of the package's own scripts, above all during their imports: one line and exit status 130.

A script is started by its path or, installed, as a command (``rotatekv-ppl``, pyproject.toml).

The package imports this module before anything that takes time. In notebooks and other people's scripts it does
nothing.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path

LINE = "interrupted: what was finished is kept, and --resume goes on with it where the script has that flag"
_ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = re.compile(r"(\w+_evaluation|calibrate_reorder|reproduce|visualize/\w+)\.py")
_COMMAND = re.compile(r"rotatekv-[a-z0-9]+")


def _is_own_script() -> bool:
    if sys.argv[:1] == ["-m"]:  # what runs is not known yet
        return "rotatekv.demo" in sys.orig_argv
    name = sys.argv[0] if sys.argv else ""
    if _COMMAND.fullmatch(Path(name).stem):
        return True
    script = Path(name).resolve()
    return script.is_relative_to(_ROOT) and _SCRIPT.fullmatch(script.relative_to(_ROOT).as_posix()) is not None


_OWN_SCRIPT = _is_own_script()


def end_at_once() -> None:
    """Ctrl-C ends the process here and now: while it imports, and while it ends."""
    in_main = threading.current_thread() is threading.main_thread()
    if _OWN_SCRIPT and in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Ctrl-C is a ``KeyboardInterrupt`` again: ``main`` has begun."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*args) -> None:
    os.write(2, f"{LINE}\n".encode())
    os._exit(130)


end_at_once()
