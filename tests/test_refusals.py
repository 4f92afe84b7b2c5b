"""A refusal that says what to do instead: doing so works on the model that was refused."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text
from transformers import AutoTokenizer

import calibrate_reorder
from rotatekv import PRESETS, UserError, patch_model

PLAIN = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)


def refusal(model, config, file=None) -> str:
    with pytest.raises(UserError) as error:
        patch_model(model, config, file)
    assert "\n" not in str(error.value)
    return str(error.value)


def works(model, config, file=None) -> None:
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    with patch_model(model, config, file), torch.no_grad():
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("preset", ["QuaRot2", "TurboQuant2", "TurboQuant4", "RotateKV2", "RotateKV3+"])
def test_the_methods_named_where_heads_cannot_be_rotated(preset):
    model = tiny_model("llama", head_dim=184, num_key_value_heads=2, num_hidden_layers=1)
    named = re.findall(r"[A-Za-z]+\d", refusal(model, preset).split("--method ")[1])
    assert named == ["RTN2", "RTN3", "RTN4"]
    for name in named:
        works(model, name)


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["KIVI2"],
        PRESETS["KIVI4"],
        replace(PRESETS["RTN3"], v_groupsize=50),
        replace(PLAIN, k_groupsize=100),
        replace(PRESETS["QuaRot4"], k_groupsize=7, v_groupsize=8),
    ],
)
def test_the_group_size_named_where_one_does_not_fit(config):
    model = tiny_model("llama", head_dim=72)
    name, size = re.search(r"--([kv]_groupsize) (\d+) does", refusal(model, config)).groups()
    works(model, replace(config, **{name: int(size)}))


@pytest.mark.parametrize(
    ("preset", "changes", "kept"),
    [
        ("RotateKV2+", {"Grouped_Head_Key_Rotation": True}, {"Grouped_Head_Key_Rotation": False}),
        ("RotateKV2+", {"v_bits": 4}, {"bits": 3.0, "v_bits": 2}),
        ("RotateKV3+", {"bits": None}, {"bits": 2.0}),
        ("RotateKV2", {"Grouped_Head_Key_Rotation": False}, {"Outlier_Aware_Key_Rotation": False}),
        ("RTN2", {"bits": 2.0}, {"bits": None}),
        ("RTN2", {"sink_selection": "massive"}, {"sink_selection": "detected"}),
        ("TurboQuant2", {"k_groupsize": 8}, {"k_groupsize": None}),
    ],
)
def test_flags_that_do_not_go_together(preset, changes, kept, tmp_path, monkeypatch):
    model, file = tiny_model("llama"), None
    model.name_or_path = "tiny"
    if preset.endswith("+"):
        file = calibrated(model, ["--statistics", "plus"], tmp_path, monkeypatch)
    config = replace(PRESETS[preset], **changes)
    line = refusal(model, config, file)
    assert next(iter(kept)) in line or "both off" in line
    works(model, replace(config, **kept), file)


def calibrated(model, flags: list[str], tmp_path, monkeypatch):
    """What calibrate_reorder.py makes of this model with these flags."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_folder(tmp_path / "words"))
    (tmp_path / "text.txt").write_text(tiny_text(300))
    monkeypatch.setattr(calibrate_reorder, "load_model", lambda **_: (model, tokenizer))
    monkeypatch.setattr(calibrate_reorder, "check_presets", lambda *_: [])
    if "--output" not in flags:
        flags = [*flags, "--output", str(tmp_path / "made.safetensors")]
    calibrate_reorder.main([*flags, "--dataset", str(tmp_path / "text.txt"), "--seq_length", "100", "--overwrite"])
    return flags[flags.index("--output") + 1]


@pytest.mark.parametrize(("preset", "heads"), [("RotateKV2", 1), ("RotateKV2", 3), ("RotateKV2+", 2), ("KVQuant2", 1)])
@pytest.mark.parametrize("where", ["nowhere", "a path", "the authors' path", "of another model", "of other groups"])
def test_the_command_that_makes_a_missing_or_foreign_file(where, preset, heads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=6)
    model.name_or_path = "tiny"
    config = PRESETS[preset] if preset == "KVQuant2" else replace(PRESETS[preset], head_group_num=heads)
    kind = {"RotateKV2": "reorder", "RotateKV2+": "plus", "KVQuant2": "kvquant"}[preset]
    file = {"a path": "some/file.safetensors", "the authors' path": "some/file.pt"}.get(where)
    if where.startswith("of"):
        file = calibrated(model, ["--statistics", kind, "--head_group_num", "6"], tmp_path, monkeypatch)
        model.name_or_path = "other" if where == "of another model" else "tiny"
        (tmp_path / file).rename("of-the-first.safetensors")
        file = "of-the-first.safetensors"
        if where == "of other groups" and preset != "RotateKV2":
            return works(model, config, file)  # they rotate no groups
    line = refusal(model, config, file)
    told = shlex.split(re.search(r"calibrate_reorder\.py([^,:]*?)(?:,| and |$)", line)[1])
    assert told[told.index("--model") + 1] == model.name_or_path
    works(model, config, calibrated(model, told, tmp_path, monkeypatch))
