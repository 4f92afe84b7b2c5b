"""Many processes, one run: who am I, and wait for the others. Started by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed

Item = TypeVar("Item")
# Ranks meet only at the beginning and the end of a run, which may lie days apart.
_TIMEOUT = timedelta(days=30)


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
    """Wait until every rank is here; returns at once in a single process."""
    if world_size() == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    torch.distributed.barrier()
