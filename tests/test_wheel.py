"""The wheel, built from a copy of the tree and installed in an environment of its own, outside any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from rotatekv import interrupts

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--quiet", "--no-deps", "--no-index"]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("rotatekv", "reorder_indices", "tests", "visualize"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE", *SCRIPTS):
        shutil.copy(ROOT / name, source)
    build = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The environment's folder of commands. All but the package itself is that of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    install = [*PIP, "--python", str(folder / "bin" / "python"), "install", *OFFLINE, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin"


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": folder, "env": outside | {"HF_HUB_OFFLINE": "1"} | environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_it_holds_the_package_the_scripts_and_no_more(wheel):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "rotatekv").glob("**/*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts and not path.name.startswith(".")}
    wanted |= {"rotatekv" / path.relative_to(ROOT) for path in ROOT.glob("reorder_indices/*.safetensors")}
    with zipfile.ZipFile(wheel) as file:
        held = {Path(name) for name in file.namelist() if ".dist-info/" not in name}
    assert held == wanted | set(map(Path, SCRIPTS))


def test_an_installed_package_evaluates(installed, tmp_path):
    flags = ["--dataset", "essays", "--limit", "1", "--PPL_seq_length", "128", "--method", "RotateKV2"]
    done = run([installed / "rotatekv-ppl", *flags], tmp_path)
    assert done.returncode == 0 and "essays" in done.stdout and "perplexity: " in done.stdout, done.stderr
    (metrics,) = tmp_path.glob("results/ppl/*/*/metrics.json")
    assert json.loads(metrics.read_text())["config"]["method"] == "RotateKV2"


def test_it_runs_without_what_only_evaluations_need(installed, tmp_path):
    """The scripts that rotatekv-reproduce starts lie beside it."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys('datasets gguf lm_eval matplotlib peft rouge_score PIL'.split()))\n"
        "import torch, rotatekv, rotatekv.cli, rotatekv.statistics, rotatekv.evals.efficiency\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, head_dim=16,\n"
        "    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4))\n"
        "rotatekv.patch_model(model, 'RTN2')\n"
        "out = model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, pad_token_id=0)\n"
        "from rotatekv.reproduce.runs import ROOT\n"
        f"print(rotatekv.__file__, out.shape[1], all((ROOT / name).is_file() for name in {SCRIPTS}))\n"
    )
    done = run([installed / "python", "-c", code], tmp_path)
    (package,) = installed.parent.glob("lib/*/site-packages/rotatekv/__init__.py")
    assert done.stdout.splitlines()[-1:] == [f"{package} 7 True"], done.stderr


def test_ctrl_c_while_a_command_imports_is_one_line(installed, tmp_path):
    """torch is a module here in whose import Ctrl-C is pressed."""
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(f"import signal\n{code}print('not interrupted')\n")
    commands = sorted(installed.glob("rotatekv-*"))
    assert len(commands) == len(SCRIPTS) + 1  # and the demo
    for command in commands:
        done = run(["env", "--default-signal=INT", command], tmp_path, PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{interrupts.LINE}\n"), command.name
