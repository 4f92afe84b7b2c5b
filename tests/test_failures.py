"""An exception anywhere in a forward leaves nothing behind: the call can be made again, on that cache or another."""

from __future__ import annotations

import copy
import pickle
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import left_padding, tiny_model, token_ids
from test_generate import generate
from test_rotatekv_plus import random_statistics

import rotatekv
from rotatekv import PRESETS, RotateKVCache, UserError, patch_model, unpatch_model
from rotatekv.cache.spec import is_patched
from rotatekv.statistics import save_statistics

ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, num_sink_entries=6)
CONFIGS = {
    "FP16": PRESETS["FP16"],
    "RotateKV2": ROTATEKV2,
    "RotateKV2, window": replace(ROTATEKV2, residual_length=4),
    "KIVI2": replace(PRESETS["KIVI2"], k_groupsize=8, v_groupsize=16, residual_length=6),
    "TurboQuant2": PRESETS["TurboQuant2"],
    "RotateKV2+": PRESETS["RotateKV2+"],
}
STEPS = (37, 1, 7, 20, 1)  # tokens of the calls: RotateKV+ packs a block in the first and in the fourth, KIVI in most


class Broken(BaseException):
    """Not an Exception, as Ctrl-C is not."""


@pytest.fixture(params=CONFIGS)
def patched(request, tmp_path):
    path = None
    if request.param == "RotateKV2+":
        path = save_statistics(tmp_path / "tiny.plus.safetensors", "plus", random_statistics(4.0), {})
    model = tiny_model("llama", num_hidden_layers=2)
    with patch_model(model, CONFIGS[request.param], path), torch.no_grad():
        yield model


def places(model) -> dict[str, torch.nn.Module]:
    """Modules of which a call is broken off at their end: all along a forward."""
    first, last = model.model.layers
    return {
        "embeddings": model.model.embed_tokens,
        "k_proj of layer 0": first.self_attn.k_proj,
        "layer 0": first,
        "v_proj of layer 1": last.self_attn.v_proj,
        "layer 1": last,
        "last norm": model.model.norm,
    }


@pytest.mark.parametrize("error", [RuntimeError, Broken])
def test_a_call_broken_off_anywhere_is_as_if_it_had_not_been(error, patched):
    whole, broken, start, ids = RotateKVCache.for_model(patched), RotateKVCache.for_model(patched), 0, token_ids(1, 66)

    def break_off(*args):
        raise error("broken off")

    for tokens in STEPS:
        call = {"input_ids": ids[:, start : start + tokens]}
        start += tokens
        for module in places(patched).values():
            before = [x.clone() for x in broken.tensors()]
            hook = module.register_forward_hook(break_off)
            with pytest.raises(error, match="broken off"):
                patched(**call, past_key_values=broken)
            hook.remove()
            assert broken.get_seq_length() == whole.get_seq_length()
            broken.settle()  # after Ctrl-C: the next call would do it
            after = list(broken.tensors())
            assert len(after) == len(before) and all(map(torch.equal, after, before))
        expected = patched(**call, past_key_values=whole).logits
        assert torch.equal(patched(**call, past_key_values=broken).logits, expected)


def test_a_padded_batchs_call_broken_off_is_as_if_it_had_not_been(patched):
    """Where each row has a cache of its own, and where none has."""
    whole, broken, ids = (
        RotateKVCache.for_model(patched),
        RotateKVCache.for_model(patched),
        token_ids(1, 80).view(2, 40),
    )
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def break_off(*args):
        raise Broken

    for part in (slice(0, 30), slice(30, 40)):
        call = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
        hook = patched.model.layers[1].register_forward_hook(break_off)
        before = [x.clone() for x in broken.tensors()]
        with pytest.raises(Broken):
            patched(**call, past_key_values=broken)
        hook.remove()
        assert broken.get_seq_length() == whole.get_seq_length()
        broken.settle()
        after = list(broken.tensors())
        assert len(after) == len(before) and all(map(torch.equal, after, before))
        expected = patched(**call, past_key_values=whole).logits
        assert torch.equal(patched(**call, past_key_values=broken).logits, expected)


def test_a_store_broken_off_between_keys_and_values_is_taken_back(patched, monkeypatch):
    cache, other = RotateKVCache.for_model(patched), RotateKVCache.for_model(patched)
    for taken in (cache, other):
        patched(token_ids(1, 97), past_key_values=taken)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1].packed.values, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            patched(token_ids(1, 24, 1), past_key_values=cache)
    again = patched(token_ids(1, 24, 1), past_key_values=cache).logits
    assert torch.equal(again, patched(token_ids(1, 24, 1), past_key_values=other).logits)


def test_a_hook_of_the_users_that_raises_beside_ours_poisons_nothing():
    model = tiny_model()
    with patch_model(model, ROTATEKV2), torch.no_grad():
        cache, other = RotateKVCache.for_model(model), RotateKVCache.for_model(model)
        for taken in (cache, other):
            model(token_ids(1, 9), past_key_values=taken)

        def break_off(*args):
            raise Broken

        hook = model.model.register_forward_pre_hook(break_off)
        with pytest.raises(Broken):
            model(token_ids(1, 5), past_key_values=cache)
        hook.remove()
        expected = model(token_ids(1, 5), past_key_values=other).logits
        assert torch.equal(model(token_ids(1, 5), past_key_values=cache).logits, expected)


def test_generate_goes_on_after_ctrl_c():
    model, ids = tiny_model(), token_ids(1, 12)
    with patch_model(model, ROTATEKV2):
        expected = generate(model, ids).sequences
        cache, calls = RotateKVCache.for_model(model), []

        def interrupt(*args):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 14  # the prompt and two tokens
        assert torch.equal(generate(model, expected[:, :15], past_key_values=cache).sequences[:, :22], expected)
        assert torch.equal(generate(model, ids).sequences, expected)


def test_early_exit_is_refused_before_it_starts():
    model, ids = tiny_model(), token_ids(1, 12)
    with patch_model(model, ROTATEKV2):
        expected = generate(model, ids).sequences
        with pytest.raises(UserError, match=r"assistant_early_exit .* prompt_lookup_num_tokens"):
            generate(model, ids, assistant_early_exit=1)
        assert torch.equal(generate(model, ids).sequences, expected)
        model.config.num_hidden_layers = 1  # as an early exit of the stock model leaves it when it is broken off
        with pytest.raises(UserError, match=r"num_hidden_layers is 1.* set it to 2"):
            generate(model, ids)
        model.config.num_hidden_layers = 2
        assert torch.equal(generate(model, ids).sequences, expected)


# --- patching is all or nothing --------------------------------------------------------------------------------------

PACKAGE = Path(rotatekv.__file__).parent
CHANGES_THE_MODEL = ("patching/changes.py", "patching/handle.py", "patching/patch.py")


def everything(model) -> list:
    """What every module and config holds, the objects themselves; hooks and flags are among it."""
    owners = [*model.modules(), model.config, model.generation_config]
    held = [(owner, name, value) for owner in owners for name, value in vars(owner).items()]
    inside = [(name, *item) for _, name, value in held if isinstance(value, dict) for item in value.items()]
    return [*held, *inside, *model.state_dict().items()]


def is_as_it_was(model, before: list, weights: list[torch.Tensor]) -> bool:
    now = everything(model)
    same = len(now) == len(before) and all(
        a == b if isinstance(a, str | int) else a is b or isinstance(a, torch.Tensor)  # state_dict makes new views
        for one, other in zip(now, before, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    return same and all(map(torch.equal, model.state_dict().values(), weights)) and not is_patched(model)


@contextmanager
def traced(on_line):
    """``on_line`` (frame) before every line of the package."""

    def trace(frame, event, arg):
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(str(PACKAGE)) else None
        if event == "line":
            on_line(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def file_of(frame) -> str:
    return Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()


def lines_of_patching(model) -> list[tuple[str, int]]:
    lines = []
    with traced(lambda frame: lines.append((file_of(frame), frame.f_lineno))):
        patch_model(model, ROTATEKV2)
    unpatch_model(model)
    return lines


def ends_before(number: int, error: type[BaseException], call) -> bool:
    """``call()``, with ``error`` raised before the package's line of that number; whether it came so far."""
    left = number

    def count(frame):
        nonlocal left
        left -= 1
        if left < 0:
            raise error

    try:
        with traced(count):
            call()
        return False
    except error:
        return True


@pytest.mark.usefixtures("one_thread")
def test_patching_broken_off_at_any_line_leaves_the_model_as_it_was():
    """Every time a line runs that changes the model, and the first time for a quarter of the others."""
    model, ids = tiny_model(num_hidden_layers=1), token_ids(1, 12)
    stock = model(ids).logits
    model.model.layers.train()
    hook = model.model.layers[0].register_forward_pre_hook(lambda *args: None)
    lines_of_patching(model)  # what is made once, at the first time, is there
    lines = lines_of_patching(model)
    before, weights = everything(model), [x.clone() for x in model.state_dict().values()]
    random = torch.get_rng_state()
    seen, places = set(), []
    for number, line in enumerate(lines):
        if line[0] in CHANGES_THE_MODEL or (line not in seen and len(seen) % 4 == 0):
            places.append(number)
        seen.add(line)
    files = {"patching/proof.py", "patching/hooks.py", "cache/cache.py"}
    assert len(places) > 400 and {lines[number][0] for number in places} >= files
    for number in places:
        error = KeyboardInterrupt if number % 2 else MemoryError
        assert ends_before(number, error, lambda: patch_model(model, ROTATEKV2))
        assert is_as_it_was(model, before, weights), lines[number]
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    hook.remove()
    model.eval()
    assert torch.equal(model(ids).logits, stock)
    with patch_model(model, ROTATEKV2):
        patched = model(ids).logits
    with patch_model(tiny_model(num_hidden_layers=1), ROTATEKV2) as handle:
        assert torch.equal(patched, handle.model(ids).logits)


def test_unpatching_broken_off_at_any_line_is_done_by_unpatching_again():
    model = tiny_model(num_hidden_layers=1)
    before, weights, number, broken_off = everything(model), [x.clone() for x in model.state_dict().values()], 0, True
    while broken_off:
        patch_model(model, ROTATEKV2)
        broken_off = ends_before(number, KeyboardInterrupt, lambda: unpatch_model(model))
        if is_patched(model):
            unpatch_model(model)
        assert is_as_it_was(model, before, weights), number
        number += 3
    assert number > 100


# --- Ctrl-C at any line of a call ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "window", "padding"), [("RotateKV2", 24, 0), ("KIVI2", None, 5), ("KIVI2", 24, 5)])
def test_a_call_broken_off_at_any_line_is_made_whole_or_not_at_all(name, window, padding):
    """What ``get_seq_length`` says then is what the cache holds, at the latest when it is used again."""
    model, ids = tiny_model("mistral", num_hidden_layers=1, sliding_window=window), token_ids(2, 61)
    mask = left_padding(61, padding, 0)

    def same(one, other):
        ours, theirs = list(one.tensors()), list(other.tensors())
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))

    with patch_model(model, CONFIGS[name]), torch.no_grad():
        cache, outcomes = RotateKVCache.for_model(model), []
        for start, stop in ((0, 37), (37, 38), (38, 61)):
            call = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            before, number, broken_off = copy.deepcopy(cache), start, True
            model(**call, past_key_values=cache)
            while broken_off:
                tried = copy.deepcopy(before)
                broken_off = ends_before(number, KeyboardInterrupt, partial(model, **call, past_key_values=tried))
                expected = {start: before, stop: cache}[tried.get_seq_length()]
                tried.settle()
                assert same(tried, expected), number
                outcomes.append((broken_off, expected is cache))
                number += 41
    assert outcomes.count((True, False)) > 20 and outcomes.count((False, True)) == 3


def test_a_cache_is_copied_whole(patched):
    cache = RotateKVCache.for_model(patched)
    patched(token_ids(1, 40), past_key_values=cache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert all(map(torch.equal, copied.tensors(), cache.tensors()))
        before = cache.nbytes()
        patched(token_ids(1, 5), past_key_values=copied)
        assert cache.nbytes() == before and copied.get_seq_length() == 45


def test_a_call_without_tokens_is_one_line_and_leaves_the_cache_alone(patched):
    cache, nothing = RotateKVCache.for_model(patched), torch.empty(1, 0, dtype=torch.long)
    calls = [{"input_ids": nothing}, {"inputs_embeds": torch.empty(1, 0, 96)}, {"input_ids": token_ids(1, 5)[:0]}, {}]
    for length in (0, 7):
        for call in calls:
            with pytest.raises(UserError, match="no tokens: pass input_ids"):
                patched(**call, past_key_values=cache)
        assert cache.get_seq_length() == length
        patched(token_ids(1, 7), past_key_values=cache)
    with pytest.raises(UserError, match="no tokens: pass input_ids"):
        patched.generate(nothing)
