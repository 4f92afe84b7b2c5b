"""Which runs a table of reproduce.py is made of: its rows, and the command behind each cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rotatekv.cli import METHOD_NAMES
from rotatekv.errors import UserError
from rotatekv.evals.generation import MAX_NEW_TOKENS
from rotatekv.evals.needle import CONTEXT_LENGTHS, DEPTHS, NEEDLE_TYPES, parse_grid
from rotatekv.evals.needle_keys import NEEDLE_KEYS
from rotatekv.models.text import ALIASES, EMBEDDED_MODEL
from rotatekv.models.vision import RANDOM_LLAVA
from rotatekv.reproduce.paper_figures import PaperFigure

TABLES = ("ppl", "ablation", "gsm8k", "longbench", "needle", "milebench")
ONE_SHOT, STREAMED, SCORE = "one-shot", "streamed", "score"
_SCRIPTS = {
    "ppl": "PPL_evaluation.py",
    "gsm8k": "GSM8K_evaluation.py",
    "longbench": "LongBench_evaluation.py",
    "needle": "needle_evaluation.py",
    "milebench": "MileBench_evaluation.py",
}
_DATASET_IDS = {"wikitext2": "wikitext2/test", "essays": "essays/even"}
_PAPER_PPL_LENGTH, _PPL_LENGTH = 4096, 2048


@dataclass(frozen=True)
class Calibration:
    """A run of calibrate_reorder.py that a cell needs first; ``flags`` without ``--output``."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One number of a table, and the run it comes from.

    Args:
        group, label, view: the part of the table, the row and the column it stands in.
        flags: of the script, without ``--output_dir`` and ``--resume``; those of the method among them.
        metric: its key in metrics.json. protocol: fields of config.json that the flags decide.
        paper: the published figure; None where there is none.
    """

    table: str
    group: str
    model: str
    label: str
    view: str
    task: str
    method: str
    flags: tuple[str, ...]
    metric: str
    protocol: tuple[tuple[str, object], ...]
    calibration: Calibration | None = None
    paper: PaperFigure | None = None

    @property
    def script(self) -> str:
        return _SCRIPTS[self.task]

    @property
    def comparable(self) -> bool:
        """The paper's figure was measured under what this run shares with it, as far as the figure says."""
        ours: dict = dict(self.protocol)
        ours["longest"] = max(ours.get("context_lengths", [0]))
        return self.paper is not None and all(ours.get(key) == value for key, value in self.paper.protocol.items())


@dataclass(frozen=True)
class Options:
    """The flags of reproduce.py that decide cells; ``shared`` go to every script as they are."""

    shared: tuple[str, ...] = ()
    limit: int | None = None
    chunk_size: int = 64
    PPL_seq_length: int | None = None
    dataset: str = "wikitext2"
    context_lengths: str = CONTEXT_LENGTHS
    depths: str = DEPTHS
    needle_type: str = "standard"
    max_new_tokens: int | None = None


def default_methods() -> list[str]:
    """Every registered preset and external method, family by family in the order they are registered."""
    families: dict[str, list[str]] = {}
    for name in METHOD_NAMES:
        families.setdefault(name.rstrip("0123456789"), []).append(name)
    return [name for names in families.values() for name in sorted(names)]


def check_methods(names: Iterable[str]) -> list[str]:
    names = list(names)
    if unknown := [name for name in names if name not in METHOD_NAMES]:
        raise UserError(f"unknown method {', '.join(unknown)}: choose among {', '.join(METHOD_NAMES)}")
    return names


def method_cells(
    table: str, models: Sequence[str], methods: Sequence[str], options: Options, figures: dict
) -> list[Cell]:
    """All cells of a table of models × methods, in its order; ``figures`` of ``load_paper_figures``."""
    cells = []
    for model in models:
        for method in methods:
            if table == "ppl":
                cells += [ppl_cell(model, method, options, view) for view in (ONE_SHOT, STREAMED)]
            else:
                cells.append(_generation_cell(table, model, method, options))
    return [replace(cell, paper=figures.get((table, cell.model, cell.method))) for cell in cells]


def ppl_cell(
    model: str,
    method: str,
    options: Options,
    view: str = ONE_SHOT,
    flags: Sequence[str] = (),
    dataset: str | None = None,
) -> Cell:
    """A perplexity; ``flags`` are those that change the method, ``dataset`` another than the options'."""
    dataset = dataset or options.dataset
    length = options.PPL_seq_length or (_PAPER_PPL_LENGTH if model in ALIASES else _PPL_LENGTH)
    chunk_size = options.chunk_size if view == STREAMED else None
    flags = [*flags, "--dataset", dataset, "--PPL_seq_length", str(length)]
    flags += ["--chunk_size", str(chunk_size)] if chunk_size else []
    name = _DATASET_IDS.get(dataset, Path(dataset).name)
    protocol = {"dataset": name, "PPL_seq_length": length, "chunk_size": chunk_size}
    return _cell("ppl", model, method, view, flags, "ppl", protocol, options)


def _generation_cell(table: str, model: str, method: str, options: Options) -> Cell:
    metric = "average"
    flags: list[str] = []
    protocol: dict
    if table == "milebench":
        model = RANDOM_LLAVA if model == EMBEDDED_MODEL else model
        protocol = {"adv": False, "combine_image": None}
    elif table == "longbench":
        protocol = {"dataset": "longbench", "max_length": None}
    elif table == "gsm8k":
        protocol, metric = {"num_fewshot": 8, "batch_size": 1}, "accuracy"
    else:
        lengths = parse_grid(options.context_lengths, "context_lengths", lowest=1)
        depths = parse_grid(options.depths, "depths", lowest=0, highest=100)
        protocol = {"needle_type": options.needle_type, "context_lengths": tuple(lengths), "depths": tuple(depths)}
        metric = NEEDLE_TYPES[options.needle_type].measure
        flags = ["--needle_type", options.needle_type, "--context_lengths", options.context_lengths]
        flags += ["--depths", options.depths]
        if options.needle_type == "multikey":
            protocol["needle_keys"] = NEEDLE_KEYS
            flags += ["--needle_keys", str(NEEDLE_KEYS)]
    if options.max_new_tokens is not None:
        flags += ["--max_new_tokens", str(options.max_new_tokens)]
    protocol["max_new_tokens"] = options.max_new_tokens or MAX_NEW_TOKENS[table]
    return _cell(table, model, method, SCORE, flags, metric, protocol, options)


def _cell(
    task: str, model: str, method: str, view: str, flags: Sequence[str], metric: str, protocol: dict, options: Options
) -> Cell:
    limit = () if options.limit is None else ("--limit", str(options.limit))
    flags = ("--model", model, "--method", method, *flags, *options.shared, *limit)
    return Cell(task, "", model, method, view, task, method, flags, metric, tuple(protocol.items()))
