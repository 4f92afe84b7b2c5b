"""A run, a cache and a calibration file know the weights they are of, wherever these lie, whatever they are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_folder, tiny_model, tiny_text

import calibrate_reorder
import PPL_evaluation
import reproduce
from rotatekv import RotateKVCache, UserError, load_model, patch_model, unpatch_model
from rotatekv.evals.results import config_hash
from rotatekv.families import find_text_model
from rotatekv.models.text import known_weights, load_skeleton
from rotatekv.models.weights import calibration_digests, files_digest, weights_digest
from rotatekv.reproduce import runs as reproduce_runs

NO_REORDER = ["--Outlier_Aware_Key_Rotation", "False"]


def retrain(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    """Other weights in the same folder: one tensor is another by one part in a thousand."""
    model = tiny_model()
    model.get_parameter(name).data *= 1.001
    model.save_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = save_tiny_folder(tmp_path / "checkpoint")
    (path / "words.txt").write_text(tiny_text(64))
    return path


@pytest.fixture
def flags(checkpoint, tmp_path) -> list[str]:
    base = ["--model", checkpoint, "--dataset", checkpoint / "words.txt", "--PPL_seq_length", 32]
    return [str(part) for part in (*base, "--RTN2", "--output_dir", tmp_path / "results")]


def metrics_in(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("ppl/*/*/metrics.json"), key=os.path.getmtime)]


# ----------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
)
def test_one_changed_tensor_is_seen_in_files_and_in_memory(checkpoint, name):
    before = files_digest(checkpoint), weights_digest(tiny_model())
    retrain(checkpoint, name)
    changed = tiny_model()
    changed.get_parameter(name).data *= 1.001
    assert files_digest(checkpoint) != before[0] and weights_digest(changed) != before[1]


def test_a_digest_is_of_the_weights_and_of_nothing_else(checkpoint, tmp_path):
    digest = files_digest(checkpoint)
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    (moved / "optimizer.pt").write_bytes(b"x" * 99)
    (moved / "training_args.bin").write_bytes(b"y")
    os.utime(moved / "model.safetensors", (1, 1))
    assert files_digest(moved) == digest == files_digest(moved / ".")
    assert known_weights(load_model(str(checkpoint))[0]) == known_weights(load_skeleton(str(checkpoint))) == digest
    assert files_digest(tmp_path) is None and files_digest(tmp_path / "nowhere") is None


def test_shards_and_pickles_have_digests_and_damage_is_no_crash(checkpoint, tmp_path):
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    digests = {files_digest(tmp_path / "shards")}
    assert len(shards) > 1 and None not in digests
    data = bytearray(shards[-1].read_bytes())
    data[-1] ^= 1
    shards[-1].write_bytes(data)
    digests.add(files_digest(tmp_path / "shards"))
    shards[-1].unlink()
    assert len(digests) == 2 and files_digest(tmp_path / "shards") is None
    (tmp_path / "pickle").mkdir()
    for content in (b"", b"a" * 5000, b"a" * 2500 + b"b" * 2500):
        (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(content)
        digests.add(files_digest(tmp_path / "pickle"))
    for content in (b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}"):
        (checkpoint / "model.safetensors").write_bytes(content)
        digests.add(files_digest(checkpoint))
    assert len(digests) == 9 and None not in digests


def test_parameters_are_the_same_in_every_dtype_that_can_tell():
    text_model = find_text_model(tiny_model())
    both = calibration_digests(text_model)
    assert set(both) == {"weights_bfloat16", "weights_float16"}
    for dtype in ("bfloat16", "float16"):
        loaded = find_text_model(tiny_model().to(getattr(torch, dtype)))
        assert calibration_digests(loaded) == {f"weights_{dtype}": both[f"weights_{dtype}"]}
    assert calibration_digests(tiny_model().to("meta")) == {} and weights_digest(tiny_model().to("meta")) is None
    packed = tiny_model()
    packed.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert calibration_digests(packed) == {}


# -------------------------------------------------------------------------------------------------------------- runs


def test_weights_exchanged_in_place_are_another_run(checkpoint, flags, tmp_path):
    PPL_evaluation.main([*flags, "--limit", "1"])
    retrain(checkpoint)
    PPL_evaluation.main([*flags, "--resume"])  # a new run, with no sample of the old model's
    old, new = metrics_in(tmp_path / "results")
    assert old["config"]["weights"] != new["config"]["weights"] and new["n"] == 2
    PPL_evaluation.main([*flags[:-1], str(tmp_path / "fresh")])
    (fresh,) = metrics_in(tmp_path / "fresh")
    assert fresh["metric"] == new["metric"] and fresh["config"] == new["config"]


@pytest.fixture
def started(monkeypatch):
    """The commands that reproduce.py starts; they run in this process."""
    commands = []

    def start(command, log):
        commands.append(list(command))
        {"PPL_evaluation.py": PPL_evaluation, "calibrate_reorder.py": calibrate_reorder}[command[0]].main(command[1:])
        return ""

    monkeypatch.setattr(reproduce_runs, "_start", start)
    monkeypatch.setattr(reproduce_runs.Runs, "skeleton", staticmethod(load_skeleton))  # uncached: weights change here
    return commands


def test_reproduce_runs_and_calibrates_anew_for_exchanged_weights(checkpoint, flags, tmp_path, started, capsys):
    table = ["--models", *flags[1:6], "--output_dir", tmp_path / "results", "--methods", "RotateKV2", "--limit", 1]
    table = [str(part) for part in table]
    reproduce.main(table)
    assert [command[0] for command in started] == ["calibrate_reorder.py", "PPL_evaluation.py", "PPL_evaluation.py"]
    reproduce.main(table)
    assert len(started) == 3
    retrain(checkpoint)
    reproduce.main(table)
    assert [command[0] for command in started[3:]] == ["calibrate_reorder.py", *["PPL_evaluation.py"] * 2]
    views = [metrics["config"]["weights"] for metrics in metrics_in(tmp_path / "results")]
    assert views == [views[0]] * 2 + [files_digest(checkpoint)] * 2 and views[0] != views[-1]


def test_a_run_that_did_not_note_its_weights_is_found_and_named(flags, tmp_path, started, capsys):
    table = ["--models", *flags[1:6], "--output_dir", str(tmp_path / "results"), "--methods", "RTN2"]
    reproduce.main(table)
    for path in (tmp_path / "results").glob("ppl/*/*/metrics.json"):  # as an older version left it
        metrics = json.loads(path.read_text())
        del metrics["config"]["weights"]
        old = path.parents[1] / config_hash(metrics["config"])
        path.parent.rename(old)
        (old / "metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    reproduce.main(table)
    assert len(started) == 2, "a finished run was started again"
    assert capsys.readouterr().err.count("done, of an older version, which did not note the weights") == 2
    assert "did not note the weights" in (tmp_path / "results" / "tables" / "ppl.md").read_text()


# ------------------------------------------------------------------------------------- calibration files and caches


@pytest.mark.parametrize("method", ["RotateKV2", "KVQuant2", "RotateKV2+"])
def test_a_calibration_file_of_other_weights_is_refused(checkpoint, tmp_path, method):
    statistics = {"RotateKV2": "reorder", "KVQuant2": "kvquant", "RotateKV2+": "plus"}[method]
    path = tmp_path / "made.safetensors"
    more = ["--dataset", checkpoint / "words.txt", "--statistics", statistics, "--output", path]
    calibrate_reorder.main([str(part) for part in ("--model", checkpoint, *more)])
    for dtype in ("float32", "bfloat16", "float16"):
        model, _ = load_model(str(checkpoint), dtype=dtype)
        with patch_model(model, method, path):
            pass
    retrain(checkpoint)
    model, _ = load_model(str(checkpoint))
    with pytest.raises(UserError, match=r"made from other weights than .*calibrate_reorder\.py.*--overwrite") as caught:
        patch_model(model, method, path)
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_model_of_the_same_shape_is_refused():
    ids = torch.arange(3, 20)[None]
    model, other = tiny_model(), tiny_model()
    other.model.layers[1].self_attn.k_proj.weight.data *= 1.001
    patch_model(model, "RTN2")
    cache = RotateKVCache.for_model(model)
    patch_model(other, "RTN2")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(UserError, match="another config, model or calibration"):
            other(ids, past_key_values=cache)
        unpatch_model(model)
        patch_model(model, "RTN2")  # the same weights again
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
