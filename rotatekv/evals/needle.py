"""Needle in a haystack: prompts of an exact length with one or several sentences hidden in them, and their scores."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from rotatekv.errors import UserError
from rotatekv.evals.generation import complete_inputs
from rotatekv.evals.needle_keys import NEEDLE_KEYS, named_keys
from rotatekv.evals.texts import Text, load_text
from rotatekv.evals.tokens import encode

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
RETRIEVAL_QUESTION = "What is the best thing to do in San Francisco?"
KEY_PHRASE = "eat a sandwich and sit in Dolores Park"
PASSKEY_NEEDLE = "The pass key is {number}. Remember it. {number} is the pass key."
PASSKEY_QUESTIONS = {
    "passkey": "What is the pass key hidden in the text above?",
    "multikey": "What is the pass key for the {name} mentioned in the provided text?",
}
CONTEXT_LENGTHS, DEPTHS = "1024,2048,4096", "0:100:10"  # by default

_MARK = "<<haystack>>"  # where the haystack goes in a rendered chat template
_NAME = "{name}"  # the asked key's, in what stands behind the haystack
_FULL_STOPS = "。！？｡．؟۔।॥։።។။"  # beside the usual test's "."
_REACH = 160, 0.05  # tokens, and share of the haystack: the farther one is how far back a sentence's end may lie
_TAIL = 8  # tokens that surely hold the last character


@dataclass(frozen=True)
class NeedleType:
    """How one kind of needle is asked for.

    Args:
        before, after: what stands around the haystack; ``{question}`` in ``after``.
        answer: the answer's beginning, given to the model; ``chat_answer``: the same behind a chat template. Here and
            in a question ``{name}`` is the asked key's.
        stop_strings: where an answer ends.
        measure: the measure its heat map shows.
    """

    before: str
    after: str
    answer: str
    chat_answer: str
    stop_strings: tuple[str, ...]
    measure: str


NEEDLE_TYPES = {
    # The prompt of Fu et al. (2024), who made the paper's LLaMA-2-7B-80K and its test.
    "standard": NeedleType(
        before="This is a very long story book: <book> ",
        after=" </book>.\nBased on the content of the book, Question: {question}",
        answer="\nAnswer:",
        chat_answer="",
        stop_strings=(),
        measure="rouge1",
    ),
    # The answer is begun for the model, so that one of 135 M parameters, tuned to chat or not, finds the number.
    "passkey": NeedleType(
        before="A pass key is hidden in this text. Find it and remember it.\n\n",
        after="\n\n{question}",
        answer=" The pass key is",
        chat_answer="The pass key is",
        stop_strings=(".", "\n"),
        measure="recall",
    ),
    # RULER's multi-key task (arXiv 2404.06654), which asks for one of several keys by its name, and nearly its wording.
    "multikey": NeedleType(
        before="Some pass keys are hidden within the following text. Make sure to memorize them. I will quiz you about "
        "them afterwards.\n\n",
        after="\n\n{question}",
        answer=" The pass key for the {name} mentioned in the provided text is",
        chat_answer="The pass key for the {name} mentioned in the provided text is",
        stop_strings=(".", "\n"),
        measure="recall",
    ),
}


class Placed(NamedTuple):
    """A prompt's tokens, and the needle's depth in percent of the haystack, which sentence ends make another one than
    was asked for; the same of the other needles, in their order."""

    ids: list[int]
    depth: float
    other_depths: tuple[float, ...] = ()


class Prompts:
    """Prompts of an exact number of tokens around one haystack.

    Args:
        haystack: repeated to the length asked for.
        chat: put haystack and question into the tokenizer's chat template, as one message of the user.
    """

    def __init__(self, tokenizer, kind: NeedleType, haystack: Text, question: str, chat: bool):
        after = kind.after.format(question=question)
        if chat:
            message = [{"role": "user", "content": f"{kind.before}{_MARK}{after}"}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            before, _, after = rendered.partition(_MARK)
            after += kind.chat_answer
        else:
            before, after = kind.before, after + kind.answer
        self._tokenizer = tokenizer
        self._before = encode(tokenizer, before, special=not chat)
        self._after = after
        self._haystack = self._tokens(f"{haystack.content}\n\n")
        if not self._haystack:
            raise UserError(f"the haystack {haystack.name} has no tokens: pass another --haystack")

    def build(
        self, length: int, depth: int, needle: str, others: Sequence[tuple[int, str]] = (), name: str | None = None
    ) -> Placed:
        """``length`` token ids, the needle about ``depth`` percent down the haystack.

        Args:
            others: depths and texts of more needles; where a depth's place is taken, the needle goes further down.
            name: what the question and the answer's beginning have for ``{name}``.

        Raises:
            UserError: no room for the needles in ``length`` tokens, or no places of their own.
        """
        after = self._tokens(self._after if name is None else self._after.replace(_NAME, name))
        hidden = [self._tokens(f"\n{text}\n") for text in (needle, *(text for _, text in others))]
        room = length - len(self._before) - sum(map(len, hidden)) - len(after)
        if room < 0:
            raise UserError(
                f"a context of {length} tokens has no room for the needle: question and needle take {length - room}, "
                f"pass --context_lengths {length - room} or more"
            )
        repeats = -(-room // len(self._haystack))
        haystack = (self._haystack * repeats)[:room]
        points = [insertion_point(haystack, depth, self._tokenizer.decode)]
        for other, _ in others:
            points.append(self._free_point(haystack, other, points, length))
        ids, start = list(self._before), 0
        for point, tokens in sorted(zip(points, hidden, strict=True)):
            ids += [*haystack[start:point], *tokens]
            start = point
        ids += [*haystack[start:], *after]
        reached = [round(100 * point / len(haystack), 1) if haystack else float(depth) for point in points]
        return Placed(ids, reached[0], tuple(reached[1:]))

    def build_cell(self, sample: dict) -> Placed:
        """``build`` of one of ``cells``."""
        needles = sample["needle"], sample.get("others", ()), sample.get("name")
        return self.build(sample["length"], sample["depth"], *needles)

    def _free_point(self, haystack: Sequence[int], depth: int, taken: Sequence[int], length: int) -> int:
        """``insertion_point`` of ``depth`` percent, or of the next depth (after 99, 0) with a place not taken."""
        for step in range(100):
            point = insertion_point(haystack, (depth + step) % 100, self._tokenizer.decode)
            if point not in taken:
                return point
        raise UserError(
            f"a context of {length} tokens has no places for so many needles: "
            "pass longer --context_lengths or fewer --needle_keys"
        )

    def _tokens(self, text: str) -> list[int]:
        return encode(self._tokenizer, text, special=False)


def insertion_point(haystack: Sequence[int], depth: int, decode: Callable[[Sequence[int]], str]) -> int:
    """Tokens of the haystack before the needle: ``depth`` percent of them, back to behind a sentence's end.

    As in the usual test 100 is the very end. A sentence ends with the token "." or another script's full stop; where
    none is near, a line's end counts, and where no line ends either (a text without any), the needle goes to the very
    place, between two characters.
    """
    # The usual test goes back to the last "." however far it is: to the start of a text without one, at every depth.
    if depth == 100:
        return len(haystack)
    point = len(haystack) * depth // 100
    reach = int(max(_REACH[0], _REACH[1] * len(haystack)))
    for is_end in (_ends_sentence, _ends_line):
        for place in range(point, max(0, point - reach), -1):
            if is_end(decode(haystack[place - 1 : place]), decode(haystack[max(0, place - _TAIL) : place])):
                return place
    for place in range(point, max(0, point - _TAIL), -1):
        if not decode(haystack[max(0, place - _TAIL) : place]).endswith("\ufffd"):  # half a character
            return place
    return point


def _ends_sentence(token: str, tail: str) -> bool:
    """Whether a place is one, from the token before it and the text of some tokens before it."""
    return token.strip() == "." or tail.rstrip()[-1:] in tuple(_FULL_STOPS)


def _ends_line(token: str, tail: str) -> bool:
    return tail.rstrip(" \t")[-1:] in ("\n", "!", "?")


def parse_grid(text: str, flag: str, lowest: int, highest: int | None = None) -> list[int]:
    """``0,50,100`` or ``min:max:steps`` (ends included, rounded) → ascending whole numbers, each once.

    Raises:
        UserError: neither of the two, or a number out of range.
    """
    try:
        values = _spread(*map(int, text.split(":"))) if ":" in text else [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise UserError(
            f"--{flag} {text!r}: pass whole numbers as a list (10,20,50) or min:max:steps (10:50:5)"
        ) from None
    for value in values:
        if value < lowest or (highest is not None and value > highest):
            bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise UserError(f"--{flag} must be {bounds}, not {value}")
    return sorted(set(values))


def _spread(first: int, last: int, steps: int) -> list[int]:
    if first >= last or not 2 <= steps <= last - first + 1:
        raise ValueError
    return [round(first + (last - first) * step / (steps - 1)) for step in range(steps)]


def cells(
    lengths: Sequence[int],
    depths: Sequence[int],
    seed: int,
    needle_type: str,
    needle: str | None = None,
    key_phrase: str | None = None,
    keys: int = NEEDLE_KEYS,
) -> list[dict]:
    """The samples of a grid: ``id`` ("1024/50"), ``length``, ``depth``, ``needle``, ``answer`` (for ROUGE-1) and
    ``key_phrase`` (for recall); a pass key is a number of its own in each cell, decided by seed, length and depth.

    Args:
        keys: how many pass keys ``multikey`` hides; see ``named_keys``.
    """
    samples = []
    for length in lengths:
        for depth in depths:
            sample = {"id": f"{length}/{depth}", "needle_type": needle_type, "length": length, "depth": depth}
            if needle_type == "passkey":
                number = str(random.Random(f"{seed}/{length}/{depth}").randint(10000, 99999))
                sample |= {"needle": PASSKEY_NEEDLE.format(number=number), "answer": number, "key_phrase": number}
            elif needle_type == "multikey":
                sample |= named_keys(random.Random(f"{seed}/{length}/{depth}"), depth, keys)
            else:
                sample |= {"needle": needle, "answer": needle, "key_phrase": key_phrase}
            samples.append(sample)
    return samples


def wording(
    needle_type: str, needle: str | None, question: str | None, key_phrase: str | None
) -> tuple[str | None, str, str | None]:
    """Needle, question and key phrase, None being the usual one; a pass key brings another needle in each cell.

    Raises:
        UserError: a needle for a pass key, one without the key phrase in it, or a question that names no key.
    """
    if needle_type in PASSKEY_QUESTIONS:
        if needle is not None or key_phrase is not None:
            raise UserError(f"--needle_type {needle_type} hides its own needle: leave out --needle and --key_phrase")
        if question is not None and needle_type == "multikey" and _NAME not in question:
            raise UserError(f"the question must say which key it asks for: put {_NAME} into --retrieval_question")
        return None, PASSKEY_QUESTIONS[needle_type] if question is None else question, None
    needle = NEEDLE if needle is None else needle
    key_phrase = KEY_PHRASE if key_phrase is None else key_phrase
    if not key_phrase.strip() or not recall(needle, key_phrase):
        raise UserError(f"the needle does not hold the key phrase {key_phrase!r}: pass a --key_phrase out of it")
    return needle, RETRIEVAL_QUESTION if question is None else question, key_phrase


def use_chat(wanted: bool | None, tokenizer) -> bool:
    """``--chat_template``; None takes the template where there is one. UserError where there is none to take."""
    if wanted and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: leave out --chat_template")
    return bool(tokenizer.chat_template) if wanted is None else wanted


def load_haystack(name: str, data_dir: str | None = None) -> Text:
    """``essays`` (those no calibration reads), ``wikitext2``, a text file, or a folder's .txt files by name.

    Raises:
        UserError: nothing of that name, or no text in it.
    """
    path = Path(name)
    if name in ("essays", "wikitext2") or path.is_file():
        return load_text(name, data_dir)
    if not path.is_dir():
        raise UserError(f"no haystack {name!r}: pass essays, a text file or a folder of .txt files")
    texts = [load_text(str(file)).content for file in sorted(path.glob("*.txt"))]
    if not texts:
        raise UserError(f"the haystack folder {name} has no .txt files")
    return Text(path.resolve().name, "\n\n".join(texts))


def answer_cell(model, tokenizer, prompts: Prompts, sample: dict, max_new_tokens: int) -> dict:
    """Ask the patched model about one cell → its record."""
    stop_strings = NEEDLE_TYPES[sample["needle_type"]].stop_strings
    prompt, depth, other_depths = prompts.build_cell(sample)
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (record,) = complete_inputs(model, tokenizer, inputs, max_new_tokens, stop_strings)
    digest = hashlib.sha256(tokenizer.decode(prompt).encode()).hexdigest()
    gold = {"answers": [sample["answer"]], "key_phrase": sample["key_phrase"], "prompt_sha256": digest}
    cell = {name: sample[name] for name in ("needle_type", "length", "depth")} | {"depth_reached": depth}
    if other_depths:
        cell |= {"name": sample["name"], "other_keys": sample["other_keys"], "other_depths": other_depths}
    return scored({**cell, **record, **gold})


def scored(record: dict) -> dict:
    """The record with ``rouge1`` and ``recall`` (0 to 100), and as ``score`` the one its needle type is judged by."""
    measures = {
        "rouge1": rouge1(record["prediction"], record["answers"][0]),
        "recall": recall(record["prediction"], record["key_phrase"]),
    }
    return {**record, **measures, "score": measures[NEEDLE_TYPES[record["needle_type"]].measure]}


def rouge1(prediction: str, answer: str) -> float:
    """ROUGE-1 F × 100 of stemmed words, by the paper's scorer (which reports F × 10)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE-1 needs rouge_score: pip install rouge_score (or make install)") from None
    return 100 * RougeScorer(["rouge1"], use_stemmer=True).score(answer, prediction)["rouge1"].fmeasure


def recall(prediction: str, key_phrase: str) -> float:
    """100 where the key phrase stands in the prediction as whole words, whatever the case and white space; else 0."""
    words = r"\s+".join(map(re.escape, key_phrase.split()))
    return 100.0 * bool(re.search(rf"(?<!\w){words}(?!\w)", prediction, re.IGNORECASE))


def means(records: Sequence[dict]) -> dict:
    """``metric`` of metrics.json: every cell counts the same."""
    return {name: sum(record[name] for record in records) / len(records) for name in ("rouge1", "recall")}


def grid_of(records: Sequence[dict], metrics: dict) -> dict:
    """The content of grid.json.

    Args:
        metrics: what metrics.json holds.

    Returns:
        ``rouge1``, ``recall`` and ``depth_reached`` as lists of rows (one for each of ``depths``) of columns
        (``context_lengths``), None where a ``--limit`` left a cell out, and what a figure's title needs.
    """
    config = metrics["config"]
    found = {(record["length"], record["depth"]): record for record in records}
    grid = {
        "needle_type": config["needle_type"],
        "model": config["model"],
        "method": config["method"],
        "bits": metrics["avg_bits"]["total"],
        "context_lengths": config["context_lengths"],
        "depths": config["depths"],
    }
    for name in ("rouge1", "recall", "depth_reached"):
        grid[name] = [
            [found.get((length, depth), {}).get(name) for length in grid["context_lengths"]] for depth in grid["depths"]
        ]
    return grid
