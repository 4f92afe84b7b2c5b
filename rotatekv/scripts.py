"""How a script ends: a user's mistake and Ctrl-C are one line each, with an exit status of their own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from rotatekv import distributed, interrupts
from rotatekv.errors import UserError
from rotatekv.files import FULL_DISK, write_error


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """A ``UserError`` in ``main`` → its line on stderr and exit status 2, without a traceback; Ctrl-C → 130.

    A full disk is a ``UserError`` wherever it is met. Of many processes, only the first shows progress bars, and what
    all have to say is said once.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        if not distributed.is_main():
            disable_progress_bar()
        try:
            interrupts.raise_again()
            try:
                main(argv)
                sys.stdout.flush()
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                raise write_error(Path(error.filename or "the output"), error, "") from None
        except UserError as error:
            interrupts.end_at_once()
            distributed.let_main_speak_first()
            with suppress(OSError):  # the disk that is full may hold stderr as well
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            interrupts.end_at_once()
            print(interrupts.LINE, file=sys.stderr)
            sys.exit(130)
        finally:
            interrupts.end_at_once()

    return wrapped
