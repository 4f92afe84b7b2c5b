"""Other people's tokenizers and lengths: no padding, no ends or too many, too many entries, too long windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_tiny_folder, tiny_model, tiny_text
from runs import refused
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import calibrate_reorder
import efficiency_evaluation
import GSM8K_evaluation
import LongBench_evaluation
import needle_evaluation
import PPL_evaluation
from rotatekv import patch_model
from rotatekv.errors import UserError
from rotatekv.evals import longbench
from rotatekv.evals.generation import complete
from rotatekv.evals.needle import NEEDLE_TYPES, Prompts
from rotatekv.evals.texts import Text, tokenize
from rotatekv.evals.tokens import encode, pad_id

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PROMPTS = [tiny_text(30, seed=1), tiny_text(9, seed=2), tiny_text(17, seed=3)]


pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer_of(*named: str, template: str = "$A", words: int = 120, **options) -> PreTrainedTokenizerFast:
    """Words, with the special tokens named and what ``template`` puts around a text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number + 8 for number in range(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {name: SPECIAL[name] for name in named}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special, **options)


def predictions(tokenizer, prompts=PROMPTS, together: bool = True, **ids) -> list[list[int]]:
    model = tiny_model()
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    with patch_model(model, "FP16"):
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        return [record["token_ids"] for batch in batches for record in complete(model, tokenizer, batch, 8)]


@pytest.mark.parametrize("ids", [{}, {"eos_token_id": None, "pad_token_id": None}], ids=["checkpoint's ends", "none"])
@pytest.mark.parametrize("named", [(), ("eos_token",), ("pad_token",), tuple(SPECIAL)], ids=" ".join)
def test_a_batch_needs_neither_padding_nor_an_end(named, ids):
    tokenizer = tokenizer_of(*named)
    assert predictions(tokenizer, **ids) == predictions(tokenizer, together=False, **ids)
    assert tokenizer.pad_token == (SPECIAL["pad_token"] if "pad_token" in named else None), "the tokenizer is as it was"


def test_a_tokenizer_that_pads_on_the_right_is_padded_on_the_left_and_left_alone():
    tokenizer = tokenizer_of(*SPECIAL, padding_side="right")
    assert predictions(tokenizer) == predictions(tokenizer, together=False)
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_an_end_that_the_tokenizer_appends_ends_no_prompt_and_no_text(template):
    appends, plain = (tokenizer_of(*SPECIAL, template=form) for form in (template, template.removesuffix(" </s>")))
    assert predictions(appends) == predictions(plain)
    assert encode(appends, "w1 w2")[-2:] == [9, 10] and encode(appends, "w1 </s>")[-1] == 2
    assert tokenize(appends, Text("words", PROMPTS[0])).tolist() == tokenize(plain, Text("words", PROMPTS[0])).tolist()
    kind, hay = NEEDLE_TYPES["standard"], Text("words", tiny_text(300))
    placed = [Prompts(tokenizer, kind, hay, "w5", chat=False).build(200, 50, "w7 w8") for tokenizer in (appends, plain)]
    assert placed[0] == placed[1] and 2 not in placed[0].ids
    fitted = [longbench.fit_prompt(tokenizer, PROMPTS[0], 12, 100, chat=False) for tokenizer in (appends, plain)]
    assert fitted[0] == fitted[1]


def test_no_prompt_of_one_special_token_is_taken_away():
    tokenizer = tokenizer_of("eos_token", "bos_token", template="<s> $A")
    tokenizer.eos_token = "<s>"  # GPT-2: one token begins and ends a text
    assert encode(tokenizer, "") == [1] and encode(tokenizer, "w1") == [1, 9]


def test_padding_outside_the_embedding_is_another_token():
    tokenizer = tokenizer_of("eos_token", words=130)
    tokenizer.pad_token = "w125"  # token 133, of 128 embeddings
    assert pad_id(tiny_model(), tokenizer) == 2
    assert predictions(tokenizer) == predictions(tokenizer, together=False)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, the tokenizer of a larger one beside it, and data."""
    path = tmp_path_factory.mktemp("place")
    save_tiny_folder(path / "tiny")
    save_tiny_folder(path / "foreign", max_position_embeddings=2048)
    tokenizer_of(*SPECIAL, words=300).save_pretrained(path / "foreign")
    (path / "gsm8k").mkdir()
    (path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "w3 w290 w5", "answer": "#### 3"}))
    (path / "longbench").mkdir()
    record = {"input": "w1 w2", "context": "w9 w290 w7", "answers": ["w1"], "all_classes": None, "length": 3}
    (path / "longbench" / "qasper.jsonl").write_text(json.dumps(record))
    (path / "words.txt").write_text("w290 " * 200 + tiny_text(1500))
    return path


def script_flags(place, model: str) -> dict:
    text = place / "words.txt"
    common = ("--model", place / model)
    run = (*common, "--output_dir", place / f"runs of {model}", "--method", "RTN4")
    return {
        PPL_evaluation: (*run, "--dataset", text, "--PPL_seq_length", 600),
        GSM8K_evaluation: (*run, "--data_dir", place, "--num_fewshot", 0, "--max_new_tokens", 4),
        LongBench_evaluation: (*run, "--data_dir", place, "--tasks", "qasper", "--max_new_tokens", 4),
        needle_evaluation: (*run, "--haystack", text, "--context_lengths", 1900, "--depths", 50),
        efficiency_evaluation: (*run, "--dataset", text, "--context_lengths", 600, "--decode_tokens", 2),
        calibrate_reorder: (*common, "--dataset", text, "--seq_length", 600, "--output", place / "new.safetensors"),
    }


@pytest.mark.parametrize("script", script_flags(Path(), "any"), ids=lambda script: script.__name__)
def test_a_tokenizer_of_another_model_is_one_line(place, capsys, script):
    error = refused(capsys, script, *script_flags(place, "foreign")[script])
    assert "token 298, but the model has embeddings for 128" in error
    assert not (place / "runs of foreign").exists()


def test_windows_longer_than_the_context_are_one_line_that_names_the_flag(place, capsys):
    flags = script_flags(place, "tiny")
    for script, flag in ((PPL_evaluation, "--PPL_seq_length"), (calibrate_reorder, "--seq_length")):
        assert f"context of 512: pass {flag} 512 or less" in refused(capsys, script, *flags[script])
    too_long = refused(capsys, PPL_evaluation, *flags[PPL_evaluation], "--PPL_seq_length", 6000)
    assert "less than one window: pass --PPL_seq_length 512" in too_long
    capture = ("--save_k_pre_rope", "--save_dir", place / "saved", "--method", "FP16")
    assert "pass --PPL_seq_length 512" in refused(capsys, PPL_evaluation, *flags[PPL_evaluation], *capture)
    for script in (needle_evaluation, efficiency_evaluation):
        assert "exceed the model's context of 512" in refused(capsys, script, *flags[script])
    error = refused(capsys, LongBench_evaluation, *flags[LongBench_evaluation], "--max_length", 600)
    assert "pass --max_length 508 or less" in error
    assert not (place / "runs of tiny").exists() and not (place / "new.safetensors").exists()


def test_a_haystack_without_a_token_is_one_line():
    class NoTokens(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__("" if "empty" in text else text, **options)

    tokenizer = NoTokens(tokenizer_object=tokenizer_of().backend_tokenizer)
    with pytest.raises(UserError, match="haystack silence has no tokens: pass another --haystack"):
        Prompts(tokenizer, NEEDLE_TYPES["standard"], Text("silence", "empty"), "w5", chat=False)
