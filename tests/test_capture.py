"""Captures against a direct forward of the model, and what their files refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import save_reorder_indices, save_tiny_folder, tiny_model, tiny_text
from safetensors.torch import load_file, save_file

import PPL_evaluation
from rotatekv import QuantConfig, patch_model
from rotatekv.capture import flags as capture_flags
from rotatekv.capture.files import CaptureInfo, read_capture, write_capture
from rotatekv.capture.hooks import KINDS, CaptureRequest, capture_bytes, capture_window, relative_error
from rotatekv.config import PRESETS
from rotatekv.errors import UserError
from rotatekv.families import find_text_model
from rotatekv.patching.patch import build_methods

TOKENS = 40
NO_ORDER = ("--Outlier_Aware_Key_Rotation", "False")
PLAIN = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False)


def capture(model, *kinds: str, layers=(0, 1), heads=(0, 3, 5), window=None, **options):
    text_model = find_text_model(model)
    window = (
        torch.randint(8, 128, (1, TOKENS), generator=torch.Generator().manual_seed(1)) if window is None else window
    )
    request = CaptureRequest(kinds, layers, (0, 1), heads, **options)
    return window, capture_window(text_model, window, request)


def test_keys_equal_those_of_the_models_own_cache_and_projection(any_family):
    window, found = capture(any_family, "k_pre_rope", "k_post_rope")
    cache = any_family(window, use_cache=True).past_key_values
    for number in (0, 1):
        own = cache.layers[number].keys[0]
        assert found["k_post_rope"][f"layers.{number}.keys"].shape == own.shape == (3, TOKENS, 16)
        torch.testing.assert_close(found["k_post_rope"][f"layers.{number}.keys"], own)
        # RoPE turns pairs of channels and keeps each pair's length.
        pre, post = (found[kind][f"layers.{number}.keys"] for kind in ("k_pre_rope", "k_post_rope"))
        assert not torch.allclose(pre, post)
        lengths = [keys.unflatten(-1, (2, 8)).norm(dim=-2) for keys in (pre, post)]
        torch.testing.assert_close(*lengths)


def test_keys_before_rope_are_k_proj_of_the_normed_input(tiny):
    window, found = capture(tiny, "k_pre_rope", layers=(1,))
    assert list(found["k_pre_rope"]) == ["layers.1.keys"]
    hidden = tiny(window, output_hidden_states=True).hidden_states[1]
    layer = tiny.model.layers[1]
    expected = layer.self_attn.k_proj(layer.input_layernorm(hidden))[0].unflatten(-1, (3, 16)).transpose(0, 1)
    torch.testing.assert_close(found["k_pre_rope"]["layers.1.keys"], expected)


def test_rotated_keys_are_one_dense_matrix_away_and_reordered_ones_a_permutation(tiny, tmp_path):
    order = torch.stack([torch.randperm(48, generator=torch.Generator().manual_seed(n)) for n in (0, 1)])
    path = save_reorder_indices(tmp_path / "order.safetensors", order, {"head_group_num": 3})
    tiny.name_or_path = "tiny"
    rotation = build_methods(tiny, tiny.model, PRESETS["RotateKV2"], path)
    _, found = capture(tiny, "k_pre_rope", "k_rotated", rotation=rotation)
    from rotatekv.kernels.hadamard import hadamard_matrix

    for number in (0, 1):
        plain = found["k_pre_rope"][f"layers.{number}.keys"].transpose(0, 1).flatten(1).double()  # (T, 48)
        rotated = plain @ hadamard_matrix(48).T
        torch.testing.assert_close(
            found["k_rotated"][f"layers.{number}.rotated"].double(), rotated, atol=1e-5, rtol=1e-5
        )
        reordered = found["k_rotated"][f"layers.{number}.reordered"]
        torch.testing.assert_close(reordered.double(), rotated[:, order[number]], atol=1e-5, rtol=1e-5)


def test_massive_activations_are_those_of_the_hidden_states(any_family):
    window, found = capture(any_family, "massive_activations")
    hidden = any_family(window, output_hidden_states=True).hidden_states
    for number in (0, 1):
        magnitudes = hidden[number][0].abs()
        layer = {
            name.split(".")[2]: value for name, value in found["massive_activations"].items() if f".{number}." in name
        }
        torch.testing.assert_close(layer["token_maximum"], magnitudes.amax(-1))
        torch.testing.assert_close(
            layer["median"][0], magnitudes.flatten().sort().values[(magnitudes.numel() - 1) // 2]
        )
        torch.testing.assert_close(layer["top_values"], magnitudes.flatten().sort(descending=True).values[:20])
        at = magnitudes[layer["top_tokens"].long(), layer["top_channels"].long()]
        torch.testing.assert_close(at, layer["top_values"])
        assert layer["sinks"].tolist() == sorted(set(layer["top_tokens"].tolist()))


def test_attention_scores_are_eager_attentions_own(any_family):
    window, found = capture(any_family, "attention_scores", "massive_activations", heads=(1, 4))
    any_family.set_attn_implementation("eager")
    own = any_family(window, output_attentions=True).attentions
    for number in (0, 1):
        scores = found["attention_scores"][f"layers.{number}.scores"]
        assert scores.shape == (2, TOKENS, TOKENS) and scores.dtype == torch.float16
        torch.testing.assert_close(scores.float(), own[number][0, [1, 4]].detach(), atol=1e-3, rtol=1e-3)
        sinks = [found[kind][f"layers.{number}.sinks"].tolist() for kind in found]
        assert sinks[0] == sinks[1] and len(sinks[0]) > 1
    assert scores.triu(1).count_nonzero() == 0


@pytest.mark.parametrize("length", (513, 1100))
def test_attention_scores_of_several_query_chunks_sum_to_one(length):
    model = tiny_model(max_position_embeddings=2048)
    window = torch.randint(8, 128, (1, length))
    _, found = capture(model, "attention_scores", layers=(0,), heads=(2,), window=window)
    model.set_attn_implementation("eager")
    own = model(window, output_attentions=True).attentions[0][0, [2]].detach()
    torch.testing.assert_close(found["attention_scores"]["layers.0.scores"].float(), own, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("config", [PRESETS["RTN3"], PLAIN], ids=["RTN3", "RotateKV2"])
def test_errors_are_those_of_the_real_cache_in_the_first_layer(tiny, config: QuantConfig):
    """Layer 0 sees the same input in both models, so a patched forward stores what the capture measured."""
    codecs = {"it": build_methods(tiny, tiny.model, config)}
    window, found = capture(tiny, "k_post_rope", "quantization_error", codecs=codecs)
    with patch_model(tiny, config), torch.no_grad():
        seen = tiny(window).past_key_values.layers[0].keys
    exact = found["k_post_rope"]["layers.0.keys"]
    expected = (seen[0] - exact).pow(2).sum((0, 2)).sqrt() / exact.pow(2).sum((0, 2)).sqrt()
    torch.testing.assert_close(found["quantization_error"]["layers.0.it.keys"], expected, atol=1e-4, rtol=1e-3)
    values = found["quantization_error"]["layers.0.it.values"]
    assert values.max() > 0.05 and not torch.allclose(values, expected, rtol=0.01)


def test_value_errors_are_those_of_plain_rounding(tiny):
    codecs = {"RTN2": build_methods(tiny, tiny.model, PRESETS["RTN2"])}
    window, found = capture(tiny, "quantization_error", codecs=codecs)
    hidden = tiny.model.layers[0].input_layernorm(tiny.model.embed_tokens(window))
    values = tiny.model.layers[0].self_attn.v_proj(hidden)[0].detach().unflatten(-1, (3, 16))  # (T, H_kv, D)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (high - low) / 3
    rounded = ((values - low) / scale).round() * scale + low
    expected = (rounded - values).flatten(1).norm(dim=1) / values.flatten(1).norm(dim=1)
    # The codec rounds its zero point to a whole number, so single tokens differ from this.
    assert found["quantization_error"]["layers.0.RTN2.values"].mean() == pytest.approx(expected.mean().item(), rel=0.06)


def test_each_layer_is_measured_with_its_own_order(tiny, tmp_path):
    orders = [
        torch.stack([torch.arange(48), torch.randperm(48, generator=torch.Generator().manual_seed(n))]) for n in (1, 2)
    ]
    errors = []
    for number, order in enumerate(orders):
        path = save_reorder_indices(tmp_path / f"{number}.safetensors", order, {"head_group_num": 3})
        codecs = {"it": build_methods(tiny, tiny.model, PRESETS["RotateKV2"], path)}
        errors.append(capture(tiny, "quantization_error", codecs=codecs)[1]["quantization_error"])
    assert torch.equal(errors[0]["layers.0.it.keys"], errors[1]["layers.0.it.keys"])
    assert not torch.equal(errors[0]["layers.1.it.keys"], errors[1]["layers.1.it.keys"])


def test_relative_error_of_a_zero_token_is_finite():
    exact = torch.zeros(1, 2, 3, 4)
    assert relative_error(exact, exact).tolist() == [0.0, 0.0, 0.0]


def test_a_capture_leaves_no_hook_and_no_trace(tiny):
    window = torch.randint(8, 128, (1, TOKENS))
    before = tiny(window).logits
    capture(tiny, *KINDS[:2], "massive_activations", "attention_scores")
    assert not any(module._forward_pre_hooks for module in tiny.modules())
    assert torch.equal(tiny(window).logits, before)


def test_announced_bytes_are_the_bytes_written(tiny):
    kinds = ("k_pre_rope", "k_post_rope", "k_rotated", "attention_scores", "quantization_error")
    options = {"rotation": build_methods(tiny, tiny.model, PLAIN)}
    options["codecs"] = {"RTN2": build_methods(tiny, tiny.model, PRESETS["RTN2"])}
    _, found = capture(tiny, *kinds, layers=(1,), **options)
    request = CaptureRequest(kinds, (1,), (0, 1), (0, 3, 5), **options)
    announced = capture_bytes(tiny.model, TOKENS, request)
    for kind, tensors in found.items():
        sizes = [tensor.nbytes for name, tensor in tensors.items() if not name.endswith("sinks")]
        assert sum(sizes) == announced[kind], kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")
    (folder.parent / "text.txt").write_text(tiny_text(300))
    return folder


def run(folder, *flags: str) -> None:
    PPL_evaluation.main(
        ["--model", str(folder), "--dataset", str(folder.parent / "text.txt"), "--PPL_seq_length", "40", *flags]
    )


def test_the_script_saves_what_was_asked_and_no_more(folder, tmp_path, capsys):
    flags = ["--save_k_pre_rope", "True", "--save_massive_activations", "--save_attention_scores", "True"]
    run(folder, *flags, "--save_dir", str(tmp_path), "--save_sample", "2", "--save_heads", "1,4")
    made = tmp_path / "tiny-llama"
    assert sorted(path.name for path in made.iterdir()) == [
        "attention_scores.safetensors",
        "k_pre_rope.safetensors",
        "massive_activations.safetensors",
    ]
    keys, scores = read_capture(made, "k_pre_rope"), read_capture(made / "attention_scores.safetensors")
    assert keys.info.layers == (1,) and scores.info.heads == (1, 4) and keys.info.window == 2
    assert read_capture(made, "massive_activations").info.layers == (0, 1)
    words = tiny_text(300).split()
    assert [text.strip() for text in keys.info.token_texts] == words[80:120]
    assert json.loads(keys.info.metadata(keys.tensors)["shapes"]) == {"layers.1.keys": [3, 40, 16]}
    assert "k_pre_rope.safetensors" in capsys.readouterr().out


def test_unasked_heads_are_the_first_of_each_key_head_and_the_group_is_written(folder, tmp_path):
    run(folder, "--save_attention_scores", "--save_k_rotated", *NO_ORDER, "--save_dir", str(tmp_path))
    found = read_capture(tmp_path / "tiny-llama", "attention_scores")
    assert found.info.heads == (0, 2, 4) and found.get(1, "scores").shape == (3, 40, 40)
    assert read_capture(tmp_path / "tiny-llama", "k_rotated").info.heads_per_group == 3


def test_all_layers_and_the_second_window_differ_from_the_first(folder, tmp_path):
    for sample in ("0", "1"):
        flags = ["--save_k_post_rope", "--save_layers", "all", "--save_sample", sample]
        run(folder, *flags, "--save_dir", str(tmp_path / sample))
    first, second = (read_capture(tmp_path / sample / "tiny-llama", "k_post_rope") for sample in ("0", "1"))
    assert first.info.layers == (0, 1) and not torch.equal(first.get(0, "keys"), second.get(0, "keys"))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--save_layers", "2"], "0 … 1"),
        (["--save_layers", "one"], "numbers separated by commas"),
        (["--save_heads", "6"], "0 … 5"),
        (["--save_sample", "9"], "windows of 40 tokens"),
        (["--save_sample", "-1"], "at least 0"),
        (["--method", "RTN2"], "full-precision"),
        (["--RotateKV4", "True"], "full-precision"),
        (["--PPL_seq_length", "301"], "pass --PPL_seq_length 300 or less"),
        (["--save_k_rotated", "--Grouped_Head_Key_Rotation", "False", *NO_ORDER], "--head_group_num 1"),
        (["--save_quantization_error"], "--Outlier_Aware_Key_Rotation False"),
    ],
)
def test_a_wrong_request_is_one_line(folder, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        run(folder, "--save_attention_scores", "--save_dir", str(tmp_path), *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and says in error and not list(tmp_path.iterdir())


def test_errors_of_a_model_without_indices_are_those_of_the_flags(folder, tmp_path, tiny):
    """The flag that the error line for a model without reorder indices names must help."""
    run(folder, "--save_quantization_error", "--save_k_rotated", *NO_ORDER, "--save_dir", str(tmp_path))
    found = read_capture(tmp_path / "tiny-llama", "quantization_error")
    names = ("RTN2", "RTN3", "RTN4", "RotateKV2*", "RotateKV3*", "RotateKV4*")
    assert set(found.tensors) == {
        f"layers.{layer}.{name}.{what}" for layer in (0, 1) for name in names for what in ("keys", "values")
    }
    errors = [found.get(0, f"{name}.keys").median() for name in names]
    assert errors[0] > errors[1] > errors[2] and errors[3] > errors[4] > errors[5]
    assert list(read_capture(tmp_path / "tiny-llama", "k_rotated").tensors) == ["layers.1.rotated"]


def test_over_2_gb_is_refused_with_its_size_unless_forced(folder, tmp_path, capsys, monkeypatch):
    assert capture_flags._LARGEST == 2_000_000_000
    monkeypatch.setattr("rotatekv.capture.flags._LARGEST", 10_000)
    flags = ["--save_attention_scores", "--save_heads", "all", "--save_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        run(folder, *flags)
    assert end.value.code == 2 and "GB" in capsys.readouterr().err
    run(folder, *flags, "--force")
    assert (tmp_path / "tiny-llama" / "attention_scores.safetensors").is_file()


def info_of(tensors: dict, **changes) -> CaptureInfo:
    values = {
        "kind": "k_pre_rope",
        "model": "tiny",
        "text": "text.txt",
        "text_sha256": "0",
        "window": 0,
        "tokens": 4,
        "layers": (0,),
        "heads": (0, 1),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "heads_per_group": 1,
        "token_texts": ("a", "b", "c", "é"),
    }
    return CaptureInfo(**{**values, **changes})


@pytest.fixture
def written(tmp_path):
    tensors = {"layers.0.keys": torch.randn(1, 4, 8)}
    return write_capture(tmp_path, info_of(tensors), tensors)


def test_a_capture_comes_back_as_it_was(written):
    found = read_capture(written)
    assert found.info == info_of({}) and list(found.tensors) == ["layers.0.keys"]


def header_of(path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(path, tensors: dict | None = None, **metadata) -> None:
    """Damage that the shapes in the header do not give away."""
    tensors = load_file(path) if tensors is None else tensors
    header = header_of(path) | {name: json.dumps(value) for name, value in metadata.items()}
    header["shapes"] = json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()})
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b"not a safetensors file"),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"weights": torch.zeros(3)}, path),
        lambda path: save_file(load_file(path), path, metadata={**header_of(path), "version": "9"}),
        lambda path: save_file(load_file(path), path, metadata={**header_of(path), "layers": "none"}),
        lambda path: save_file(load_file(path), path, metadata={**header_of(path), "tokens": "[1]"}),
        lambda path: save_file(load_file(path), path, metadata={**header_of(path), "token_texts": '["a"]'}),
        lambda path: save_file({"layers.0.keys": torch.zeros(1, 4, 9)}, path, metadata=header_of(path)),
        lambda path: save_file({"layers.0.keys": torch.full((1, 4, 8), torch.nan)}, path, metadata=header_of(path)),
        lambda path: rewrite(path, {"layers.0.keys": torch.zeros(1, 4, 9)}),
        lambda path: rewrite(path, {"layers.0.keys": torch.zeros(32)}),
        lambda path: rewrite(path, {"layers.1.keys": torch.zeros(1, 4, 8)}),
        lambda path: rewrite(path, {"layers.0.keys": torch.zeros(1, 4, 8), "more": torch.zeros(1)}),
        lambda path: rewrite(path, head_dim=0),
        lambda path: rewrite(path, heads=[]),
        lambda path: rewrite(path, heads_per_group=0),
        lambda path: rewrite(path, heads_per_group=2),
        lambda path: rewrite(path, num_key_value_heads=2),
        lambda path: rewrite(path, token_texts="abcd"),
        lambda path: rewrite(path, model="\ud800"),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(written, damage):
    damage(written)
    with pytest.raises(UserError):
        read_capture(written, "k_pre_rope")


def test_tensors_must_be_those_of_the_kind_and_name_tokens_of_the_window(tmp_path):
    some = {f"layers.0.{name}": torch.ones(3) for name in ("top_values", "top_tokens", "top_channels", "sinks")}
    massive = {"layers.0.token_maximum": torch.ones(4), "layers.0.median": torch.ones(1), **some}
    scores = {"layers.0.scores": torch.ones(2, 4, 4), "layers.0.sinks": torch.ones(1)}
    errors = {"layers.0.RTN2.keys": torch.ones(4), "layers.0.RTN2.values": torch.ones(4)}
    rotated = {"layers.0.rotated": torch.ones(4, 8), "layers.0.reordered": torch.ones(4, 8)}
    good = {
        "massive_activations": massive,
        "attention_scores": scores,
        "quantization_error": errors,
        "k_rotated": rotated,
    }
    for kind, tensors in good.items():
        assert read_capture(write_capture(tmp_path, info_of(tensors, kind=kind), tensors)).info.kind == kind
        for name in tensors:
            damages = [tensors | {name: torch.ones(0)}, tensors | {name: torch.ones(1, 1, 1, 1)}]
            if name.endswith(("sinks", "top_tokens")):
                damages += [tensors | {name: torch.tensor([4])}, tensors | {name: torch.tensor([-1])}]
            if not name.endswith("reordered"):
                damages += [{other: tensor for other, tensor in tensors.items() if other != name}]
            for broken in damages:
                with pytest.raises(UserError, match="damaged"):
                    read_capture(write_capture(tmp_path, info_of(broken, kind=kind), broken))


def test_names_that_are_no_utf8_are_written_with_a_question_mark(tmp_path):
    path = write_capture(tmp_path, info_of({}, text="\udcff.txt"), {"layers.0.keys": torch.zeros(1, 4, 8)})
    assert read_capture(path).info.text == "?.txt"


def test_titles_name_a_local_model_without_its_folders():
    assert info_of({}, model="/home/me/models/tiny").where.startswith("tiny, text.txt")
    assert info_of({}, model="org/tiny").where.startswith("org/tiny, text.txt")


def test_another_kind_or_layer_is_refused(written):
    with pytest.raises(UserError, match="holds k_pre_rope, not attention_scores"):
        read_capture(written, "attention_scores")
    with pytest.raises(UserError, match="layer 3"):
        read_capture(written).get(3, "keys")


def test_quantization_error_with_a_recent_window(tiny):
    """What a call packs lies before its last tokens: the codec turns it at its own positions."""
    codecs = {"it": build_methods(tiny, tiny.model, replace(PRESETS["RTN4"], residual_length=5))}
    _, found = capture(tiny, "quantization_error", codecs=codecs)
    assert found["quantization_error"]["layers.0.it.keys"].isfinite().all()
