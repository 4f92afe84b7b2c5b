"""Flags and what becomes of them; every mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from conftest import save_tiny_folder, tiny_text

import PPL_evaluation
from rotatekv import PRESETS, QuantConfig, UserError
from rotatekv.cli import (
    add_method_arguments,
    add_model_arguments,
    add_run_arguments,
    add_switch,
    make_parser,
    method_from_args,
    model_flags,
)
from rotatekv.scripts import exit_on_user_error


def parse(*flags: str):
    parser = make_parser("all shared flags")
    add_model_arguments(parser)
    add_method_arguments(parser)
    add_run_arguments(parser, "windows")
    return parser.parse_args([str(flag) for flag in flags])


def method(*flags: str) -> tuple[str, QuantConfig]:
    return method_from_args(parse(*flags))


# --- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], False),
        (["--x"], True),
        (["--x", "True"], True),
        (["--x", "False"], False),
        (["--x=False"], False),
        (["--x", "true"], True),
        (["--x", "false"], False),
        (["--x", "1"], True),
        (["--x", "0"], False),
        (["--x", "False", "--x"], True),
        (["--x", "--x", "False"], False),
    ],
)
def test_switches_take_nothing_true_or_false(flags, expected):
    parser = make_parser("switch")
    add_switch(parser, "x", "a switch")
    assert parser.parse_args(flags).x is expected


@pytest.mark.parametrize("value", ["maybe", "2", "None", "", "Truee"])
def test_switches_refuse_anything_else(value):
    parser = make_parser("switch")
    add_switch(parser, "x", "a switch")
    with pytest.raises(UserError, match=r"--x.*True or False"):
        parser.parse_args(["--x", value])


def test_default_method_is_rotatekv2():
    assert method() == ("RotateKV2", PRESETS["RotateKV2"])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", [["--method", "{}"], ["--{}"], ["--{}", "True"]])
def test_every_preset_by_name_and_by_legacy_switch(name, form):
    assert method(*[part.format(name) for part in form]) == (name, PRESETS[name])


def test_a_legacy_switch_set_to_false_chooses_nothing():
    assert method("--FP16", "False")[0] == "RotateKV2"
    assert method("--RTN2", "True", "--FP16", "False") == ("RTN2", PRESETS["RTN2"])
    assert method("--method", "RTN3", "--RotateKV2", "False")[0] == "RTN3"


def test_the_same_method_twice_is_no_contradiction():
    assert method("--method", "RTN2", "--RTN2")[0] == "RTN2"


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--RTN2", "--FP16"], ["RTN2", "FP16"]),
        (["--method", "RTN4", "--RotateKV2", "True"], ["RTN4", "RotateKV2"]),
        (["--RTN2", "--RTN3", "--RTN4"], ["RTN2", "RTN3", "RTN4"]),
    ],
)
def test_two_methods_at_once_are_refused_by_name(flags, names):
    with pytest.raises(UserError, match="two methods") as caught:
        method(*flags)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("k_bits", "3", 3),
        ("v_bits", "4", 4),
        ("k_groupsize", "16", 16),
        ("v_groupsize", "8", 8),
        ("k_clip_ratio", "0.5", 0.5),
        ("v_clip_ratio", "0.7", 0.7),
        ("head_group_num", "1", 1),
        ("Outlier_Aware_Key_Rotation", "False", False),
        ("Attention_Sink_Aware", "False", False),
        ("Grouped_Head_Key_Rotation", "False", False),
        ("quantize_prefill", "False", False),
        ("num_sink_entries", "5", 5),
        ("residual_length", "32", 32),
        ("bits", "2.5", 2.5),
        ("sink_selection", "first", "first"),
    ],
)
def test_a_flag_overrides_the_preset_and_nothing_else(flag, value, expected):
    name, config = method("--method", "RotateKV2", f"--{flag}", value)
    assert (name, config) == ("RotateKV2*", replace(PRESETS["RotateKV2"], **{flag: expected}))


def test_every_field_of_the_config_has_a_flag():
    given = vars(parse())
    assert {field.name for field in fields(QuantConfig)} <= set(given)


def test_an_override_with_the_presets_own_value_keeps_its_plain_name():
    assert method("--RotateKV2", "--k_bits", "2", "--Attention_Sink_Aware")[0] == "RotateKV2"


def test_a_preset_can_be_switched_on_as_well_as_off():
    assert method("--RTN2", "--Attention_Sink_Aware")[1] == replace(PRESETS["RTN2"], Attention_Sink_Aware=True)


def test_model_flags_are_what_load_model_takes():
    assert model_flags(parse("--model", "a", "--dtype", "float16", "--device", "cpu")) == {
        "name": "a",
        "dtype": "float16",
        "device": "cpu",
        "device_map": None,
        "attn_implementation": "sdpa",
    }


def test_run_flags_have_the_documented_defaults():
    args = parse()
    found = {name: getattr(args, name) for name in ("seed", "limit", "output_dir", "resume", "overwrite", "data_dir")}
    expected = {
        "seed": 0,
        "limit": None,
        "output_dir": "results",
        "resume": False,
        "overwrite": False,
        "data_dir": None,
    }
    assert found == expected


@pytest.mark.parametrize("flag", ["--k_bit", "--meth", "--Rotate", "--out", "--res", "--mod"])
def test_flags_are_not_abbreviated(flag):
    with pytest.raises(UserError, match=f"unrecognized arguments: {flag}"):
        parse(flag, "2")


def test_help_lists_every_preset(capsys):
    with pytest.raises(SystemExit) as ended:
        PPL_evaluation.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in shown for name in PRESETS)
    assert "--k_bits N" in shown and "--k_clip_ratio X" in shown and "--data_dir DIR" in shown


# --- how a mistake ends --------------------------------------------------------------------------------------------


def test_a_user_error_is_one_line_and_status_2(capsys):
    @exit_on_user_error
    def main(argv):
        raise UserError("what is wrong:\n  how to\tfix it")

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: what is wrong: how to fix it\n")


def test_another_error_keeps_its_traceback():
    @exit_on_user_error
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main([])


def test_ctrl_c_ends_with_130_and_names_resume(capsys):
    @exit_on_user_error
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 130 and "--resume" in capsys.readouterr().err


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """Paths of models (``order``: head_dim 184), texts and an empty folder."""
    root = tmp_path_factory.mktemp("cli")
    texts = {"text": tiny_text(100), "short": tiny_text(7), "empty": "", "blank": " \n\n"}
    paths = {name: root / f"{name}.txt" for name in texts}
    for name, content in texts.items():
        paths[name].write_text(content, encoding="utf-8")
    (root / "nothing").mkdir()
    scaled = {"rope_theta": 10000.0, "factor": 2.0}
    models = {
        "model": save_tiny_folder(root / "tiny-llama"),
        "dynamic": save_tiny_folder(root / "dynamic", rope_parameters={"rope_type": "dynamic", **scaled}),
        "order": save_tiny_folder(root / "order", head_dim=184, num_key_value_heads=2),
    }
    return SimpleNamespace(**paths, **models, root=root, nothing=root / "nothing")


def fail(capfd, at, *flags) -> str:
    """Run the perplexity script with good flags, then ``flags``; its one error line."""
    base = ["--model", at.model, "--dataset", at.text, "--PPL_seq_length", 32, "--output_dir", at.root / "results"]
    with pytest.raises(SystemExit) as ended:
        PPL_evaluation.main([str(flag) for flag in [*base, "--Outlier_Aware_Key_Rotation", "False", *flags]])
    errors = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in errors
    # Progress bars of transformers and tqdm end in \r; anything else on stderr must be our one line.
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "it/s]" not in line]
    lines = [line for line in lines if "?it/s" not in line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "RotateKV5"], "unknown method 'RotateKV5': choose one of FP16, "),
        (["--RTN2", "--FP16"], "two methods at once: FP16 and RTN2"),
        (["--k_bits", "5"], "k_bits must be 2, 3 or 4, not 5"),
        (["--v_bits", "1"], "v_bits must be 2, 3 or 4, not 1"),
        (["--k_bits", "two"], "--k_bits"),
        (["--k_clip_ratio", "1.5"], "k_clip_ratio must lie in (0, 1], not 1.5"),
        (["--v_clip_ratio", "0"], "v_clip_ratio must lie in (0, 1]"),
        (["--k_clip_ratio", "nan"], "k_clip_ratio must lie in (0, 1]"),
        (["--k_groupsize", "0"], "k_groupsize must be at least 1"),
        (["--head_group_num", "0"], "head_group_num must be at least 1"),
        (["--num_sink_entries", "0"], "--Attention_Sink_Aware False"),
        (["--sink_selection", "last"], "sink_selection must be one of detected, first, massive, not 'last'"),
        (["--residual_length", "-1"], "residual_length must be 0 or more"),
        (["--PPL_seq_length", "1"], "--PPL_seq_length must be at least 2"),
        (["--PPL_seq_length", "-5"], "--PPL_seq_length must be at least 2"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
        (["--limit", "-3"], "--limit must be at least 1, not -3"),
        (["--limit", "many"], "--limit"),
        (["--chunk_size", "0"], "--chunk_size must be at least 1"),
        (["--FP16", "maybe"], "expected True or False, not 'maybe'"),
        (["--dtype", "int8"], "--dtype"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_flags(at, capfd, flags, words):
    assert words in fail(capfd, at, *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--k_groupsize", "7"], "k_groupsize 7 does not divide the 48 key channels"),
        (["--v_groupsize", "48"], "v_groupsize 48 does not divide head_dim 16"),
        (["--Grouped_Head_Key_Rotation", "False", "--Outlier_Aware_Key_Rotation", "True"], "switch both off"),
        (["--Outlier_Aware_Key_Rotation", "True"], "no reorder indices for"),
        (["--Outlier_Aware_Key_Rotation", "True", "--calibration_file", "none.safetensors"], "none.safetensors"),
        (["--resume", "--overwrite"], "not both"),
        (["--device", "cuda:77"], "--device cpu"),
        (["--device", "toaster"], "--device cpu"),
        (["--device", "cpu", "--device_map", "auto"], "not both"),
        (["--attn_implementation", "flash_attention_2"], "--attn_implementation sdpa"),
        (["--attn_implementation", "magic"], "magic"),
    ],
)
def test_flags_that_do_not_fit_the_model_or_each_other(at, capfd, flags, words):
    assert words in fail(capfd, at, *flags)


def test_unknown_model_lists_the_known_names(at, capfd):
    line = fail(capfd, at, "--model", "no-such-model")
    assert "no-such-model" in line and "smollm2-135m" in line and "llama2_7b_80K" in line


def test_a_gated_model_names_the_token(at, capfd, monkeypatch):
    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it\n401 Client Error.")

    monkeypatch.setattr("rotatekv.models.text.AutoTokenizer.from_pretrained", gated)
    assert "HF_TOKEN" in fail(capfd, at, "--model", "llama3_8b")


@pytest.mark.parametrize("version", ["4.57.1", "5.15.1", "6.0.0"])
def test_an_unsupported_transformers_is_named(at, capfd, monkeypatch, version):
    monkeypatch.setattr("rotatekv.compat.transformers.__version__", version)
    line = fail(capfd, at)
    assert f"transformers {version} is not supported" in line and "pip install" in line


def test_a_folder_that_holds_no_model(at, capfd):
    assert "nothing" in fail(capfd, at, "--model", at.nothing)


def test_a_head_group_without_a_hadamard_order(at, capfd):
    line = fail(capfd, at, "--model", at.order)
    assert "Hadamard matrix of order 184" in line and "--method RTN2" in line


def test_a_model_whose_rope_changes_with_the_length(at, capfd):
    assert "RoPE type 'dynamic' is not supported" in fail(capfd, at, "--model", at.dynamic)


@pytest.mark.parametrize("name", ["empty", "blank"])
def test_an_empty_text(at, capfd, name):
    assert "is empty" in fail(capfd, at, "--dataset", getattr(at, name))


def test_a_missing_text(at, capfd):
    assert "no text file" in fail(capfd, at, "--dataset", at.root / "missing.txt")
    assert "choose wikitext2, essays" in fail(capfd, at, "--dataset", "wikitext1")


def test_a_missing_data_folder(at, capfd):
    assert "wiki.test.raw" in fail(capfd, at, "--dataset", "wikitext2", "--data_dir", at.root / "missing")


def test_no_network_and_no_data_dir(at, capfd, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "--data_dir" in fail(capfd, at, "--dataset", "wikitext2")


def test_a_text_shorter_than_one_window_names_a_length_that_works(at, capfd):
    assert "short.txt has 7 tokens, less than one window: pass --PPL_seq_length 7 or less" in fail(
        capfd, at, "--dataset", at.short
    )


def test_an_unwritable_output_folder(at, capfd):
    assert "choose another --output_dir" in fail(capfd, at, "--output_dir", at.text / "below")
    assert "choose another --output_dir" in fail(capfd, at, "--output_dir", at.text)


def test_limit_is_no_part_of_the_run_id_and_metrics_hold_the_contract(at, tmp_path):
    base = ["--model", at.model, "--dataset", at.text, "--PPL_seq_length", 32, "--RTN2", "--output_dir", tmp_path]
    base = [str(flag) for flag in base]
    PPL_evaluation.main([*base, "--limit", "1"])
    (path,) = tmp_path.glob("ppl/tiny-llama/*/metrics.json")
    assert json.loads(path.read_text())["partial"] is True
    PPL_evaluation.main([*base, "--resume"])
    assert [path] == list(tmp_path.glob("ppl/*/*/metrics.json"))
    metrics = json.loads(path.read_text())
    assert set(metrics) == {
        "schema",
        "task",
        "metric",
        "n",
        "partial",
        "config",
        "avg_bits",
        "cache_bytes_per_token",
        "env",
        "model",
        "dataset",
        "seed",
        "started",
        "seconds",
        "argv",
    }
    assert metrics["partial"] is False and metrics["n"] == 3 and metrics["schema"] == 1
    assert set(metrics["avg_bits"]) == {"k", "v", "total"} and set(metrics["metric"]) == {"ppl"}
    assert set(metrics["model"]) == {"id", "revision"} and set(metrics["dataset"]) == {"id", "sha256"}


def test_an_existing_run_is_refused_and_its_files_kept(at, tmp_path, capfd):
    flags = ["--RTN2", "--output_dir", tmp_path]
    base = ["--model", at.model, "--dataset", at.text, "--PPL_seq_length", 32, "--Outlier_Aware_Key_Rotation", "False"]
    PPL_evaluation.main([str(flag) for flag in [*base, *flags]])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert "--resume goes on with it, --overwrite starts anew" in fail(capfd, at, *flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
