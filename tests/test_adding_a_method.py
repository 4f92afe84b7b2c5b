"""docs/adding_a_method.md: its codec, saved in the folder of methods, is found, generates, takes the bits it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import rotatekv.methods
from rotatekv import PRESETS
from rotatekv.methods import METHODS

PAGE = (Path(__file__).resolve().parent.parent / "docs/adding_a_method.md").read_text(encoding="utf-8")
METHOD, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HEADS, DIM, PROMPT, NEW = 3, 16, 20, 8


@pytest.fixture
def methods_folder(tmp_path, monkeypatch):
    """A folder that counts as part of rotatekv/methods/."""
    monkeypatch.setattr(rotatekv.methods, "__path__", [*rotatekv.methods.__path__, str(tmp_path)])
    yield tmp_path
    METHODS.pop("int8_values", None)
    PRESETS.pop("INT8V", None)
    sys.modules.pop("rotatekv.methods.int8_values", None)


def test_the_page_s_method_is_found_generates_and_takes_the_bits_it_says(methods_folder):
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 25
    (methods_folder / "int8_values.py").write_text(METHOD, encoding="utf-8")
    rotatekv.methods.find_methods()
    with pytest.raises(ValueError, match="int8_values, INT8V is registered already"):
        exec(METHOD)
    model, input_ids = tiny_model(), torch.arange(8, 8 + PROMPT)[None]
    stock = model(input_ids).logits
    named = {"model": model, "input_ids": input_ids}
    exec(USE, named)
    stored = PROMPT + NEW - 1
    assert named["tokens"].shape == (1, PROMPT + NEW) and named["cache"].get_seq_length() == stored
    assert named["bits"]["k"] == 32 and named["bits"]["v"] == 8 + 16 / DIM  # the tiny model is in float32
    layers = 2 * stored * HEADS * (4 * DIM + DIM + 2)
    assert named["size"] == layers + 4 * stored  # and the positions
    error = (model(input_ids).logits - stock).norm() / stock.norm()
    assert 0 < error < 0.025  # 0.018; with 7 bits 0.028
