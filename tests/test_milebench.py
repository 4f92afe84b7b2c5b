"""MileBench: prompts and scores by hand, and the command on a tiny LLaVA with pictures made here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from runs import metrics_of, refused, samples_of
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

import calibrate_reorder
import MileBench_evaluation
from rotatekv import RotateKVCache, UserError, patch_model
from rotatekv.compat import CACHE_NAME
from rotatekv.evals.milebench import build_prompt, drop_earliest, encode_prompt, load_datasets, split_marks
from rotatekv.evals.milebench_metrics import (
    CATEGORIES,
    category_of,
    image_level,
    match_choice,
    normalize,
    rouge_l,
    score_record,
    summarize,
)
from rotatekv.methods.fp16 import FP16
from rotatekv.models.vision import load_vision_model, random_llava

Image = pytest.importorskip("PIL.Image")
NO_REORDER = ["--Outlier_Aware_Key_Rotation", "False"]
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PER_IMAGE = 4  # 28 × 28 pixels in patches of 14


def sample(**changes) -> dict:
    base = {
        "id": "A/0",
        "dataset": "A",
        "question_type": "multi-choice",
        "instruction": "Judge.",
        "context": "One {image#1} two {table#2}\nTrue?",
        "choices": ["yes", "no"],
        "letters": True,
        "answer": "yes",
        "image_files": [Path("a.png"), Path("b.png")],
        "image_count": 2,
        "combined": False,
    }
    return {**base, **changes}


# Prompts


def test_prompt_word_for_word():
    prompt = build_prompt(sample())
    expected = "Judge.\nOne <I> two <I>\nTrue?\nChoice list: \nA. yes\nB. no\nYour answer is: "
    assert prompt.text("<I>") == expected
    assert prompt.shown == [Path("a.png"), Path("b.png")]


def test_no_letters_for_gpr1200_and_no_list_for_open_questions():
    assert build_prompt(sample(letters=False)).text("<I>").endswith("Choice list: \nyes\nno\nYour answer is: ")
    assert build_prompt(sample(choices=None)).text("<I>") == "Judge.\nOne <I> two <I>\nTrue?"


def test_combined_pictures_come_first_and_marks_become_text():
    prompt = build_prompt(sample(combined=True, image_files=[Path("all.png")], choices=None))
    assert prompt.text("<I>") == "<I>\nJudge.\nOne <Image 1>  two <Image 2> \nTrue?"


@pytest.mark.parametrize(
    ("context", "images", "parts"),
    [
        ("{image#2} x {image#1}", 2, (1, " x ", 0)),
        ("x {image#1}{image#2}", 2, ("x ", 0, 1)),
        ("{image#1} again {image#1}.", 1, (0, " again ", 0, ".")),
        ("no mark", 2, (0, 1, "no mark")),
        ("{image#12} {image#1x} {text#1}", 12, (*range(11), 11, " {image#1x} {text#1}")),
        ("plain", 0, ("plain",)),
    ],
)
def test_marks(context, images, parts):
    assert split_marks(context, images) == parts


@pytest.mark.parametrize("context", ["{image#3}", "{image#0}"])
def test_a_mark_without_its_picture_is_refused(context):
    with pytest.raises(UserError, match="names picture"):
        split_marks(context, 2)


def test_the_image_token_in_the_data_is_no_picture():
    assert build_prompt(sample(context="a <I> {image#1}{image#2}", choices=None)).text("<I>") == "Judge.\na  <I><I>"


def characters(part) -> int:
    return len(part) if isinstance(part, str) else 10


@pytest.mark.parametrize(
    ("budget", "body"),
    [
        (100, ("abc", 0, "de", 1, "fghi")),
        (7 + 29, ("abc", 0, "de", 1, "fghi")),
        (7 + 28, (0, "de", 1, "fghi")),
        (7 + 25, ("de", 1, "fghi")),
        (7 + 15, (1, "fghi")),
        (7 + 13, ("fghi",)),
        (7 + 3, ("ghi",)),
    ],
)
def test_earliest_parts_go_first_and_the_instruction_stays(budget, body):
    prompt = build_prompt(sample(context="abc{image#1}de{image#2}fghi", choices=None))
    shown = drop_earliest(prompt, budget, characters, lambda text, tokens: text[-tokens:])
    assert shown.head == ("Judge.\n",) and shown.body == body


def test_an_instruction_without_room_is_refused():
    with pytest.raises(UserError, match="instruction alone"):
        drop_earliest(build_prompt(sample()), 7, characters, lambda text, tokens: text)


# Scores


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("A. red car", 0),
        ("b) blue car", 1),
        ("The answer is (C) 10.", 2),
        ("It is the Blue Car!", 1),
        ("blue car, not red car", 1),
        ("A. red car\nB. blue car", 0),
        ("D", 3),
        ("d.", 3),
        ("(B)", 1),
        ("The answer is B.", 1),
        ("Answer: C\n", 2),
        ("10", 2),
        ("1", 3),
        ("100", None),
        ("", None),
        ("...", None),
        ("E", None),
        ("A dog and a cat", None),
        ("A or B", None),
        ("A is right", 0),
        ("I think so", None),
        ("redcar", None),
        ("predicted cars", None),
        ("B. red car", 0),
    ],
)
def test_awkward_choices(prediction, chosen):
    assert match_choice(prediction, ["red car", "blue car", "10", "1"]) == chosen


def test_letter_and_text_win_over_text():
    assert match_choice("not yes but B. no", ["yes", "no"]) == 1
    assert match_choice("not yes but no", ["yes", "no"]) == 0


def test_without_letters_only_the_text_counts():
    assert match_choice("B", ["x.jpg", "y.jpg"], letters=False) is None
    assert match_choice("I say y.jpg", ["x.jpg", "y.jpg"], letters=False) == 1


def test_longer_of_two_choices_that_begin_alike():
    assert match_choice("red car", ["red", "red car"]) == 1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  It's 1,234.50 (USD). ", "it's 1234.50 usd"),
        ("top-left\n'Yes'", "top left yes"),
        ("-5", "-5"),
        (".5 a.b", "5 a b"),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


def test_rouge_l_by_hand():
    # longest common subsequence "the cat mat" of 3 words: P = 3/4, R = 3/6, F = 0.6
    assert rouge_l("The cat, a mat.", "the cat sat on one mat") == pytest.approx(0.6, abs=1e-6)
    assert rouge_l("Same words!", "same words") == pytest.approx(1.0, abs=1e-6)
    assert rouge_l("", "gold") == rouge_l(" . ", "gold") == rouge_l("other", "gold") == 0.0


def record(dataset="A", prediction="yes", answer="yes", **changes) -> dict:
    base = {"dataset": dataset, "question_type": "multi-choice", "prediction": prediction, "answers": [answer]}
    return {**base, "choices": ["yes", "no"], "letters": True, "image_count": 2, **changes}


@pytest.mark.parametrize(
    ("dataset", "prediction", "answer", "score"),
    [
        ("TextNeedleInAHaystack", "The code is Paris.", "paris", 1.0),
        ("ImageNeedleInAHaystack", "It says 'New  York'", "new york", 1.0),
        ("TextNeedleInAHaystack", "comparison", "paris", 0.0),
        ("MMCoQA", "The comparison", "paris", 1.0),
        ("MMCoQA", "", "paris", 0.0),
        ("TextNeedleInAHaystack", "", "paris", 0.0),
    ],
)
def test_containment(dataset, prediction, answer, score):
    assert score_record(record(dataset, prediction, answer, question_type="open-ended", choices=None)) == score


def test_question_type_decides_the_score():
    assert score_record(record(prediction="A")) == 1.0
    assert score_record(record(prediction="B. no")) == score_record(record(prediction="")) == 0.0
    open_ended = record("IEdit", "a b", "a b c d", question_type="open-ended", choices=None)
    assert score_record(open_ended) == pytest.approx(2 / 3, abs=1e-6)


def test_splits():
    assert [image_level(n) for n in (1, 5, 6, 31, 32, 109)] == ["few", "few", "medium", "medium", "many", "many"]
    assert category_of("action_localization") == category_of("ActionLocalization") == "temporal"
    assert (category_of("OCR-VQA"), category_of("GPR1200"), category_of("NLVR-few")) == ("semantic", "diagnostic", None)
    assert {name: len(datasets) for name, datasets in CATEGORIES.items()} == {
        "temporal": 13,
        "semantic": 13,
        "diagnostic": 3,
    }


def test_summary_by_hand():
    rows = [("TQA", 1.0, 2), ("TQA", 0.0, 6), ("TQA", 0.0, 7), ("TQA", 0.0, 2), ("GPR1200", 1.0, 40), ("X", 0.5, 5)]
    metric = summarize([record(name, score=score, image_count=images) for name, score, images in rows])
    assert metric == {
        "TQA": 25.0,
        "GPR1200": 100.0,
        "X": 50.0,
        "average": pytest.approx(175 / 3),
        "images": {"few": 50.0, "medium": 0.0, "many": 100.0},
        "categories": {"semantic": 25.0, "diagnostic": 100.0},
    }


# The command, on a tiny LLaVA


def tiny_llava(folder: Path, context: int = 512) -> Path:
    """A random LLaVA of a tiny LLaMA and a CLIP tower that sees 2 × 2 patches, with its processor."""
    save_tiny_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=VISION,
        text_config=tiny_model(max_position_embeddings=context).config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


def write_dataset(parent: Path, name: str, records: int = 3, images: int = 2, **changes) -> Path:
    target = parent / name
    (target / "images").mkdir(parents=True)
    marks = " ".join(f"w{n} {{image#{n}}}" for n in range(1, images + 1))
    data = []
    for number in range(records):
        files = [f"{number}-{n}.png" for n in range(images)]
        for n, file in enumerate(files):
            colour = (40 * number % 256, 90 * n % 256, 200)
            Image.new("RGB", (20, 12 + n), colour).save(target / "images" / file)
        instance = {"context": f"{marks} w30 w{40 + number}", "images_path": files, "choice_list": ["w1", "w2"]}
        data.append(
            {"sample_id": number, "task_instruction_id": number % 2, "task_instance": instance, "response": "w2"}
        )
    meta = {"dataset": name, "question_type": "multi-choice", "task_instruction": ["w5 w6", "w7"]}
    content = {"meta_data": meta, "data": data, **changes}
    (target / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.fixture
def pictures(tmp_path):
    write_dataset(tmp_path / "data" / "milebench", "TQA", records=4)
    write_dataset(tmp_path / "data" / "milebench", "Other-set", records=2, images=6)
    return tmp_path / "data"


def flags(folder, data, output_dir, *more):
    base = ["--model", folder, "--data_dir", data, "--output_dir", output_dir, "--max_new_tokens", 4]
    return [str(part) for part in (*base, *more)]


def change(dataset: Path, edit) -> Path:
    path = dataset / f"{dataset.name}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_all_data_sets_end_to_end(folder, pictures, tmp_path, capsys):
    MileBench_evaluation.main(flags(folder, pictures, tmp_path / "out", "--method", "RotateKV2", *NO_REORDER))
    out = capsys.readouterr().out.strip().splitlines()
    metrics, records = metrics_of(tmp_path / "out"), samples_of(tmp_path / "out")
    assert [r["id"] for r in records] == ["Other-set/0", "Other-set/1", "TQA/0", "TQA/1", "TQA/2", "TQA/3"]
    assert metrics["metric"] == summarize(records) and metrics["n"] == 6 and metrics["partial"] is False
    assert set(metrics["metric"]) == {"TQA", "Other-set", "average", "images", "categories"}
    assert [r["image_tokens"] for r in records] == [6 * PER_IMAGE] * 2 + [2 * PER_IMAGE] * 4
    for r in records:
        assert r["tokens"] == r["prompt_tokens"] + r["new_tokens"] - 1  # the last token is not fed
        assert {"prediction", "answers", "score", "prompt_sha256", "dropped_parts"} <= set(r)
    assert any("not part of MileBench" in line and "Other-set" in line for line in out)
    found = re.fullmatch(r"milebench average: ([\d.]+)  \(RotateKV2\*, ([\d.]+) bits, ([\d.]+) bytes/token\)", out[-1])
    assert found and float(found[1]) == pytest.approx(metrics["metric"]["average"], abs=1e-3)


def test_fp16_answers_are_the_stock_models(folder, pictures, tmp_path):
    MileBench_evaluation.main(flags(folder, pictures, tmp_path, "--FP16", "--datasets", "TQA"))
    model, processor = load_vision_model(str(folder))
    for expected, item in zip(samples_of(tmp_path), load_datasets(pictures, ["TQA"])[0], strict=True):
        inputs, _ = encode_prompt(processor, model, build_prompt(item), 4)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True) == expected["prediction"]


def test_image_tokens_go_through_the_quantized_cache(folder, pictures):
    model, processor = load_vision_model(str(folder))
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]
    inputs, shown = encode_prompt(processor, model, build_prompt(item), 4)
    length = inputs["input_ids"].shape[1]
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    assert is_image.sum() == 2 * PER_IMAGE
    assert length == len(processor.tokenizer(shown.text("")).input_ids) + 2 * PER_IMAGE
    logits = {}
    for name in ("FP16", "RTN2"):
        with patch_model(model, name), torch.no_grad():
            cache = RotateKVCache.for_model(model)
            logits[name] = model(**inputs, **{CACHE_NAME: cache}).logits
            assert cache.get_seq_length() == length and cache.positions.numel() == length
            assert all(layer.get_seq_length() == length for layer in cache.layers)
    with torch.no_grad():
        stock = model(**inputs).logits
    assert torch.allclose(logits["FP16"], stock, atol=1e-4)
    # The first picture's second token sees nothing but words and the picture's own first token.
    first = int(is_image.nonzero()[1, 0])
    assert not torch.allclose(logits["RTN2"][0, first], stock[0, first], atol=1e-2)


def test_a_codec_that_forgets_image_tokens_changes_the_logits(folder, pictures, monkeypatch):
    model, processor = load_vision_model(str(folder))
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]
    inputs, _ = encode_prompt(processor, model, build_prompt(item), 4)
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    with patch_model(model, "FP16"), torch.no_grad():
        right = model(**inputs).logits[0, -1]
        decode = FP16.decode_values
        monkeypatch.setattr(FP16, "decode_values", lambda self, packed: decode(self, packed) * ~is_image[:, None])
        assert not torch.allclose(model(**inputs).logits[0, -1], right, atol=1e-2)


def test_llava_next_with_mistral_inside(folder, pictures, tmp_path):
    """Pictures of other shapes take other numbers of tokens; the processor decides, the cache holds them all."""
    source = load_vision_model(str(folder))[1]
    tokenizer = source.tokenizer
    pinpoints = [[28, 56], [56, 28]]
    config = LlavaNextConfig(
        vision_config=VISION,
        text_config=tiny_model("mistral").config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path / "next")
    size = {"height": 28, "width": 28}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "next")
    MileBench_evaluation.main(flags(tmp_path / "next", pictures, tmp_path, "--RTN4", "--datasets", "TQA"))
    metrics, records = metrics_of(tmp_path), samples_of(tmp_path)
    assert metrics["n"] == 4 and all(r["image_tokens"] > 2 * PER_IMAGE for r in records)
    assert all(r["tokens"] == r["prompt_tokens"] + r["new_tokens"] - 1 for r in records)


def test_pictures_change_the_answer_and_their_order_too(folder, pictures):
    model, processor = load_vision_model(str(folder))
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]

    def logits(files):
        inputs, _ = encode_prompt(processor, model, build_prompt({**item, "image_files": files}), 4)
        with torch.no_grad():
            return model(**inputs).logits[0, -1]

    one, two = item["image_files"]
    assert not torch.allclose(logits([one, two]), logits([two, one]), atol=1e-3)


def test_a_long_context_loses_its_earliest_pictures_and_fits(tmp_path):
    folder = tiny_llava(tmp_path / "short", context=48)
    write_dataset(tmp_path / "data", "TQA", records=1, images=9)
    MileBench_evaluation.main(flags(folder, tmp_path / "data", tmp_path / "out", "--RTN4"))
    (record_,) = samples_of(tmp_path / "out")
    assert 0 < record_["images_shown"] < 9 and record_["dropped_parts"] > 0
    assert record_["prompt_tokens"] + 4 <= 48 < record_["prompt_tokens"] + 4 + PER_IMAGE + 2
    assert record_["image_tokens"] == PER_IMAGE * record_["images_shown"]
    model, processor = load_vision_model(str(folder))
    item = load_datasets(tmp_path / "data", ["TQA"])[0][0]
    _, shown = encode_prompt(processor, model, build_prompt(item), 4)
    text = shown.text("<image>")
    assert text.startswith("w5 w6\n") and text.endswith("w30 w40\nChoice list: \nA. w1\nB. w2\nYour answer is: ")
    assert shown.shown == item["image_files"][-len(shown.shown) :]
    with pytest.raises(UserError, match="instruction alone"):
        encode_prompt(processor, model, build_prompt({**item, "instruction": "w1 " * 60}), 4)


def test_a_chat_template_wraps_the_prompt(folder, pictures):
    model, processor = load_vision_model(str(folder))
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]
    plain, _ = encode_prompt(processor, model, build_prompt(item), 4)
    processor.chat_template = (
        "{{ '<s>' }}w90 {% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %} w91"
    )
    chat, _ = encode_prompt(processor, model, build_prompt(item), 4)
    expected = [1, 98, *plain["input_ids"][0].tolist(), 99]
    assert chat["input_ids"][0].tolist() == expected


def test_one_bos_whoever_writes_it(folder, pictures):
    model, processor = load_vision_model(str(folder))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]
    for template in (None, "{{ '<s>' + messages[0]['content'][0]['text'] }}"):
        processor.chat_template = template
        inputs, _ = encode_prompt(processor, model, build_prompt(item), 4)
        assert inputs["input_ids"][0, 0] == 1 and (inputs["input_ids"] == 1).sum() == 1


def test_an_end_that_the_tokenizer_appends_ends_no_prompt(folder, pictures):
    model, processor = load_vision_model(str(folder))
    item = load_datasets(pictures, ["TQA"], limit=1)[0][0]
    found = []
    for template in ("<s> $A", "<s> $A </s>"):
        special = [("<s>", 1), ("</s>", 2)]
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=special)
        found.append(encode_prompt(processor, model, build_prompt(item), 4)[0])
    assert found[0]["input_ids"].tolist() == found[1]["input_ids"].tolist()
    assert found[0]["attention_mask"].shape == found[1]["attention_mask"].shape


def test_a_prompt_fits_also_where_its_parts_were_counted_short(tmp_path):
    folder = tiny_llava(tmp_path / "short", context=60)
    write_dataset(tmp_path / "data", "TQA", records=1, images=9)
    model, processor = load_vision_model(str(folder))
    item = load_datasets(tmp_path / "data", ["TQA"])[0][0]
    processor.chat_template = "{{ messages[0]['content'][0]['text'] + messages[0]['content'][0]['text'][-18:] }}"
    inputs, shown = encode_prompt(processor, model, build_prompt(item), 4)
    assert inputs["input_ids"].shape[1] <= 56 and shown.shown


def test_a_llava_is_calibrated_by_its_text_model(folder, pictures, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text(400), encoding="utf-8")
    output = tmp_path / "indices.safetensors"
    calibrate = ["--model", folder, "--dataset", tmp_path / "text.txt", "--seq_length", 64, "--output", output]
    calibrate_reorder.main([str(part) for part in calibrate])
    more = ["--calibration_file", output, "--datasets", "TQA", "--limit", "1"]
    MileBench_evaluation.main(flags(folder, pictures, tmp_path / "out", *more))
    assert metrics_of(tmp_path / "out")["config"]["quant"]["Outlier_Aware_Key_Rotation"] is True


def test_limit_counts_records_of_each_data_set(folder, pictures, tmp_path):
    (pictures / "milebench" / "TQA" / "images" / "3-0.png").unlink()  # beyond the limit
    MileBench_evaluation.main(flags(folder, pictures, tmp_path / "out", "--RTN4", "--limit", "1"))
    metrics, records = metrics_of(tmp_path / "out"), samples_of(tmp_path / "out")
    assert [r["id"] for r in records] == ["Other-set/0", "TQA/0"] and metrics["partial"] is True


def test_variants_are_found_by_their_names(pictures):
    dataset = pictures / "milebench" / "TQA"
    content = json.loads((dataset / "TQA.json").read_text())
    (dataset / "TQA-adv.json").write_text(json.dumps(content))
    (dataset / "combined_1_images").mkdir()
    for record_ in content["data"]:
        name = f"c{record_['sample_id']}.png"
        record_["task_instance"]["combined_1_images"] = [name]
        Image.new("RGB", (8, 8)).save(dataset / "combined_1_images" / name)
    (dataset / "TQA_combined_1.json").write_text(json.dumps(content))
    assert {s["dataset"] for s in load_datasets(pictures, ["all"], adv=True)[0]} == {"TQA"}
    first = load_datasets(pictures, ["all"], combined=1)[0][0]
    assert first["image_files"] == [dataset / "combined_1_images" / "c0.png"] and first["image_count"] == 2
    assert build_prompt(first).text("<I>").startswith("<I>\nw5 w6\nw1 <Image 1>  w2 <Image 2> ")
    with pytest.raises(UserError, match="not both"):
        load_datasets(pictures, ["all"], adv=True, combined=1)


def test_gpr1200_lists_its_choices_without_letters(tmp_path):
    write_dataset(tmp_path, "GPR1200", records=1)
    assert load_datasets(tmp_path, ["GPR1200"])[0][0]["letters"] is False


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c["data"][1]["task_instance"].pop("context"), "record 2 has no field 'task_instance.context'"),
        (lambda c: c["data"][0].pop("response"), "record 1 has no field 'response'"),
        (lambda c: c["data"][0]["task_instance"].pop("choice_list"), "no field 'task_instance.choice_list'"),
        (lambda c: c["data"][0]["task_instance"].update(images_path="0-0.png"), "is a str"),
        (lambda c: c["meta_data"].pop("question_type"), "no field 'meta_data.question_type'"),
        (lambda c: c["meta_data"].update(question_type="essay"), "unknown question_type 'essay'"),
        (lambda c: c["data"][2].update(task_instruction_id=7), "no task_instruction 7"),
        (lambda c: c["data"][2].update(sample_id=1), "sample_id is there twice"),
        (lambda c: c["data"][0].update(response="w9"), "'w9' is not in choice_list"),
        (lambda c: c["data"][0]["task_instance"].update(context="{image#5}"), "names picture 5"),
        (lambda c: c["data"].clear(), "has no samples"),
    ],
)
def test_damaged_records_are_named(tmp_path, capsys, edit, says):
    path = change(write_dataset(tmp_path, "TQA"), edit)
    line = refused(capsys, MileBench_evaluation, *flags("nowhere", tmp_path, tmp_path / "out"))
    assert says in line and str(path) in line


def test_data_that_is_not_there(pictures, folder, tmp_path, capsys):
    base = ["--model", str(folder), "--output_dir", str(tmp_path / "out")]
    assert "pass --data_dir DIR" in refused(capsys, MileBench_evaluation, *base)
    assert "no data set in" in refused(capsys, MileBench_evaluation, *[*base, "--data_dir", str(tmp_path / "empty")])
    line = refused(capsys, MileBench_evaluation, *flags(folder, pictures, tmp_path / "out", "--datasets", "TQA,nlvr"))
    assert "unknown dataset 'nlvr'" in line and "Other-set, TQA" in line
    missing = pictures / "milebench" / "TQA" / "images" / "1-1.png"
    missing.write_bytes(b"no picture")
    assert str(missing) in refused(
        capsys, MileBench_evaluation, *flags(folder, pictures, tmp_path / "out", "--FP16", "--datasets", "TQA")
    )
    missing.unlink()
    line = refused(capsys, MileBench_evaluation, *flags(folder, pictures, tmp_path / "out2"))
    assert str(missing) in line and "record 2" in line
    (pictures / "milebench" / "TQA" / "TQA.json").write_text("{")
    assert "as json" in refused(capsys, MileBench_evaluation, *flags(folder, pictures, tmp_path / "out3"))
    assert not list(tmp_path.glob("out[23]"))


def test_models_that_take_no_pictures_are_refused(pictures, tmp_path, capsys):
    text = save_tiny_folder(tmp_path / "text")
    assert "text" in refused(capsys, MileBench_evaluation, *flags(text, pictures, tmp_path / "out"))
    assert "cannot load model" in refused(
        capsys, MileBench_evaluation, *flags(tmp_path / "nowhere", pictures, tmp_path / "out")
    )


def test_a_sliding_window_in_the_text_model_is_kept():
    text = tiny_model("mistral", sliding_window=24)
    model, _ = random_llava(text, tokenizer_with_image(), "<image>")
    with torch.no_grad(), patch_model(model, "FP16"):
        cache = RotateKVCache.for_model(model)
        model(input_ids=torch.arange(6, 70)[None], past_key_values=cache)
        assert [layer.sliding_window for layer in cache.layers] == [24, 24]
        assert all(layer.keys.shape[2] < 64 for layer in cache.layers)


def tokenizer_with_image():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 3, "<image>": 5}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def test_random_llava_has_the_text_model_and_is_always_the_same():
    text = tiny_model("mistral")
    text.name_or_path = "somewhere/tiny-text"
    (one, processor), (two, _) = (random_llava(text, tokenizer_with_image(), "<image>") for _ in range(2))
    assert one.model.language_model is text.model and one.lm_head is text.lm_head
    weights = zip(one.model.vision_tower.parameters(), two.model.vision_tower.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert one.name_or_path == "llava-random/tiny-text" and processor.image_token_id == 5
    ids = torch.tensor([[9, *[5] * 144, 10]])
    pictures = torch.stack([torch.zeros(3, 168, 168), torch.ones(3, 168, 168)])
    with patch_model(one, "FP16"), torch.no_grad():
        black, white = (one(input_ids=ids, pixel_values=p[None]).logits[0, -1] for p in pictures)
    assert not torch.allclose(black, white, atol=1e-3)


def test_help_names_the_models(capsys):
    with pytest.raises(SystemExit):
        MileBench_evaluation.main(["--help"])
    assert "llava-random-smollm2" in capsys.readouterr().out
