"""README.md and docs/: what they name is there, their commands parse, their tables are those of docs/results.json."""

from __future__ import annotations

import json
import re
from functools import reduce
from importlib import import_module, util

import docs_check
import pytest
from docs_check import PAGES, ROOT

SPEC = util.spec_from_file_location("measured", ROOT / "docs" / "measured.py")
measured = util.module_from_spec(SPEC)
SPEC.loader.exec_module(measured)
IDEAS = ("rotation", "reorder", "attention sinks", "quantize and pack", "fused decode", "its specification")
ORIGINAL = (  # the headings of the original project's README
    "Installation",
    "Calibration for the reordering indices",
    *(f"{name} evaluation" for name in ("PPL", "GSM8K", "LongBench", "MileBench", "Needle-in-a-Haystack")),
    "2D and 3D visualizations of key tensors",
    "Massive activations",
    "Attention sinks",
    "Citation",
)
pages = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


@pages
def test_commands_parse(page):
    for command in docs_check.commands(page):
        docs_check.check_command(command)


@pages
def test_python_compiles(page):
    for block in docs_check.blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")


@pages
def test_links_lead_somewhere(page):
    docs_check.check_links(page)


@pages
def test_files_and_functions_named_are_there(page):
    for file, name in docs_check.named_places(page.read_text(encoding="utf-8")):
        docs_check.check_place(file, name)


@pages
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert measured.tables_written(text, measured.read_results()) == text, "run python docs/measured.py"
    assert len(re.findall("<!-- measured: ", text)) == len(measured._TABLE.findall(text)), "a mark without a table"


@pages
def test_marks_are_known(page):
    for block in docs_check.blocks(page):
        assert re.fullmatch(r"|run|printed by: .*; within \S+ %", block.mark), block.mark


@pytest.mark.parametrize(
    "command",
    [
        "python PPL_evaluation.py --limt 3",
        "python missing.py",
        "make missing",
        "python -m rotatekv.demo --modell x",
        "python benchmarks/decode_attention.py --length 3",
        "sudo rm x",
        "torchrun --nproc_per_node 2 PPL_evaluation.py --nope",
    ],
)
def test_a_command_that_is_not_there_is_found(command):
    with pytest.raises(AssertionError):
        docs_check.check_command(command)


def test_what_a_page_shows_and_what_is_printed():
    shown = "model, 2 threads\nmethod  ppl\nRTN2  585.58  3424\nFP16  19.04  46084\n"
    assert docs_check.differences(shown, shown.replace("585.58", "590.1").replace("2 t", "8 t"), 0.04) == []
    assert len(docs_check.differences(shown, shown.replace("585.58", "690.1"), 0.04)) == 1
    assert len(docs_check.differences(shown, shown.replace("ppl", "loss"), 0.04)) == 1
    assert docs_check.differences("3 files\n", "4 files\n", 0) == []


@pytest.mark.parametrize("idea", IDEAS)
def test_attentions_docstring_leads_to_every_idea(idea):
    for file, name in docs_check.attention_table()[idea]:
        module = import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert reduce(getattr, name.split("."), module)
        assert docs_check.files_away(file) <= 3


def test_readme_is_short_and_keeps_the_originals_headings():
    readme, *docs = (page.read_text(encoding="utf-8") for page in PAGES)
    assert len(readme.splitlines()) <= 200
    headings = re.findall(r"^#+ (.*)$", "\n".join([readme, *docs]), re.MULTILINE)
    assert not [name for name in ORIGINAL if name not in headings]
    hidden = [page.name for page in PAGES[1:] if f"{page.name})" not in readme and f"{page.name}#" not in readme]
    assert not hidden, "pages that nobody finds"


def test_bytes_of_llama_3_8b():
    readme = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    before, after = (docs_check.kv_cache_gigabytes(method, 32768) for method in ("bf16", "RotateKV2"))
    assert f"at 32,768 tokens takes {before:.2f} GB in bf16 and {after:.2f} GB under RotateKV2" in readme
    memory = (ROOT / "docs/memory_and_speed.md").read_text(encoding="utf-8")
    for tokens in (8192, 32768, 131072):
        before, after = (docs_check.kv_cache_gigabytes(method, tokens) for method in ("bf16", "RotateKV2"))
        assert f"| {tokens:,} tokens | {before:.2f} GB | {after:.2f} GB | {before / after:.1f} |" in memory


def test_what_the_pages_say_of_the_results():
    """The sentences around the tables: README's "Where RotateKV loses", docs/beyond.md's "What it gives"."""
    rows = {(row["protocol"], row["method"]): row for row in measured.read_results()["rows"]}
    exact, paper, ours = (rows["smollm2", name]["perplexity"] for name in ("FP16", "RotateKV2", "RotateKV2+"))
    window = rows["smollm2", "RotateKV2 --residual_length 16"]["perplexity"]
    kvquant, kivi = rows["smollm2", "KVQuant2"], rows["smollm2", "KIVI2"]
    assert 1.7 < paper / exact < 2  # nearly twice
    assert kvquant["perplexity"] < paper and kvquant["bits"] < rows["smollm2", "RotateKV2"]["bits"]
    assert kivi["perplexity"] < paper and round(kivi["bits"], 1) == 3.6
    assert 85 < (paper - exact) / (ours - exact) < 95  # a ninetieth
    assert 18.5 < (window - exact) / (ours - exact) < 21.5  # a twentieth
    for name in ("RotateKV2", "RTN2", "QuaRot2", "TurboQuant2"):
        assert rows["gemma3", name]["perplexity"] > 5 * rows["gemma3", "FP16"]["perplexity"]  # useless
    for protocol in ("smollm2", "gemma3"):
        few = [row for row in rows.values() if row["protocol"] == protocol and row["bits"] < 3]
        best = min(few, key=lambda row: row["perplexity"])["method"]
        assert best.split()[0] == "RotateKV2+"  # the least loss below 3 bits


def test_finished_runs_become_rows(tmp_path):
    config = {"task": "ppl", "model": "m", "method": "RotateKV2*", "chunk_size": 64}
    metrics = {
        "config": config,
        "n": 4,
        "metric": {"ppl": 30.0},
        "avg_bits": {"total": 2.5},
        "cache_bytes_per_token": 100.0,
        "env": {"git_commit": "0123456789"},
        "started": "2026-11-28T01:02:03+00:00",
        "argv": "PPL_evaluation.py --model m --k_bits 3 --calibration_file a/b.safetensors --limit 4 --resume",
    }
    folder = tmp_path / "ppl" / "m" / "id"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    method = "RotateKV2 --k_bits 3 --calibration_file b"
    old = {"protocol": "p", "method": method, "label": "three", "perplexity": 31.0}
    results = {"protocols": {"p": {"config": {"task": "ppl", "n": 4}}, "q": {"config": {"n": 5}}}, "rows": [old]}
    assert measured.add_runs(results, tmp_path) == 1
    (row,) = results["rows"]
    expected = {"method": method, "label": "three", "perplexity": 30.0, "commit": "0123456", "date": "2026-11-28"}
    assert {**row, **expected} == row
    page = "<!-- measured: p.perplexity p.bits; all -->\n| | ppl | bits |\n|---|---|---|\n| old | 1 | 2 |\ntext\n"
    assert measured.tables_written(page, results).splitlines()[3:] == ["| three | 30.00 | 2.500 |", "text"]
