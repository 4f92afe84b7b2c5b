"""Greedy completions of a patched model, or one with HF's cache, with what their cache took."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from rotatekv.compat import CACHE_NAME
from rotatekv.errors import UserError
from rotatekv.evals.results import NOT_FINITE
from rotatekv.evals.running import cache_use
from rotatekv.evals.tokens import check_token_ids, context_length, encode, end_ids, left_padded, pad_id
from rotatekv.external import new_cache

# Greedy, whatever a checkpoint's generation config says. A field that is not named has transformers' own default, which
# changes no token: no penalty, no forced or suppressed token, no speculation.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}
MAX_NEW_TOKENS = {"gsm8k": 256, "longbench": None, "needle": 50, "milebench": 512}  # by default; None: each task's own


def decoding(model, tokenizer, stop_strings: Sequence[str] = ()) -> dict:
    """How ``complete`` decodes, for config.json; of the checkpoint it takes the tokens that end a text, no more."""
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    return {**GREEDY, "eos_token_id": ends, "pad_token_id": pad, "stop_strings": list(stop_strings)}


def complete(
    model,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    add_special_tokens: bool = True,
    **options,
) -> list[dict]:
    """Continue a batch of prompts greedily.

    Args:
        prompts: left-padded into one batch; an end of text that the tokenizer appends is left out.
        max_new_tokens: at most this many tokens each.
        stop_strings: a completion ends before the first of them.
        add_special_tokens: False where the prompt comes from a chat template.
        options: fields of a ``GenerationConfig`` that the task sets besides ``decoding``'s.

    Returns:
        for each prompt ``prediction`` (str), ``prompt_sha256``, ``prompt_tokens``, ``new_tokens`` (the
            batch's longest completion), ``token_ids`` without the padding at their end, and what ``cache_use``
            measures of the batch's cache, divided by its rows.

    Raises:
        UserError: a prompt has no token or one without an embedding, it and its completion exceed the model's
            context, or the model's logits are no finite numbers.
    """
    rows = [encode(tokenizer, prompt, add_special_tokens) for prompt in prompts]
    if not all(rows):
        raise UserError("a prompt without a single token has no completion")
    check_context(model, max(map(len, rows)), max_new_tokens)
    inputs = left_padded(rows, pad_id(model, tokenizer), model.device)
    records = complete_inputs(model, tokenizer, inputs, max_new_tokens, stop_strings, **options)
    for prompt, record in zip(prompts, records, strict=True):
        record["prompt_sha256"] = hashlib.sha256(prompt.encode()).hexdigest()
    return records


def complete_inputs(
    model, tokenizer, inputs: dict, max_new_tokens: int, stop_strings: Sequence[str] = (), **options
) -> list[dict]:
    """``complete`` for inputs that are tokens already, a processor's with pictures among them.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` (B, T), left-padded, and whatever else the model takes.
    """
    check_token_ids(model, inputs["input_ids"])
    cache = new_cache(model)
    length, ends, pad = inputs["input_ids"].shape[1], end_ids(model, tokenizer), pad_id(model, tokenizer)
    watch = {"logits_processor": LogitsProcessorList([_Finite()])}
    if stop_strings:
        watch["stopping_criteria"] = [_StopAt(tokenizer, stop_strings, length)]
    fields = {**GREEDY, "eos_token_id": ends or None, "pad_token_id": pad, **options}
    with torch.no_grad(), _generation_config(model, GenerationConfig(**fields, max_new_tokens=max_new_tokens)) as own:
        tokens = model.generate(**inputs, **{CACHE_NAME: cache}, generation_config=own, **watch)
    rows = len(tokens)
    use = cache_use(cache)
    use |= {"tokens": use["tokens"] / rows, "cache_bytes": use["cache_bytes"] / rows}
    records = []
    for row, mask in zip(tokens[:, length:], inputs["attention_mask"], strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        records.append(
            {
                "prediction": cut_at(text, stop_strings),
                "prompt_tokens": int(mask.sum()),
                "new_tokens": len(row),
                "token_ids": _without_padding(row.tolist(), pad if ends else None),  # nothing pads rows that never end
                **use,
            }
        )
    return records


@contextmanager
def _generation_config(model, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """``config`` in the place of the checkpoint's, from which ``generate`` takes every field that is None."""
    checkpoints = model.generation_config
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = checkpoints


def _without_padding(token_ids: list[int], pad_token_id: int | None) -> list[int]:
    while token_ids and token_ids[-1] == pad_token_id:
        token_ids.pop()
    return token_ids


class _Finite(LogitsProcessor):
    """Raises UserError where the model overflowed: the best of such logits is no answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool((scores < math.inf).all()):  # a suppressed token's is −inf
            raise UserError(f"the model's logits are no finite numbers{NOT_FINITE}")
        return scores


class _StopAt(StoppingCriteria):
    """Ends a row as soon as its completion holds one of the strings.

    Unlike transformers' ``stop_strings``, which takes a tokenizer's vocabulary apart (and fails on word-level ones),
    this reads the decoded text, and never the prompt's.
    """

    def __init__(self, tokenizer, strings: Sequence[str], prompt_length: int):
        self.tokenizer, self.strings, self.start = tokenizer, strings, prompt_length
        self.reach = max(len(string.encode()) for string in strings) + 4  # a token holds at least one byte

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :]  # (B, ≤ reach)
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        stops = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(stops, dtype=torch.bool, device=input_ids.device)


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text


def check_context(model, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError where a prompt and its completion exceed the model's context."""
    limit = context_length(model)
    if prompt_tokens + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
        )
