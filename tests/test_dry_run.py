"""The package's launches compiled for GPUs that are not here (rotatekv/kernels/triton/dry_run.py); none is launched."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_model
from kernel_cases import Shape, random_step

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from gpu_matrix import failures, run_case

from benchmarks.random_models import patch_random
from rotatekv import RotateKVCache
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.layout import allocate_blocks
from rotatekv.kernels.triton import dry_run
from rotatekv.kernels.triton.dry_run import DryRun
from rotatekv.kernels.triton.start import Unusable, start, unusable

# capability, heads, preset: kernels compiled. transform (with a rotation), quantize and dequantize, for keys and
# for values where these differ, split, merge, and exact where there are sinks or a window: once each. RotateKV+: map,
# quantize and read for keys and for values, queries, split (for one new token, and for several), merge and exact.
# QuaRot and RTN: queries, and split likewise. The first capability is the least one's.
MODELS = {
    (86, "14/2x64", "RotateKV3+"): 11,
    (90, "32/8x128", "RotateKV2+"): 11,
    (80, "8/1x256", "RotateKV4+"): 11,
    (90, "32/8x128", "RotateKV2"): 9,
    (86, "9/3x64", "RotateKV2"): 9,
    (86, "32/8x128", "QuaRot4"): 7,
    (86, "8/1x256", "RotateKV4"): 7,  # all channels in one group: one kernel quantizes keys and values
    (80, "32/32x128", "RTN2"): 6,
}
FEW = 1  # of them shows every kernel; the others are slow


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """One folder of compiled kernels for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield


@pytest.mark.parametrize(
    ("capability", "heads", "preset"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (number >= FEW)) for number, case in enumerate(MODELS)],
)
def test_a_models_launches_compile_and_fit(capability, heads, preset):
    """Prompts of 1 to 4097 tokens, batches of 1 to 160, 1 to 16 new tokens, 300 decode steps."""
    with DryRun(capability, resources=True) as dry:
        run_case(heads, preset)
    assert failures(dry, preset) == []
    assert len(dry.compiled) == MODELS[capability, heads, preset]
    assert max(kernel.shared for kernel in dry.compiled) <= 99 * 1024  # sm_86 and sm_89, whatever this one is


def test_a_dry_run_compiles_and_launches_nothing():
    packed = allocate_blocks(1, 2, 64, 1, 2)
    assert not kernels.available("cpu")
    with DryRun(86, resources=True) as dry:
        assert kernels.available("cpu")
        kernels.quantize_into_blocks(torch.ones(1, 1, 20, 64), packed, 3, 2, 64)
    assert not kernels.available("cpu") and not any(plane.any() for plane in packed.values())
    assert dry.launches == {"quantize_kernel": 1} and dry.needless() == [] and dry.refused == {}
    (kernel,) = dry.compiled
    assert kernel.kernel == "quantize_kernel" and 0 < kernel.registers < 255 and not kernel.spills
    with pytest.raises(ValueError, match="80, 86"):
        DryRun(75)


def test_sequences_of_more_than_65535_blocks_fit_the_grid():
    tokens, group = 65536 * 16 + 1, torch.zeros(16, dtype=torch.int32)
    with DryRun(86) as dry:
        packed = allocate_blocks(1, 65537, 16, 1, 2)
        kernels.quantize_into_blocks(torch.empty(1, 1, tokens, 16), packed, 0, 2, 16, rotation_width=16)
        kernels.dequantize_blocks(packed, tokens, 2, group, 16, 16)
    names = ("transform_kernel", "quantize_kernel", "dequantize_kernel")
    assert dry.launches == dict.fromkeys(names, 1) and dry.refused == {}


def test_a_views_strides_compile_nothing_anew():
    """Any part of wider tokens, any number of them, and tables that a batch shares."""
    x, packed = torch.empty(3, 40, 5, 48), allocate_blocks(3, 3, 96, 2, 2)
    cos = torch.empty(1, 40, 12)
    with DryRun(86) as dry:
        for tokens in (x[:, :, :2], x[:, 3:8, 1:3], x[:, :1, 3:]):
            heads = tokens.transpose(1, 2)
            tables = (cos[:, : heads.shape[2]].expand(3, -1, -1),) * 2
            kernels.quantize_into_blocks(heads, packed, 0, 2, 48)
            kernels.quantize_into_blocks(heads, packed, 0, 2, 48, rotation_width=96, unrope=tables)
    assert dry.needless() == [] and len(dry.compiled) == 3 and dry.refused == {}


def test_every_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    current, seen = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def launch(run, source, *_):
        seen.append((source.name, *current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(DryRun, "_launch", launch)
    step = random_step(Shape(kv_heads=1, head_dim=16, heads_per_group=1, tokens=20, sinks=2, value_group=16))
    with DryRun(86):
        kernels.quantize_into_blocks(torch.ones(1, 1, 20, 16), step["values"], 0, 2, 16, rotation_width=16)
        kernels.dequantize_blocks(step["values"], 20, 2, torch.zeros(16, dtype=torch.int32), 16, 16)
        kernels.decode_attention(**step)
    names = ("transform", "quantize", "dequantize", "split", "exact", "merge")
    assert seen == [(f"{name}_kernel", torch.device("cpu")) for name in names]


class Refused:
    """A kernel that no compiler takes."""

    __name__ = "some_kernel"

    def __init__(self):
        self.tries = 0

    def __getitem__(self, grid):
        self.tries += 1
        raise RuntimeError("at 3:4\n  ^") from ValueError("a dot too small")


def test_a_refused_kernel_is_named_once_and_never_tried_again():
    kernel, other = Refused(), Refused()
    with DryRun(86) as dry:
        said = "some_kernel does not run on cpu.*ValueError: a dot too small"
        with pytest.warns(RuntimeWarning, match=said), pytest.raises(Unusable):
            start(kernel, (1,), torch.zeros(1), C=3)
        with warnings.catch_warnings(), pytest.raises(Unusable):
            warnings.simplefilter("error")
            start(kernel, (1,), torch.zeros(1), C=3)
        start(other, (0, 5), torch.zeros(1), C=3)  # nothing to do
        assert kernel.tries == 1 and other.tries == 0
        with pytest.warns(RuntimeWarning, match=said), pytest.raises(Unusable):
            start(kernel, (1,), torch.zeros(1), C=4)  # another shape has its own try
    assert dry.refused == {"some_kernel": "ValueError: a dot too small"}


@pytest.mark.parametrize(
    ("preset", "refused"),
    [("RotateKV3", ("transform", "dequantize", "split")), ("RotateKV3+", ("coded_map", "coded_read", "coded_queries"))],
)
def test_torch_does_what_a_gpu_too_small_cannot(preset, refused, monkeypatch):
    """Every kernel refused for its shared memory, in the middle of a forward: the numbers of the reference path."""
    monkeypatch.setitem(dry_run.SHARED_MEMORY, 86, -1)
    model, results = tiny_model(), {}
    ids = torch.randint(8, 128, (2, 120), generator=torch.Generator().manual_seed(1))

    def logits() -> torch.Tensor:
        with patch_random(model, preset), torch.no_grad():
            cache = RotateKVCache.for_model(model)
            calls = (ids[:, :116], ids[:, 116:117], ids[:, 117:118], ids[:, 118:])
            return torch.cat([model(call, past_key_values=cache).logits for call in calls], dim=1)

    with DryRun(86) as dry, pytest.warns(RuntimeWarning, match="OutOfResources") as said:
        results["triton"] = logits()
        shapes = len(unusable)
    assert {f"{name}_kernel" for name in refused} == set(dry.refused) and not dry.launches
    assert sum("Triton kernel" in str(warning.message) for warning in said) == shapes
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    results["reference"] = logits()
    difference = (results["triton"] - results["reference"]).abs()
    assert difference.median() < 5e-4 and difference.mean() < 0.005 * results["reference"].std()
