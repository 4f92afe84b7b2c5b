"""Many processes, one run: who am I, and wait for the others. Started by ``torchrun`` or ``accelerate launch``.

The launcher's environment says who a process is, so that a mistyped flag is told before the processes are connected.
So accelerate's ``PartialState`` does not serve: it connects them where it is first asked, and takes a GPU or sets the
number of threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from rotatekv.errors import UserError

Item = TypeVar("Item")
# Ranks meet only at the beginning and the end of a run, which may lie days apart.
_TIMEOUT = timedelta(days=30)
_GRACE = 3.0  # seconds, within which torchrun sees that rank 0 has ended


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of ``items``: every item goes to exactly one rank, whatever the number of ranks."""
    return list(items[rank() :: world_size()])


def barrier() -> None:
    """Wait until every rank is here; returns at once in a single process.

    Raises:
        UserError: another rank ended before it came here; it has said why.
    """
    if world_size() == 1:
        return
    try:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the processes of this run cannot find each other ({reason}): start them with torchrun"
        ) from None
    try:
        torch.distributed.barrier()
    except RuntimeError:  # gloo: the connection is closed
        raise UserError("another process of this run ended early; the same command with --resume goes on") from None


def let_main_speak_first() -> None:
    """To call before a rank reports an error: all ranks may have it, and the launcher ends them with rank 0."""
    if not is_main():
        time.sleep(_GRACE)
