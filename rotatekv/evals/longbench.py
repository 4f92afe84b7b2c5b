"""LongBench (Bai et al. 2023, arXiv 2308.14508): tasks, records, prompts and scores.

Prompts, answer lengths and metrics are read from the installed ``lm_eval[longbench]``; nothing of them is copied here.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from rotatekv.errors import UserError
from rotatekv.evals.records import read_hub, read_jsonl
from rotatekv.evals.scoring import deep_recursion
from rotatekv.evals.tokens import encode, end_ids

GROUPS = {
    "single-doc": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-doc": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
TASKS = tuple(name for names in GROUPS.values() for name in names)
# PAPER: it names no list; these are the eight of KIVI, whose tables it follows.
GROUPS["paper"] = ("qasper", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p")
GROUPS["all"] = TASKS
_ONLY_PLAIN = {
    "narrativeqa",
    "musique",
    "qmsum",
    "dureader",
    "vcsum",
    "lsht",
    "multifieldqa_zh",
    "passage_retrieval_zh",
}
E_TASKS = tuple(name for name in TASKS if name not in _ONLY_PLAIN)
FIELDS = ("input", "context", "answers", "all_classes", "length")
LENGTHS = {"0-4k": range(4000), "4-8k": range(4000, 8000), "8k+": range(8000, sys.maxsize)}  # words, LongBench-E
_NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_INSTALL = 'pip install "lm_eval[longbench]" (or make install)'


@dataclass(frozen=True)
class Task:
    """One task as lm_eval defines it; a name in ``_e`` is of LongBench-E.

    ``template`` holds ``{{context}}`` and ``{{question}}``, ``scorer`` names the function of lm_eval's metrics that
    takes a record and ``[prediction]``, ``hub`` is the data set's id, configuration and split.
    """

    name: str
    template: str
    max_new_tokens: int
    metric: str
    scorer: str
    hub: tuple[str, str, str]

    @property
    def base(self) -> str:
        return self.name.removesuffix("_e")

    @property
    def takes_chat(self) -> bool:
        return self.base not in _NO_CHAT


def task_names(text: str, e: bool = False) -> list[str]:
    """The tasks that a comma-separated list of names and groups means, each once; with ``e`` those of LongBench-E.

    Raises:
        UserError: an unknown name, or one with no LongBench-E variant. A group loses such tasks silently.
    """
    names: dict[str, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part in GROUPS:
            names |= dict.fromkeys(name for name in GROUPS[part] if not e or name in E_TASKS)
        elif part not in TASKS:
            raise UserError(f"unknown task {part!r}: choose among {', '.join((*GROUPS, *TASKS))}")
        elif e and part not in E_TASKS:
            raise UserError(f"{part} has no LongBench-E variant: choose among {', '.join(E_TASKS)}")
        else:
            names[part] = None
    if not names:
        raise UserError(f"--tasks {text!r} names no task: choose among {', '.join((*GROUPS, *TASKS))}")
    return [f"{name}_e" if e else name for name in names]


@cache
def load_task(name: str) -> Task:
    """Raises UserError where lm_eval is not installed or does not know the task."""
    try:
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:
        raise UserError(f"LongBench's prompts come from lm_eval, which is not installed: {_INSTALL}") from None
    path = Path(lm_eval.tasks.__file__).parent / "longbench" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"the installed lm_eval has no LongBench task {name!r}: {_INSTALL}")
    found = load_yaml(path, resolve_func=False)
    (metric,) = (entry["metric"] for entry in found["metric_list"] if entry["metric"] != "score")
    return Task(
        name=name,
        template=found["doc_to_text"],
        max_new_tokens=found["generation_kwargs"]["max_gen_toks"],
        metric=metric,
        scorer=found["process_results"].rpartition(".")[2],
        hub=(found["dataset_path"], found["dataset_name"], found["test_split"]),
    )


def load_records(task: Task, data_dir: str | None) -> list[dict]:
    """The task's records, of ``DIR/longbench/<task>.jsonl`` or the Hub, with no fields but ``FIELDS``.

    Raises:
        UserError: no data, a broken line, a missing field, or a record that the task's metric cannot score.
    """
    if data_dir is not None:
        place = str(Path(data_dir) / "longbench" / f"{task.name}.jsonl")
        records = read_jsonl(Path(place), FIELDS)
    else:
        place = f"{task.hub[0]} {task.hub[1]}"
        # lm_eval's copy on the Hub says question where the official files say input.
        records = [{"input": row.get("question"), **row} for row in _from_hub(task)]
    records = [{field: record.get(field) for field in FIELDS} for record in records]
    for number, record in enumerate(records, start=1):
        _check(task, record, f"{place}, record {number}")
    return records


def prompt_of(task: Task, record: dict) -> str:
    """The task's prompt; marks inside the record's own text stay as they are."""
    values = {"context": record["context"], "question": record["input"]}
    return re.sub(r"\{\{\s*(context|question)\s*\}\}", lambda mark: values[mark[1]], task.template)


def truncate_middle(tokenizer, text: str, max_length: int) -> str:
    """``text``, or where it has more than ``max_length`` ≥ 2 tokens its first and last ``max_length // 2``."""
    ids = encode(tokenizer, text)
    if len(ids) <= max_length:
        return text
    half = max_length // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))


def fit_prompt(tokenizer, text: str, max_length: int, room: int, chat: bool) -> str:
    """The prompt truncated in the middle as the official code does, then put into the chat template.

    Args:
        max_length: tokens of ``text`` at most, before the template.
        room: tokens of the whole prompt at most. The template, and halves that tokenize anew into more tokens, may
            exceed it; then the text is cut further.

    Raises:
        UserError: the template alone leaves no room.
    """
    limit = max_length
    while limit >= 2:
        prompt = truncate_middle(tokenizer, text, limit)
        if chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        excess = len(encode(tokenizer, prompt, not chat)) - room
        if excess <= 0:
            return prompt
        limit -= excess
    raise UserError(f"the chat template leaves no room for a prompt in {room} tokens: pass --chat_template False")


def wants_chat(tokenizer, asked: bool | None) -> bool:
    """Whether prompts go through the chat template: as asked, else where the tokenizer has one."""
    has = getattr(tokenizer, "chat_template", None) is not None
    if asked and not has:
        raise UserError("the tokenizer has no chat template: leave --chat_template out")
    return has if asked is None else asked


def stop_options(task: Task, model, tokenizer) -> dict:
    """Fields of the generation config: samsum ends at a newline, but not with its first token, as officially."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    if task.base != "samsum" or not newline:
        return {}
    return {"eos_token_id": [*end_ids(model, tokenizer), newline[-1]], "min_new_tokens": 1}


def score(task: Task, prediction: str, record: dict) -> float:
    """lm_eval's metric in [0, 1], the best over the record's answers; few-shot tasks count the first line only."""
    if task.base in _FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    with deep_recursion():
        return float(getattr(_metrics(), task.scorer)(record, [prediction])["score"])


def rescored(records: Sequence[dict]) -> list[dict]:
    """The records with ``score`` computed anew from their ``prediction``."""
    return [{**record, "score": score(_task_of(record), record["prediction"], record)} for record in records]


def metric_of(records: Sequence[dict]) -> dict[str, float]:
    """Mean score × 100 of each task, and their ``average``, in which every task counts the same.

    LongBench-E has ``<task>/<length>`` and ``average/<length>`` as well, for the lengths that occur.
    """
    metric = _means(records)
    if any(_task_of(record).name.endswith("_e") for record in records):
        for label, words in LENGTHS.items():
            part = [record for record in records if int(record["length"]) in words]
            metric |= {f"{name}/{label}": value for name, value in (_means(part) if part else {}).items()}
    return metric


def table(records: Sequence[dict], metric: dict[str, float]) -> str:
    """Task, metric, records and score, a row each, then the average; LongBench-E with a column per length."""
    counts: dict[str, int] = {}
    for record in records:
        counts[_task_of(record).name] = counts.get(_task_of(record).name, 0) + 1
    labels = [label for label in LENGTHS if any(name.endswith(f"/{label}") for name in metric)]
    rows = [["task", "metric", "n", "score", *labels]]
    for name in (*counts, "average"):
        native = "" if name == "average" else load_task(name).metric
        values = [metric[name], *(metric.get(f"{name}/{label}") for label in labels)]
        shown = ["-" if value is None else f"{value:.2f}" for value in values]
        rows.append([name, native, str(counts.get(name, len(records))), *shown])
    return "\n".join(f"{row[0]:<22}{row[1]:<22}" + "".join(f"{cell:>8}" for cell in row[2:]) for row in rows)


def _means(records: Sequence[dict]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(_task_of(record).name, []).append(record["score"])
    means = {name: 100 * fmean(values) for name, values in scores.items()}
    return {**means, "average": fmean(means.values())}


def _task_of(record: dict) -> Task:
    return load_task(record["id"].rpartition("/")[0])


def _from_hub(task: Task) -> list[dict]:
    def load() -> Sequence[dict]:
        from datasets import load_dataset

        path, name, split = task.hub
        return load_dataset(path, name, split=split)

    return read_hub(load, f"LongBench {task.name}", f"DIR/longbench/{task.name}.jsonl")


def _check(task: Task, record: dict, place: str) -> None:
    for field in ("input", "context"):
        if not isinstance(record[field], str):
            raise UserError(f"{place}: {field!r} must be a text, not {record[field]!r}")
    answers = record["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(f"{place}: 'answers' must be a list of one or more texts, not {answers!r}")
    if task.name.endswith("_e") and not isinstance(record["length"], int):
        raise UserError(f"{place}: 'length' must be a number of words, not {record['length']!r}")
    classes = record["all_classes"]
    if task.metric == "classification_score" and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes) and set(answers) <= set(classes)
    ):
        raise UserError(f"{place}: 'all_classes' must be a list of texts with all answers in it, not {classes!r}")
    try:
        score(task, "", record)
    except IndexError:  # the retrieval metrics look for a paragraph's number
        raise UserError(f"{place}: the answers {answers!r} do not suit {task.metric}") from None


@cache
def _metrics():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fuzzywuzzy, that it runs without python-Levenshtein
            from lm_eval.tasks.longbench import metrics
    except ImportError:
        raise UserError(f"LongBench's metrics need lm_eval with jieba, rouge and fuzzywuzzy: {_INSTALL}") from None
    metrics.jieba.setLogLevel("WARNING")
    return metrics
