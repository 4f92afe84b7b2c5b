"""The benchmarks decode greedily, whatever a checkpoint's config and generation config say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text

import GSM8K_evaluation
import LongBench_evaluation
import needle_evaluation
from rotatekv import RotateKVCache, load_model, patch_model
from rotatekv.errors import UserError
from rotatekv.evals.generation import complete
from rotatekv.evals.results import config_hash
from rotatekv.reproduce.plan import Cell
from rotatekv.reproduce.runs import Runs

NASTY = {
    "use_cache": False,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 2.0,
    "early_stopping": True,
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[number] for number in range(3, 100)],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "suppress_tokens": list(range(10, 120)),
    "begin_suppress_tokens": list(range(10, 100)),
    "max_length": 3,
    "min_length": 40,
    "min_new_tokens": 3,
    "max_new_tokens": 1,
    "max_time": 1e-9,
    "stop_strings": ["w"],
    "exponential_decay_length_penalty": [1, 9.0],
    "sequence_bias": [[[11], 90.0]],
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0},
    "prompt_lookup_num_tokens": 4,
    "cache_implementation": "static",
    "prefill_chunk_size": 3,
    "renormalize_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "remove_invalid_values": True,
    "token_healing": True,
    "pad_token_id": 5000,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def plain(loaded) -> list[list[int]]:
    return completions(loaded)


def greedy(model, tokenizer, prompt: str, tokens: int) -> list[int]:
    """By hand, from the stock model, with no cache at all."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == model.generation_config.eos_token_id:
            break
    return ids[0, start:].tolist()


def completions(loaded, preset: str = "FP16") -> list[list[int]]:
    model, tokenizer = loaded
    with patch_model(model, preset):
        records = complete(model, tokenizer, [tiny_text(30, seed=1), tiny_text(9, seed=2)], 12)
    return [record["token_ids"] for record in records]


@torch.no_grad()
def test_completions_are_the_greedy_ones_by_hand(loaded, plain):
    by_hand = [greedy(*loaded, tiny_text(count, seed), 12) for count, seed in ((30, 1), (9, 2))]
    assert plain == by_hand


@pytest.mark.parametrize("field", [*NASTY, "all of them"])
def test_a_checkpoints_generation_config_changes_no_completion(loaded, plain, monkeypatch, field):
    model, _ = loaded
    before = dict(vars(model.generation_config))
    for name, value in NASTY.items() if field == "all of them" else [(field, NASTY[field])]:
        monkeypatch.setattr(model.generation_config, name, value, raising=False)  # GenerationConfig(…) refuses some
    nasty = dict(vars(model.generation_config))
    assert completions(loaded) == plain
    assert vars(model.generation_config) == nasty != before, "what the user has is untouched"


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
@torch.no_grad()
def test_a_checkpoint_that_says_no_cache_is_completed_right(tmp_path, loaded, plain, place):
    other = save_tiny_folder(tmp_path / "no-cache", max_position_embeddings=1024)
    change(other / place, use_cache=False)
    if place == "config.json":
        (other / "generation_config.json").unlink()  # it is made from config.json then
    no_cache = load_model(str(other))
    assert no_cache[0].generation_config.use_cache is False
    assert completions(no_cache) == plain
    assert completions(no_cache, "RTN2") == completions(loaded, "RTN2")


@pytest.mark.parametrize("preset", ["FP16", "RTN3"])
def test_a_users_own_cache_is_used_where_the_checkpoint_says_no_cache(preset):
    model, ids = tiny_model(), torch.arange(8, 30)[None]
    made = []
    for use_cache in (True, False):
        model.generation_config.use_cache = use_cache
        with patch_model(model, preset):
            cache = RotateKVCache.for_model(model)
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "past_key_values": cache}
            made.append((model.generate(ids, **options).tolist(), cache.get_seq_length(), cache.positions.tolist()))
    assert made[0] == made[1] and made[0][1] == 27


@pytest.mark.parametrize("content", ["[]", '{"watermarking_config": {"no": 1}}', '{"max_new_tokens": -5}'])
def test_a_damaged_generation_config_is_one_line(tmp_path, content):
    other = save_tiny_folder(tmp_path / "damaged")
    (other / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot load model .*damaged"):
        load_model(str(other))


def change(path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def data(folder) -> str:
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "w3 w4 w5", "answer": "#### 3"}))
    (folder / "longbench").mkdir()
    record = {"input": "w1 w2", "context": "w9 w8 w7", "answers": ["w1"], "all_classes": None, "length": 3}
    (folder / "longbench" / "qasper.jsonl").write_text(json.dumps(record))
    (folder / "hay.txt").write_text(tiny_text(500))
    return str(folder)


def run(script, model, out, *flags) -> tuple[dict, list[dict]]:
    script.main(["--model", str(model), "--output_dir", str(out), "--method", "RTN4", "--max_new_tokens", "5", *flags])
    (path,) = out.glob("*/*/*/samples.jsonl")
    config = json.loads((path.parent / "config.json").read_text())
    return config, [json.loads(line) for line in path.read_text().splitlines()]


def test_every_generating_script_decodes_its_own_way_and_writes_it_down(folder, tmp_path):
    nasty = save_tiny_folder(tmp_path / "tiny-llama", max_position_embeddings=1024)
    change(nasty / "config.json", use_cache=False)
    fields = {"use_cache": False, "repetition_penalty": 3.0, "do_sample": True, "temperature": 5.0, "num_beams": 2}
    change(nasty / "generation_config.json", **fields, suppress_tokens=list(range(10, 100)))
    place = data(tmp_path)
    for script, *flags in (
        (GSM8K_evaluation, "--data_dir", place, "--num_fewshot", "0"),
        (LongBench_evaluation, "--data_dir", place, "--tasks", "qasper"),
        (needle_evaluation, "--haystack", f"{place}/hay.txt", "--context_lengths", "200", "--depths", "50"),
    ):
        name = script.__name__
        plain_config, (plain,) = run(script, folder, tmp_path / name / "plain", *flags)
        nasty_config, (sample,) = run(script, nasty, tmp_path / name / "nasty", *flags)
        assert sample["token_ids"] == plain["token_ids"] and sample["prediction"] == plain["prediction"]
        decoding = nasty_config["decoding"]
        assert decoding == plain_config["decoding"] and decoding["eos_token_id"] == [2]
        assert decoding["do_sample"] is False and decoding["repetition_penalty"] == 1.0 and decoding["num_beams"] == 1


def test_reproduce_takes_no_run_that_may_have_decoded_as_the_checkpoint_said(folder, tmp_path):
    place = data(tmp_path)
    run(GSM8K_evaluation, folder, tmp_path / "out", "--data_dir", place, "--num_fewshot", "0")
    flags = ("--method", "RTN4")
    cell = Cell("gsm8k", "", str(folder), "RTN4", "", "gsm8k", "RTN4", flags, "accuracy", (("num_fewshot", 0),))
    runs = Runs(tmp_path / "out")
    found = runs.find(cell)
    assert found.status == "done"
    before = Path(found.folder)
    config = {name: value for name, value in found.metrics["config"].items() if name != "decoding"}
    (earlier := before.with_name(config_hash(config))).mkdir()
    (earlier / "metrics.json").write_text(json.dumps({**found.metrics, "config": config, "started": "2999"}))
    assert runs.find(cell) == found


def test_the_checkpoints_list_of_ends_ends_a_completion(loaded, plain, monkeypatch):
    model, free = loaded[0], plain[0]
    end = next(token for token in free if token != free[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, end])
    assert completions(loaded)[0] == free[: free.index(end) + 1]
