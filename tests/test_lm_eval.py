"""lm_eval as a client: an ``HFLM`` around a patched model measures the quantized cache."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rotatekv import patch_model
from rotatekv.evals.perplexity import perplexity, score_window
from rotatekv.evals.texts import load_text, tokenize, windows_of

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
    found = lm_eval.simple_evaluate(
        client, tasks=["local_text"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )["results"]["local_text"]
    nats_per_byte = math.log(found["byte_perplexity,none"])
    return math.exp(nats_per_byte * sum(len(text.encode()) for text in texts) / tokens), client.prefix_token_id


@pytest.mark.parametrize("method", ["FP16", "RotateKV2"])
def test_lm_eval_agrees_with_our_perplexity_on_the_same_windows(embedded, tmp_path, monkeypatch, method):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = embedded
    windows = list(windows_of(tokenize(tokenizer, load_text("essays")), 256))[:4]
    texts = [tokenizer.decode(window[0]) for window in windows]
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with patch_model(model, method):
        theirs, prefix = lm_eval_perplexity(model, tokenizer, tmp_path, texts, sum(x.shape[1] for x in ids))
        # lm_eval predicts the first token as well, from a prefix token, and leaves the last one out of the input.
        scored = [score_window(model, torch.cat([torch.tensor([[prefix]]), x], dim=1))["nll"] for x in ids]
    ours = perplexity(scored)
    stock, _ = lm_eval_perplexity(model, tokenizer, tmp_path, texts, sum(x.shape[1] for x in ids))
    assert theirs == pytest.approx(ours, rel=0.03)
    if method == "FP16":
        assert theirs == pytest.approx(stock, rel=1e-4)
    else:
        assert theirs > 1.2 * stock
