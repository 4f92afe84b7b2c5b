"""LongBench: scores by hand and by lm_eval, prompts, truncation, and the script on a tiny byte-level model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from runs import metrics_of, refused, samples_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

pytest.importorskip("lm_eval.tasks.longbench.metrics", reason="lm_eval[longbench] is not installed")

import LongBench_evaluation
from rotatekv import patch_model
from rotatekv.errors import UserError
from rotatekv.evals import longbench
from rotatekv.evals.generation import complete
from rotatekv.evals.longbench import E_TASKS, GROUPS, TASKS, load_records, load_task, score, task_names

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
PLAIN = ["--chat_template", "False", "--RTN2"]


def save_byte_folder(folder: Path, newline: int | None = None, chat: bool = True, **changes) -> Path:
    """A tiny model with one token per UTF-8 byte; ``newline`` is the id that byte 10 trades places for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + number for number, letter in enumerate(letters)}
    if newline is not None:
        (other,) = (letter for letter, number in vocab.items() if number == newline)
        vocab[other], vocab["Ċ"] = vocab["Ċ"], newline
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=259, **changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def record(context="The cat sat.", question="Who sat?", answers=("the cat",), all_classes=None, length=3000):
    return {
        "input": question,
        "context": context,
        "answers": list(answers),
        "all_classes": all_classes,
        "length": length,
    }


def write_data(data_dir: Path, **tasks: list[dict]) -> Path:
    (data_dir / "longbench").mkdir(parents=True, exist_ok=True)
    for name, records in tasks.items():
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in records]
        (data_dir / "longbench" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return data_dir


def flags(folder, data, output_dir, *more):
    return [
        str(part)
        for part in ("--model", folder, "--data_dir", data, "--output_dir", output_dir, "--max_new_tokens", 6, *more)
    ]


# -- scores, by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "classes", "value"),
    [
        # F1 of words, without case, articles and punctuation: precision 2/2, recall 2/3
        ("qasper", "The Cat, sat!", ["cat sat down"], None, 4 / 5),
        ("qasper", "cat", ["dog", "a cat"], None, 1.0),  # the best answer counts, not the first or the last
        ("qasper", "cat", ["a cat", "dog"], None, 1.0),
        ("qasper", "cat cat", ["cat"], None, 2 / 3),  # a word counts as often as it is there: precision 1/2
        ("qasper", "", ["cat"], None, 0.0),
        # jieba cuts 我 / 来到 / 北京 / 清华大学 and 北京 / 清华大学: precision 2/4, recall 2/2
        ("multifieldqa_zh", "我来到北京清华大学。", ["北京清华大学"], None, 2 / 3),
        ("multifieldqa_zh", "", ["北京"], None, 0.0),
        # the longest common subsequence a b d has 3 words, of 4 and 5
        ("gov_report", "a b c d", ["a x b d y"], None, 2 / (4 / 3 + 5 / 3)),
        ("gov_report", "", ["a b"], None, 0.0),
        # the same words as above: subsequence of 2 of 4 and 2
        ("vcsum", "我来到北京清华大学", ["北京清华大学"], None, 2 / 3),
        # the only class named; two named; a class inside the right one's name does not count; none
        ("trec", "It is a Date.", ["Date"], ["Date", "Food"], 1.0),
        ("trec", "Food or Date", ["Date"], ["Date", "Food"], 0.5),
        ("trec", "Vehicle color", ["Vehicle color"], ["color", "Vehicle color"], 1.0),
        ("trec", "neither", ["Date"], ["Date", "Food"], 0.0),
        # the part of the numbers named that is right
        ("passage_count", "17 or 18?", ["17"], None, 0.5),
        ("passage_count", "none", ["17"], None, 0.0),
        ("passage_retrieval_en", "Paragraph 4", ["Paragraph 4"], None, 1.0),
        ("passage_retrieval_en", "Paragraphs 4, 5, 6 and 14", ["Paragraph 4"], None, 1 / 4),
        ("passage_retrieval_zh", "段落3和段落5", ["段落5"], None, 1 / 2),
        # the first line that is no comment and no fence; 2 × 4 matching characters of 5 + 4
        ("lcc", "```\n# a comment\n// another\nabcde\nabcd", ["abcd"], None, 0.89),
        ("lcc", "", ["abcd"], None, 0.0),
    ],
)
def test_scores_by_hand(task, prediction, answers, classes, value):
    found = score(load_task(task), prediction, record(answers=answers, all_classes=classes))
    assert found == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht", "trec_e"])
def test_few_shot_tasks_count_the_first_line(task):
    gold = record(answers=["alpha beta"], all_classes=["alpha beta", "gamma"])
    assert score(load_task(task), "\n\nalpha beta\ngamma", gold) == pytest.approx(1.0, abs=1e-6)
    assert score(load_task(task), "gamma\nalpha beta", gold) == 0.0


def test_other_tasks_count_every_line():
    assert score(load_task("qasper"), "dog\ncat", record(answers=["dog cat"])) == 1.0


def test_a_long_prediction_without_full_stops_is_scored():
    words = " ".join(f"w{number}" for number in range(1200))
    limit = sys.getrecursionlimit()
    precision, recall = 3 / 1200, 1
    expected = 2 * precision * recall / (precision + recall)
    assert score(load_task("gov_report"), words, record(answers=["w0 w1 w2"])) == pytest.approx(expected, abs=1e-6)
    assert sys.getrecursionlimit() == limit


def _synthetic(entry):
    gold = entry["answers"][-1]
    other = (entry["all_classes"] or ["Paragraph 77 段落78 nothing at all"])[0]
    noisy = f"It may be {gold[:300]}, or {other} 12\n{gold[:40]} once more"
    return [gold, f"\n{noisy}", f"{noisy[3:]}\n\n# end", other, "zzz qqq", "", " \n "]


@pytest.mark.parametrize("name", TASKS)
def test_scores_agree_with_lm_eval(name, data_dir):
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.longbench import metrics

    if not (data_dir / "longbench" / f"{name}.jsonl").is_file():
        pytest.skip(f"no local data {name}.jsonl")
    task = load_task(name)
    process = load_yaml(Path(metrics.__file__).with_name(f"{name}.yaml"))["process_results"]
    base = getattr(metrics, task.metric)
    seen = set()
    records = sorted(load_records(task, str(data_dir)), key=lambda entry: len(entry["answers"][0]))  # ROUGE is slow
    for entry in records[: 1 if task.metric == "rouge_score" else 3]:
        for prediction in _synthetic(entry):
            # lm_eval cuts few-shot answers at its stop string; the official scorer (its utils.py) at the first line.
            shown = prediction.lstrip("\n").split("\n")[0] if name in GROUPS["few-shot"] else prediction
            ours = score(task, prediction, entry)
            assert ours == process(entry, [shown])["score"]
            kept = shown if task.metric == "code_sim_score" else shown.strip()
            assert ours == max(base(kept, gold, all_classes=entry["all_classes"]) for gold in entry["answers"])
            seen.add(ours)
    assert max(seen) > 0.99 and min(seen) < 0.3, "the predictions tell nothing apart"


# -- tasks and prompts -------------------------------------------------------------------------------------------------


def test_tasks_and_groups_are_those_of_lm_eval():
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.longbench import metrics

    here = Path(metrics.__file__).parent
    names = {path.stem for path in here.glob("[!_]*.yaml")}
    assert names == set(TASKS) | {f"{name}_e" for name in E_TASKS}
    assert len(TASKS) == len(set(TASKS)) == 21 and len(E_TASKS) == 13
    tags = {"single-doc": "single", "multi-doc": "multi", "few-shot": "fewshot"}
    for group in ("single-doc", "multi-doc", "summarization", "few-shot", "synthetic", "code"):
        tag = f"longbench_{tags.get(group, group)}_tasks"
        assert {name for name in TASKS if tag in load_yaml(here / f"{name}.yaml", resolve_func=False)["tag"]} == set(
            GROUPS[group]
        )


def test_names_groups_and_longbench_e():
    assert task_names("qasper, code,qasper") == ["qasper", "lcc", "repobench-p"]
    assert task_names("all") == list(TASKS) and len(task_names("paper")) == 8
    assert task_names("summarization", e=True) == ["gov_report_e", "multi_news_e"]
    with pytest.raises(UserError, match=r"unknown task 'quasper': choose among single-doc, .*qasper"):
        task_names("trec,quasper")
    with pytest.raises(UserError, match="qmsum has no LongBench-E variant"):
        task_names("qmsum", e=True)
    with pytest.raises(UserError, match="names no task"):
        task_names(" , ")


LENGTHS = {
    32: "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en passage_retrieval_zh",
    64: "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p",
    128: "narrativeqa qasper dureader samsum",
    512: "gov_report qmsum multi_news vcsum",
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name):
    task = load_task(name)
    (length,) = (length for length, names in LENGTHS.items() if name in names.split())
    assert task.max_new_tokens == length  # of the official dataset2maxlen.json
    entry = record(context="CONTEXT {{question}} {{context}}", question="QUESTION \\1 {{context}}")
    prompt = longbench.prompt_of(task, entry)
    asks = name not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    assert prompt.count(entry["context"]) == 1
    assert prompt.count(entry["input"]) == asks
    rest = prompt.replace(entry["context"], "").replace(entry["input"], "")
    assert "{" not in rest and len(rest) > 15
    if asks and name != "repobench-p":
        assert prompt.index(entry["context"]) < prompt.index(entry["input"])
    assert task.takes_chat is (name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


def test_prompts_of_a_chat_and_a_few_shot_task():
    entry = record("C", "Q")
    assert longbench.prompt_of(load_task("trec"), entry).endswith("examples of questions.\n\nC\nQ")
    assert longbench.prompt_of(load_task("hotpotqa_e"), entry).endswith("\n\nQuestion: Q\nAnswer:")
    assert longbench.prompt_of(load_task("lcc"), entry).endswith("below. \nCNext line of code:")


# -- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_keeps_head_and_tail(tokenizer):
    text = "abcdefghijklmnopqrstuvwxyz"
    cut = {length: longbench.truncate_middle(tokenizer, text, length) for length in (2, 9, 10, 25, 26, 27)}
    assert cut == {2: "az", 9: "abcdwxyz", 10: "abcdevwxyz", 25: text[:12] + text[-12:], 26: text, 27: text}


def test_the_prompt_fits_with_its_template(tokenizer):
    text = "h" * 50 + "t" * 50
    whole = longbench.fit_prompt(tokenizer, text, 100, 200, chat=True)
    assert whole == f"[user]{text}[bot]"
    assert longbench.fit_prompt(tokenizer, text, 40, 200, chat=True) == f"[user]{'h' * 20}{'t' * 20}[bot]"
    assert longbench.fit_prompt(tokenizer, text, 100, 100, chat=False) == text
    tight = longbench.fit_prompt(tokenizer, text, 100, 100, chat=True)  # the template takes 11 tokens
    assert tight == f"[user]{'h' * 44}{'t' * 44}[bot]"
    with pytest.raises(UserError, match="no room"):
        longbench.fit_prompt(tokenizer, text, 12, 12, chat=True)


def test_halves_that_cut_a_character_still_fit(tokenizer):
    # Byte tokens: half of 学 decodes to U+FFFD, which is three tokens where one was.
    prompt = longbench.fit_prompt(tokenizer, "学" * 40, 50, 50, chat=False)
    assert 40 <= len(tokenizer(prompt).input_ids) <= 50


def test_chat_template_switch(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    bare.chat_template = None
    wants = longbench.wants_chat
    assert [wants(tokenizer, asked) for asked in (None, True, False)] == [True, True, False]
    assert [wants(bare, asked) for asked in (None, False)] == [False, False]
    with pytest.raises(UserError, match="no chat template"):
        wants(bare, True)


# -- samsum's newline --------------------------------------------------------------------------------------------------


def test_samsum_ends_at_a_newline_but_not_with_its_first_token(tmp_path):
    def run(newline, task):
        folder = save_byte_folder(tmp_path / f"{newline}{task}", newline)
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        options = longbench.stop_options(load_task(task), model, tokenizer)
        inputs = tokenizer("abcd", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 4:].tolist()
        with patch_model(model, "FP16"):
            (found,) = complete(model, tokenizer, ["abcd"], 8, **options)
        return tokens, found

    plain, found = run(None, "qasper")
    assert found["new_tokens"] == 8 and plain[0] not in plain[1:]
    later = next(number for number in plain[1:] if number >= 3 and number not in map(ord, "abcd"))
    _, found = run(later, "samsum")
    assert found["new_tokens"] == plain.index(later) + 1 and found["prediction"].endswith("\n")
    assert run(later, "qasper")[1]["new_tokens"] == 8
    _, found = run(plain[0], "samsum")
    assert not found["prediction"].startswith("\n") and found["new_tokens"] >= 1


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "task", "said"),
    [
        ([json.dumps(record()), '{"input": '], "qasper", "qasper.jsonl, line 2 is no json"),
        ([json.dumps({"input": "", "answers": [""], "all_classes": None, "length": 1})], "lcc", "no field 'context'"),
        ([json.dumps(record() | {"answers": []})], "lcc", "record 1: 'answers' must be a list"),
        ([json.dumps(record()), json.dumps(record() | {"answers": "x"})], "lcc", "record 2: 'answers' must be a list"),
        ([json.dumps(record() | {"context": None})], "lcc", "record 1: 'context' must be a text"),
        ([json.dumps(record())], "trec", "record 1: 'all_classes' must be a list"),
        ([json.dumps(record())], "passage_retrieval_en", "do not suit retrieval_score"),
        ([""], "lcc", "has no records"),
    ],
)
def test_wrong_data_is_one_line(folder, tmp_path, capsys, lines, task, said):
    write_data(tmp_path)
    (tmp_path / "longbench" / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert said in refused(capsys, LongBench_evaluation, *flags(folder, tmp_path, tmp_path / "out", "--tasks", task))


def test_wrong_flags_are_one_line(folder, tmp_path, capsys):
    data = write_data(tmp_path, qasper=[record()], gov_report=[record()])

    def said(*more):
        return refused(
            capsys, LongBench_evaluation, *flags(folder, data, tmp_path / "out", "--tasks", "qasper,gov_report", *more)
        )

    assert "unknown task 'x'" in said("--tasks", "x")
    assert "no data file" in said("--tasks", "lcc")
    assert "no data file" in said("--e", "--tasks", "qasper") and "qasper_e.jsonl" in said("--e", "--tasks", "qasper")
    assert "--max_length must be at least 2" in said("--max_length", "1")
    assert "--max_length 507" in said("--max_length", "507") and "pass --max_length 506" in said("--max_length", "507")
    assert "gov_report's answer of 512 tokens" in refused(
        capsys,
        LongBench_evaluation,
        *[
            part
            for part in flags(folder, data, tmp_path, "--tasks", "gov_report")
            if part not in ("6", "--max_new_tokens")
        ],
    )
    assert "--limit must be at least 1" in said("--limit", "0")
    assert "is no run's folder" in said("--rescore", tmp_path)


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    longbench.load_task.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"lm_eval\[longbench\]"):
        load_task("qasper")


def test_hub_records_are_read_as_the_official_ones(monkeypatch):
    row = record() | {"question": "Who sat?", "dataset": "qasper", "_id": "1"}
    del row["input"]
    monkeypatch.setattr(longbench, "read_hub", lambda load, name, hint: [row])
    assert load_records(load_task("qasper"), None) == [record()]


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path):
    records = [record(f"{number} " + "word " * 200, f"Who sat {number}?", ["a"]) for number in range(12)]
    return write_data(tmp_path / "data", qasper=records, lcc=records)


def test_end_to_end(folder, two_tasks, tmp_path, capsys):
    out = tmp_path / "out"
    LongBench_evaluation.main(flags(folder, two_tasks, out, "--tasks", "qasper,lcc", "--limit", 2, "--RTN2"))
    shown = capsys.readouterr().out.splitlines()
    metrics, samples = metrics_of(out), samples_of(out)
    assert [sample["id"] for sample in samples] == ["qasper/0", "qasper/1", "lcc/0", "lcc/1"]
    assert metrics["n"] == 4 and metrics["partial"] is True and set(metrics["metric"]) == {"qasper", "lcc", "average"}
    for name in ("qasper", "lcc"):
        mean = sum(sample["score"] for sample in samples if sample["id"].startswith(name)) / 2
        assert metrics["metric"][name] == pytest.approx(100 * mean)
    assert metrics["metric"]["average"] == pytest.approx(sum(metrics["metric"][name] for name in ("qasper", "lcc")) / 2)
    assert all(sample["prompt_tokens"] <= 506 and sample["new_tokens"] <= 6 for sample in samples)
    assert all(sample["answers"] == ["a"] and sample["all_classes"] is None for sample in samples)
    assert samples[0]["prompt_tokens"] >= 500, "a long prompt should fill the context"
    assert len({sample["prompt_sha256"] for sample in samples}) == 4
    assert shown[0].split() == ["task", "metric", "n", "score"] and shown[1].split()[:3] == [
        "qasper",
        "qa_f1_score",
        "2",
    ]
    tail = f"(RTN2, {metrics['avg_bits']['total']:.3f} bits, {metrics['cache_bytes_per_token']:.1f} bytes/token)"
    assert shown[-1] == f"longbench average: {metrics['metric']['average']:.2f}  {tail}"


def test_max_length_and_template_decide_the_prompt(folder, two_tasks, tmp_path):
    for name, more in {"chat": [], "plain": PLAIN[:2]}.items():
        arguments = flags(folder, two_tasks, tmp_path / name, "--tasks", "qasper,lcc", "--limit", 1, "--RTN2", *more)
        LongBench_evaluation.main([*arguments, "--max_length", "100"])
    tokens = {name: [sample["prompt_tokens"] for sample in samples_of(tmp_path / name)] for name in ("chat", "plain")}
    assert tokens == {"chat": [111, 100], "plain": [100, 100]}


def test_longbench_e_splits_by_length(folder, tmp_path, capsys):
    lengths = [3999, 4000, 7999, 8000]
    data = write_data(tmp_path, qasper_e=[record(length=length) for length in lengths], trec=[record()])
    out = tmp_path / "out"
    LongBench_evaluation.main(flags(folder, data, out, "--longbench_e", "--tasks", "qasper", *PLAIN))
    records = [{**sample, "score": value} for sample, value in zip(samples_of(out), (1, 0, 0.5, 0.25), strict=True)]
    metric = longbench.metric_of(records)
    assert metric == {
        "qasper_e": 43.75,
        "qasper_e/0-4k": 100,
        "qasper_e/4-8k": 25,
        "qasper_e/8k+": 25,
        "average": 43.75,
        "average/0-4k": 100,
        "average/4-8k": 25,
        "average/8k+": 25,
    }
    assert longbench.table(records, metric).splitlines()[1].split()[2:] == ["4", "43.75", "100.00", "25.00", "25.00"]
    assert "8k+" in capsys.readouterr().out and set(metrics_of(out)["metric"]) == set(metric)


def test_tasks_of_unequal_size_count_the_same():
    records = [{"id": f"qasper/{number}", "score": 0.0} for number in range(3)] + [
        {"id": "repobench-p/0", "score": 1.0}
    ]
    assert longbench.metric_of(records) == {"qasper": 0, "repobench-p": 100, "average": 50}


def test_real_records_of_all_tasks_load(data_dir):
    for name in TASKS:
        assert load_records(load_task(name), str(data_dir)), name
