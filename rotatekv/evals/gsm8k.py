"""GSM8K with chain of thought: questions, the 8-shot prompt, and the number in an answer (paper, Table 2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from rotatekv.errors import UserError
from rotatekv.evals.numbers import boxed, first_number, last_number
from rotatekv.evals.records import read_hub, read_jsonl

STOP = "Q:"  # the model goes on to a question of its own
_FIELDS = ("question", "answer")
_EXAMPLES = Path("tasks") / "gsm8k" / "gsm8k-cot.yaml"  # in the installed lm_eval
_OPENING = "Let's think step by step."
_MARK = "The answer is"


def load_questions(data_dir: str | None) -> list[dict]:
    """The test split in order, each with ``id`` (its place), ``question`` and ``answers``, the normalised number alone.

    Raises:
        UserError: no file, no network, a broken line, a missing field, or an answer without ``#### number``.
    """
    if data_dir is not None:
        rows = read_jsonl(Path(data_dir) / "gsm8k" / "test.jsonl", _FIELDS)
    else:
        rows = read_hub(_load_hub, "GSM8K", "DIR/gsm8k/test.jsonl")
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row[field], str) for field in _FIELDS):
            raise UserError(f"GSM8K record {number}: question and answer must be texts")
    return [
        {"id": number, "question": row["question"], "answers": [gold_number(row["answer"], number)]}
        for number, row in enumerate(rows)
    ]


def load_examples(count: int) -> list[tuple[str, str]]:
    """The first ``count`` pairs of question and worked answer of lm_eval's gsm8k_cot.

    Raises:
        UserError: lm_eval is not installed, or has fewer examples.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the GSM8K examples are lm_eval's: pip install 'lm_eval[longbench]==0.4.13' (or make install)")
    try:
        from lm_eval.tasks._yaml_loader import load_yaml

        task = load_yaml(Path(spec.submodule_search_locations[0]) / _EXAMPLES, resolve_func=False)
        samples = task["fewshot_config"]["samples"]
    except (ImportError, OSError, KeyError):
        raise UserError("the installed lm_eval has no gsm8k_cot: pip install 'lm_eval[longbench]==0.4.13'") from None
    if not 0 <= count <= len(samples):
        raise UserError(f"--num_fewshot must be from 0 to {len(samples)}, not {count}")
    return [(sample["question"], sample["target"]) for sample in samples[:count]]


def build_prompt(examples: Sequence[tuple[str, str]], question: str) -> str:
    """``Q: …`` and ``A: Let's think step by step. …`` of every example, then the question and an open ``A:``."""
    shots = [f"Q: {asked}\nA: {_OPENING} {worked}\n\n" for asked, worked in examples]
    return "".join(shots) + f"Q: {question}\nA:"


def extract_number(text: str) -> str | None:
    r"""The number a completion answers with, normalised; None: no number.

    The first number after the first "The answer is", as in lm_eval's gsm8k_cot (the paper's metric); else the one in
    the last ``\boxed{…}``; else the last number of the text. Numbers are read as ``numbers.plain`` says, words never:
    "twelve" is none. Where lm_eval cuts a number ("1" of "1 234", "3" of "3/4") the whole counts.
    """
    for place in (text.partition(_MARK)[2], boxed(text)):
        if (found := first_number(place)) is not None:
            return found
    return last_number(text)


def gold_number(answer: str, place: int) -> str:
    """The normalised number behind ``####`` in the data set's answer; ``place`` names the question in the error."""
    _, mark, last = str(answer).rpartition("####")
    found = first_number(last) if mark else None
    if found is None:
        raise UserError(f"the answer of GSM8K question {place} (from 0) has no '#### number'")
    return found


def score(record: dict) -> dict:
    """The record with ``extracted`` and ``score``, 1 or 0, of its ``prediction`` and ``answers``."""
    extracted = extract_number(record["prediction"])
    return {**record, "extracted": extracted, "score": int(extracted in record["answers"])}


def accuracy(records: Sequence[dict]) -> float:
    """Percent of the records that score."""
    return 100 * sum(record["score"] for record in records) / len(records)


def agreement(records: Sequence[dict], others: Mapping[int, dict]) -> float:
    """Tokens of a completion before it leaves the one that another run gave to the same question, on average.

    Args:
        others: that run's records by ``id``.

    Raises:
        UserError: a question is not there, or a run of an earlier version kept no token ids.
    """
    check_token_ids(records, {record["id"]: record for record in records})
    check_token_ids(records, others)
    total = 0
    for record in records:
        pairs = zip(record["token_ids"], others[record["id"]]["token_ids"], strict=False)
        total += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return total / len(records)


def check_token_ids(samples: Sequence[dict], records: Mapping[int, dict]) -> None:
    """Raises UserError where a sample has no completion's tokens among ``records``."""
    for sample in samples:
        if not isinstance(records.get(sample["id"], {}).get("token_ids"), list):
            raise UserError(f"question {sample['id']} has no completion's tokens in both runs: run both anew")


def _load_hub() -> list[dict]:
    from datasets import load_dataset

    rows = load_dataset("openai/gsm8k", "main", split="test")
    return [{name: row[name] for name in _FIELDS} for row in rows]
