"""GSM8K: the number in an answer, the prompt, and GSM8K_evaluation.py on a tiny folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import save_tiny_folder, tiny_model
from runs import metrics_of, samples_of

import GSM8K_evaluation
from rotatekv import patch_model
from rotatekv.errors import UserError
from rotatekv.evals import gsm8k
from rotatekv.evals.generation import complete
from rotatekv.evals.numbers import normalise

COUNT = 7


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama", max_position_embeddings=1024)


def write_questions(folder: Path, lines: list[str]) -> Path:
    (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def question(number: int, answer: str | None = None) -> str:
    words = " ".join(f"w{number + step}" for step in range(3 + 5 * (number % 3)))
    return json.dumps({"question": words, "answer": answer or f"Some words.\n#### {number}"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("data"), [question(number) for number in range(COUNT)])


def flags(folder, data, output_dir, *more):
    base = ["--model", folder, "--data_dir", data, "--output_dir", output_dir, "--num_fewshot", 1]
    return [str(part) for part in (*base, "--max_new_tokens", 6, *more)]


# --- the number in an answer -------------------------------------------------------------------------------------

EXTRACTED = [
    ("3 + 4 = 7. The answer is 7.", "7"),
    ("The answer is 5. The answer is 6", "5"),
    ("The answer is $1,000", "1000"),
    ("The answer is $1,234.00.", "1234"),
    ("$1,234.00.", "1234"),
    ("The answer is -5.", "-5"),
    ("It fell to -12", "-12"),
    ("The answer is -$3.50", "-3.5"),
    ("The answer is $-3.50", "-3.5"),
    ("The answer is \u22128", "-8"),
    ("She has no idea.", None),
    ("", None),
    ("The answer is", None),
    ("7 apples. The answer is unclear.", "7"),
    ("The answer is unclear, 3 or 4", "3"),
    ("First 3, then 14 and at last 15 apples", "15"),
    ("The answer is 5 apples, 3 of them red", "5"),
    ("The answer is 50%.", "50"),
    ("The answer is 0.25 of 8", "0.25"),
    ("The answer is $.50", "0.5"),
    ("The answer is\n42\n", "42"),
    ("The answer is: 42", "42"),
    ("The answer is 5.00", "5"),
    ("The answer is 007", "7"),
    ("The answer is -0.0", "0"),
    ("The answer is 100", "100"),
    ("The answer is 1,000,000.", "1000000"),
    ("The answer is 3, 4", "3"),
    ("20-12", "12"),
    ("(3+2)-4", "4"),
    ("the answer is 5, out of 9", "9"),
    ("9 " * 50 + "The answer is " + "1" * 5000, "1" * 5000),
]


@pytest.mark.parametrize(("text", "number"), EXTRACTED)
def test_extracted_number(text, number):
    assert gsm8k.extract_number(text) == number


@pytest.mark.parametrize("same", [("5", "5.0", "5.00", "05", "$5", "5."), ("1234", "1,234", "$1,234.00", "1,234.")])
def test_spellings_of_one_value_are_one(same):
    assert {normalise(spelling) for spelling in same} == {same[0]}


def test_values_that_differ_stay_apart():
    spellings = ["5", "-5", "50", "0.5", "5.5", "500", "1" * 40, "1" * 39 + "2"]
    assert len({normalise(spelling) for spelling in spellings}) == len(spellings)


def lm_eval_filters() -> dict:
    import lm_eval
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml", resolve_func=False)
    filters = {}
    for entry in task["filter_list"]:
        options = {key: value for key, value in entry["filter"][0].items() if key != "function"}
        filters[entry["name"]] = RegexFilter(**options)
    return {"filters": filters, "ignore": task["metric_list"][0]["regexes_to_ignore"]}


# Rows where the rule says what lm_eval's filter of that name says.
STRICT = [
    "3 + 4 = 7. The answer is 7.",
    "The answer is 5. The answer is 6",
    "The answer is -5.",
    "The answer is 1,000,000.",
    "The answer is 5 apples, 3 of them red",
    "The answer is 50%.",
    "The answer is 3, 4",
    "The answer is 10.",
]
FLEXIBLE = [
    "$1,234.00.",
    "It fell to -12",
    "First 3, then 14 and at last 15 apples",
    "The answer is 5 apples",
    "The answer is\n42\n",
    "She pays $18.50 in all",
]


@pytest.mark.parametrize(
    ("name", "text"), [*(("strict-match", text) for text in STRICT), *(("flexible-extract", text) for text in FLEXIBLE)]
)
def test_agrees_with_lm_eval(name, text):
    from lm_eval.api.metrics import exact_match_fn

    theirs = lm_eval_filters()
    ((found,),) = theirs["filters"][name].apply([[text]], [{}])
    options = {"regexes_to_ignore": theirs["ignore"], "ignore_case": True, "ignore_punctuation": False}
    for gold in ("7", "5", "-5", "1000000", "50", "3", "10", "1234.00", "-12", "15", "42", "18.50", "6"):
        theirs_says = exact_match_fn(predictions=[found], references=[gold], **options)["exact_match"]
        ours = gsm8k.score({"prediction": text, "answers": [normalise(gold)]})["score"]
        assert ours == theirs_says, (found, gold)


def test_score_keeps_the_record_and_needs_the_whole_number():
    record = gsm8k.score({"id": 3, "prediction": "The answer is 18.0 dollars", "answers": ["18"]})
    assert record == {
        "id": 3,
        "prediction": "The answer is 18.0 dollars",
        "answers": ["18"],
        "extracted": "18",
        "score": 1,
    }
    assert gsm8k.score({"prediction": "The answer is 180", "answers": ["18"]})["score"] == 0
    assert gsm8k.score({"prediction": "", "answers": ["18"]})["score"] == 0


def test_accuracy_is_the_percentage_of_right_answers():
    assert gsm8k.accuracy([{"score": 1}, {"score": 0}, {"score": 0}, {"score": 1}]) == 50.0


# --- data and prompt ---------------------------------------------------------------------------------------------


def test_questions_are_numbered_and_their_gold_normalised(tmp_path):
    lines = [question(0, "a\n#### 1,234"), "", question(1, "70 #### not\n#### -5.0")]
    rows = gsm8k.load_questions(write_questions(tmp_path, lines))
    assert [(row["id"], row["answers"]) for row in rows] == [(0, ["1234"]), (1, ["-5"])]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([question(0), "", '{"question": "w1", "answer"'], "line 3 is no json"),
        ([question(0), '{"question": "w1"}'], "line 2 has no field 'answer'"),
        ([question(0), '["question", "answer"]'], "line 2 has no field 'question'"),
        (["", ""], "has no records"),
        ([question(0), question(1, "I do not know")], "question 1 .* no '#### number'"),
        ([question(0, "18 and then\n#### none")], "question 0 .* no '#### number'"),
    ],
)
def test_bad_data_is_one_line_and_status_2(folder, tmp_path, capsys, lines, says):
    data = write_questions(tmp_path / "data", lines)
    with pytest.raises(SystemExit) as ended:
        GSM8K_evaluation.main(flags(folder, data, tmp_path / "results"))
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(error) == 1
    assert re.search(says, error[0])


def test_no_file_names_the_path_it_wants(tmp_path):
    with pytest.raises(UserError, match=r"gsm8k.test\.jsonl"):
        gsm8k.load_questions(str(tmp_path))


@pytest.mark.parametrize(
    "bad", [["--limit", 0], ["--batch_size", 0], ["--max_new_tokens", 0], ["--num_fewshot", 9], ["--num_fewshot", -1]]
)
def test_bad_flags_name_themselves(folder, data, tmp_path, capsys, bad):
    with pytest.raises(SystemExit) as ended:
        GSM8K_evaluation.main(flags(folder, data, tmp_path, *bad))
    assert ended.value.code == 2 and bad[0] in capsys.readouterr().err


def test_more_than_the_context_is_refused_in_one_line(folder, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        GSM8K_evaluation.main(flags(folder, data, tmp_path, "--max_new_tokens", 1000, "--RTN4"))
    assert ended.value.code == 2 and "context of 1024" in capsys.readouterr().err.splitlines()[-1]


def test_prompt_is_eight_worked_examples_and_an_open_answer():
    prompt = gsm8k.build_prompt(gsm8k.load_examples(8), "How many?")
    blocks = prompt.split("\n\n")
    assert len(blocks) == 9 and blocks[-1] == "Q: How many?\nA:"
    for block in blocks[:-1]:
        asked, answered = block.split("\nA: ")
        assert asked.startswith("Q: ") and answered.startswith("Let's think step by step. ")
        assert gsm8k.extract_number(answered) is not None and "The answer is " in answered
    assert blocks[0].startswith("Q: There are 15 trees in the grove.") and blocks[0].endswith("The answer is 6.")
    assert [gsm8k.extract_number(block) for block in blocks[:-1]] == ["6", "5", "39", "8", "9", "29", "33", "8"]


def test_fewer_examples_are_the_first_ones():
    assert gsm8k.load_examples(2) == gsm8k.load_examples(8)[:2]
    assert gsm8k.build_prompt([], "Why?") == "Q: Why?\nA:"


def test_every_real_question_has_its_number(data_dir):
    if not (data_dir / "gsm8k" / "test.jsonl").is_file():
        pytest.skip("no local GSM8K")
    rows = gsm8k.load_questions(str(data_dir))
    assert rows[0]["answers"] == ["18"] and all(row["answers"][0] for row in rows)
    golds = [json.loads(line)["answer"] for line in (data_dir / "gsm8k" / "test.jsonl").read_text().splitlines()]
    records = [
        gsm8k.score({"prediction": gold, "answers": row["answers"]}) for gold, row in zip(golds, rows, strict=True)
    ]
    assert gsm8k.accuracy(records) == 100.0


# --- the script --------------------------------------------------------------------------------------------------


def test_last_line_records_and_metrics_say_the_same(folder, data, tmp_path, capsys):
    GSM8K_evaluation.main(flags(folder, data, tmp_path, "--RTN4", "--limit", 3))
    metrics, samples = metrics_of(tmp_path), samples_of(tmp_path)
    bits, size = metrics["avg_bits"]["total"], metrics["cache_bytes_per_token"]
    expected = f"gsm8k accuracy: {metrics['metric']['accuracy']:.2f} %  (RTN4, {bits:.3f} bits, {size:.1f} bytes/token)"
    assert capsys.readouterr().out.strip().splitlines()[-1] == expected
    assert metrics["n"] == 3 and metrics["partial"] is True and metrics["task"] == "gsm8k"
    assert [sample["id"] for sample in samples] == [0, 1, 2]
    assert len({sample["prompt_sha256"] for sample in samples}) == 3
    for number, sample in enumerate(samples):
        assert sample["answers"] == [str(number)]
        assert gsm8k.score(sample) == sample
    assert metrics["config"]["num_fewshot"] == 1 and metrics["config"]["max_new_tokens"] == 6


def test_agreement_counts_tokens_before_the_first_difference(folder, data, tmp_path, capsys):
    records = [{"id": 0, "token_ids": [5, 6, 7, 8]}, {"id": 1, "token_ids": [5, 6]}, {"id": 2, "token_ids": [1]}]
    others = {0: {"token_ids": [5, 6, 9, 8]}, 1: {"token_ids": [5, 6, 7]}, 2: {"token_ids": [2]}}
    assert gsm8k.agreement(records, others) == 4 / 3
    with pytest.raises(UserError, match="question 2 has no"):
        gsm8k.agreement(records, {**others, 2: {}})
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "one", "--FP16", "--limit", 3))
    other = next((tmp_path / "one").rglob("metrics.json")).parent
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "two", "--RTN2", "--limit", 3, "--agree_with", other))
    said = capsys.readouterr().out.strip().splitlines()[-1]
    agreement = metrics_of(tmp_path / "two")["metric"]["agreement"]
    assert said == f"the same as the other run for {agreement:.1f} tokens of an answer, on average" and agreement < 6
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "one", "--rescore", other, "--agree_with", other))
    assert metrics_of(tmp_path / "one")["metric"]["agreement"] == 6


def test_accuracy_counts_right_answers(folder, data, tmp_path):
    """The golds are set to what the model says, but for one: 6 of 7 right."""
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "first", "--RTN4"))
    said = [sample["extracted"] for sample in samples_of(tmp_path / "first")]
    assert None not in said
    said[2] += "1"
    right = write_questions(tmp_path / "right", [question(n, f"#### {number}") for n, number in enumerate(said)])
    GSM8K_evaluation.main(flags(folder, right, tmp_path / "second", "--RTN4"))
    assert metrics_of(tmp_path / "second")["metric"]["accuracy"] == pytest.approx(100 * 6 / 7)
    assert metrics_of(tmp_path / "second")["partial"] is False


@pytest.mark.parametrize("method", ["FP16", "RotateKV4"])
def test_batches_answer_as_single_questions_do(folder, data, tmp_path, method):
    more = ["--method", method, "--Outlier_Aware_Key_Rotation", "False", "--num_fewshot", 0]
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "one", *more))
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "three", *more, "--batch_size", 3))
    keys = ("id", "prediction", "extracted", "prompt_sha256", "prompt_tokens", "score")
    one, three = (
        [{key: sample[key] for key in keys} for sample in samples_of(tmp_path / name)] for name in ("one", "three")
    )
    assert one == three
    assert len({sample["prediction"] for sample in one}) > 3, "the model always says the same: this shows nothing"


def test_a_new_question_ends_the_answer(folder):
    """A model made to say w1 w2 w3 … stops as soon as its text holds the stop string."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = tiny_model(max_position_embeddings=1024)
    prompt = "w5 w6 w7 w8"
    with patch_model(model, "FP16"):
        (free,) = complete(model, tokenizer, [prompt], 12)
        words = free["prediction"].split()
        stop = words[5]
        before = words[: words.index(stop)]
        (stopped,) = complete(model, tokenizer, [prompt], 12, [stop])
        assert stopped["prediction"].split() == before
        assert stopped["new_tokens"] == len(before) + 1 < free["new_tokens"] == 12
        (unstopped,) = complete(model, tokenizer, [f"{stop} {prompt}"], 12, ["w5 w6"])  # in the prompt: no stop
        assert unstopped["new_tokens"] == 12
        both = complete(model, tokenizer, [prompt, "w9"], 12, [stop])  # a row that ended does not end the other
        assert both[0]["prediction"] == stopped["prediction"]
    assert gsm8k.STOP == "Q:"


def test_the_script_stops_at_a_new_question(folder, data, tmp_path, monkeypatch):
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "free", "--RTN4", "--limit", 1))
    words = samples_of(tmp_path / "free")[0]["prediction"].split()
    monkeypatch.setattr(gsm8k, "STOP", words[3])
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "stop", "--RTN4", "--limit", 1))
    sample = samples_of(tmp_path / "stop")[0]
    assert sample["prediction"].split() == words[: words.index(words[3])] and sample["new_tokens"] < 6


def test_an_empty_answer_scores_0(folder, data, tmp_path, monkeypatch):
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "free", "--RTN4", "--limit", 1))
    first = samples_of(tmp_path / "free")[0]["prediction"].split()[0]
    monkeypatch.setattr(gsm8k, "STOP", first)
    GSM8K_evaluation.main(flags(folder, data, tmp_path / "empty", "--RTN4", "--limit", 1))
    sample = samples_of(tmp_path / "empty")[0]
    assert (sample["prediction"], sample["extracted"], sample["score"]) == ("", None, 0)
    assert metrics_of(tmp_path / "empty")["metric"]["accuracy"] == 0
