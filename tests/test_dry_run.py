"""The package's launches compiled for GPUs that are not here (rotatekv/kernels/triton/dry_run.py)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rotatekv.kernels.layout import allocate_blocks

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from rotatekv.kernels import triton as kernels
from rotatekv.kernels.triton.dry_run import DryRun


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """One folder of compiled kernels for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_a_dry_run_compiles_and_launches_nothing():
    packed = allocate_blocks(1, 2, 64, 1, 2)
    assert not kernels.available("cpu")
    with DryRun(86, resources=True) as dry:
        assert kernels.available("cpu")
        kernels.quantize_into_blocks(torch.ones(1, 20, 64), packed, 3, 2, 64)
    assert not kernels.available("cpu") and not any(plane.any() for plane in packed.values())
    assert dry.launches == {"quantize_kernel": 1} and dry.needless() == []
    (kernel,) = dry.compiled
    assert kernel.kernel == "quantize_kernel" and 0 < kernel.registers < 255 and not kernel.spills
    with pytest.raises(ValueError, match="80, 86"):
        DryRun(75)
