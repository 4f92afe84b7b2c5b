"""Reorder indices: computed as a naive version does, written atomically, and every bad file one clear line."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import save_reorder_indices, save_tiny_folder, tiny_model, tiny_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import calibrate_reorder
from rotatekv import UserError, load_model, patch_model
from rotatekv import statistics as statistics_module
from rotatekv.calibration.reorder import collect_key_sums, indices_from_key_sums
from rotatekv.families import find_text_model
from rotatekv.statistics import load_reorder_indices, model_slug

LAYERS, CHANNELS, GROUP = 2, 48, 3
METADATA = {
    "model": "org/Tiny",
    "revision": "none",
    "head_group_num": GROUP,
    "order": 48,
    "dataset": "words",
    "dataset_sha256": "0" * 64,
    "tokens": 128,
}


def random_indices(layers: int = LAYERS, channels: int = CHANNELS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(channels, generator=generator) for _ in range(layers)])


def load(path, **changes):
    asked = {"model_id": "org/Tiny", "num_layers": LAYERS, "channels": CHANNELS, "head_group_num": GROUP}
    return load_reorder_indices(**{**asked, **changes}, path=path)


def refused(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **changes)
    line = str(caught.value)
    assert line and "\n" not in line and str(path) in line
    return line


@pytest.fixture
def good_file(tmp_path):
    return save_reorder_indices(tmp_path / "tiny.safetensors", random_indices(), METADATA)


def independent_hadamard_48() -> np.ndarray:
    """Paley's matrix of order 12 ⊗ Sylvester's of order 4, from Legendre symbols and bit parities."""
    paley = np.ones((12, 12))
    for i in range(11):
        paley[i + 1] = [-1] + [1 if i == j or pow((j - i) % 11, 5, 11) == 1 else -1 for j in range(11)]
    sylvester = np.array([[(-1) ** bin(i & j).count("1") for j in range(4)] for i in range(4)])
    return np.kron(paley, sylvester) / np.sqrt(48)


def naive_rotated_sums(model, batches, key_module: str) -> np.ndarray:
    """Keep every pre-RoPE key, rotate each one, then sum."""
    kept = [[] for _ in range(LAYERS)]

    def keep(layer):
        def hook(module, args, output):
            kept[layer].append(output.detach().double().reshape(-1, CHANNELS).numpy())

        return hook

    hooks = [
        getattr(layer.self_attn, key_module).register_forward_hook(keep(number))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return np.stack([(np.concatenate(keys) @ independent_hadamard_48().T).sum(0) for keys in kept])


@pytest.mark.parametrize("family, key_module", [("llama", "k_proj"), ("qwen2", "k_proj"), ("qwen3", "k_norm")])
def test_indices_equal_the_argsort_of_all_rotated_keys(family, key_module):
    model = tiny_model(family)
    windows = list(torch.randint(3, 128, (3, 1, 20), generator=torch.Generator().manual_seed(1)))
    sums = collect_key_sums(model, find_text_model(model), windows)
    assert sums.shape == (LAYERS, CHANNELS) and sums.dtype == torch.float64
    expected = naive_rotated_sums(model, windows, key_module)
    np.testing.assert_array_equal(indices_from_key_sums(sums, CHANNELS).numpy(), np.argsort(expected, axis=-1))


def test_indices_of_two_groups_rotate_each_group_alone():
    sums = torch.randn(1, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = independent_hadamard_48()
    rotated = np.concatenate([matrix @ sums[0, :48].numpy(), matrix @ sums[0, 48:].numpy()])
    np.testing.assert_array_equal(indices_from_key_sums(sums, 48)[0].numpy(), np.argsort(rotated))


def test_equal_sums_keep_the_channel_order():
    assert indices_from_key_sums(torch.zeros(2, 16), 16).tolist() == [list(range(16))] * 2


def test_two_streamed_windows_equal_one_pass_over_both(tiny):
    windows = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    text_model = find_text_model(tiny)
    streamed = collect_key_sums(tiny, text_model, (windows[row : row + 1] for row in range(2)))
    at_once = collect_key_sums(tiny, text_model, [windows])
    torch.testing.assert_close(streamed, at_once, rtol=1e-5, atol=1e-4)
    first = collect_key_sums(tiny, text_model, [windows[:1]])
    assert (streamed - first).abs().max() > 0.1


def test_collecting_leaves_no_hook_behind_even_after_an_error(tiny):
    def failing_windows():
        yield torch.tensor([[3, 4, 5]])
        raise KeyError("the text broke off")

    with pytest.raises(KeyError):
        collect_key_sums(tiny, find_text_model(tiny), failing_windows())
    assert not any(layer.self_attn._forward_pre_hooks for layer in tiny.model.layers)


def test_collecting_from_no_window_is_a_user_error(tiny):
    with pytest.raises(UserError, match="no window"):
        collect_key_sums(tiny, find_text_model(tiny), [])


def test_saved_indices_and_metadata_come_back(good_file):
    found = load(good_file)
    assert torch.equal(found.indices, random_indices()) and found.indices.dtype == torch.int64
    assert {key: found.metadata[key] for key in METADATA} == {key: str(value) for key, value in METADATA.items()}
    assert found.metadata["format"] == "1" and len(found.metadata["date"]) == 10
    assert os.listdir(good_file.parent) == [good_file.name]


def test_saving_makes_missing_folders(tmp_path):
    path = save_reorder_indices(tmp_path / "a" / "b" / "tiny.safetensors", random_indices(), METADATA)
    assert torch.equal(load(path).indices, random_indices())


@pytest.fixture
def failed_save(good_file, monkeypatch):
    before = good_file.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="make room") as caught:
            save_reorder_indices(good_file, random_indices().flip(-1), METADATA)
    assert "\n" not in str(caught.value)
    return good_file, before


def test_a_failing_write_keeps_the_old_file(failed_save):
    path, before = failed_save
    assert path.read_bytes() == before


def test_a_failing_write_leaves_no_temporary_file(failed_save):
    path, _ = failed_save
    assert os.listdir(path.parent) == [path.name]


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output") as caught:
        save_reorder_indices(tmp_path / "file" / "tiny.safetensors", random_indices(), METADATA)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_command(tmp_path):
    path = tmp_path / "none.safetensors"
    made = f"calibrate_reorder.py --model {METADATA['model']} --head_group_num 3 --output {path}"
    assert f"no calibration file {path}: make it with {made}" in refused(path)


def test_a_folder_is_refused(tmp_path):
    refused(tmp_path)


def test_a_model_without_indices_names_the_three_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_module, "INDEX_FOLDERS", (tmp_path,))
    with pytest.raises(UserError, match=r"calibrate_reorder.py.*--calibration_file.*Outlier_Aware") as caught:
        load(None)
    assert "\n" not in str(caught.value)


def test_without_a_path_the_first_folder_with_the_models_name_counts(tmp_path, monkeypatch):
    folders = tuple(tmp_path / name for name in ("none", "first", "second"))
    save_reorder_indices(folders[1] / "tiny.safetensors", random_indices(), METADATA)
    save_reorder_indices(folders[2] / "tiny.safetensors", random_indices().flip(-1), METADATA)
    monkeypatch.setattr(statistics_module, "INDEX_FOLDERS", folders)
    assert torch.equal(load(None, model_id="org/Tiny").indices, random_indices())


@pytest.mark.parametrize("left", [0, 1, 7, 8, 60, -300, -1])
def test_a_truncated_file_is_refused(good_file, left):
    good_file.write_bytes(good_file.read_bytes()[:left])
    assert "calibrate_reorder.py" in refused(good_file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "2"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    save_file({"indices": random_indices().int()}, path, metadata=metadata)
    assert "format 1" in refused(path)


def test_a_file_without_the_indices_tensor_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path, metadata={"format": "1"})
    assert "format 1" in refused(path)


@pytest.mark.parametrize("content", [b"hello, this is no safetensors file", b"\x00" * 100, b"\xff" * 100])
def test_bytes_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content)
    refused(path)


def test_indices_of_floats_are_refused(tmp_path):
    path = tmp_path / "floats.safetensors"
    save_file({"indices": random_indices().float() + 0.25}, path, metadata={"format": "1"})
    refused(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_id": "org/other"}, "made for org/Tiny, not for org/other"),
        ({"num_layers": 3}, r"(3, 48)"),
        ({"channels": 96}, r"(2, 96)"),
        ({"head_group_num": 1}, "groups of 3 heads, not 1"),
    ],
)
def test_a_file_for_another_model_shape_or_group_is_refused(good_file, changes, words):
    assert words in refused(good_file, **changes)


@pytest.mark.parametrize("position, value", [(0, None), (7, -1), (3, CHANNELS)])
def test_a_row_that_is_no_permutation_is_named(tmp_path, position, value):
    indices = random_indices()
    indices[1, position] = indices[1, position - 1] if value is None else value
    path = save_reorder_indices(tmp_path / "bad.safetensors", indices, METADATA)
    assert "row 1 is not a permutation" in refused(path)


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "lists", "dict", "named"])
def test_authors_tables_load(tmp_path, kind):
    rows = random_indices(12)
    content = {
        "tensor": rows,
        "list": list(rows),
        "tuple": tuple(rows),
        "lists": rows.tolist(),
        "dict": {number: rows[number] for number in reversed(range(12))},
        "named": {f"layer_{number}": rows[number] for number in reversed(range(12))},
    }[kind]
    torch.save(content, tmp_path / "authors.pt")
    found = load(tmp_path / "authors.pt", num_layers=12)
    assert torch.equal(found.indices, rows) and found.metadata == {}


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    save([RunsCode(tmp_path / "was_run")], tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", random_indices().float(), torch.arange(48), [], {}, "text", {"a": "b"}, [1, [2]]]
)
def test_a_pt_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "calibrate_reorder.py" in refused(path)


def test_a_truncated_pt_file_is_refused(tmp_path):
    path = tmp_path / "authors.pt"
    torch.save(random_indices(), path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path)


def test_an_authors_table_of_another_shape_or_no_permutation_is_refused(tmp_path):
    path = tmp_path / "authors.pt"
    torch.save(random_indices(), path)
    assert "(3, 48)" in refused(path, num_layers=3)
    torch.save(torch.zeros(LAYERS, CHANNELS, dtype=torch.int64), path)
    assert "row 0 is not a permutation" in refused(path)


@pytest.mark.parametrize(
    "model_id, slug",
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b-hf"),
        ("smollm2-135m", "smollm2-135m"),
        ("/models/My Model (v2)/", "my-model-v2-"),
        ("a/b/Qwen2.5_0.5B", "qwen2.5_0.5b"),
        ("/", "model"),
        ("", "model"),
    ],
)
def test_model_slug(model_id, slug):
    assert model_slug(model_id) == slug


@pytest.mark.parametrize("model_id", [".", "..", "./", "../"])
def test_model_slug_is_never_a_step_in_the_file_tree(model_id):
    assert model_slug(model_id) not in (".", "..")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("calibration") / "tiny-llama")


@pytest.fixture
def words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(tiny_text(100), encoding="utf-8")
    return path


def test_calibrate_command_makes_a_file_that_patches_the_model(tiny_folder, words_file, tmp_path, capsys):
    output = tmp_path / "out" / "mine.safetensors"
    flags = ["--model", tiny_folder, "--dataset", words_file, "--seq_length", 16, "--calibration_tokens", 70]
    calibrate_reorder.main([str(part) for part in (*flags, "--output", output)])
    assert f"{output}: 2 layers × 48 channels, 3 heads per group" in capsys.readouterr().out

    model, tokenizer = load_model(str(tiny_folder))
    ids = tokenizer(words_file.read_text(), return_tensors="pt").input_ids
    expected = naive_rotated_sums(model, ids[:, :64].split(16, dim=1), "k_proj")
    assert load_file(output)["indices"].tolist() == np.argsort(expected, axis=-1).tolist()
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tokens"] == "64" and metadata["head_group_num"] == "3" and metadata["order"] == "48"
    assert metadata["dataset"] == "words.txt" and metadata["model"] == str(tiny_folder)

    with patch_model(model, "RotateKV2", output) as handle, torch.no_grad():
        assert handle.spec.methods[1].order.tolist() == np.argsort(expected[1]).tolist()
        assert torch.isfinite(model(input_ids=ids[:, :20]).logits).all()


def test_calibrate_command_finds_its_default_place_again(tiny_folder, words_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibrate_reorder.main(["--model", str(tiny_folder), "--dataset", str(words_file), "--seq_length", "16"])
    assert os.listdir(tmp_path / "reorder_indices") == ["tiny-llama.safetensors"]
    with patch_model(load_model(str(tiny_folder))[0], "RotateKV2"):
        pass


def test_the_authors_flag_of_the_perplexity_script_is_the_same_command(tiny_folder, words_file, tmp_path):
    import PPL_evaluation

    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    flags = ["--model", str(tiny_folder), "--dataset", str(words_file)]
    calibrate_reorder.main([*flags, "--output", str(ours)])
    PPL_evaluation.main([*flags, "--generate_for_calibration", "True", "--calibration_file", str(theirs)])
    assert load_file(ours)["indices"].tolist() == load_file(theirs)["indices"].tolist()


def test_a_text_without_tokens_is_one_line(tiny_folder, words_file, monkeypatch, capsys):
    monkeypatch.setattr(calibrate_reorder, "tokenize", lambda *args: torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(SystemExit) as ended:
        calibrate_reorder.main(["--model", str(tiny_folder), "--dataset", str(words_file)])
    assert ended.value.code == 2 and "no tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--calibration_tokens", "0"], "--calibration_tokens must be at least 1"),
        (["--seq_length", "-1"], "--seq_length must be at least 1"),
        (["--head_group_num", "0"], "head_group_num must be at least 1"),
        (["--dataset", "missing.txt"], "no text file missing.txt"),
    ],
)
def test_wrong_flags_of_the_calibrate_command(tiny_folder, words_file, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        calibrate_reorder.main(["--model", str(tiny_folder), "--dataset", str(words_file), *flags])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith("error:") and errors.count("\n") == 1 and words in errors


def test_shipped_indices_fit_the_embedded_model():
    path = statistics_module._ROOT / "reorder_indices" / "smollm2-135m.safetensors"
    found = load_reorder_indices("smollm2-135m", 30, 192, 3, path)
    assert found.indices.shape == (30, 192)
    for row in found.indices.tolist():
        assert sorted(row) == list(range(192))
    assert found.metadata["head_group_num"] == "3" and found.metadata["order"] == "192"
    assert found.metadata["dataset"].startswith("essays/") and len(found.metadata["dataset_sha256"]) == 64
    assert json.loads(found.metadata["tokens"]) > 1000
    assert len({tuple(row) for row in found.indices.tolist()}) == 30
