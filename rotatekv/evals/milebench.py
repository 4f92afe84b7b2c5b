"""MileBench on disk and its prompts (arXiv 2404.18532): long contexts with many pictures.

A data set is ``DIR/<NAME>/<NAME>.json`` with its pictures in ``DIR/<NAME>/images``. Two variants lie beside it:
``<NAME>-adv.json``, and ``<NAME>_combined_<N>.json``, whose pictures are pasted into one (``combined_<N>_images/``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import ProcessorMixin

from rotatekv.errors import UserError
from rotatekv.evals.milebench_metrics import normalize
from rotatekv.evals.tokens import appends_end, context_length

QUESTION_TYPES = ("multi-choice", "open-ended")
_MARK = re.compile(r"\{(?:image|table)#(\d+)\}")
Part = str | int  # a text, or the number of a picture


@dataclass(frozen=True)
class Prompt:
    """A text with pictures in it.

    Args:
        head: what always stays: the instruction.
        body: the context; its earliest parts go where it is too long, its end stays.
        images: the pictures' files; a number among the parts is an index into them.
    """

    head: tuple[Part, ...]
    body: tuple[Part, ...]
    images: tuple[Path, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.head + self.body

    @property
    def shown(self) -> list[Path]:
        """The pictures in the order the text names them, a repeated one repeatedly."""
        return [self.images[part] for part in self.parts if isinstance(part, int)]

    def text(self, image_token: str) -> str:
        """The prompt with the processor's token for each picture; the same characters in the data are taken out."""
        return "".join(image_token if isinstance(part, int) else part.replace(image_token, "") for part in self.parts)


def build_prompt(sample: dict) -> Prompt:
    """Instruction, newline, context, choices. The combined variant's pictures come first of all, marks being text."""
    instruction, context = sample["instruction"], sample["context"] + choice_text(sample)
    images = tuple(sample["image_files"])
    if sample["combined"]:
        body = _MARK.sub(lambda mark: f"<Image {mark[1]}> ", context)
        return Prompt((*range(len(images)), f"\n{instruction}\n"), (body,), images)
    return Prompt((f"{instruction}\n",), split_marks(context, len(images)), images)


def choice_text(sample: dict) -> str:
    """The choice list and the words that ask for an answer; nothing where the question is open."""
    choices = sample["choices"]
    if choices is None:
        return ""
    lines = [f"{chr(65 + number)}. {choice}" if sample["letters"] else choice for number, choice in enumerate(choices)]
    return "\n".join(["\nChoice list: ", *lines, "Your answer is: "])


def split_marks(context: str, images: int) -> tuple[Part, ...]:
    """``{image#i}`` and ``{table#i}`` → picture ``i − 1``, in the text's order; pictures without a mark come first.

    Raises:
        UserError: a mark of a picture that is not there.
    """
    # AUTHORS: pictures are taken in file order there, whatever number the mark has.
    pieces = _MARK.split(context)  # text, number, text, number, …, text
    for number in pieces[1::2]:
        if not 1 <= int(number) <= images:
            raise UserError(f"the context names picture {number}, but the record has {images}")
    marked = [int(piece) - 1 if place % 2 else piece for place, piece in enumerate(pieces)]
    unmarked = [number for number in range(images) if number not in marked]
    return tuple(part for part in (*unmarked, *marked) if part != "")


def drop_earliest(
    prompt: Prompt, budget: int, count: Callable[[Part], int], keep_end: Callable[[str, int], str]
) -> Prompt:
    """The prompt with as much of the end of its body as fits.

    Args:
        budget: tokens for head and body.
        count: a part → its tokens.
        keep_end: (text, tokens) → the text's last tokens, for an end that is too long by itself.

    Raises:
        UserError: the head leaves no room.
    """
    room = budget - sum(count(part) for part in prompt.head)
    if room < 1:
        raise UserError("the instruction alone exceeds the model's context: fewer --max_new_tokens, or another model")
    kept: list[Part] = []
    for part in reversed(prompt.body):
        length = count(part)
        if length > room:
            if not kept and isinstance(part, str):
                kept.append(keep_end(part, room))
            break
        kept.append(part)
        room -= length
    return Prompt(prompt.head, tuple(reversed(kept)), prompt.images)


def encode_prompt(processor: ProcessorMixin, model, prompt: Prompt, max_new_tokens: int) -> tuple[dict, Prompt]:
    """A prompt → the model's inputs and the prompt as shown, its earliest parts dropped where it is too long.

    A processor with a chat template wraps the prompt as the user's turn.

    Returns:
        ``input_ids`` and ``attention_mask`` (1, T), ``pixel_values``, …; T + max_new_tokens is at most the context.

    Raises:
        UserError: a picture cannot be read, or the instruction alone is too long.
    """
    tokenizer, token = processor.tokenizer, processor.image_token
    images = {path: _open(path) for path in dict.fromkeys(prompt.shown)}
    image_tokens: dict[tuple[int, int], int] = {}  # of a picture's size

    def count(part: Part) -> int:
        if isinstance(part, str):
            return len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
        image = images[prompt.images[part]]
        if image.size not in image_tokens:
            image_tokens[image.size] = _count_image_tokens(processor, image)
        return image_tokens[image.size]

    def keep_end(text: str, tokens: int) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[-tokens:])

    limit = context_length(model) - max_new_tokens
    budget = limit - len(_tokenize(processor, "", []).input_ids[0])
    while True:
        shown = drop_earliest(prompt, budget, count, keep_end)
        inputs = _tokenize(processor, shown.text(token), [images[path] for path in shown.shown])
        excess = inputs["input_ids"].shape[1] - limit
        if excess <= 0:
            return dict(inputs.to(model.device, dtype=model.dtype)), shown
        budget -= excess  # words may split otherwise where parts meet


def _count_image_tokens(processor: ProcessorMixin, image) -> int:
    token = processor.image_token
    return processor(text=token, images=[image], return_tensors="pt", add_special_tokens=False).input_ids.shape[1]


def _tokenize(processor: ProcessorMixin, text: str, images: Sequence):
    if processor.chat_template:
        turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    inputs = processor(
        text=text, images=list(images) or None, return_tensors="pt", add_special_tokens=special, verbose=False
    )
    ids = inputs["input_ids"]
    if special and appends_end(processor.tokenizer, text, ids[0].tolist()):
        inputs.update({name: x[:, :-1] for name, x in inputs.items() if x.shape == ids.shape})
    return inputs


def load_datasets(
    data_dir: str | None, names: Sequence[str], limit: int | None = None, adv: bool = False, combined: int | None = None
) -> tuple[list[dict], list[dict]]:
    """The samples of the data sets, and all records as read (for their hash).

    Args:
        names: folders in ``data_dir`` or ``data_dir/milebench``; ``["all"]``: every one that has the variant's file.
        limit: samples of each data set; only their pictures need be there.

    Returns:
        samples: dicts with ``id, dataset, question_type, instruction, context, choices, letters, answer,
        image_files, image_count, combined``.

    Raises:
        UserError: no folder, an unknown data set, a damaged file, a missing field or picture, or no sample.
    """
    if data_dir is None:
        raise UserError("MileBench has no plain loader on the Hub: download it, and pass --data_dir DIR")
    if adv and combined:
        raise UserError("give --adv or --combine_image, not both")
    suffix = "-adv" if adv else f"_combined_{combined}" if combined else ""
    found = _find_datasets(Path(data_dir), suffix)
    if not found:
        raise UserError(f"no data set in {data_dir}: expected DIR/<DATASET>/<DATASET>{suffix}.json")
    names = list(found) if list(names) == ["all"] else list(dict.fromkeys(names))
    if not names:
        raise UserError(f"--datasets names none: {data_dir} has {', '.join(found)}")
    samples, records = [], []
    for name in names:
        if name not in found:
            raise UserError(f"unknown dataset {name!r}: {data_dir} has {', '.join(found)}")
        content = _read_json(found[name])
        records.append(content)
        samples += _samples(name, found[name], content, limit, combined)
    return samples, records


def _find_datasets(folder: Path, suffix: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent in (folder, folder / "milebench"):
        for child in sorted(parent.iterdir()) if parent.is_dir() else []:
            path = child / f"{child.name}{suffix}.json"
            if path.is_file():
                found.setdefault(child.name, path)
    return found


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as json: {error}") from None


def _samples(name: str, path: Path, content: dict, limit: int | None, combined: int | None) -> list[dict]:
    instructions = _field(content, "meta_data.task_instruction", list, str(path))
    question_type = _field(content, "meta_data.question_type", str, str(path))
    data = _field(content, "data", list, str(path))
    if question_type not in QUESTION_TYPES:
        raise UserError(f"{path}: unknown question_type {question_type!r}, expected {' or '.join(QUESTION_TYPES)}")
    if not data:
        raise UserError(f"{path} has no samples")
    picture_key, folder = (f"combined_{combined}_images",) * 2 if combined else ("images_path", "images")
    samples: dict[str, dict] = {}
    for number, record in enumerate(data[:limit], start=1):
        where = f"{path}, record {number}"
        key = f"{name}/{_field(record, 'sample_id', (int, str), where)}"
        which = _field(record, "task_instruction_id", int, where)
        if not 0 <= which < len(instructions):
            raise UserError(f"{where}: no task_instruction {which}")
        if key in samples:
            raise UserError(f"{where}: sample_id is there twice ({key})")
        samples[key] = sample = {
            "id": key,
            "dataset": name,
            "question_type": question_type,
            "instruction": instructions[which],
            "context": _field(record, "task_instance.context", str, where),
            "choices": None,
            "letters": name != "GPR1200",  # more choices than letters there
            "answer": str(_field(record, "response", (str, int, float), where)),
            "image_count": len(_field(record, "task_instance.images_path", list, where)),
            "combined": bool(combined),
        }
        files = _field(record, f"task_instance.{picture_key}", list, where)
        sample["image_files"] = [path.parent / folder / str(file) for file in files]
        if question_type == "multi-choice" or "choice_list" in record["task_instance"]:
            sample["choices"] = [str(choice) for choice in _field(record, "task_instance.choice_list", list, where)]
        _check_sample(sample, where)
    return list(samples.values())


def _check_sample(sample: dict, where: str) -> None:
    if sample["choices"] is not None and normalize(sample["answer"]) not in map(normalize, sample["choices"]):
        raise UserError(f"{where}: the response {sample['answer']!r} is not in choice_list")
    for file in sample["image_files"]:
        if not file.is_file():
            raise UserError(f"{where}: no picture {file}")
    try:
        build_prompt(sample)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _field(record, name: str, kind: type | tuple[type, ...], where: str):
    """``record["a"]["b"]`` for ``a.b``; UserError where it is missing or of another kind."""
    value = record
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{where} has no field {name!r}")
        value = value[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: the field {name!r} is a {type(value).__name__}")
    return value


def _open(path: Path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises half a dozen classes on damaged files
        raise UserError(f"cannot read the picture {path}: {error}") from None
