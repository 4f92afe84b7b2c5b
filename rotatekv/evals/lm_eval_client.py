"""lm_eval's Hugging Face model with the attention mask that it leaves out: batches score as texts do one by one."""

from __future__ import annotations

import torch
from lm_eval.models.huggingface import HFLM

_PADDING = 0  # the token that HFLM fills the shorter rows of a batch with, on the right, whatever the tokenizer's is


class MaskedHFLM(HFLM):
    """``HFLM`` for a patched model, at any ``batch_size``; for causal language models.

    When HFLM scores, it hands the model padded rows without a mask, so that padding can pass for attention sinks. Here
    trailing zeros are masked. A text that itself ends with token 0 is scored alone, where nothing is padded.
    """

    batch_size_per_gpu: int

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        ends_in_zero = [(context + text)[-2] == _PADDING for _, context, text in requests]  # what the model is given
        lone = [request for request, zero in zip(requests, ends_in_zero, strict=True) if zero]
        others = [request for request, zero in zip(requests, ends_in_zero, strict=True) if not zero]
        scores = iter(super()._loglikelihood_tokens(others, disable_tqdm, override_bs))
        batch_size = self.batch_size_per_gpu
        self.batch_size_per_gpu = 1
        try:
            scores_alone = iter(super()._loglikelihood_tokens(lone, disable_tqdm=True))
        finally:
            self.batch_size_per_gpu = batch_size
        return [next(scores_alone if zero else scores) for zero in ends_in_zero]

    def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
        is_padding = (inps == _PADDING).flip(1).cumprod(1).flip(1).bool()
        if len(inps) == 1 or attn_mask is not None or not is_padding.any():
            return super()._model_call(inps, attn_mask, labels)

        def add_mask(model, args, kwargs):
            return args, {**kwargs, "attention_mask": (~is_padding).long()}

        with self.model.register_forward_pre_hook(add_mask, with_kwargs=True):
            return super()._model_call(inps)
