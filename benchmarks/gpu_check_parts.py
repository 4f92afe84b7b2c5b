"""The parts of ``gpu_check.py``; each takes the ``Part`` it reports to."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from benchmarks.decode_attention import fused_step, percentile, plus_step
from benchmarks.gpu_check_part import Part, heads_of
from benchmarks.random_models import patch_random, random_llama
from rotatekv import RotateKVCache
from rotatekv.compat import CACHE_NAME
from rotatekv.evals.results import environment as versions
from rotatekv.kernels import triton as kernels
from rotatekv.kernels.blocks import dequantize_blocks_reference
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.hadamard import channels_to_heads, head_group_size, rotate_channels
from rotatekv.kernels.layout import BLOCK, allocate_blocks, unpack_blocks
from rotatekv.kernels.quantize import dequantize_groups, quantize_groups
from rotatekv.kernels.transform_coding import Transform, dequantize_components, unpack_components

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whose files import each other
from frame_cases import FrameShape, FrameWrite, random_frame_write, random_frames_step, written_by_torch
from kernel_cases import Shape, error, random_step

# Relative errors of all numbers together. Rounding an output to bfloat16 costs 2e-3.
BOUND = 1e-3
OTHER_CODES = 1e-2  # that ties, and scales that tie, may make other than torch's
MODEL_BOUND = 1e-2  # of a float32 model's logits, where a rounding of a key may tip
FLUSHED = 2**28  # bytes written before a timed step, so that the L2 cache holds nothing of it
GIB = 2**30


# --- environment -----------------------------------------------------------------------------------


def environment(part: Part) -> None:
    found = versions()
    part.row(
        torch=torch.__version__,
        transformers=transformers.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        commit=(found["git_commit"] or "")[:7],
    )
    if not part.dry:
        card = torch.cuda.get_device_properties(part.device)
        part.row(
            card=card.name,
            capability=f"{card.major}.{card.minor}",
            multiprocessors=card.multi_processor_count,
            gib=card.total_memory / GIB,
            cuda=torch.version.cuda,
            shared_kib=getattr(card, "shared_memory_per_block_optin", 0) // 1024,
        )
    part.row(copy_gb_per_s=copy_bandwidth(part))


def _triton_version() -> str:
    import triton

    return triton.__version__


def copy_bandwidth(part: Part) -> float:
    """GB/s of a copy, bytes read + written."""
    source = torch.ones(2**12 if part.dry else GIB // 4, device=part.device)
    target = torch.empty_like(source)
    milliseconds = min(timed(part, lambda: target.copy_(source))[0] for _ in range(10))
    return 2 * source.nbytes / max(milliseconds, 1e-6) / 1e6


def timed(part: Part, step: Callable) -> tuple[float, float]:
    """Milliseconds of the device, with all launches queued before it begins, and of the host to queue them."""
    if part.dry:
        start = time.perf_counter()
        step()
        return (took := 1e3 * (time.perf_counter() - start)), took
    torch.empty(FLUSHED, dtype=torch.int8, device=part.device).zero_()
    torch.cuda._sleep(4_000_000)  # cycles, 2 ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


# --- kernels ---------------------------------------------------------------------------------------


def kernels_part(part: Part, shape: str) -> None:
    """Around the lengths at which the decode kernel splits its work and those that do not fill a block."""
    lengths, batches = ((241,), (3,)) if part.dry else ((1, 17, 239, 240, 241, 255, 256, 257, 4097), (1, 3))
    first, *others = part.options.forms.split(",")
    decodes = [(first, tokens, batch, new) for new in (1, 16) for tokens in lengths for batch in batches]
    decodes += [(form, tokens, 3, 1) for form in others for tokens in lengths[-2:]]
    for bits in sorted({_bits(form) for form in (first, *others) if not form.endswith("+")}):
        with part.case(f"quantize {bits} bits"):
            check_quantize(part, shape, bits)
            check_dequantize(part, shape, bits)
    for form in (form for form in (first, *others) if form.endswith("+")):
        with part.case(f"write {form}"):
            check_coded_write(part, shape, form)
    for form, tokens, batch, new in part.cases(decodes):
        with part.case(f"decode {form}, {tokens} tokens, batch {batch}, {new} new"):
            check_decode(part, shape, form, tokens, batch, new)


def check_quantize(part: Part, shape: str, bits: int) -> None:
    """Not more error than torch's rounding makes, and the same codes but for ties."""
    _, kv_heads, dim = heads_of(shape)
    channels, start, tokens, batch = kv_heads * dim, 5, 57, 3
    x = torch.randn(batch, tokens, channels, device=part.device)
    order = torch.randperm(channels, device=part.device)
    for width in (head_group_size(kv_heads, dim, 4) * dim, 0):
        blocks = allocate_blocks(batch, -(-(start + tokens) // BLOCK), channels, kv_heads, bits, part.device)
        kernels.quantize_into_blocks(
            channels_to_heads(x, dim), blocks, start, bits, dim, 0.8, order.int(), rotation_width=width
        )
        codes, scale, zero = (y[:, start:] for y in unpack_blocks(blocks, start + tokens, bits))
        truth = (rotate_channels(x, width) if width else x)[..., order]
        wanted = quantize_groups(truth, bits, dim, 0.8)
        found = codes[..., order], scale, zero
        errors = [error(dequantize_groups(*of).double(), truth.double()) for of in (found, wanted)]
        other = (found[0] != wanted[0]).float().mean().item()
        part.check(f"quantize {bits} bits, W {width}", errors[0] / errors[1] - 1, BOUND, other_codes=other)


def check_dequantize(part: Part, shape: str, bits: int) -> None:
    _, kv_heads, dim = heads_of(shape)
    for width in (head_group_size(kv_heads, dim, 4) * dim, 0):
        step = on_device(random_step(_case(shape, 250, 3, bits)), part.device)
        keys, groups = step["keys"], step["group_of_channel"]
        found = kernels.dequantize_blocks(keys, 250, bits, groups, dim, width)
        truth = dequantize_blocks_reference(keys, 250, bits, groups, dim, width, dtype=torch.float64)
        part.check(f"dequantize {bits} bits, W {width}", error(found, truth), BOUND)


def check_coded_write(part: Part, shape: str, form: str) -> None:
    """The codes of torch but for ties, of keys and of values; and these read."""
    _, kv_heads, dim = heads_of(shape)
    for bits, of_values in zip(_coded_bits(form), (False, True), strict=True):
        case = FrameWrite(bits, 2, kv_heads, dim, 57, 5, 0 if of_values else dim, of_values)
        write = on_device(random_frame_write(case), part.device)
        kernels.quantize_into_frames(**write)
        codes, scale = (x[:, 5:] for x in unpack_components(write["packed"], 62, write["transform"]))
        true_codes, true_scale = written_by_torch(write)
        other = (codes != true_codes).float().mean().item()
        scales = (scale != true_scale).float().mean().item()
        part.check(f"write {form}", other, OTHER_CODES, of_values=of_values, other_scales=scales)
        out = torch.empty(2, kv_heads, 62, dim, device=part.device)
        kernels.read_components(write["packed"], 62, write["transform"], out)
        truth = dequantize_components(
            *unpack_components(write["packed"], 62, write["transform"]), write["transform"]
        ).transpose(1, 2)
        part.check(f"read {form}", error(out, truth.double()), BOUND, of_values=of_values)


def check_decode(part: Part, shape: str, form: str, tokens: int, batch: int, new: int) -> None:
    """With and without sinks, a recent window and a sliding one; the first row padded, the second without its start."""
    before_rope = form.startswith("RotateKV")
    for exact in (False, True):
        if tokens < new + 20 * exact:
            continue
        case = _case(shape, tokens, batch, _bits(form))
        case = replace(
            case,
            query_tokens=new,
            window=12 * exact,
            sinks=5 * exact,
            padding=(min(3, tokens - new),),
            heads_per_group=case.heads_per_group if before_rope else int(form.startswith("QuaRot")),
            rotary_dim=case.head_dim if before_rope else 0,
            unrotate_values=not form.startswith("RTN"),
            dropped=(0, 64),
            sliding_window=200 * exact,
            exact_dtype=torch.bfloat16,
        )
        made = random_step(case)
        if form.endswith("+"):
            bits, value_bits = _coded_bits(form)
            made = random_frames_step(FrameShape(bits, case, value_bits, dropped=64 * exact))
        step = on_device(made, part.device)
        found = kernels.decode_attention(**step)
        truth = found if part.dry else decode_attention_reference(**step, dtype=torch.float64)
        label = f"decode {form}, {tokens} tokens, batch {batch}, {new} new"
        part.check(label, error(found, truth), BOUND, exact=exact)


def _case(shape: str, tokens: int, batch: int, bits: int) -> Shape:
    heads, kv_heads, dim = heads_of(shape)
    group = head_group_size(kv_heads, dim, 4)
    return Shape(batch, heads // kv_heads, kv_heads, dim, group, tokens=tokens, key_bits=bits, value_bits=bits)


def _coded_bits(form: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the groups of keys, as calibration spreads them, and of values."""
    return {2: (4, 2, 1, 1), 3: (5, 3, 2, 2), 4: (5, 5, 3, 3)}[_bits(form)], (_bits(form),)


def _bits(form: str) -> int:
    return int(form.rstrip("+")[-1])


def on_device(x, device: torch.device):
    """Arguments of a kernel, with all their tensors moved."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: on_device(y, device) for name, y in x.items()}
    if isinstance(x, Transform):  # whose bits stay
        return x.on(device)
    if isinstance(x, tuple):
        return tuple(on_device(y, device) for y in x)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{name: on_device(getattr(x, name), device) for name in x.__dataclass_fields__})
    return x


# --- models ----------------------------------------------------------------------------------------


def models(part: Part) -> None:
    """Every preset, a prompt of two rows with padding, and steps over the ends of blocks and splits."""
    shape = part.options.shapes.split(",")[0]
    model = random_llama(*heads_of(shape), layers=1, device=part.device)
    for preset in part.cases(part.options.presets.split(",")):
        with part.case(preset), patch_random(model, preset):
            calls, found = logits_of(part, model, "triton")
            _, wanted = logits_of(part, model, "reference") if not part.dry else (0, found)
            part.check(preset, error(found, wanted.double()), MODEL_BOUND, fused_steps=calls)
    for preset in part.cases(part.options.presets.split(",") if not part.dry else []):
        with part.case(f"generate, bfloat16, {preset}"), patch_random(model.to(torch.bfloat16), preset):
            ids = torch.arange(3, 67, device=part.device).view(2, 32)
            out = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
            part.row(case=f"generate, bfloat16, {preset}", tokens=out.shape[1])


def logits_of(part: Part, model: torch.nn.Module, backend: str) -> tuple[int, torch.Tensor]:
    """Steps that a fused kernel took, and logits of the prompt's end and of the steps after it, (2, T, V)."""
    steps = [1, 2] if part.dry else [*[1] * 20, 5, 16]
    prompt, calls, kernel = 231, [], kernels.decode_attention
    ids = torch.randint(3, 500, (2, prompt + sum(steps)), generator=torch.Generator().manual_seed(0)).to(part.device)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start, found = RotateKVCache.for_model(model), 0, []

    def counted(*args, **options) -> torch.Tensor:
        calls.append(1)
        return kernel(*args, **options)

    with _backend(backend) if not part.dry else nullcontext():
        kernels.decode_attention = counted
        try:
            for new in [prompt, *steps]:
                end = start + new
                out = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    **{CACHE_NAME: cache},
                )
                found.append(out.logits[:, -min(new, 16) :])
                start = end
        finally:
            kernels.decode_attention = kernel
    return len(calls), torch.cat(found, dim=1)


def _backend(name: str):
    from unittest.mock import patch

    return patch.dict("os.environ", ROTATEKV_BACKEND=name)


# --- layer -----------------------------------------------------------------------------------------


def layer(part: Part) -> None:
    """Microseconds of the device and of the host's launches, and GB/s of the bytes of K and V against a copy's."""
    copied = copy_bandwidth(part)
    lengths = [300] if part.dry else [int(x) for x in part.options.lengths.split(",")]
    cases = [(shape, tokens) for shape in part.options.shapes.split(",")[:2] for tokens in lengths]
    for number, (shape, tokens) in enumerate(cases):
        left = (part.deadline - time.monotonic()) / (len(cases) - number)
        steps = {}
        for name, make in ways(part, shape, tokens).items():
            with part.case(f"{shape}, {tokens} tokens, {name}"):
                step, size = make()
                step()  # compiled
                steps[name] = step, size
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        end = time.monotonic() + 0.5 * left
        while steps and not (len(next(iter(times.values()))) >= 5 and time.monotonic() > end) and _most(part, times):
            for name, (step, _) in steps.items():  # in turn
                times[name].append(timed(part, step))
        for name, found in times.items():
            p20, p50, p80 = (percentile([gpu for gpu, _ in found], share) for share in (0.2, 0.5, 0.8))
            rate = steps[name][1] / max(p50, 1e-6) / 1e6
            part.row(
                shape=shape,
                tokens=tokens,
                way=name,
                p20_us=1e3 * p20,
                p50_us=1e3 * p50,
                p80_us=1e3 * p80,
                host_us=1e3 * percentile([host for _, host in found], 0.5),
                megabytes=steps[name][1] / 1e6,
                gb_per_s=rate,
                share_of_copy=rate / copied,
                runs=len(found),
            )


def _most(part: Part, times: dict) -> bool:
    return len(next(iter(times.values()))) < (1 if part.dry else 200)


def ways(part: Part, shape: str, tokens: int) -> dict[str, Callable[[], tuple[Callable, int]]]:
    """name → what makes a decode step and the bytes of its K and V."""
    heads, kv_heads, dim = heads_of(shape)
    full = heads, kv_heads, dim, head_group_size(kv_heads, dim, 4)

    def attention(backend: SDPBackend | None) -> tuple[Callable, int]:
        q, k, v = (
            torch.randn(1, n, t, dim, dtype=torch.bfloat16, device=part.device)
            for n, t in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens))
        )

        def step() -> torch.Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return step, k.nbytes + v.nbytes

    def fused(form: str) -> Callable:
        method = form.replace(str(_bits(form)), "")
        if form.endswith("+"):
            key_bits, value_bits = _coded_bits(form)
            return lambda: plus_step(full, tokens, key_bits, value_bits[0], kernels, part.device)
        return lambda: fused_step(full, tokens, _bits(form), method, kernels, part.device)

    return {
        "flash bf16": lambda: attention(None if part.dry else SDPBackend.FLASH_ATTENTION),
        "sdpa bf16": lambda: attention(None),
        **{form: fused(form) for form in part.options.forms.split(",")},
    }


# --- llama -----------------------------------------------------------------------------------------

LLAMA3_8B: dict = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "initializer_range": 0.02}
LAYER_GIB, REST_GIB = 0.41, 1.97  # of its weights in bfloat16


def llama(part: Part) -> None:
    """Prefill, decode, memory and the largest batch, the ways in turn."""
    options = part.options
    heads, layers, changes = (32, 8, 128), 32, LLAMA3_8B
    context = options.context
    if part.dry:
        heads, layers, changes, context = heads_of(options.shapes.split(",")[0]), 1, {}, 50
    else:
        free = torch.cuda.mem_get_info(part.device)[0] / GIB
        layers = max(1, min(layers, int((0.6 * free - REST_GIB) / LAYER_GIB)))
    model = random_llama(*heads, layers=layers, device=part.device, dtype=torch.bfloat16, **changes)
    part.row(layers=layers, context=context, weights_gib=sum(x.nbytes for x in model.parameters()) / GIB)
    presets = options.presets.split(",")
    ways = ("stock", *(name for name in ("RotateKV2", "RotateKV2+", "QuaRot2") if name in presets))
    for number, way in enumerate(part.cases([*ways, *ways])):
        with part.case(f"{way}, batch 1"), nullcontext() if way == "stock" else patch_random(model, way):
            one_sequence(part, model, way, context, find_batch=number < len(ways))
        release()


def one_sequence(part: Part, model: torch.nn.Module, way: str, context: int, find_batch: bool) -> None:
    """Time a prompt and the steps after it; then, where asked for, how many such sequences fit."""
    cuda, steps = not part.dry, 2 if part.dry else 24
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (1, context), device=part.device)
    cache = DynamicCache(config=model.config) if way == "stock" else RotateKVCache.for_model(model)
    prefill = seconds(part, lambda: forward(model, ids, cache))
    times = [seconds(part, lambda: forward(model, ids[:, :1], cache)) for _ in range(steps)]
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if cuda else 0.0
    held = (torch.cuda.memory_allocated() - before) / GIB if cuda else 0.0
    part.row(
        way=way,
        batch=1,
        context=context,
        prefill_s=prefill,
        tokens_per_s=1 / percentile(times, 0.5),
        p20_ms=1e3 * percentile(times, 0.2),
        p80_ms=1e3 * percentile(times, 0.8),
        peak_gib=peak,
        cache_gib=held,
    )
    if find_batch:
        largest_batch(part, model, way, cache, ids)


def largest_batch(part: Part, model: torch.nn.Module, way: str, cache, ids: torch.Tensor) -> None:
    """Repeat the sequence: doubled until a decode step runs out of memory, then halfway between to 1/8."""
    fits, too_many, speed = 0, None, 0.0
    batch = 2
    while time.monotonic() < part.deadline and (too_many is None or too_many - fits > max(fits // 8, 1)):
        try:
            speed = tokens_per_second(part, model, cache, ids, batch)
            fits = batch
        except torch.OutOfMemoryError:
            too_many = batch
        release()
        if part.dry and batch == 2:
            break
        batch = 2 * fits if too_many is None else (fits + too_many) // 2
        if batch < 2:
            break
    part.row(way=way, largest_batch=fits, too_many=too_many, tokens_per_s=speed)


def tokens_per_second(part: Part, model: torch.nn.Module, cache, ids: torch.Tensor, batch: int) -> float:
    from copy import deepcopy

    many = deepcopy(cache)
    many.batch_repeat_interleave(batch)
    new = ids[:, :1].expand(batch, 1)
    times = [seconds(part, lambda: forward(model, new, many)) for _ in range(1 if part.dry else 4)]
    return batch / min(times)


def forward(model: torch.nn.Module, ids: torch.Tensor, cache) -> torch.Tensor:
    return model(ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits


def seconds(part: Part, step: Callable) -> float:
    """Wall time of a step, waited for."""
    start = time.perf_counter()
    step()
    if not part.dry:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[..., None]] = {
    "environment": environment,
    "kernels": kernels_part,
    "models": models,
    "layer": layer,
    "llama": llama,
}
