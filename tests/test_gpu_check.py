"""benchmarks/gpu_check.py without a GPU: the launches of every part are compiled, and a part that fails is alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

ROOT = Path(__file__).parents[1]
# What the machine with the card does not have; any import of it fails.
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('gguf', 'datasets', 'lm_eval', 'peft', 'pytest')))\n"
PARTS = ("environment", "kernels", "models", "layer", "llama")
RUN = "sys.path.insert(0, '.'); from benchmarks import gpu_check, gpu_check_parts as parts\n"


def run(code: str, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "ROTATEKV"))}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + RUN + code + "sys.exit(gpu_check.main(sys.argv[1:]))", *flags],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize(
    "parts", [("environment", "kernels", "layer"), pytest.param(PARTS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_dry_run_compiles_the_launches_of_every_part(parts, tmp_path):
    output = tmp_path / "check.json"
    small = ["--shapes", "4/2x32", "--forms", "RotateKV2,RotateKV2+", "--presets", "RotateKV2", "--minutes", "20"]
    small += ["--parts", ",".join(parts)]
    done = run("", {}, "--dry_run", *small, "--output", str(output))
    found = json.loads(output.read_text())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = [part["part"] for part in found["parts"]]
    assert names == ["kernels 4/2x32" if part == "kernels" else part for part in parts]
    launched = {part["part"]: part["rows"][-1]["launches"] for part in found["parts"]}
    assert launched["kernels 4/2x32"]["exact_kernel"] > 0
    assert all(launched["layer"][name] > 0 for name in ("split_kernel", "coded_split_kernel"))
    if parts == PARTS:
        names = ("quantize", "dequantize", "split", "merge")
        assert all(launched["models"][f"{name}_kernel"] > 0 for name in names)
        assert launched["llama"]["quantize_kernel"] > 0


STAND_INS = """
import os, time
def fails(part): raise RuntimeError("first line\\nsecond line")
def dies(part, shape): part.row(shape=shape); os.kill(os.getpid(), 9)
def hangs(part): time.sleep(1000)
def is_wrong(part): part.dry = False; part.check("one", float("nan"), 1.0); part.dry = True
def is_right(part): part.dry = False; part.check("one", 0.5, 1.0); part.dry = True
parts.PARTS.update(environment=fails, kernels=dies, models=hangs, layer=is_wrong, llama=is_right)
gpu_check._GRACE = 1
"""


def test_what_fails_dies_or_hangs_costs_the_other_parts_nothing(tmp_path):
    output = tmp_path / "check.json"
    done = run(STAND_INS, {}, "--dry_run", "--shapes", "4/2x32", "--minutes", "0.02", "--output", str(output))
    verdicts = {part["part"]: part["verdict"] for part in json.loads(output.read_text())["parts"]}
    assert verdicts == {
        "environment": "failed",
        "kernels 4/2x32": "died (-9)",
        "models": "killed: out of time",
        "layer": "failed",
        "llama": "right",
    }
    assert done.returncode == 4 and "4 of 5 parts failed" in done.stdout
    assert "RuntimeError: first line" in done.stdout and "second line" not in done.stdout + done.stderr


INTERPRETED = """
import torch
from pathlib import Path
from types import SimpleNamespace
torch.manual_seed(0)
def part(name, *calls):
    here = gpu_check.Part(name, SimpleNamespace(dry_run=False, traceback=True), 100, Path(sys.argv[1]))
    here.device = torch.device("cpu")
    for call, *arguments in calls:
        with here.case(name):
            call(here, "4/2x16", *arguments)
    return here.failures
decodes = [(parts.check_decode, form, 37, 2, new) for form, new in (("RotateKV2+", 1), ("QuaRot2", 2))]
assert part("right", (parts.check_quantize, 2), (parts.check_dequantize, 3), *decodes) == 0
kernels = parts.kernels
decode, quantize, dequantize = kernels.decode_attention, kernels.quantize_into_blocks, kernels.dequantize_blocks
kernels.decode_attention = lambda *args, **step: 1.01 * decode(*args, **step)
kernels.quantize_into_blocks = lambda x, *rest, **named: quantize(1.1 * x, *rest, **named)
kernels.dequantize_blocks = lambda *args: dequantize(*args) + 0.01
assert part("wrong", (parts.check_quantize, 2), (parts.check_dequantize, 3), *decodes) == 2 + 2 + 4
sys.exit(0)
"""


@pytest.mark.slow
def test_the_checks_of_numbers_pass_right_kernels_and_bite_wrong_ones(tmp_path):
    done = run(INTERPRETED, {"TRITON_INTERPRET": "1"}, str(tmp_path / "rows"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "--dry_run"), (["--parts", "kernel"], "--parts kernel"), (["--shapes", "9x64"], "--shapes 9x64")],
)
def test_wrong_flags_are_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_has_gpu", lambda: False)
    assert gpu_check.main(flags) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
