"""lm_eval as a client: an ``HFLM`` around a patched model measures the quantized cache."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from test_masks import small
from transformers import AutoTokenizer

from rotatekv import load_model, patch_model
from rotatekv.evals.perplexity import perplexity, score_window

TASK = """task: local_text
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


def lm_eval_perplexity(model, tokenizer, folder, texts, tokens):
    """Per-token perplexity that ``lm_eval.simple_evaluate`` finds on a local task made of ``texts``."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "local_text.yaml").write_text(TASK.format(data=data))
    # No attention mask reaches the model when lm_eval scores, so padding could pass for sinks: batch size 1.
    client = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(client, tasks=["local_text"], task_manager=tasks, bootstrap_iters=0)
    found = found["results"]["local_text"]
    nats_per_byte = math.log(found["byte_perplexity,none"])
    return math.exp(nats_per_byte * sum(len(text.encode()) for text in texts) / tokens), client.prefix_token_id


def test_lm_eval_agrees_with_our_perplexity_on_the_same_windows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(str(save_tiny_folder(tmp_path / "tiny")))
    texts = [tiny_text(100, seed) for seed in range(4)]
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    tokens = sum(x.shape[1] for x in ids)
    stock, prefix = lm_eval_perplexity(model, tokenizer, tmp_path, texts, tokens)
    for method in ("FP16", "RTN2"):
        with patch_model(model, method):
            theirs, _ = lm_eval_perplexity(model, tokenizer, tmp_path, texts, tokens)
            # lm_eval predicts the first token as well, from a prefix token, and leaves the last one out of the input.
            scored = [score_window(model, torch.cat([torch.tensor([[prefix]]), x], dim=1))["nll"] for x in ids]
        assert theirs == pytest.approx(perplexity(scored), rel=1e-3)
        assert (abs(theirs / stock - 1) < 1e-4) if method == "FP16" else (abs(theirs / stock - 1) > 0.02)


def scores(client_class, model, tokenizer, requests, batch_size):
    client = client_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return [nats for nats, _ in client._loglikelihood_tokens(requests, disable_tqdm=True)]


# Each has another way to depend on padding: sinks chosen by size, the first token, groups of tokens, none.
@pytest.mark.parametrize("name", ["RotateKV2", "KVQuant2", "KIVI2", "RotateKV2+", "FP16"])
def test_a_batch_of_the_masked_client_scores_as_its_texts_one_by_one(name, statistics, tmp_path, monkeypatch):
    """Texts of many lengths, some that end with the token that lm_eval pads with."""
    from lm_eval.models.huggingface import HFLM

    from rotatekv.evals.lm_eval_client import MaskedHFLM

    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    folder, generator = save_tiny_folder(tmp_path / "tiny"), torch.Generator().manual_seed(0)
    tokenizer, model, requests = AutoTokenizer.from_pretrained(folder), tiny_model().double(), []
    model.name_or_path = "tiny"
    # Large padding, as a real model's first token is: else it is never a sink.
    model.get_input_embeddings().weight.data[0] = 3.0
    for number, length in enumerate((40, 90, 61, 7, 33, 90, 2, 75)):
        ids = torch.randint(8, 128, (length,), generator=generator).tolist()
        if number in (2, 5):
            ids[-2] = 0
        requests.append((("", str(number)), ids[:1], ids[1:]))
    config = replace(small(name), num_sink_entries=5) if name == "RotateKV2" else small(name)
    with patch_model(model, config, statistics(config)):
        want = scores(HFLM, model, tokenizer, requests, 1)
        assert scores(MaskedHFLM, model, tokenizer, requests, 4) == pytest.approx(want, abs=1e-6)
        if name == "RotateKV2":
            with pytest.warns(UserWarning, match="look padded.*MaskedHFLM"):
                plain = scores(HFLM, model, tokenizer, requests, 4)
            assert plain != pytest.approx(want, abs=0.01)
            with warnings.catch_warnings():  # once
                warnings.simplefilter("error", UserWarning)
                scores(HFLM, model, tokenizer, requests, 4)


@pytest.mark.parametrize(
    ("name", "rows", "warns"),
    [
        ("RotateKV2", [[5, 6, 0], [7, 8, 9]], True),
        ("RotateKV2", [[99, 6, 4], [7, 8, 9]], True),
        ("KIVI2", [[0, 6, 4], [7, 8, 9]], True),
        ("RotateKV2", [[5, 6, 4], [7, 8, 9]], False),
        ("RotateKV2", [[5, 6, 0], [7, 8, 0]], False),
        ("RotateKV2", [[5, 6, 0]], False),
        ("RTN2", [[5, 6, 0], [7, 8, 9]], False),
    ],
)
def test_a_batch_that_looks_padded_without_a_mask_is_warned_of(name, rows, warns, statistics):
    model, ids, config = tiny_model(pad_token_id=99), torch.tensor(rows), small(name)
    model.name_or_path = "tiny"
    with patch_model(model, config, statistics(config)), warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        model(ids, attention_mask=torch.ones_like(ids))
        assert not seen
        model(ids), model(ids)
    assert len(seen) == warns
