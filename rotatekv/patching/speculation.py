"""Speculative decoding on a patched model: the prompt goes through it first, alone."""

from __future__ import annotations

import torch
from transformers.generation.candidate_generator import CandidateGenerator


def prompt_first(generator: CandidateGenerator) -> CandidateGenerator:
    """Have a generator of candidates (prompt lookup, an assistant model, ...) propose none in its first round.

    Sinks are chosen in a cache's first call. Candidates in that call which are rejected later would have taken the
    place of the prompt's own tokens: in one layer's attention, and by that in all that the next layers have stored.
    """

    def of_prompt(input_ids: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        del generator.get_candidates  # this one, which hides the class's
        generator.get_candidates(input_ids, *args, **kwargs)  # an assistant model's cache is to have the prompt as well
        return input_ids, None

    generator.get_candidates = of_prompt
    return generator
