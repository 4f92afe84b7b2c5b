"""Where a needle goes in texts of other scripts and in texts without sentences, and what the map says of it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_tiny_folder
from test_needle import byte_tokenizer

import needle_evaluation
from rotatekv.evals import needle_figure
from rotatekv.evals.needle import NEEDLE_TYPES, Prompts
from rotatekv.evals.texts import Text

NEEDLE = "藏在这里。"
DEPTHS = range(0, 100, 10)
TEXTS = {
    "English": "It was late, and the rain fell on the town. Nobody came! A dog barked twice? Then silence fell. ",
    "Chinese": "很久以前，有一座山，山上有一座庙。庙里有个老和尚在讲故事！他讲了什么？没有人知道，也没有人去问。",
    "Hindi": "एक समय की बात है, एक गाँव था। वहाँ एक किसान रहता था। उसके पास एक बैल था। ",
    "a poem": "Über allen Gipfeln\nist Ruh,\nin allen Wipfeln\nspürest du\nkaum einen Hauch;\n",
    "a poem with one full stop": "Mr.\n" + "the fog comes\non little cat feet\nit sits\nover the city\n" * 80,
    "no end at all": "没有句号也没有换行只有字一个接一个地写下去" * 100,
    "Thai": "กาลครั้งหนึ่งนานมาแล้ว มีเมืองเล็กๆอยู่ริมแม่น้ำ ",
}


def place(text: str, depth: int, length: int = 6000) -> tuple[str, str, float]:
    """The haystack before and behind the needle, and the depth that is recorded."""
    prompts = Prompts(byte_tokenizer(), NEEDLE_TYPES["standard"], Text("hay", text), "?", chat=False)
    placed = prompts.build(length, depth, NEEDLE)
    whole = byte_tokenizer().decode(placed.ids).removeprefix("<s>")
    before, _, after = whole.partition(f"\n{NEEDLE}\n")
    return before.partition("<book> ")[2], after.partition(" </book>")[0], placed.depth


@pytest.mark.parametrize("name", TEXTS)
def test_each_depth_has_a_place_of_its_own_and_says_which(name):
    found = [place(TEXTS[name], depth) for depth in DEPTHS]
    assert len({before for before, _, _ in found}) == len(DEPTHS)
    for depth, (before, after, reached) in zip(DEPTHS, found, strict=True):
        sizes = [len(part.encode()) for part in (before, after)]  # a byte is a token here
        assert reached == pytest.approx(100 * sizes[0] / sum(sizes), abs=0.6)  # the end may cut a character
        assert depth - 6 <= reached <= depth
        assert "\ufffd" not in before + after[:-1], "no character is cut in two"


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("English", "."),
        ("Chinese", "。！？"),
        ("Hindi", "।"),
        ("a poem", "\n"),
        ("a poem with one full stop", "\n"),
        ("no end at all", TEXTS["no end at all"]),
    ],
    ids=lambda text: text[:30],
)
def test_a_needle_stands_behind_an_end_where_the_text_has_ends(name, ends):
    for depth in DEPTHS[1:]:
        before = place(TEXTS[name], depth)[0]
        assert (before if "\n" in ends else before.rstrip())[-1] in ends


def test_a_full_stop_goes_before_a_line_that_ends_nearer():
    text = "He came. He saw\nand he won. "
    assert all(place(text, depth)[0].rstrip()[-1] == "." for depth in DEPTHS[1:])


def test_half_a_character_is_never_before_the_needle_whatever_the_length():
    for length in range(300, 312):
        before, after, _ = place(TEXTS["no end at all"], 50, length)
        assert "\ufffd" not in before + after[:-1]


def test_the_reached_depth_is_in_samples_grid_and_figure(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    model = save_tiny_folder(tmp_path / "tiny", vocab_size=260, max_position_embeddings=2048)
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "hay.txt").write_text(TEXTS["Chinese"] * 3, encoding="utf-8")
    labels = []
    monkeypatch.setattr(needle_figure, "_ticks", lambda ticks: labels.append(list(ticks)) or ([0], ["x"]))
    flags = ["--model", model, "--haystack", tmp_path / "hay.txt", "--output_dir", tmp_path / "out", "--method", "RTN4"]
    flags += ["--context_lengths", "700,1400", "--depths", "50,100", "--max_new_tokens", 2]
    needle_evaluation.main([str(flag) for flag in flags])
    (folder,) = (tmp_path / "out").glob("needle/*/*")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    reached = {(sample["length"], sample["depth"]): sample["depth_reached"] for sample in samples}
    assert grid["depth_reached"] == [[reached[700, depth], reached[1400, depth]] for depth in (50, 100)]
    low, high = sorted(reached[length, 50] for length in (700, 1400))
    assert 30 < low < high < 50
    assert labels[1] == [f"50 (at {low:.0f}–{high:.0f})", "100"]
    assert needle_figure.read_grid(str(folder)) == grid
    del grid["depth_reached"]  # a run of an earlier version
    (folder / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    needle_evaluation.main(["--compare", str(folder), "--output", str(tmp_path / "old.png")])
    assert labels[3] == ["50", "100"]
