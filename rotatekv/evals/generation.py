"""Greedy completions of a patched model, or one with HF's cache, with what their cache took."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import StoppingCriteria

from rotatekv.compat import CACHE_NAME
from rotatekv.errors import UserError
from rotatekv.evals.running import cache_use
from rotatekv.external import new_cache


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
        prompts: left-padded into one batch.
        max_new_tokens: at most this many tokens each.
        stop_strings: a completion ends before the first of them.
        add_special_tokens: False where the prompt comes from a chat template.
        options: further ones of ``generate``.

    Returns:
        for each prompt ``prediction`` (str), ``prompt_sha256``, ``prompt_tokens``, ``new_tokens`` (the
            batch's longest completion), ``token_ids`` without the padding at their end, and what ``cache_use``
            measures of the batch's cache, divided by its rows.

    Raises:
        UserError: a prompt has no token, or it and its completion exceed the model's context.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=add_special_tokens)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if not inputs["attention_mask"].any(dim=1).all():
        raise UserError("a prompt without a single token has no completion")
    check_context(model, inputs["input_ids"].shape[1], max_new_tokens)
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
    cache = new_cache(model)
    length = inputs["input_ids"].shape[1]
    stop = {"stopping_criteria": [_StopAt(tokenizer, stop_strings, length)]} if stop_strings else {}
    with torch.no_grad():
        tokens = model.generate(
            **inputs, **{CACHE_NAME: cache}, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            do_sample=False, temperature=None, top_p=None, top_k=None, **stop, **options,
        )  # fmt: skip
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
                "token_ids": _without_padding(row.tolist(), tokenizer.pad_token_id),
                **use,
            }
        )
    return records


def _without_padding(token_ids: list[int], pad_token_id: int) -> list[int]:
    while token_ids and token_ids[-1] == pad_token_id:
        token_ids.pop()
    return token_ids


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


def context_length(model) -> int:
    """Tokens the model's positions reach."""
    return model.config.get_text_config().max_position_embeddings


def check_context(model, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError where a prompt and its completion exceed the model's context."""
    limit = context_length(model)
    if prompt_tokens + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's context of {limit}"
        )
