"""``make demo``: a model under six presets, as a table of perplexity, bits and cache bytes."""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from rotatekv.evals.perplexity import perplexity, score_window
from rotatekv.evals.texts import load_text, tokenize, windows_of
from rotatekv.evals.tokens import bos_of_windows
from rotatekv.models.text import EMBEDDED_MODEL, GEMMA_MODEL, load_model
from rotatekv.patching.patch import patch_model
from rotatekv.scripts import exit_on_user_error

METHODS = ("FP16", "RTN2", "RotateKV4", "RotateKV3", "RotateKV2", "RotateKV2+")
SEQ_LENGTH, WINDOWS = 2048, 2


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = f"{EMBEDDED_MODEL} (default), {GEMMA_MODEL}, or another that the scripts take"
    parser.add_argument("--model", default=EMBEDDED_MODEL, help=names)
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.model)
    text = load_text("essays")
    windows = list(windows_of(tokenize(tokenizer, text), SEQ_LENGTH, bos_of_windows(model)))[:WINDOWS]
    rows = []
    with tqdm(total=len(METHODS) * len(windows), desc="demo", unit="window") as bar:
        for name in METHODS:
            bar.set_postfix(method=name)
            with patch_model(model, name):
                scores = []
                for window in windows:
                    scores.append(score_window(model, window))
                    bar.update()
            rows.append((name, perplexity([score["nll"] for score in scores]), scores))

    config = model.config
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    threads = torch.get_num_threads()
    print(f"\n{args.model}, {len(windows)} windows of {SEQ_LENGTH} tokens of {text.name}, {threads} threads")
    print(f"{'method':<10} {'perplexity':>10} {'average bits':>12} {'bytes/token':>11} {'of fp16':>8}")
    for name, value, scores in rows:
        bits = sum(score["total_bits"] for score in scores) / len(scores)
        bytes_per_token = sum(score["cache_bytes"] for score in scores) / sum(score["tokens"] for score in scores)
        ratio = bytes_per_token / (2 * numbers_per_token)  # fp16: 2 bytes a number, whatever the model's dtype
        print(f"{name:<10} {value:>10.2f} {bits:>12.3f} {bytes_per_token:>11.0f} {ratio:>8.3f}")


if __name__ == "__main__":
    main()
