"""--needle_type multikey: several pass keys in one haystack, each under its own name, of which one is asked for."""

from __future__ import annotations

import re

import pytest
from conftest import save_tiny_folder
from runs import read, refused, run_folder, samples_of
from test_needle import HAYSTACK, byte_tokenizer

import needle_evaluation
from rotatekv.evals import needle
from rotatekv.evals.needle import NEEDLE_TYPES, PASSKEY_QUESTIONS, Placed, Prompts
from rotatekv.evals.needle_keys import KEY_NAMES, NEEDLE_KEYS
from rotatekv.evals.texts import Text
from rotatekv.reproduce.plan import Options, method_cells

pytestmark = pytest.mark.usefixtures("one_thread")
DEPTHS = (0, 7, 50, 93, 100)


def cells(keys: int = NEEDLE_KEYS, lengths=(2000, 4000), depths=DEPTHS, seed: int = 0) -> list[dict]:
    return needle.cells(lengths, depths, seed, "multikey", keys=keys)


def prompts_of(chat: bool = False, text: str = HAYSTACK) -> Prompts:
    kind = NEEDLE_TYPES["multikey"]
    return Prompts(byte_tokenizer(chat), kind, Text("hay", text), PASSKEY_QUESTIONS["multikey"], chat)


def texts_of(cell: dict) -> list[str]:
    """The asked needle, and the others."""
    return [cell["needle"], *(text for _, text in cell["others"])]


def parts_of(placed: Placed, cell: dict, chat: bool = False) -> tuple[list[str], str]:
    """The haystack's pieces between the needles, and what stands behind it."""
    text = byte_tokenizer(chat).decode(placed.ids)
    hay, _, after = text.partition(NEEDLE_TYPES["multikey"].before)[2].rpartition("\n\n")
    return re.split("|".join(re.escape(f"\n{needle}\n") for needle in texts_of(cell)), hay), after


# ----------------------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize("keys", [2, NEEDLE_KEYS, len(KEY_NAMES)])
def test_each_key_has_a_number_and_a_name_of_its_own(keys):
    for cell in cells(keys, depths=range(101)):
        said = [re.search(r"pass keys for the (\w+) is: (\d{5})\.", text) for text in texts_of(cell)]
        names, numbers = zip(*(found.groups() for found in said), strict=True)
        assert len(set(names)) == len(set(numbers)) == keys
        assert (names[0], numbers[0]) == (cell["name"], cell["answer"]) == (cell["name"], cell["key_phrase"])
        assert list(numbers[1:]) == cell["other_keys"]
        for text, number, name in zip(texts_of(cell), numbers, names, strict=True):
            assert set(re.findall(r"\d+", text)) == {number}
            assert [other for other in KEY_NAMES if other in text] == [name]


def test_no_name_is_a_part_of_another_one():
    assert not [(a, b) for a in KEY_NAMES for b in KEY_NAMES if a != b and a in b]


def test_keys_are_decided_by_seed_length_and_depth():
    assert cells() == cells() == [cell for cell in cells(lengths=(1000, 2000, 4000)) if cell["length"] > 1000]
    answers = [cell["answer"] for seed in (0, 1) for cell in cells(seed=seed)]
    assert len(set(answers)) == len(answers)
    assert len({cell["name"] for cell in cells(depths=range(101))}) > len(KEY_NAMES) // 2
    places = {tuple((depth - cell["depth"]) % 100 for depth, _ in cell["others"]) for cell in cells(depths=range(101))}
    assert len(places) > 50, "the others' places are drawn, too"


@pytest.mark.parametrize("keys", [2, 8])
def test_another_number_of_keys_asks_for_the_same_key(keys):
    for cell, other in zip(cells(), cells(keys), strict=True):
        assert {name: cell[name] for name in ("id", "needle", "answer", "name")} == {
            name: other[name] for name in ("id", "needle", "answer", "name")
        }
        assert (len(cell["others"]), len(other["others"])) == (3, keys - 1)


@pytest.mark.parametrize("keys", [2, NEEDLE_KEYS, len(KEY_NAMES)])
def test_keys_lie_all_over_the_haystack(keys):
    for cell in cells(keys, depths=range(101)):
        depths = sorted([cell["depth"] % 100, *(depth for depth, _ in cell["others"])])
        gaps = [after - before for before, after in zip(depths, [*depths[1:], depths[0] + 100], strict=True)]
        assert min(gaps) >= 50 / keys - 1 and max(gaps) <= 150 / keys + 1


# --------------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("keys", [2, NEEDLE_KEYS, 9])
def test_a_prompt_has_the_exact_length_and_each_needle_once_behind_a_sentence(keys, chat):
    prompts = prompts_of(chat)
    for cell in cells(keys):
        placed = prompts.build_cell(cell)
        assert len(placed.ids) == cell["length"] and placed.ids.count(1) == 1
        pieces, after = parts_of(placed, cell, chat)
        assert len(pieces) == keys + 1, "each needle once"
        behind = pieces[cell["depth"] == 0 : len(pieces) - 1 - (cell["depth"] == 100)]  # 0 and 100 are the very ends
        assert all(piece.rstrip().endswith(".") for piece in behind)
        hay = f"{HAYSTACK}\n\n" * 60
        assert hay.startswith("".join(pieces)), "the haystack goes on behind each needle"
        asked = f"What is the pass key for the {cell['name']} mentioned in the provided text?"
        begun = f"The pass key for the {cell['name']} mentioned in the provided text is"
        assert after == (f"{asked}[end][bot]{begun}" if chat else f"{asked} {begun}")


def test_the_recorded_depths_are_those_of_the_prompt():
    prompts = prompts_of()
    for cell in cells(depths=(0, 50, 100)):
        placed = prompts.build_cell(cell)
        text = byte_tokenizer().decode(placed.ids)
        hay = "".join(parts_of(placed, cell)[0])
        order = sorted(texts_of(cell), key=text.index)
        found, length = {}, 0
        for needle_text, piece in zip(order, parts_of(placed, cell)[0], strict=False):
            length += len(piece)
            found[needle_text] = round(100 * length / len(hay), 1)
        assert [found[needle_text] for needle_text in texts_of(cell)] == [placed.depth, *placed.other_depths]
        assert len({placed.depth, *placed.other_depths}) == NEEDLE_KEYS
        assert cell["depth"] - 8 <= placed.depth <= cell["depth"]


def test_the_asked_needle_lies_where_a_single_one_would():
    prompts, tokenizer = prompts_of(), byte_tokenizer()
    for cell in cells():
        placed = prompts.build_cell(cell)
        pieces, _ = parts_of(placed, cell)
        hay = tokenizer.encode("".join(pieces), add_special_tokens=False)
        point = needle.insertion_point(hay, cell["depth"], tokenizer.decode)
        assert placed.depth == round(100 * point / len(hay), 1)


def test_needles_whose_sentence_is_taken_go_on_to_the_next():
    """Sentences longer than the steps between the keys, so that several depths lead to one place."""
    text = ("word " * 30 + "end. ") * 10
    for cell in cells(8, lengths=(2400,)):
        placed = prompts_of(text=text).build_cell(cell)
        pieces, _ = parts_of(placed, cell)
        assert len(placed.ids) == 2400 and len({placed.depth, *placed.other_depths}) == 8
        assert all(pieces[1:-1])


def test_a_context_too_short_for_the_keys_is_one_line():
    def error(length: int) -> str:
        with pytest.raises(needle.UserError) as caught:
            prompts_of().build_cell(cells(lengths=(length,), depths=(50,))[0] | {"others": others})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    others = cells(depths=(50,))[0]["others"]
    no_room = error(300)
    assert "no room for the needle" in no_room
    least = int(re.search(r"pass --context_lengths (\d+)", no_room)[1])
    assert "no places for so many needles: pass longer --context_lengths or fewer --needle_keys" in error(least)


# ------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    byte_tokenizer().save_pretrained(save_tiny_folder(path / "tiny", vocab_size=260, max_position_embeddings=2048))
    (path / "rain.txt").write_text(HAYSTACK, encoding="utf-8")
    return path


def flags(place, output_dir, *more) -> list[str]:
    base = ["--model", place / "tiny", "--haystack", place / "rain.txt", "--output_dir", output_dir, "--RTN4"]
    grid = ["--context_lengths", 1000, "--depths", "20,80", "--max_new_tokens", 4]
    return [str(part) for part in (*base, *grid, *more)]


def test_a_run_records_its_keys_and_another_number_is_another_run(place, tmp_path, capsys):
    needle_evaluation.main(flags(place, tmp_path / "4", "--needle_type", "multikey"))
    assert "needle (multikey)" in capsys.readouterr().out
    run = run_folder(tmp_path / "4")
    assert read(run / "config.json")["needle_keys"] == 4
    for sample, cell in zip(samples_of(run), cells(lengths=(1000,), depths=(20, 80)), strict=True):
        assert sample["prompt_tokens"] == 1000 and sample["answers"] == [cell["answer"]]
        assert (sample["name"], sample["other_keys"]) == (cell["name"], cell["other_keys"])
        assert len({sample["depth_reached"], *sample["other_depths"]}) == 4
        assert sample["score"] == sample["recall"]
    assert read(run / "grid.json")["needle_type"] == "multikey" and (run / "heatmap.png").exists()
    needle_evaluation.main(flags(place, tmp_path / "3", "--needle_type", "multikey", "--needle_keys", 3, "--limit", 1))
    other = run_folder(tmp_path / "3")
    assert read(other / "config.json")["needle_keys"] == 3 and other.name != run.name
    assert [len(sample["other_keys"]) for sample in samples_of(other)] == [2]


def test_only_the_asked_key_counts(place):
    cell = cells()[0]
    record = {"needle_type": "multikey", "answers": [cell["answer"]], "key_phrase": cell["key_phrase"]}
    assert needle.scored({**record, "prediction": f" {cell['answer']}"})["score"] == 100
    assert [needle.scored({**record, "prediction": f" {key}"})["score"] for key in cell["other_keys"]] == [0, 0, 0]


@pytest.mark.parametrize("needle_type", ["standard", "passkey"])
def test_runs_of_the_other_types_have_the_config_they_had(place, tmp_path, needle_type):
    """So that finished ones are found again: a run's folder is a hash of its config."""
    needle_evaluation.main(flags(place, tmp_path, "--needle_type", needle_type, "--limit", 1))
    config = read(run_folder(tmp_path) / "config.json")
    assert not {"needle_keys", "name", "introduction"} & set(config)
    wanted = {
        "standard": (needle.NEEDLE, "What is the best thing to do in San Francisco?", needle.KEY_PHRASE),
        "passkey": (None, "What is the pass key hidden in the text above?", None),
    }
    assert (config["needle"], config["retrieval_question"], config["key_phrase"]) == wanted[needle_type]


def test_a_paper_table_asks_for_the_usual_number_of_keys():
    cells = {
        kind: method_cells("needle", ["smollm2-135m"], ["RTN2"], Options(needle_type=kind), {})[0]
        for kind in NEEDLE_TYPES
    }
    args = needle_evaluation.parse_args(list(cells["multikey"].flags))
    assert dict(cells["multikey"].protocol)["needle_keys"] == args.needle_keys == NEEDLE_KEYS
    for kind in ("standard", "passkey"):
        assert "needle_keys" not in dict(cells[kind].protocol) and "--needle_keys" not in cells[kind].flags


def test_a_question_of_ones_own_names_the_key(place, tmp_path, monkeypatch):
    texts, build = [], Prompts.build

    def note(self, *args):
        placed = build(self, *args)
        texts.append(byte_tokenizer().decode(placed.ids))
        return placed

    monkeypatch.setattr(Prompts, "build", note)
    own = ["--retrieval_question", "The {name}'s?", "--limit", 1]
    needle_evaluation.main(flags(place, tmp_path, "--needle_type", "multikey", *own))
    (sample,) = samples_of(run_folder(tmp_path))
    name = sample["name"]
    assert texts[-1].endswith(f"\n\nThe {name}'s? The pass key for the {name} mentioned in the provided text is")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--needle_keys", 4], "--needle_keys is for --needle_type multikey"),
        (["--needle_type", "passkey", "--needle_keys", 4], "--needle_keys is for --needle_type multikey"),
        (["--needle_type", "multikey", "--needle_keys", 1], "--needle_keys must be from 2 to 16, not 1"),
        (["--needle_type", "multikey", "--needle_keys", 17], "--needle_keys must be from 2 to 16, not 17"),
        (["--needle_type", "multikey", "--needle", "x"], "multikey hides its own needle"),
        (["--needle_type", "multikey", "--key_phrase", "x"], "multikey hides its own needle"),
        (["--needle_type", "multikey", "--retrieval_question", "Where?"], "put {name} into --retrieval_question"),
        (["--needle_type", "multikey", "--context_lengths", "400,1500"], "no room for the needle"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_no_run(place, tmp_path, capsys, more, message):
    assert message in refused(capsys, needle_evaluation, *flags(place, tmp_path, *more))
    assert not list(tmp_path.iterdir())
