"""What every evaluation does around its samples: open the run, loop with resume, share over ranks, write metrics."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from rotatekv import distributed
from rotatekv.cache import RotateKVCache
from rotatekv.models import model_revision
from rotatekv.patch import PatchHandle
from rotatekv.results import Run


def open_run(args: argparse.Namespace, task: str, method: str, handle: PatchHandle, dataset: dict, **protocol) -> Run:
    """The run of one command.

    Args:
        method: the preset's name as the tables show it.
        dataset: ``{"id", "sha256"}`` of the data.
        protocol: the task's own choices that decide the numbers (lengths, prompts, …).
    """
    model = handle.model
    config = {
        "task": task, "model": model.name_or_path, "revision": model_revision(model),
        "dtype": str(model.dtype).removeprefix("torch."), "attn_implementation": args.attn_implementation,
        "method": method, "quant": handle.config.to_dict(), "fingerprint": handle.spec.fingerprint,
        "dataset": dataset["id"], "dataset_sha256": dataset["sha256"], "seed": args.seed, **protocol,
    }  # fmt: skip
    return Run(args.output_dir, task, args.model, config, args.resume, args.overwrite)


def score_samples(
    run: Run,
    samples: Sequence[dict],
    score: Callable[[list[dict]], list[dict]],
    unit: str,
    batch_size: int = 1,
    running: Callable[[list[dict]], dict] | None = None,
) -> bool:
    """Score what the run has not scored yet, this rank's share of it, and join the ranks.

    Args:
        samples: each with an ``id``, in order.
        score: a batch of samples → their records, without ``id`` and ``seconds``.
        unit: of the progress bar.
        running: the records so far → what the bar is to show.

    Returns:
        True on the rank that is to finish the run.
    """
    wanted = {sample["id"] for sample in samples}
    done = [record for key, record in run.samples.items() if key in wanted]
    todo = distributed.share([sample for sample in samples if sample["id"] not in run.samples])
    total = len(todo) + (len(done) if distributed.world_size() == 1 else 0)
    silent = not distributed.is_main()
    with tqdm(total=total, initial=total - len(todo), desc=run.task, unit=unit, file=sys.stderr, disable=silent) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            begun = time.perf_counter()
            records = score(batch)
            seconds = (time.perf_counter() - begun) / len(batch)
            for sample, record in zip(batch, records, strict=True):
                run.append({"id": sample["id"], **record, "seconds": seconds})
                done.append(run.samples[sample["id"]])
            bar.update(len(batch))
            if running is not None:
                bar.set_postfix(running(done))
    return run.gather()


def finish_run(run: Run, records: Sequence[dict], metric: dict, partial: bool, model: dict, dataset: dict) -> dict:
    """Write metrics.json from the samples' records.

    Args:
        records: each with what ``cache_use`` gives, and ``seconds``.

    Returns:
        ``{"path", "total_bits", "bytes_per_token"}`` for the script's last line.
    """
    count = len(records)
    bits = {key: sum(record[f"{key}_bits"] for record in records) / count for key in ("k", "v", "total")}
    bytes_per_token = sum(record["cache_bytes"] for record in records) / sum(record["tokens"] for record in records)
    path: Path = run.finish(
        metric=metric, n=count, partial=partial, avg_bits=bits, cache_bytes_per_token=bytes_per_token,
        model=model, dataset=dataset, seed=run.config["seed"], seconds=sum(record["seconds"] for record in records),
    )  # fmt: skip
    return {"path": path, "total_bits": bits["total"], "bytes_per_token": bytes_per_token}


def cache_use(cache: RotateKVCache) -> dict:
    """What a sample's cache took: measured bytes, the tokens it holds, and average bits per number."""
    bits = cache.avg_bits()
    return {
        "tokens": cache.positions.numel(), "cache_bytes": cache.nbytes(),
        "k_bits": bits["k"], "v_bits": bits["v"], "total_bits": bits["total"],
    }  # fmt: skip
