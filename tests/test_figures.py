"""Every figure from captures of a tiny model; what they compute against a few lines of their own; bad files."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_reorder_indices, save_tiny_folder, tiny_text
from matplotlib.figure import Figure
from PIL import Image

import PPL_evaluation
from rotatekv.capture.files import read_capture, write_capture
from rotatekv.kernels.hadamard import heads_to_channels
from visualize.attention_sinks import draw_received, mean_received
from visualize.common import set_title, token_label
from visualize.keys_3d import draw_surface
from visualize.keys_3d import stages_of as stages_3d
from visualize.massive_activations import carriers
from visualize.outlier_spread import group_range, stages_of
from visualize.quantization_error import pick_methods

ROOT = Path(__file__).parents[1]
FIGURES = ("keys_2d", "keys_3d", "massive_activations", "attention_sinks", "quantization_error", "outlier_spread")
SOURCE = {
    "keys_2d": "k_pre_rope",
    "keys_3d": "k_rotated",
    "massive_activations": "massive_activations",
    "attention_sinks": "attention_scores",
    "quantization_error": "quantization_error",
    "outlier_spread": "k_rotated",
}


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    model = save_tiny_folder(folder / "tiny")
    (folder / "text.txt").write_text(tiny_text(300))
    order = torch.stack([torch.arange(48).flip(0), torch.arange(48)])
    indices = save_reorder_indices(folder / "order.safetensors", order, {"head_group_num": 3})
    kinds = ("k_pre_rope", "k_post_rope", "k_rotated", "massive_activations", "attention_scores", "quantization_error")
    PPL_evaluation.main(
        [
            "--model",
            str(model),
            "--dataset",
            str(folder / "text.txt"),
            "--PPL_seq_length",
            "100",
            "--save_layers",
            "all",
            "--calibration_file",
            str(indices),
            "--save_dir",
            str(folder / "saved"),
            *(f"--save_{kind}" for kind in kinds),
        ]
    )
    return folder / "saved" / "tiny"


def draw(name: str, *flags: str) -> None:
    importlib.import_module(f"visualize.{name}").main(list(flags))


def drawn(name: str, monkeypatch, *flags: str) -> dict[str, list]:
    """Titles of the figure's panels → the panels, as a reader would be shown them."""
    kept = []
    monkeypatch.setattr("visualize.common.save", lambda drawing, output: kept.append(drawing.figure))
    draw(name, *flags)
    panels = {}
    for panel in kept[0].axes:
        panels.setdefault(panel.get_title() or panel.get_title(loc="left") or panel.get_ylabel(), []).append(panel)
    return panels


def fails(name: str, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        draw(name, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_with_more_than_one_colour_and_a_description(name, captures, tmp_path):
    for source in (captures, captures / f"{SOURCE[name]}.safetensors"):
        output = tmp_path / f"{source.stem}" / f"{name}.png"
        draw(name, "--input", str(source), "--output", str(output))
        with Image.open(output) as picture:
            assert picture.width > 600 and "tiny, text.txt (window 0, 100 tokens)" in picture.text["Description"]
            assert len(picture.convert("RGB").resize((200, 200)).getcolors(40000)) > 20


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "quantization_error"])
def test_a_layer_that_is_not_there_is_one_line(name, captures, capsys, tmp_path):
    error = fails(name, capsys, "--input", str(captures), "--layer", "7", "--output", str(tmp_path / "x.png"))
    assert "7" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FIGURES)
def test_a_damaged_foreign_or_missing_file_is_one_line(name, captures, capsys, tmp_path):
    whole = (captures / f"{SOURCE[name]}.safetensors").read_bytes()
    damaged = tmp_path / f"{SOURCE[name]}.safetensors"
    for content in (whole[: len(whole) // 2], b"", b"\x89PNG\r\n\x1a\n" + bytes(60)):
        damaged.write_bytes(content)
        for given in (damaged, tmp_path):
            assert "damaged" in fails(name, capsys, "--input", str(given), "--output", str(tmp_path / "x.png"))
    damaged.unlink()
    assert "--save_" in fails(name, capsys, "--input", str(tmp_path), "--output", str(tmp_path / "x.png"))
    assert "--save_" in fails(name, capsys, "--input", str(tmp_path / "none"), "--output", str(tmp_path / "x.png"))
    other = "attention_scores" if name != "attention_sinks" else "k_pre_rope"
    error = fails(name, capsys, "--input", str(captures / f"{other}.safetensors"), "--output", str(tmp_path / "x.png"))
    assert other in error and not (tmp_path / "x.png").exists()


def test_an_output_that_cannot_be_written_is_one_line(captures, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "x.png")
    assert "--output" in fails("keys_2d", capsys, "--input", str(captures), "--output", output)


@pytest.mark.parametrize("heads", ("3", "a", "-1"))
def test_a_head_that_is_not_there_is_one_line(heads, captures, capsys):
    assert "heads" in fails("keys_2d", capsys, "--input", str(captures), f"--heads={heads}")


def test_unknown_methods_are_one_line(captures, capsys):
    assert "KIVI2" in fails("quantization_error", capsys, "--input", str(captures), "--methods", "RTN2,KIVI2")


def test_keys_2d_shows_each_head_under_its_title_on_one_scale(captures, monkeypatch):
    panels = drawn("keys_2d", monkeypatch, "--input", str(captures), "--heads", "2,0", "--layer", "1")
    limits = set()
    for kind, when in (("k_pre_rope", "before RoPE"), ("k_post_rope", "after RoPE")):
        for head in (2, 0):
            image = panels[f"key head {head}, {when}"][0].images[0]
            expected = read_capture(captures, kind).get(1, "keys")[head].abs().T
            torch.testing.assert_close(torch.tensor(image.get_array().data), expected)
            limits.add(image.get_clim())
    both = torch.stack([read_capture(captures, kind).get(1, "keys")[[0, 2]] for kind in ("k_pre_rope", "k_post_rope")])
    assert limits == {(0.0, both.abs().max().item())}


def test_keys_3d_names_its_stages(captures, monkeypatch):
    panels = drawn("keys_3d", monkeypatch, "--input", str(captures), "--max_tokens", "40")
    names = ("before RoPE", "after RoPE", "before RoPE, rotated in groups of 3 heads", "rotated and reordered")
    tensors = [
        read_capture(captures, "k_pre_rope").get(0, "keys")[:, :40],
        read_capture(captures, "k_post_rope").get(0, "keys")[:, :40],
        read_capture(captures, "k_rotated").get(0, "rotated")[:40],
        read_capture(captures, "k_rotated").get(0, "reordered")[:40],
    ]
    titles = {f"{name}\nlargest {keys.abs().max():.1f}" for name, keys in zip(names, tensors, strict=True)}
    assert titles < set(panels)
    pre = heads_to_channels(tensors[0].unsqueeze(0))[0]
    torch.testing.assert_close(stages_3d(read_capture(captures, "k_pre_rope"), 0, 40), {"before RoPE": pre.abs()})
    post = heads_to_channels(tensors[1].unsqueeze(0))[0]
    torch.testing.assert_close(stages_3d(read_capture(captures, "k_post_rope"), 0, 40), {"after RoPE": post.abs()})


def test_massive_activations_have_the_dots_and_the_field_of_their_own_layer(captures, monkeypatch):
    capture = read_capture(captures, "massive_activations")
    panels = drawn("massive_activations", monkeypatch, "--input", str(captures))
    (lines,), (field,) = panels["|layer input|"], panels["layer"]
    tokens = carriers(capture, [0, 1])
    dots = {tuple(place) for place in field.collections[0].get_offsets().data.astype(int).tolist()}
    sinks = [set(capture.get(layer, "sinks").tolist()) for layer in (0, 1)]
    assert sinks[0] != sinks[1]
    assert dots == {(tokens.index(token), layer) for layer in (0, 1) for token in sinks[layer] & set(tokens)}
    ratios = torch.stack([capture.get(n, "token_maximum")[tokens] / capture.get(n, "median") for n in (0, 1)])
    torch.testing.assert_close(torch.tensor(field.images[0].get_array().data), ratios, check_dtype=False)
    for rank in range(3):
        shown = [capture.get(layer, "top_values")[rank].item() for layer in (0, 1)]
        assert lines.lines[rank].get_ydata().tolist() == shown


def test_attention_maps_stand_upright_under_the_heads_they_are_of(captures, monkeypatch):
    capture = read_capture(captures, "attention_scores")
    assert capture.info.heads == (0, 2, 4)
    panels = drawn("attention_sinks", monkeypatch, "--input", str(captures), "--heads", "1,2", "--layer", "1")
    for place, head in ((1, 2), (2, 4)):
        shown = torch.tensor(panels[f"query head {head}"][0].images[0].get_array().filled(0.0))
        expected = capture.get(1, "scores")[place, :64, :64].float().clamp_min(1e-4).tril()
        torch.testing.assert_close(shown, expected)  # a query's row holds its weights
    ((received, sinks),) = [panel.lines for name, (panel, *_) in panels.items() if name.startswith("mean attention")]
    torch.testing.assert_close(
        torch.tensor(received.get_ydata()), mean_received(capture.get(1, "scores")[[1, 2]].float())[:50]
    )
    assert sinks.get_xdata().tolist() == [token for token in capture.get(1, "sinks").tolist() if token < 50]


def test_each_methods_line_is_its_own_error(captures, monkeypatch):
    capture = read_capture(captures, "quantization_error")
    panels = drawn("quantization_error", monkeypatch, "--input", str(captures))
    for what, title in (("keys", "keys, after RoPE, all heads"), ("values", "values, all heads")):
        lines = {line.get_label(): line for line in panels[title][0].lines}
        assert list(lines) == ["RTN2", "RotateKV2", "RTN3", "RotateKV3", "RTN4", "RotateKV4"]
        for method, line in lines.items():
            middle = [capture.get(layer, f"{method}.{what}").quantile(0.5).item() for layer in (0, 1)]
            assert line.get_ydata() == pytest.approx(middle)
        assert len({line.get_color() for line in lines.values()}) == len(lines)


def test_outlier_spread_draws_the_largest_magnitudes(captures, monkeypatch):
    panels = drawn("outlier_spread", monkeypatch, "--input", str(captures))
    stages = stages_of(read_capture(captures, "k_rotated"), 0)
    for (title, (panel,)), (name, keys) in zip(panels.items(), stages.items(), strict=True):
        assert title.startswith(f"{name}: largest {keys.abs().max():.1f}")
        heights = torch.tensor([bar.get_height() for bar in panel.patches])
        torch.testing.assert_close(heights, keys.abs().amax(dim=0), check_dtype=False)


def test_methods_are_ordered_by_bits_whatever_flags_changed():
    held = {f"layers.0.{name}.keys": None for name in ("RTN2", "RTN4", "RotateKV2*", "RotateKV4*")}
    assert pick_methods(SimpleNamespace(tensors=held), None) == ["RTN2", "RotateKV2*", "RTN4", "RotateKV4*"]


def test_outlier_spread_shows_the_keys_before_per_head_grouped_and_reordered(captures):
    from rotatekv.kernels.hadamard import hadamard_matrix

    plain = read_capture(captures, "k_pre_rope").get(1, "keys").transpose(0, 1).flatten(1)  # (T, 48)
    stages = list(stages_of(read_capture(captures, "k_rotated"), 0 + 1).values())
    per_head = torch.block_diag(*[hadamard_matrix(16)] * 3).float()
    for stage, expected in zip(
        stages, (plain, plain @ per_head.T, plain @ hadamard_matrix(48).T.float()), strict=False
    ):
        torch.testing.assert_close(stage, expected, atol=1e-5, rtol=1e-4)
    assert len(stages) == 4 and group_range(torch.tensor([[1.0, 4.0, -2.0, -2.5]]), 2) == pytest.approx(1.75)


def test_attention_received_leaves_out_a_tokens_own_and_counts_later_queries():
    weights = torch.tensor([[[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.5, 0.4, 0.1]]])
    torch.testing.assert_close(mean_received(weights), torch.tensor([0.6, 0.4, 0.0]))


def test_the_named_tokens_are_the_protected_ones(captures):
    capture = read_capture(captures, "massive_activations")
    protected = set(capture.get(0, "sinks").tolist())
    assert set(carriers(capture, [0])) <= protected and len(carriers(capture, [0])) == min(14, len(protected))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["日本 😀 नम.txt", r"$\bad$ $a_b$", "\u202e\x00\u0301", "long " * 40, "x" * 300])
def test_any_name_and_token_can_be_drawn_without_mathematics_or_a_missing_glyph(text, captures, tmp_path):
    for kind, name in (("massive_activations", "massive_activations"), ("k_pre_rope", "keys_2d")):
        found = read_capture(captures, kind)
        info = replace(found.info, text=text, token_texts=(text,) * found.info.tokens)
        path = write_capture(tmp_path, info, found.tensors)
        draw(name, "--input", str(path), "--output", str(tmp_path / "x.png"))


def test_a_title_fits_its_figure():
    figure = Figure(figsize=(5, 3))
    set_title(figure, "Keys of layer 15: some-organisation/some-model, " + "a_very_long_file_name" * 5)
    figure.draw_without_rendering()
    extent = figure._suptitle.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width


def test_two_windows_are_not_drawn_under_one_title(captures, capsys, tmp_path):
    for kind, window in (("k_pre_rope", 0), ("k_post_rope", 3)):
        found = read_capture(captures, kind)
        write_capture(tmp_path, replace(found.info, window=window), found.tensors)
    for name in ("keys_2d", "keys_3d"):
        assert "window 3" in fails(name, capsys, "--input", str(tmp_path), "--output", str(tmp_path / "x.png"))


def test_a_ridge_of_one_channel_has_the_colour_of_its_height():
    magnitudes = torch.zeros(5, 6)
    magnitudes[:, 2] = 10.0
    panel = Figure().add_subplot(projection="3d")
    colours = draw_surface(panel, magnitudes, 10.0)
    drawn = {tuple(colour) for colour in panel.collections[0].get_facecolor().round(3).tolist()}
    expected = {tuple(round(float(part), 3) for part in colours.to_rgba(height)) for height in (0.0, 10.0)}
    assert drawn == expected


@pytest.mark.parametrize("tokens", ("1", "2"))
def test_few_tokens_make_a_surface(tokens, captures, tmp_path):
    draw("keys_3d", "--input", str(captures), "--max_tokens", tokens, "--output", str(tmp_path / "x.png"))


@pytest.mark.parametrize("length, drawn", ((2, 1), (10, 5), (100, 50), (200, 136)))
def test_a_short_window_shows_its_first_half(length, drawn):
    found = torch.full((1, length, length), 1.0 / length).tril()
    info = SimpleNamespace(token_texts=("a",) * length)
    figure = Figure(figsize=(8, 2.7))
    panel = figure.subplots()
    draw_received(panel, SimpleNamespace(info=info, get=lambda layer, what: torch.tensor([0])), 0, found)
    assert len(panel.lines[0].get_xdata()) == drawn
    figure.draw_without_rendering()
    names = sorted((text.get_window_extent() for text in panel.texts), key=lambda extent: extent.y0)
    assert len(names) == min(3, drawn) and names[-1].y1 < panel.bbox.y1
    assert all(one.y1 <= other.y0 or one.x1 <= other.x0 or other.x1 <= one.x0 for one, other in pairwise(names))


def test_token_labels_show_white_space_and_no_mathematics():
    assert token_label(" a\n") == "“·a↵”" and token_label("$x$") == r"“\$x\$”" and token_label("\x00") == "“�”"
    assert len(token_label("x" * 40)) == 14


def test_a_figure_starts_as_a_script_from_anywhere_and_opens_no_window(captures, tmp_path):
    script = str(ROOT / "visualize" / "attention_sinks.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--input", str(captures), "--output", "a.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"MPLBACKEND": "tkagg"},
        timeout=120,
    )
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
