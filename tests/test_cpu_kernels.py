"""The CPU kernels against plain torch: every instruction set this CPU has, over odd shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Shape, Write, assert_written, error, pack_blocks, random_step, random_write, with_options

from rotatekv.kernels import cpu
from rotatekv.kernels.blocks import quantize_into_blocks_reference
from rotatekv.kernels.cpu import build
from rotatekv.kernels.decode_attention import decode_attention_reference
from rotatekv.kernels.hadamard import has_hadamard
from rotatekv.kernels.layout import Blocks, allocate_blocks, unpack_blocks, write_blocks

if build._load("attention", "portable") is None:
    pytest.skip("no g++", allow_module_level=True)

INSTRUCTION_SETS = cpu.available_instruction_sets()
# head_dim, key/value heads, heads per rotation group (0: not rotated)
GEOMETRIES = [
    (64, 1, 1),
    (128, 1, 1),
    (64, 3, 3),
    (80, 3, 1),
    (80, 4, 4),
    (96, 4, 4),
    (128, 4, 4),
    (96, 2, 1),
    (64, 2, 2),
    (64, 4, 4),
    (80, 2, 2),
    (48, 2, 1),
    (16, 3, 3),
    (16, 4, 2),
    (32, 3, 3),
    (64, 16, 16),
    (112, 2, 0),
    (64, 2, 0),
    (128, 8, 4),
    (112, 2, 2),
    (112, 3, 3),
    (144, 3, 1),
    (176, 1, 1),
]


@st.composite
def shapes(draw) -> Shape:
    head_dim, kv_heads, heads_per_group = draw(st.sampled_from(GEOMETRIES))
    batch = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 600))
    window = draw(st.sampled_from([0, 1, 5, min(40, tokens)])) if tokens > 5 else 0
    groups = [g for g in (head_dim, 16, 32) if head_dim % g == 0]
    tokens_per_scale = draw(st.sampled_from([0, 0, 16, 32, 48, 128]))
    return Shape(
        batch=batch,
        repeat=draw(st.sampled_from([1, 2, 3, 4, 7])),
        kv_heads=kv_heads,
        head_dim=head_dim,
        heads_per_group=heads_per_group,
        query_tokens=min(draw(st.sampled_from([1, 1, 2, 5, 16])), tokens),
        tokens=tokens,
        window=window,
        sinks=draw(st.sampled_from([0, 0, 3, 20])),
        key_bits=draw(st.integers(2, 4)),
        value_bits=draw(st.integers(2, 4)),
        value_group=draw(st.sampled_from(groups)),
        tokens_per_scale=tokens_per_scale,
        rotary_dim=draw(st.sampled_from([0, head_dim, head_dim // 2, 8])),
        unrotate_values=has_hadamard(head_dim) and draw(st.booleans()),
        padding=tuple(draw(st.integers(0, tokens)) for _ in range(batch)),
        dropped=tuple(draw(st.sampled_from([0, 0, 16, 1000])) for _ in range(batch)),
        sliding_window=draw(st.sampled_from([0, 0, 1, 17, 256, 300])),
        exact_dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shape=shapes(), instruction_set=st.sampled_from(INSTRUCTION_SETS), threads=st.integers(1, 3))
def test_attention_is_as_exact_as_torch_in_bfloat16(shape, instruction_set, threads):
    step = random_step(shape)
    truth = decode_attention_reference(**step, dtype=torch.float64)
    out = cpu.decode_attention(**step, threads=threads, instruction_set=instruction_set)
    eager = decode_attention_reference(**step, dtype=torch.bfloat16)
    assert error(out, truth) <= 2 * error(eager, truth) + 1e-6
    assert error(out, truth) < 2e-3


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_keys_are_exact_to_float32(instruction_set):
    """With constant values, weights do not round away: what is left is the error of the scores alone."""
    step = random_step(Shape(tokens=500, rotary_dim=64, kv_heads=3, sinks=4, window=300, key_bits=3))
    step = {**step, "packed_tokens": 0}
    exact = step["exact"]
    rows, columns = torch.zeros(500, dtype=torch.int32), torch.arange(500, dtype=torch.int32)
    keys, values = (torch.randn(500, 3, 64).half() for _ in range(2))
    step["exact"] = type(exact)(rows, columns, keys, values)
    truth = decode_attention_reference(**step, dtype=torch.float64)
    eager = decode_attention_reference(**step)
    out = cpu.decode_attention(**step, instruction_set=instruction_set)
    assert error(out, truth) <= 2 * error(eager, truth) + 1e-7


def test_far_positions_do_not_drift():
    shape = Shape(tokens=40_003, rotary_dim=64, query_tokens=2, padding=(3,))
    step = random_step(shape)
    truth = decode_attention_reference(**step, dtype=torch.float64)
    assert error(cpu.decode_attention(**step), truth) < 1e-3


@pytest.mark.parametrize("tokens_per_scale", [0, 32])
def test_room_for_more_blocks_changes_nothing(tokens_per_scale):
    shape = Shape(batch=2, tokens=70, rotary_dim=64, key_bits=3, value_bits=4, tokens_per_scale=tokens_per_scale)
    step = random_step(shape)
    out = cpu.decode_attention(**step)
    for name in ("keys", "values"):
        step[name] = {k: torch.cat([x, torch.full_like(x[:, :1], 77)], 1) for k, x in step[name].items()}
    assert torch.equal(cpu.decode_attention(**step), out)


@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_sliding_window_reads_no_block_that_no_query_sees(instruction_set, query_tokens):
    """Those blocks hold scales that are no numbers."""
    shape = Shape(batch=2, tokens=700, query_tokens=query_tokens, rotary_dim=64, sliding_window=300, window=2)
    step = random_step(shape)
    out = cpu.decode_attention(**step, instruction_set=instruction_set)
    unseen = (700 - query_tokens - 300 + 1) // 16
    for name in ("keys", "values"):
        step[name]["scale"][:, :unseen] = torch.nan
    assert torch.equal(cpu.decode_attention(**step, instruction_set=instruction_set), out) and not out.isnan().any()
    step["keys"]["scale"][:, unseen] *= -1
    assert not torch.equal(cpu.decode_attention(**step, instruction_set=instruction_set), out)


# key/value heads, head_dim, channels that share a scale, heads per rotation group
WRITES = [
    (3, 64, 64, 3),
    (1, 128, 128, 1),
    (4, 80, 80, 4),
    (3, 16, 16, 1),
    (3, 24, 24, 1),
    (3, 8, 8, 1),
    (10, 5, 5, 0),
    (8, 128, 128, 4),
    (2, 96, 48, 1),
    (3, 112, 112, 3),
    (4, 112, 112, 4),
    (2, 144, 72, 1),
    (20, 80, 80, 1),
    (6, 4, 8, 3),
]


def written(step: dict, write, **options):
    """The blocks after ``write``, and what they are written over: a copy."""
    packed = Blocks({name: plane.clone() for name, plane in step["packed"].items()})
    write(**{**step, "packed": packed}, **options)
    return packed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(0, 70),
    start=st.integers(0, 40),
    geometry=st.sampled_from(WRITES),
    magnitude=st.sampled_from([1e-3, 1, 3e4]),
    clip=st.sampled_from([0.8, 1.0]),
    reorder=st.booleans(),
    rotate=st.booleans(),
    rotary=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["heads", "tokens", "slice"]),
    threads=st.integers(1, 3),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 10**6),
)
def test_writes_are_those_of_torch(
    bits,
    batch,
    tokens,
    start,
    geometry,
    magnitude,
    clip,
    reorder,
    rotate,
    rotary,
    dtype,
    layout,
    threads,
    instruction_set,
    seed,
):
    """Bit for bit where nothing is rotated: the order of a Hadamard transform's additions is not torch's."""
    kv_heads, head_dim, group_size, heads_per_group = geometry
    step = random_write(
        Write(
            batch=batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tokens=tokens,
            start=start,
            bits=bits,
            group_size=group_size,
            clip_ratio=clip,
            reorder=reorder,
            heads_per_group=heads_per_group * rotate,
            rotary_dim=head_dim // 4 * 2 * rotary,
            dtype=dtype,
            layout=layout,
            magnitude=magnitude,
            seed=seed,
        )
    )
    made = written(step, cpu.quantize_into_blocks, threads=threads, instruction_set=instruction_set)
    assert_written(made, written(step, quantize_into_blocks_reference), step, exactly=not step["rotation_width"])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("magnitude", [1e-7, 1, 3e4])
def test_odd_numbers_are_quantized_bit_for_bit_as_by_torch(magnitude, instruction_set):
    step = random_write(Write(batch=2, tokens=20, bits=3, clip_ratio=0.8, magnitude=magnitude, reorder=True))
    heads = step["heads"]
    heads[:, :, 0], heads[:, :, 1], heads[0, :, 2], heads[:, 1, 3] = 0.0, 5.0, 1e6, torch.arange(64) * 0.5 * magnitude
    made = written(step, cpu.quantize_into_blocks, instruction_set=instruction_set)
    assert_written(made, written(step, quantize_into_blocks_reference), step, exactly=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(bits=st.integers(2, 4), lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_blocks_written_in_parts_equal_blocks_packed_at_once(bits, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    codes = torch.randint(0, 2**bits, (2, tokens, 48), generator=generator, dtype=torch.uint8)
    scale = torch.rand(2, tokens, 3, generator=generator).half()
    zero = torch.randint(-127, 128, (2, tokens, 3), generator=generator, dtype=torch.int8)
    whole = pack_blocks(codes, scale, zero, bits)
    assert all(torch.equal(a, b) for a, b in zip(unpack_blocks(whole, tokens, bits), (codes, scale, zero), strict=True))
    parts, start = allocate_blocks(2, -(-tokens // 16), 48, 3, bits), 0
    for length in lengths:
        piece = slice(start, start + length)
        write_blocks(parts, start, codes[:, piece], scale[:, piece], zero[:, piece], bits)
        start += length
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


GOOD = Shape(batch=2, tokens=70, window=5, sinks=3, rotary_dim=64, key_bits=3, value_bits=4)
TOKEN_GROUPS = replace(GOOD, tokens_per_scale=32)


def _damaged_tensors(step: dict) -> list:
    """Every tensor of the call, each with a wrong dtype, a wrong shape and wrong strides."""
    cases = []
    for name in ("queries", "group_of_channel", "first_seen", "origin"):
        if step[name] is None:
            continue
        cases += [({**step, name: bad}, name) for bad in _damage(step[name])]
    for name in ("keys", "values"):
        for plane, tensor in step[name].items():
            cases += [({**step, name: {**step[name], plane: bad}}, f"{name}.{plane}") for bad in _damage(tensor)]
    for name in ("batch_index", "token_index", "keys", "values"):
        for bad in _damage(getattr(step["exact"], name)):
            fields = {**vars(step["exact"]), name: bad}
            cases.append(({**step, "exact": type(step["exact"])(**fields)}, f"exact.{name}"))
    for name in ("coarse_cos", "coarse_sin", "fine_cos", "fine_sin"):
        rope = step["options"].rope
        for bad in _damage(getattr(rope, name)):
            cases.append((with_options(step, rope=type(rope)(**{**vars(rope), name: bad})), f"rope.{name}"))
    return cases


def _damage(x: torch.Tensor) -> list:
    other = torch.float64 if x.is_floating_point() else torch.int64
    stretched = torch.stack([x, x], -1)[..., 0]  # the same numbers, every second in memory
    return [x.to(other), x[:-1], x.unsqueeze(0), stretched, None]


@pytest.mark.parametrize("shape", [GOOD, TOKEN_GROUPS], ids=["token scales", "channel scales"])
def test_damaged_tensors_are_refused(shape):
    for step, name in _damaged_tensors(random_step(shape)):
        with pytest.raises(ValueError):
            cpu.decode_attention(**step)
            pytest.fail(f"accepted a damaged {name}")


def _set(tensor: torch.Tensor, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[-1] = value
    return changed


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("packed tokens", lambda s: {**s, "packed_tokens": 10_000, "total_tokens": 10_000}),
        ("packed_tokens", lambda s: {**s, "packed_tokens": -1}),
        ("packed_tokens", lambda s: {**s, "total_tokens": 3}),
        ("too short", lambda s: {**s, "total_tokens": 100_000}),
        ("2\\^31", lambda s: {**s, "total_tokens": 2**40}),
        ("group is not there", lambda s: {**s, "group_of_channel": _set(s["group_of_channel"], 3)}),
        ("group is not there", lambda s: {**s, "group_of_channel": _set(s["group_of_channel"], -1)}),
        ("first_seen", lambda s: {**s, "first_seen": _set(s["first_seen"], 71)}),
        ("first_seen", lambda s: {**s, "first_seen": _set(s["first_seen"], -1)}),
        ("too short", lambda s: {**s, "origin": _set(s["origin"], 2**31 - 1)}),
        ("sliding_window", lambda s: with_options(s, sliding_window=-1)),
        ("threads", lambda s: {**s, "threads": -1}),
        ("rotation_width", lambda s: with_options(s, rotation_width=100)),
        ("rotation_width", lambda s: with_options(s, rotation_width=-64)),
        ("rotation_width", lambda s: with_options(s, rotation_width=32)),
        ("rotation_width", lambda s: with_options(s, rotation_width=128)),
        ("head_dim", lambda s: with_options(s, head_dim=32)),
        ("bits", lambda s: with_options(s, key_bits=5)),
        ("bits need", lambda s: with_options(s, key_bits=2)),
        ("query_tokens", lambda s: {**s, "queries": torch.zeros(2, 9, 17, 64)}),
        ("kv_heads", lambda s: {**s, "queries": torch.zeros(2, 8, 1, 64)}),
        ("exact batch", lambda s: {**s, "exact": _exact(s, batch_index=2)}),
        ("ascend", lambda s: {**s, "exact": _exact(s, batch_index=0)}),
        ("exact token index", lambda s: {**s, "exact": _exact(s, token_index=70)}),
        ("exact token index", lambda s: {**s, "exact": _exact(s, token_index=-1)}),
    ],
)
def test_numbers_out_of_range_are_refused(message, change):
    with pytest.raises(ValueError, match=message):
        cpu.decode_attention(**change(random_step(GOOD)))


def _keys(step: dict, **planes):
    return {**step, "keys": {**step["keys"], **planes}}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        *(("tokens_per_scale", lambda s, g=g: with_options(s, key_tokens_per_scale=g)) for g in (8, 24, -16, 2**40)),
        ("no scales", lambda s: with_options(s, key_tokens_per_scale=16)),
        ("no scales", lambda s: _keys(s, **{x: s["keys"][x][:, :2].contiguous() for x in ("scale", "zero")})),
        ("zero", lambda s: _keys(s, zero=s["keys"]["zero"][:, :2].contiguous())),
        ("scale", lambda s: _keys(s, scale=s["keys"]["scale"][..., :64].contiguous())),
        ("only there", lambda s: {**s, "group_of_channel": torch.zeros(192, dtype=torch.int32)}),
        ("4 dimensions", lambda s: with_options(s, key_tokens_per_scale=0)),
        ("packed tokens", lambda s: {**s, "packed_tokens": 90, "total_tokens": 90}),
    ],
)
def test_wrong_scales_per_channel_are_refused(message, change):
    """65 packed tokens of 192 channels, with three scales each."""
    step = random_step(TOKEN_GROUPS)
    cpu.decode_attention(**step)
    with pytest.raises(ValueError, match=message):
        cpu.decode_attention(**change(step))


def test_scales_per_token_need_the_channels_groups():
    step = random_step(GOOD)
    with pytest.raises(ValueError, match="group_of_channel is needed"):
        cpu.decode_attention(**{**step, "group_of_channel": None})
    with pytest.raises(ValueError, match="3 dimensions"):
        cpu.decode_attention(**with_options(step, key_tokens_per_scale=32))


def _exact(step: dict, **last):
    exact = step["exact"]
    return type(exact)(**{**vars(exact), **{name: _set(getattr(exact, name), value) for name, value in last.items()}})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": torch.zeros(2, 3, 5, 16, dtype=torch.float64)},
        {"heads": torch.zeros(2, 3, 5, 15)},
        {"heads": torch.zeros(1, 3, 5, 16)},
        {"heads": torch.zeros(2, 3, 16, 5).transpose(2, 3)},
        {"heads": torch.zeros(2, 5, 48)},
        {"heads": None},
        {"start": 28},
        {"start": -1},
        {"bits": 2},
        {"bits": 1},
        {"group_size": 24},
        {"clip_ratio": 0.0},
        {"clip_ratio": float("nan")},
        {"threads": -2},
        {"order": torch.zeros(48, dtype=torch.int32)},
        {"order": torch.arange(48)},
        {"order": torch.arange(1, 49, dtype=torch.int32)},
        {"order": torch.arange(-1, 47, dtype=torch.int32)},
        {"rotation_width": 24},
        {"rotation_width": -48},
        {"rotation_width": 32},
        {"rotation_width": 2**40},
        {"unrope": (torch.ones(2, 5, 9),) * 2},
        {"unrope": (torch.ones(2, 5, 8).double(),) * 2},
        {"unrope": (torch.ones(2, 5, 8), torch.ones(2, 5, 4))},
        {"unrope": (torch.ones(2, 4, 8),) * 2},
        {"unrope": (torch.ones(2, 5, 16)[..., ::2],) * 2},
        {"unrope": (torch.ones(5, 8),) * 2},
        {"unrope": (torch.ones(2, 5, 8), torch.ones(1, 5, 8).expand(2, 5, 8))},
        {"unrope": (torch.ones(2, 5, 8), None)},
    ],
)
def test_wrong_quantize_arguments_are_refused_and_nothing_is_written(change):
    packed = allocate_blocks(2, 2, 48, 3, 3)
    arguments = {"heads": torch.ones(2, 3, 5, 16), "packed": packed, "start": 0, "bits": 3, "group_size": 16}
    with pytest.raises(ValueError):
        cpu.quantize_into_blocks(**{**arguments, **change})
    assert not any(plane.any() for plane in packed.values())


def test_an_instruction_set_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(build, "available_instruction_sets", lambda: ("portable",))
    build._load.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot run 'avx2'"):
        assert build.load_library("attention", "avx2") is None
    build._load.cache_clear()


def test_the_environment_switches_kernels_off(monkeypatch):
    monkeypatch.setenv("ROTATEKV_CPU_KERNEL", "off")
    build.chosen_instruction_set.cache_clear()  # it is read once
    try:
        assert not cpu.available()
        step = random_step(Shape())
        with pytest.raises(RuntimeError, match="not available"):
            cpu.decode_attention(**step)
        with pytest.raises(RuntimeError, match="not available"):
            cpu.dequantize_blocks(step["keys"], 20, 2, step["group_of_channel"], 64)
    finally:
        build.chosen_instruction_set.cache_clear()


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang_compiles_them_too(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("ROTATEKV_CACHE_DIR", str(tmp_path))
    assert build._load.__wrapped__("dequantize", "portable") is not None  # it has the lanes' shuffles


@pytest.mark.slow  # two compilations with every check on
@pytest.mark.parametrize("place", [0, 1], ids=["widest", "next"])
def test_address_and_undefined_behaviour_sanitizers_stay_silent(place, tmp_path):
    """Of the widest instruction set that the CPU has, and of the next."""
    if place >= len(cpu.available_instruction_sets()):
        pytest.skip("the CPU has no other instruction set")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("no libasan")
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(tests.parent),
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",
        "ROTATEKV_CACHE_DIR": str(tmp_path),
        "ROTATEKV_CPU_KERNEL": cpu.available_instruction_sets()[place],
        "ROTATEKV_CPU_FLAGS": "-g -O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    code = tests / "sanitized_kernels.py"
    done = subprocess.run([sys.executable, str(code)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


def test_a_cache_whose_memory_moved_is_found_where_it_lies():
    """Sending a tensor to another process moves its memory: an address kept from an earlier call would be stale."""
    step = random_step(Shape(batch=2, tokens=70, rotary_dim=64, key_bits=3, value_bits=4))
    step |= {name: Blocks(step[name]) for name in ("keys", "values")}
    out = cpu.decode_attention(**step)
    rope = step["options"].rope
    for tensor in (*step["keys"].values(), *step["values"].values(), rope.coarse_cos, rope.fine_sin):
        old = tensor.clone().set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())
        moved = tensor.clone()
        tensor.set_(moved.untyped_storage(), 0, tensor.shape, tensor.stride())
        assert old.data_ptr() != tensor.data_ptr()
        old.zero_()
    assert torch.equal(cpu.decode_attention(**step), out)


def test_a_call_with_other_arguments_forgets_what_blocks_remember_of_the_last_one():
    shape = Shape(batch=2, tokens=70, rotary_dim=64, key_bits=3, value_bits=4, window=5, sinks=3)
    step, other = random_step(shape), random_step(replace(shape, seed=1))
    kept = step | {name: Blocks(step[name]) for name in ("keys", "values")}
    for change in (
        {"exact": None},
        {"values": other["values"]},
        {"group_of_channel": other["group_of_channel"]},
        {"first_seen": torch.tensor([3, 50], dtype=torch.int32)},
        {"total_tokens": 71},
        {"queries": other["queries"][:, :3].contiguous()},
        *(
            {"options": replace(step["options"], **options)}
            for options in (
                {"rope": None},
                {"sliding_window": 9},
                {"unrotate_values": True},
                {"softmax_scale": 0.5},
                {"rotation_width": 64},
                {"rope": replace(step["options"].rope, attention_scaling=1.0)},
            )
        ),
    ):
        for arguments in ({**kept, **change}, kept):
            plain = arguments | {name: dict(arguments[name]) for name in ("keys", "values")}
            assert torch.equal(cpu.decode_attention(**arguments), cpu.decode_attention(**plain))
    shorter = {name: plane[:1] for name, plane in kept["values"].items()}  # at the same addresses
    with pytest.raises(ValueError, match="values"):
        cpu.decode_attention(**{**kept, "values": shorter})


def test_keys_with_scales_per_channel_are_remembered_by_their_values():
    step, other = (random_step(replace(TOKEN_GROUPS, seed=seed)) for seed in (0, 1))
    kept = step | {"values": Blocks(step["values"])}
    for keys in (step["keys"], other["keys"], step["keys"]):
        plain = {**step, "keys": keys}
        assert torch.equal(cpu.decode_attention(**{**kept, "keys": keys}), cpu.decode_attention(**plain))
    assert kept["values"].checked


def test_a_write_with_other_arguments_forgets_what_blocks_remember_of_the_last_one():
    write = Write(batch=2, tokens=3, start=17, bits=3, rotary_dim=64, reorder=True, heads_per_group=3)
    step, other = random_write(write), random_write(replace(write, seed=1))
    kept = step["packed"]
    for change in (
        {"order": None},
        {"order": other["order"]},
        {"unrope": None},
        {"rotation_width": 64},
        {"clip_ratio": 0.8},
        {"heads": other["heads"][:, :, :1], "unrope": None},
        {"heads": other["heads"].bfloat16()},
        {"heads": other["heads"].transpose(0, 1).contiguous().transpose(0, 1)},
        {"start": 2},
    ):
        for arguments in ({**step, **change}, step):
            plain = {name: plane.clone() for name, plane in kept.items()}
            cpu.quantize_into_blocks(**{**arguments, "packed": plain})
            cpu.quantize_into_blocks(**arguments)
            assert all(torch.equal(plain[name], kept[name]) for name in kept)
