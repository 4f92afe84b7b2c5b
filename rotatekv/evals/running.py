"""What every evaluation does around its samples: open the run, loop with resume, share over ranks, write metrics."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import QuantizedCache

from rotatekv import distributed
from rotatekv.cache.cache import RotateKVCache
from rotatekv.errors import UserError
from rotatekv.evals.results import Run
from rotatekv.external import ExternalHandle, external_use
from rotatekv.files import write_error
from rotatekv.models.text import known_weights, model_revision
from rotatekv.patching.handle import PatchHandle


def open_run(
    args: argparse.Namespace, task: str, method: str, handle: PatchHandle | ExternalHandle, dataset: dict, **protocol
) -> Run:
    """The run of one command.

    Args:
        method: the preset's name as the tables show it.
        dataset: ``{"id", "sha256"}`` of the data.
        protocol: the task's own choices that decide the numbers (lengths, prompts, …).
    """
    model = handle.model
    config = {
        "task": task,
        "model": model.name_or_path,
        "revision": model_revision(model),
        "weights": known_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": args.attn_implementation,
        "method": method,
        "quant": handle.config.to_dict(),
        "fingerprint": handle.fingerprint,
        "dataset": dataset["id"],
        "dataset_sha256": dataset["sha256"],
        "seed": args.seed,
        **protocol,
    }
    if handle.external:
        config["external"] = True
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


def finish_run(
    run: Run,
    records: Sequence[dict],
    metric: dict,
    partial: bool,
    draw: Callable[[Sequence[dict], dict, Path], None] | None = None,
) -> dict:
    """Write metrics.json from the samples' records, and the run's figures.

    Args:
        records: each with what ``cache_use`` gives, and ``seconds``.
        metric: the task's, as the contract names its keys.
        partial: a ``--limit`` left samples out.
        draw: of the records, what metrics.json holds and the folder; not called where that keeps a longer run's.

    Returns:
        what metrics.json holds; ``summary`` makes the end of the script's last line of it.

    Raises:
        UserError: the metric is no finite number; metrics.json has null there, and the ``reason``.
    """
    path = run.finish(metric=metric, partial=partial, **_identity(run.config), **_measures(records))
    if draw is not None and not run.is_shorter:
        draw_figures(draw, records, run.metrics, run.folder)
    _check_computed(run.metrics, path)
    return run.metrics


def draw_figures(draw: Callable[[Sequence[dict], dict, Path], None], records, metrics: dict, folder: Path) -> None:
    """``draw(records, metrics, folder)``; a file that cannot be written is one line."""
    try:
        draw(records, metrics, folder)
    except OSError as error:
        raise write_error(folder, error, "fix it, then start the same command again with --resume") from None


def rescore(
    folder: str,
    task: str,
    metric_of: Callable[[list[dict]], tuple[list[dict], dict]],
    draw: Callable[[Sequence[dict], dict, Path], None] | None = None,
) -> dict:
    """Compute a run's metrics again from its samples.jsonl, without a model; for ``--rescore DIR``.

    The samples and metrics.json are replaced one after the other, each at once; what metrics.json says of the run (env,
    started, argv) stays. A run broken off gets a metrics.json with ``partial`` true.

    Args:
        folder: the run's own, which holds config.json and samples.jsonl (and rank files, which are merged).
        task: what the run must be of, as in ``open_run``.
        metric_of: all records → the records with their ``score`` computed anew, and ``metric`` of metrics.json.
        draw: as in ``finish_run``.

    Returns:
        what metrics.json holds now; ``summary`` makes the end of the script's last line of it.

    Raises:
        UserError: no run of this task is there, its records lack a field, there are several processes, or the metric
            is no finite number.
    """
    if distributed.world_size() > 1:
        raise UserError("--rescore takes a single process: start it without torchrun or accelerate")
    run = Run.of_folder(folder, task)
    try:
        records, metric = metric_of(list(run.samples.values()))
        measured = _measures(records)
    except KeyError as error:
        raise UserError(f"the samples in {folder} have no field {error}: they are of another version") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the samples in {folder} are damaged ({error})") from None
    metrics = run.rewrite(records, {"partial": True, **_identity(run.config)}, metric=metric, **measured)
    if draw is not None:
        draw_figures(draw, records, metrics, run.folder)
    _check_computed(metrics, run.folder / "metrics.json")
    return metrics


def _check_computed(metrics: dict, path: Path) -> None:
    if "reason" in metrics:
        raise UserError(f"no result in {path}: {metrics['reason']}")


def summary(metrics: dict) -> str:
    """``(RotateKV2, 3.156 bits, 1234.5 bytes/token)``, the end of a script's last line, from its metrics.json."""
    bits, size = metrics["avg_bits"]["total"], metrics["cache_bytes_per_token"]
    return f"({metrics['config']['method']}, {bits:.3f} bits, {size:.1f} bytes/token)"


def _identity(config: dict) -> dict:
    return {
        "model": {"id": config["model"], "revision": config["revision"]},
        "seed": config["seed"],
        "dataset": {"id": config["dataset"], "sha256": config["dataset_sha256"]},
    }


def _measures(records: Sequence[dict]) -> dict:
    """Of the records, in whatever order: their number, what their caches took, and the seconds they took."""
    count = len(records)
    if not any(record["tokens"] for record in records):
        nothing = {"avg_bits": dict.fromkeys(("k", "v", "total")), "cache_bytes_per_token": None}
        seconds = math.fsum(record["seconds"] for record in records)
        return {"n": count, **nothing, "seconds": seconds, "reason": "no sample left a cache to measure"}
    total = {name: math.fsum(record[name] for record in records) for name in ("cache_bytes", "tokens", "seconds")}
    # Weighted by tokens: the bytes of all caches × 8 over the numbers they hold.
    bits = {
        key: math.fsum(record[f"{key}_bits"] * record["tokens"] for record in records) / total["tokens"]
        for key in ("k", "v", "total")
    }
    return {
        "n": count,
        "avg_bits": bits,
        "cache_bytes_per_token": total["cache_bytes"] / total["tokens"],
        "seconds": total["seconds"],
    }


def cache_use(cache: RotateKVCache | QuantizedCache) -> dict:
    """What a sample's cache took: measured bytes, the tokens it holds, and average bits per number."""
    if isinstance(cache, QuantizedCache):
        return external_use(cache)
    bits = cache.avg_bits()
    assert cache.positions is not None  # it has tokens
    return {
        "tokens": cache.positions.numel(),
        "cache_bytes": cache.nbytes(),
        "k_bits": bits["k"],
        "v_bits": bits["v"],
        "total_bits": bits["total"],
    }
