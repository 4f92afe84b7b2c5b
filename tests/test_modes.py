"""The process's modes and defaults leave the cache alone: inference mode, default dtype and device, torch.compile."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from benchmarks.random_models import patch_random, random_llama
from rotatekv import PRESETS, RotateKVCache
from rotatekv.calibration import kvquant as calibration_kvquant
from rotatekv.calibration import plus as calibration_plus
from rotatekv.calibration import reorder as calibration_reorder
from rotatekv.calibration import transform as calibration_transform
from rotatekv.families import find_text_model
from rotatekv.kernels import cpu
from rotatekv.kernels import hadamard as transforms
from rotatekv.kernels.backend import kernels_on
from rotatekv.kernels.triton import plan

ONE_OF_EACH = [name for name in PRESETS if name.rstrip("+").endswith("2") or name == "FP16"]
BEFORE, BETWEEN, AFTER = "prefill inside", "prefill and operations inside", "all but the prefill inside"


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(8, 128, (rows, tokens), generator=generator, device="cpu", dtype=torch.int64)


def run(model, inside: str | None = None) -> torch.Tensor:
    """Logits of a prefill of 37 tokens, and of 3 decode steps after a crop and an exchange of rows."""
    cache, tokens = RotateKVCache.for_model(model), ids(2, 45)
    with torch.inference_mode(inside in (BEFORE, BETWEEN)):
        found = [model(tokens[:, :37], past_key_values=cache).logits]
    with torch.inference_mode(inside in (BETWEEN, AFTER)):
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
    with torch.inference_mode(inside == AFTER):
        found += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(37, 40)]
    cache.crop(-2)
    found.append(model(tokens[:, 40:], past_key_values=cache).logits)
    return torch.cat(found, dim=1).detach()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_calls_inside_and_outside_inference_mode_share_a_cache(preset, backend, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    model = random_llama(6, 3, 32, 1).requires_grad_(False)  # with gradients no kernel attends
    with patch_random(model, preset):
        expected = run(model)
        for inside in (BEFORE, BETWEEN, AFTER):
            torch.testing.assert_close(run(model, inside), expected, rtol=0, atol=0, msg=inside)


def test_a_model_patched_in_inference_mode_trains_and_unpatches_outside():
    model = tiny_model()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.inference_mode():
        handle = patch_random(model, "RotateKV2")
    with handle:
        assert not any(x.is_inference() for x in model.parameters())
        run(model)
    model(ids(1, 8)).logits.sum().backward()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


# --- default dtype and device ----------------------------------------------------------------------


@contextmanager
def defaults(dtype: torch.dtype, device: str):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "meta")]


def forget_tables() -> None:
    """Tensors that were made once and kept would hide how they are made now."""
    for kept in (transforms._kronecker_factors, plan.factor, plan.matrices):
        kept.cache_clear()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_default_dtype_and_device_change_no_number(preset, backend, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", backend)
    model = random_llama(6, 3, 32, 1).requires_grad_(False)
    with patch_random(model, preset):
        expected = run(model)
    for dtype, device in DEFAULTS:
        forget_tables()
        with defaults(dtype, device), patch_random(model, preset):
            torch.testing.assert_close(run(model), expected, rtol=0, atol=0)


def calibrated(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that calibration gives for a model."""
    text_model, windows = find_text_model(model), [ids(1, 40, seed) for seed in range(2)]
    sums = calibration_reorder.collect_key_sums(model, text_model, windows)
    found = {"indices": calibration_reorder.indices_from_key_sums(sums, 96)}
    offset, scale = calibration_kvquant.collect_key_ranges(model, text_model, windows, 78)
    found |= {"offset": offset, **calibration_kvquant.collect_levels(model, text_model, windows, offset, scale)}
    threshold = calibration_plus.collect_sink_thresholds(model, text_model, windows)
    plus = calibration_transform.collect_transforms(model, windows, threshold) | {"sink_threshold": threshold}
    return found | plus | calibration_plus.in_predictions(model, windows, plus)


def test_default_dtype_and_device_change_no_calibration():
    model = random_llama(6, 3, 32, 1)
    expected = calibrated(model)
    for dtype, device in DEFAULTS[1:]:
        forget_tables()
        with defaults(dtype, device):
            found = calibrated(model)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=f"{name}, {dtype}, {device}")


FACTORIES = {
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "tensor",
    "eye",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
    "as_tensor",
    "Generator",
}
ROOT = Path(__file__).parents[1]


def unnamed(path: Path) -> list[str]:
    """Calls of ``torch.<factory>`` that leave dtype or device to the process's defaults."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name not in FACTORIES or ast.unparse(call.func) != f"torch.{name}":
            continue
        named = {keyword.arg for keyword in call.keywords}  # None: **options
        wanted = {"device"} if name in ("Generator", "tensor", "as_tensor") else {"dtype", "device"}
        if None not in named and not wanted <= named:
            found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    return found


def test_every_tensor_names_its_dtype_and_device():
    """``torch.tensor`` of Python numbers takes integers as they are; of floats the package makes none without dtype."""
    files = sorted((ROOT / "rotatekv").rglob("*.py"))
    assert len(files) > 50 and [line for path in files for line in unnamed(path)] == []


# --- torch.compile ---------------------------------------------------------------------------------


LARGEST_GRAPHS = 250  # nodes, of a prefill and a decode of one layer; the stock model has 308


@pytest.fixture
def graphs():
    """A backend that runs graphs as they are, and their sizes."""
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    yield backend, sizes
    torch._dynamo.reset()


def compiled_steps(model, backend, cache) -> torch.Tensor:
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        return torch.cat([compiled(part, past_key_values=cache).logits for part in ids(2, 22).split((20, 1, 1), 1)], 1)


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: the fused kernel is not built")
def test_a_compiled_model_keeps_its_kernels_and_has_small_graphs(graphs, monkeypatch):
    """A compiler has a few small graphs to do, so it takes no longer than for the stock model."""
    backend, sizes = graphs
    model, calls, kernel = random_llama(6, 3, 32, 1), [], cpu.decode_attention
    monkeypatch.setattr(cpu, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    with patch_random(model, "RotateKV2"):
        found = compiled_steps(model, backend, RotateKVCache.for_model(model))
        assert len(calls) == 2 and sum(sizes) < LARGEST_GRAPHS
        with torch.no_grad():
            cache = RotateKVCache.for_model(model)
            expected = [model(part, past_key_values=cache).logits for part in ids(2, 22).split((20, 1, 1), 1)]
    torch.testing.assert_close(found, torch.cat(expected, 1))


def test_a_full_graph_is_refused_with_what_to_do(graphs):
    model = random_llama(6, 3, 32, 1)
    with patch_random(model, "RTN2"), pytest.raises(Exception, match="leave out fullgraph=True"):
        torch.compile(model, backend=graphs[0], fullgraph=True)(ids(1, 4))


def test_a_traced_cache_says_that_it_leaves_the_kernels(graphs):
    def serve(x: torch.Tensor) -> torch.Tensor:
        return x + (kernels_on(x.device) is None)

    zero = torch.zeros(1)
    with pytest.warns(UserWarning, match="torch decodes there, not the fused kernels"):
        assert torch.compile(serve, backend=graphs[0])(zero) == 1
