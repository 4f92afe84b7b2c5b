"""needle_evaluation.py: grids, where the needle goes, what an answer scores, figures, resume, on a tiny byte model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import save_tiny_folder
from PIL import Image
from runs import read, refused, run_folder, samples_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import needle_evaluation
from rotatekv.errors import UserError
from rotatekv.evals import needle
from rotatekv.evals.needle import NEEDLE, NEEDLE_TYPES, Prompts
from rotatekv.evals.needle_figure import write_heat_maps
from rotatekv.evals.texts import Text

HAYSTACK = "It was late. The rain fell on the town and nobody came. A dog barked twice! Then silence fell over it. "
CHAT = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[bot]"


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte behind a BOS, so that every text survives and lengths can be counted by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + number for number, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-needle", vocab_size=260)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def haystack(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rain.txt"
    path.write_text(HAYSTACK, encoding="utf-8")
    return path


def flags(folder, haystack, output_dir, *more):
    base = ["--model", folder, "--haystack", haystack, "--output_dir", output_dir, "--max_new_tokens", 4]
    grid = ["--context_lengths", "300,400", "--depths", "0,50,100"]
    return [str(part) for part in (*base, *grid, *more)]


# ---------------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("50", [50]),
        ("100,0,50,0", [0, 50, 100]),
        ("0:100:5", [0, 25, 50, 75, 100]),
        ("0:100:10", [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]),
        (" 1 , 2", [1, 2]),
    ],
)
def test_lists_and_ranges(text, values):
    assert needle.parse_grid(text, "depths", 0, 100) == values


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "1.5", "0:100", "0:100:1", "100:0:3", "0:3:9", "0:9:2:2", "0:1:0", "-1", "0,101", "5:5:2"]
)
def test_bad_grids_are_one_line_with_the_flag(text):
    with pytest.raises(UserError, match="--depths") as caught:
        needle.parse_grid(text, "depths", 0, 100)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- placement


def words(tokens: list[int]) -> str:
    return "".join("." if token == 9 else "a" for token in tokens)


@pytest.mark.parametrize(("depth", "point"), [(0, 0), (10, 1), (40, 2), (50, 5), (60, 6), (80, 6), (99, 6), (100, 10)])
def test_needle_goes_back_to_the_last_full_stop(depth, point):
    tokens = [1, 9, 1, 1, 9, 9, 1, 1, 1, 1]  # 9 is the full stop
    assert needle.insertion_point(tokens, depth, words) == point


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("needle_type", list(NEEDLE_TYPES))
@pytest.mark.parametrize("depth", [0, 33, 50, 99, 100])
def test_prompts_have_the_exact_length_and_the_needle_once(needle_type, chat, depth):
    tokenizer = byte_tokenizer(chat)
    prompts = Prompts(tokenizer, NEEDLE_TYPES[needle_type], Text("rain", HAYSTACK), "What is it?", chat)
    for length in (350, 777):
        ids = prompts.build(length, depth, NEEDLE).ids
        text = tokenizer.decode(ids)
        assert len(ids) == length
        assert ids[0] == 1 and ids.count(1) == 1, "one BOS, with a chat template too"
        assert text.count(f"\n{NEEDLE}\n") == 1
        assert text.count("What is it?") == 1
        before = text[: text.index(f"\n{NEEDLE}")]
        start, end = NEEDLE_TYPES[needle_type].before, text[text.index(NEEDLE) + len(NEEDLE) + 1 :]
        if depth == 0:
            assert before.endswith(start)
        elif depth == 100:
            assert end.startswith(NEEDLE_TYPES[needle_type].after[:2])
        else:
            assert before.endswith(".")
            hay = length - len(text) + len(text.replace(f"\n{NEEDLE}\n", ""))
            assert len(before) <= len(start) + hay * depth / 100 + len("<s>[user]")
        assert text.startswith("<s>[user]") == chat
        assert text.endswith("[bot]" + NEEDLE_TYPES[needle_type].chat_answer) or not chat


def test_haystack_is_repeated_in_its_order():
    tokenizer = byte_tokenizer()
    prompts = Prompts(tokenizer, NEEDLE_TYPES["standard"], Text("rain", HAYSTACK), "Where?", False)
    text = tokenizer.decode(prompts.build(1000, 0, NEEDLE).ids)
    hay = text[text.index(NEEDLE) + len(NEEDLE) + 1 : text.index(" </book>")]
    assert hay == (f"{HAYSTACK}\n\n" * 20)[: len(hay)] and len(hay) > 5 * len(HAYSTACK)


def test_prompt_without_room_says_how_much_it_needs():
    prompts = Prompts(byte_tokenizer(), NEEDLE_TYPES["standard"], Text("rain", HAYSTACK), "Where?", False)
    with pytest.raises(UserError, match=r"pass --context_lengths (\d+) or more") as caught:
        prompts.build(100, 50, NEEDLE)
    least = int(re.search(r"context_lengths (\d+)", str(caught.value))[1])
    assert len(prompts.build(least, 50, NEEDLE).ids) == least


def test_passkeys_are_seeded_and_of_their_own_in_each_cell():
    def numbers(seed, lengths=(512, 1024), depths=(0, 50)):
        return {s["id"]: s["key_phrase"] for s in needle.cells(lengths, depths, seed, "passkey", None, None)}

    assert numbers(0) == numbers(0)
    assert len({*numbers(0).values(), *numbers(1).values()}) == 8
    assert numbers(0).items() <= numbers(0, (256, 512, 1024), (0, 25, 50)).items(), "decided by its own cell only"
    for sample in needle.cells([512, 1024], range(101), 0, "passkey", None, None):
        assert re.fullmatch(r"\d{5}", sample["answer"]) and sample["needle"].count(sample["answer"]) == 2


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("eat a sandwich", "eat a sandwich and sit", 75.0),  # P = 3/3, R = 3/5
        ("Eating SANDWICHES!", "eat a sandwich", 80.0),  # stems; P = 2/2, R = 2/3
        ("", "eat", 0.0),
        ("no", "eat", 0.0),
        (NEEDLE, NEEDLE, 100.0),
        (" 12345", "12345", 100.0),
    ],
)
def test_rouge1_by_hand(prediction, answer, score):
    assert needle.rouge1(prediction, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "phrase", "score"),
    [
        ("You should EAT a\n sandwich and sit in Dolores park.", needle.KEY_PHRASE, 100.0),
        ("eat a sandwich", needle.KEY_PHRASE, 0.0),
        ("", "12345", 0.0),
        ("It is 12345.", "12345", 100.0),
        ("It is 123456", "12345", 0.0),
        ("It is 912345", "12345", 0.0),
        ("costs $1.50 (net)", "$1.50 (net)", 100.0),
    ],
)
def test_recall_by_hand(prediction, phrase, score):
    assert needle.recall(prediction, phrase) == score


def test_score_is_the_measure_of_the_needle_type():
    record = {"prediction": "eat a sandwich", "answers": ["eat a sandwich and sit"], "key_phrase": "sandwich"}
    assert needle.scored({**record, "needle_type": "standard"})["score"] == pytest.approx(75.0)
    assert needle.scored({**record, "needle_type": "passkey"})["score"] == 100.0
    assert needle.means([{"rouge1": 10, "recall": 0}, {"rouge1": 30, "recall": 100}]) == {"rouge1": 20, "recall": 50}


# ------------------------------------------------------------------------------------------------------ a whole run


def test_a_run_writes_samples_metrics_grid_and_figure(folder, haystack, tmp_path, capsys):
    needle_evaluation.main(flags(folder, haystack, tmp_path, "--RTN4"))
    run = run_folder(tmp_path)
    samples, metrics, grid = samples_of(run), read(run / "metrics.json"), read(run / "grid.json")
    assert [sample["id"] for sample in samples] == [f"{n}/{d}" for n in (300, 400) for d in (0, 50, 100)]
    for sample in samples:
        assert sample["prompt_tokens"] == sample["length"] and 1 <= sample["new_tokens"] <= 4
        assert sample["answers"] == [NEEDLE] and sample["score"] == sample["rouge1"]
        assert sample["recall"] == 0 and re.fullmatch(r"[0-9a-f]{64}", sample["prompt_sha256"])
    assert len({sample["prompt_sha256"] for sample in samples}) == 6
    mean = sum(sample["rouge1"] for sample in samples) / 6
    assert metrics["metric"] == {"rouge1": pytest.approx(mean), "recall": 0} and metrics["n"] == 6
    assert metrics["partial"] is False and metrics["config"]["depths"] == [0, 50, 100]
    by_id = {sample["id"]: sample for sample in samples}
    assert (grid["context_lengths"], grid["depths"]) == ([300, 400], [0, 50, 100])
    assert grid["rouge1"] == [[by_id[f"{n}/{d}"]["rouge1"] for n in (300, 400)] for d in (0, 50, 100)]
    assert_picture(run / "heatmap.png")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(
        r"needle \(standard\) rouge1: ([\d.]+), recall: ([\d.]+) %  \(RTN4, ([\d.]+) bits, ([\d.]+) bytes/token\)", last
    )
    assert found and float(found[1]) == pytest.approx(mean, abs=0.01) and float(found[2]) == 0
    assert float(found[3]) == pytest.approx(metrics["avg_bits"]["total"], abs=1e-3)


def test_limit_leaves_holes_and_a_longer_one_goes_on(folder, haystack, tmp_path):
    more = ["--RTN2", "--needle_type", "passkey"]
    needle_evaluation.main(flags(folder, haystack, tmp_path, *more, "--limit", 2))
    run = run_folder(tmp_path)
    first = samples_of(run)
    assert read(run / "metrics.json")["partial"] is True
    assert read(run / "grid.json")["recall"] == [[0.0, None], [0.0, None], [None, None]]
    needle_evaluation.main(flags(folder, haystack, tmp_path, *more, "--resume"))
    assert samples_of(run)[:2] == first and len(samples_of(run)) == 6
    assert read(run / "metrics.json")["partial"] is False and None not in read(run / "grid.json")["recall"][2]


def test_chat_template_is_the_default_where_there_is_one(folder, haystack, tmp_path, capsys):
    chat = save_tiny_folder(tmp_path / "tiny-chat", vocab_size=260)
    byte_tokenizer(chat=True).save_pretrained(chat)
    needle_evaluation.main(flags(chat, haystack, tmp_path / "a", "--RTN4", "--limit", 1))
    needle_evaluation.main(flags(chat, haystack, tmp_path / "b", "--RTN4", "--limit", 1, "--chat_template", "False"))
    needle_evaluation.main(flags(chat, haystack, tmp_path / "c", "--RTN4", "--limit", 1, "--needle_type", "passkey"))
    a, b, c = (run_folder(tmp_path / name) for name in "abc")
    assert [read(run / "config.json")["chat_template"] for run in (a, b, c)] == [True, False, True]
    assert samples_of(a)[0]["prompt_sha256"] != samples_of(b)[0]["prompt_sha256"]
    assert "no chat template" in refused(
        capsys, needle_evaluation, *flags(folder, haystack, tmp_path, "--chat_template")
    )


# ----------------------------------------------------------------------------------------------------------- figures


def grid_for(needle_type="passkey", method="FP16", columns=3, rows=4, **changes) -> dict:
    values = [[100.0 * (row + column) / (rows + columns) for column in range(columns)] for row in range(rows)]
    return {
        "needle_type": needle_type,
        "model": "some/Model",
        "method": method,
        "bits": 3.2,
        "context_lengths": [512 * (n + 1) for n in range(columns)],
        "depths": [10 * n for n in range(rows)],
        "rouge1": values,
        "recall": values,
        **changes,
    }


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50, "blank"


def folder_with(path: Path, grid) -> Path:
    path.mkdir(parents=True)
    (path / "grid.json").write_text(grid if isinstance(grid, str) else json.dumps(grid), encoding="utf-8")
    return path


def near(colour, expected) -> bool:
    return max(abs(a - b) for a, b in zip(colour, expected, strict=True)) <= 1


def test_a_cell_has_the_colour_of_its_value(tmp_path):
    from matplotlib import colormaps

    for value in (0.0, 50.0, 100.0):
        path = tmp_path / f"{value}.png"
        write_heat_maps(path, [grid_for(columns=1, rows=1, recall=[[value]], rouge1=[[7.0]])])
        expected = tuple(round(255 * part) for part in colormaps["cividis"](value / 100)[:3])
        with Image.open(path) as image:
            colours = image.convert("RGB").getcolors(1 << 24)
        assert max(count for count, colour in colours if near(colour, expected)) > 10000


def test_compare_draws_one_panel_a_run(tmp_path, capsys):
    names = ["FP16", "RTN2", "RTN4", "RotateKV4", "RotateKV2"]
    folders = [str(folder_with(tmp_path / name, grid_for(method=name))) for name in names]
    sizes = {}
    for count in (1, 2, 5):
        output = tmp_path / "figures" / f"{count}.png"
        needle_evaluation.main(["--compare", ",".join(folders[:count]), "--output", str(output)])
        assert_picture(output)
        with Image.open(output) as image:
            sizes[count] = image.size
    assert sizes[2][0] > 1.5 * sizes[1][0] and sizes[5][1] == 2 * sizes[1][1]
    assert capsys.readouterr().out.strip().endswith("5.png")


def test_holes_and_large_grids_are_drawn(tmp_path):
    write_heat_maps(tmp_path / "holes.png", [grid_for(columns=2, rows=1, recall=[[None, 5.0]], rouge1=[[None, 1.0]])])
    write_heat_maps(tmp_path / "large.png", [grid_for(columns=35, rows=35)])
    for name in ("holes", "large"):
        assert_picture(tmp_path / f"{name}.png")


def test_compare_refuses_what_is_no_needle_run(tmp_path, capsys):
    good = folder_with(tmp_path / "good", grid_for())
    damaged = {
        "torn": '{"needle_type": "pass',
        "list": "[1, 2]",
        "foreign": {"ppl": 12.0},
        "shape": grid_for(columns=2, rows=2) | {"depths": [0]},
        "short": grid_for(columns=2, rows=2) | {"recall": [[1.0], [2.0]]},
        "words": grid_for(columns=1, rows=1) | {"recall": [["high"]]},
        "range": grid_for(columns=1, rows=1) | {"recall": [[180.0]]},
        "kind": grid_for("multi"),
        "empty": grid_for(columns=0, rows=0),
    }
    for name, content in damaged.items():
        bad = folder_with(tmp_path / name, content)
        assert f"{name}/grid.json is damaged or no needle grid" in refused(
            capsys, needle_evaluation, "--compare", f"{good},{bad}"
        )
    assert "finished needle run" in refused(capsys, needle_evaluation, "--compare", f"{good},{tmp_path / 'nowhere'}")
    other = folder_with(tmp_path / "other", grid_for("standard"))
    assert "different needle types" in refused(capsys, needle_evaluation, "--compare", f"{good},{other}")
    assert "needs folders" in refused(capsys, needle_evaluation, "--compare", ",")
    file = tmp_path / "file"
    file.write_text("")
    assert "another --output" in refused(capsys, needle_evaluation, "--compare", good, "--output", file / "x.png")


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context_lengths", "600"], "600 tokens and 4 new ones exceed the model's context of 512"),
        (["--context_lengths", "120"], "no room for the needle"),
        (["--context_lengths", "0"], "--context_lengths must be at least 1"),
        (["--depths", "0:200:3"], "--depths must be from 0 to 100, not 200"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--needle", "Bees hum."], "pass a --key_phrase"),
        (["--needle", "", "--key_phrase", ""], "pass a --key_phrase"),
        (["--needle_type", "passkey", "--needle", "x"], "leave out --needle"),
        (["--needle_type", "multi"], "invalid choice"),
        (["--haystack", "nowhere"], "no haystack 'nowhere'"),
        (["--output", "x.png"], "--output is for --compare"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_no_run(folder, haystack, tmp_path, capsys, more, message):
    assert message in refused(capsys, needle_evaluation, *flags(folder, haystack, tmp_path, *more))
    assert not list(tmp_path.iterdir())


def test_haystack_from_a_folder_and_the_essays(tmp_path):
    assert len(needle.load_haystack("essays").content) > 10**5
    with pytest.raises(UserError, match=r"no \.txt files"):
        needle.load_haystack(str(tmp_path))
    (tmp_path / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.")
    (tmp_path / "c.md").write_text("Not this.")
    assert needle.load_haystack(str(tmp_path)).content == "First.\n\nSecond."
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(UserError, match=r"d\.txt is empty"):
        needle.load_haystack(str(tmp_path))


def test_own_needle_question_and_phrase_reach_the_prompt(folder, haystack, tmp_path):
    own = ["--needle", "Bees hum at noon.", "--retrieval_question", "When?", "--key_phrase", "AT  noon"]
    needle_evaluation.main(flags(folder, haystack, tmp_path, *own, "--RTN4", "--limit", 1))
    (sample,) = samples_of(run_folder(tmp_path))
    assert sample["answers"] == ["Bees hum at noon."] and sample["key_phrase"] == "AT  noon"
    assert read(run_folder(tmp_path) / "config.json")["retrieval_question"] == "When?"


def test_an_introduction_of_ones_own_stands_before_the_haystack(folder, haystack, tmp_path, monkeypatch):
    """And in the config only where it is given, so that runs from before it are found again."""
    texts, build = [], needle.Prompts.build

    def note(self, *args):
        placed = build(self, *args)
        texts.append(self._tokenizer.decode(placed.ids, skip_special_tokens=True))
        return placed

    monkeypatch.setattr(needle.Prompts, "build", note)
    for number, own in enumerate(([], ["--introduction", "Once. "], ["--introduction", ""])):
        output = tmp_path / str(number)
        needle_evaluation.main(
            flags(folder, haystack, output, "--needle_type", "passkey", "--RTN4", "--limit", 1, *own)
        )
        config = read(run_folder(output) / "config.json")
        assert config.get("introduction") == (own[1] if own else None) and ("introduction" in config) == bool(own)
    starts = [text[:6] for text in texts[::2]]
    assert starts[:2] == ["A pass", "Once. "] and starts[2] not in starts[:2]
