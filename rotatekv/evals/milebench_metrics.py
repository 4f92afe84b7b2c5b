"""MileBench's scores as pure functions: choices, ROUGE-L, containment, and the splits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rotatekv.errors import UserError
from rotatekv.evals.scoring import deep_recursion

# The categories of the published evaluation code (github.com/MileBench/MileBench, score.py). Its data sets are named
# in two ways (action_localization, ActionLocalization): compare with _plain.
CATEGORIES = {
    "temporal": (
        "ActionLocalization",
        "ActionPrediction",
        "ActionSequence",
        "CharacterOrder",
        "CounterfactualInference",
        "EgocentricNavigation",
        "MovingAttribute",
        "MovingDirection",
        "ObjectExistence",
        "ObjectInteraction",
        "ObjectShuffle",
        "SceneTransition",
        "StateChange",
    ),
    "semantic": (
        "ALFRED",
        "CLEVR-Change",
        "DocVQA",
        "IEdit",
        "MMCoQA",
        "MultiModalQA",
        "nuscenes",
        "OCR-VQA",
        "SlideVQA",
        "Spot-the-Diff",
        "TQA",
        "WebQA",
        "WikiVQA",
    ),
    "diagnostic": ("GPR1200", "ImageNeedleInAHaystack", "TextNeedleInAHaystack"),
}
IMAGE_LEVELS = ("few", "medium", "many")
_DROPPED = ';/[]"{}()=+\\_-><@`,?!:'


def category_of(dataset: str) -> str | None:
    """temporal, semantic, diagnostic; None for what is no data set of MileBench."""
    for category, datasets in CATEGORIES.items():
        if _plain(dataset) in map(_plain, datasets):
            return category
    return None


def image_level(images: int) -> str:
    """few (under 6), medium (6 to 31), many (over 31)."""
    return "few" if images < 6 else "medium" if images <= 31 else "many"


def score_record(record: dict) -> float:
    """0 … 1, from the record's ``dataset, question_type, prediction, answers, choices, letters``."""
    (answer,), prediction = record["answers"], record["prediction"]
    if "NeedleInAHaystack" in record["dataset"]:
        return float(contains_words(prediction, answer))
    if "MMCoQA" in record["dataset"]:
        return float(normalize(answer) in normalize(prediction))
    if record["question_type"] == "open-ended":
        return rouge_l(prediction, answer)
    chosen = match_choice(prediction, record["choices"], record["letters"])
    if chosen is None:
        return 0.0
    if answer in record["choices"]:  # "C" and "C++" are one word to normalize
        return float(chosen == record["choices"].index(answer))
    return float(normalize(record["choices"][chosen]) == normalize(answer))


def match_choice(prediction: str, choices: Sequence[str], letters: bool = True) -> int | None:
    """Which choice an answer names: letter and text, else the text, else a bare letter; None for none.

    Whole words count, the earliest in the answer wins, and of two that begin at one place the longer.

    Args:
        letters: False where the prompt lists the choices without letters (GPR1200).
    """
    # AUTHORS: an empty answer counts as C there, "10" as the choice "1", "untrue" as "true", and the letters of any
    # other answer are strung together.
    text = normalize(prediction)
    plain = [normalize(choice) for choice in choices]
    if letters:
        named = [f"{chr(97 + number)} {choice}" for number, choice in enumerate(plain)]
        if (found := _earliest(text, named)) is not None:
            return found
    if (found := _earliest(text, plain)) is not None:
        return found
    return _bare_letter(prediction, len(choices)) if letters else None


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F of the ``rouge`` package on normalized texts; 0 for an empty answer."""
    from rouge import Rouge

    prediction, answer = normalize(prediction), normalize(answer)
    if not prediction.strip(". ") or not answer.strip(". "):  # rouge finds no sentence in dots
        return 0.0
    with deep_recursion():
        return Rouge().get_scores(prediction, answer)[0]["rouge-l"]["f"]


def contains_words(prediction: str, answer: str) -> bool:
    """The answer's words stand in the prediction, one after the other."""
    return _earliest(normalize(prediction), [normalize(answer)]) is not None


def normalize(text: str) -> str:
    """Lower case, one space between words, without punctuation; a point between digits stays."""
    # AUTHORS: whether a punctuation mark becomes a space or nothing depends on the rest of the text there.
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<=\s)-(?=\d)|^-(?=\d)", "\0", text)  # a minus is no hyphen
    text = text.translate(str.maketrans(_DROPPED, " " * len(_DROPPED))).replace("\0", "-")
    text = re.sub(r"\.(?!\d)|(?<!\d)\.(?=\d)", " ", text)
    return " ".join(word.strip("'") for word in text.lower().split())


def summarize(records: Sequence[dict]) -> dict:
    """``{dataset: score, "average": …, "images": {level: …}, "categories": {category: …}}``, in percent.

    A data set's score is the mean over its samples, every other number the mean over data sets of their scores.
    """
    metric = _means(records)
    by_level = {level: _means([r for r in records if image_level(r["image_count"]) == level]) for level in IMAGE_LEVELS}
    by_category = {name: _means([r for r in records if category_of(r["dataset"]) == name]) for name in CATEGORIES}
    return {
        **metric,
        "average": _mean(metric.values()),
        "images": {name: _mean(scores.values()) for name, scores in by_level.items() if scores},
        "categories": {name: _mean(scores.values()) for name, scores in by_category.items() if scores},
    }


def rescored(records: Sequence[dict]) -> tuple[list[dict], dict]:
    """The records with their ``score`` computed anew, and the metric; for ``rescore``."""
    records = [{**record, "score": score_record(record)} for record in records]
    return records, summarize(records)


def _means(records: Sequence[dict]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record["dataset"], []).append(100 * record["score"])
    return {dataset: _mean(values) for dataset, values in scores.items()}


def _mean(values) -> float:
    values = list(values)
    if not values:
        raise UserError("no samples to score")
    return sum(values) / len(values)


def _earliest(text: str, phrases: Sequence[str]) -> int | None:
    """Which phrase stands first in ``text`` as whole words."""
    padded = f" {text} "
    places = {number: padded.find(f" {phrase} ") for number, phrase in enumerate(phrases) if phrase}
    found = [(place, -len(phrases[number]), number) for number, place in places.items() if place >= 0]
    return min(found)[2] if found else None


def _bare_letter(prediction: str, choices: int) -> int | None:
    """``B``, ``b``, ``(B).``, ``The answer is B`` → 1; two letters, or the words "A" and "I" in a sentence, → None."""
    alone = normalize(prediction).upper()
    letters = (
        [alone]
        if len(alone) == 1
        else re.findall(r"(?<![\w'])([B-HJ-Z]|[AI](?! (?!or |and |is )[a-z]))(?![\w'])", prediction)
    )
    found = {ord(letter) - 65 for letter in letters if 0 <= ord(letter) - 65 < choices}
    return found.pop() if len(found) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
