"""Random sequences of the cache's operations, against a plain list of tokens. A failure prints its operations."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cache_model import BLOCK, MASSIVE, RECORDED, Call, Token, TokenList
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.random_models import random_statistics
from rotatekv import PRESETS, QuantConfig
from rotatekv.cache.cache import RotateKVCache
from rotatekv.cache.fused_call import exact_tokens
from rotatekv.cache.spec import CacheSpec
from rotatekv.methods import LayerGeometry, build_method, method_class
from rotatekv.rope import LayerRope, ModelRope
from rotatekv.statistics import CalibrationTarget

HEADS, DIM, HIDDEN = 2, 16, 8
OPERATIONS = 22
ROTATEKV2 = replace(PRESETS["RotateKV2"], Outlier_Aware_Key_Rotation=False, num_sink_entries=30)
CONFIGS = {
    "RotateKV2": ROTATEKV2,
    "RotateKV2 with window": replace(ROTATEKV2, residual_length=5),
    "RotateKV2+": replace(PRESETS["RotateKV2+"], residual_length=6),
    "KIVI2": replace(PRESETS["KIVI2"], k_groupsize=8, v_groupsize=16, residual_length=5),
    "RTN2 with window": replace(PRESETS["RTN2"], residual_length=7),
    "FP16": PRESETS["FP16"],
}


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x[:, :1], cos, sin)[0]


def new_cache(config: QuantConfig, sliding_window: int | None) -> RotateKVCache:
    """An empty cache of one layer."""
    geometry, statistics = LayerGeometry(0, HEADS, DIM), None
    if config.method == "rotatekv_plus":
        found = random_statistics("plus", CalibrationTarget("", 1, HEADS, DIM))
        found = method_class(config).plan(config, found, [geometry]) | {"sink_threshold": torch.tensor([[MASSIVE]])}
        statistics = {name: x[0] for name, x in found.items()}
    method = build_method(config, geometry, statistics)
    text_config = LlamaConfig(num_hidden_layers=1, head_dim=DIM, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    if sliding_window is not None:
        text_config.layer_types, text_config.sliding_window = ["sliding_attention"], sliding_window
    model = SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(text_config), config=SimpleNamespace())
    rope = LayerRope(ModelRope(model), None, turn)
    return RotateKVCache(CacheSpec(config, (method,), "none", (rope,), text_config))


class Run:
    """A cache and its list of tokens, through the same operations."""

    def __init__(self, name: str, sliding_window: int | None, batch_size: int, seed: int):
        self.random = random.Random(f"{name} {sliding_window} {batch_size} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        self.cache, self.batch_size, self.done = new_cache(CONFIGS[name], sliding_window), batch_size, []
        spec = self.cache._spec
        self.model = TokenList(spec.methods[0], spec.ropes[0], sliding_window)
        self.is_recording = False
        self.before: tuple[TokenList, Call] | None = None  # a recording cache's last call, and what was there before it
        self.left_behind: list[tuple[RotateKVCache, TokenList]] = []

    @property
    def layer(self):
        return self.cache.layers[0]

    def new_call(self, tokens: int) -> Call:
        rows = self.model.rows or [[] for _ in range(self.batch_size)]
        hidden_states = torch.randn(len(rows), tokens, HIDDEN, generator=self.generator)  # hardly two of one size
        new = []
        for batch_index, row in enumerate(rows):
            start = row[-1].position + 1 if row else 3 * batch_index
            heads = torch.randn(2, tokens, HEADS, DIM, generator=self.generator).half().float()
            new.append([Token(heads[0, i], heads[1, i], start + i) for i in range(tokens)])
        return Call(new, hidden_states)

    def begin(self, call: Call) -> None:
        positions = torch.tensor([[token.position for token in row] for row in call.tokens])
        self.cache.begin_forward(positions, len(call.tokens), None)
        if self.cache.names_sinks:
            self.cache.choose_sinks(0, call.hidden_states)

    def write(self, call: Call) -> None:
        heads = (
            [torch.stack([getattr(x, kind) for x in row], dim=1) for row in call.tokens] for kind in ("key", "value")
        )
        keys, values = (torch.stack(x) for x in heads)
        self.cache.update(keys, values, 0)
        self.cache.take(0)

    def append(self) -> None:
        tokens = self.random.choice([1, 1, 2, 7, 16, self.random.randint(1, 40), self.random.randint(60, 100)])
        self.log(f"append {tokens}")
        call, before = self.new_call(tokens), self.model.copy()
        self.begin(call)
        self.write(call)
        self.model.append(call)
        self.check_flushed(before)
        check(self.cache, self.model)
        self.cache.end_forward()
        self.model.drop_unseen(RECORDED if self.is_recording else 0)
        self.before = (before, call) if self.is_recording else None
        if self.is_recording and self.random.random() < 0.4:  # as speculative decoding does
            self.crop()

    def check_flushed(self, before: TokenList) -> None:
        """Tokens that the call has packed, where its first query has them in its window and its last has not."""
        flushed, method = self.layer.flushed, before.method
        has_window = method.residual_length(self.model.sliding_window) > 0 or method.tokens_per_flush > 1
        if not has_window or before.packed_with(1) == self.model.packed:
            assert flushed is None
            return
        exact = self.model.copy()
        exact.rows = [[replace(token, decoded=None) for token in row] for row in exact.rows]
        assert flushed.start == before.packed and flushed.end == self.model.packed
        for ours, theirs in zip((flushed.keys, flushed.values), exact.read(), strict=True):
            assert torch.equal(ours, theirs[:, :, flushed.start : flushed.end])

    def append_several(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            self.append()

    def fail(self) -> None:
        """A call that fails before, while or after its tokens are stored."""
        call, when = self.new_call(self.random.randint(1, 40)), self.random.choice(["before", "after", "while"])
        settles = self.random.random() < 0.5
        self.log(f"a call of {len(call.tokens[0])} tokens fails {when} they are stored, settles={settles}")
        self.begin(call)
        if when == "after":
            self.write(call)
        elif when == "while":
            interrupts = mock.patch.object(type(self.model.method), "encode_values", side_effect=KeyboardInterrupt)
            with interrupts, contextlib.suppress(KeyboardInterrupt):
                self.write(call)
        if settles:
            self.cache.settle()
        else:
            self.cache.end_forward(failed=True)
        if when != "before":
            self.before = None

    def crop(self) -> None:
        count = self.random.choice([0, 1, 3, self.random.randint(0, 20), self.random.randint(0, self.model.tokens + 1)])
        count = self.whole_record(count)
        self.log(f"crop {count}")
        if self.model.refuses_crop(count):
            with pytest.raises(RuntimeError, match="cannot be cropped"):
                self.cache.crop(-count)
            return
        self.cache.crop(-count)
        length, dropped = self.model.tokens - count, self.model.dropped
        if self.before is None or count == 0 or count > RECORDED or length <= 0:
            self.model.crop(length)
        else:
            self.model, call = self.before
            left = dropped + length - self.model.dropped - self.model.tokens  # of the last call
            if left > 0:
                self.model.append(call.first(left))
            else:
                self.model.crop(self.model.tokens + left)
            self.model.drop(dropped - self.model.dropped)
        self.before = None

    def whole_record(self, count: int) -> int:
        """Of a recorded call that many tokens at most, or so many that nothing of it is given back."""
        recent = self.model.method.residual_length(self.model.sliding_window)
        kept_on_record = self.model.tokens - RECORDED - recent
        if self.before is not None and count > RECORDED and self.model.tokens - count >= kept_on_record - BLOCK:
            return RECORDED
        return count

    def select(self) -> None:
        if not self.model.rows:
            return
        batch_size = len(self.model.rows)
        way = self.random.choice(["reorder_cache", "indices", "bool", "repeat"])
        rows = [self.random.randrange(batch_size) for _ in range(self.random.randint(1, 3))]
        if way == "repeat" and batch_size < 3:
            rows = [row for row in range(batch_size) for _ in range(2)]
            self.log("batch_repeat_interleave 2")
            self.cache.batch_repeat_interleave(2)
        elif way == "bool":
            rows = sorted(set(rows))
            self.log(f"batch_select_indices, as bool, {rows}")
            self.cache.batch_select_indices(torch.tensor([row in rows for row in range(batch_size)]))
        elif way == "indices":
            self.log(f"batch_select_indices {rows}")
            self.cache.batch_select_indices(torch.tensor(rows))
        else:
            self.log(f"reorder_cache {rows}")
            self.cache.reorder_cache(torch.tensor(rows))
        self.model.rows, self.before = [list(self.model.rows[row]) for row in rows], None

    def move(self) -> None:
        self.log("offload and prefetch")
        self.layer.offload()
        self.layer.prefetch()
        if self.model.rows:
            self.before = None

    def duplicate(self) -> None:
        """Go on with a copy; the other is looked at when all is done."""
        way = self.random.choice(["deepcopy", "pickle"])
        self.log(way)
        self.left_behind.append((self.cache, self.model.copy()))
        self.cache = copy.deepcopy(self.cache) if way == "deepcopy" else pickle.loads(pickle.dumps(self.cache))

    def record(self) -> None:
        self.log("activate_past_recording")
        self.cache.activate_past_recording()
        self.is_recording = True

    def reset(self) -> None:
        self.log("reset")
        self.cache.reset()
        self.model.crop(0)
        self.is_recording, self.before = False, None

    def log(self, operation: str) -> None:
        self.done.append(operation)

    def step(self) -> None:
        often = {self.append_several: 8, self.crop: 7, self.select: 4, self.fail: 3}
        seldom = {self.move: 1, self.duplicate: 2, self.record: 1.5, self.reset: 0.5}
        operations = often | seldom
        self.random.choices(list(operations), list(operations.values()))[0]()
        check(self.cache, self.model)


def check(cache: RotateKVCache, model: TokenList) -> None:
    layer, tokens = cache.layers[0], model.tokens
    assert layer.get_seq_length() == model.dropped + tokens and layer.dropped == model.dropped
    assert layer.packed.length == layer.packed.values.length == model.packed
    if not tokens:
        assert layer.keys is None and layer.values is None and not list(layer.tensors("keys"))
        return
    assert cache.positions[:, model.dropped :].tolist() == [[token.position for token in row] for row in model.rows]
    for ours, theirs in zip((layer.keys, layer.values), model.read(), strict=True):
        wrong = (ours != theirs).any(dim=3).any(dim=1).nonzero().tolist() if ours.shape == theirs.shape else "all"
        assert torch.equal(ours, theirs), f"tokens (batch index, token index) {wrong}"
    check_exact_tokens(layer, model)
    for tensor in (*layer.tensors("keys"), *layer.tensors("values")):  # no view of a larger one
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def check_exact_tokens(layer, model: TokenList) -> None:
    """What a fused kernel is given beside the codes: each token once, batch_index ascending."""
    expected, exact = model.exact(), exact_tokens(layer.sinks, layer.window, model.packed)
    if exact is None:
        assert not expected
        return
    places = list(zip(exact.batch_index.tolist(), exact.token_index.tolist(), strict=True))
    assert exact.batch_index.tolist() == sorted(exact.batch_index.tolist()) and sorted(places) == sorted(expected)
    assert all(torch.equal(key, expected[place]) for key, place in zip(exact.keys.float(), places, strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_sequence_of_operations_leaves_what_its_tokens_say(name, sliding_window, batch_size, monkeypatch):
    monkeypatch.setenv("ROTATEKV_BACKEND", "reference")
    for seed in range(3):
        run = Run(name, sliding_window, batch_size, seed)
        if seed % 2:
            run.record()
        try:
            with torch.no_grad():
                for _ in range(OPERATIONS):
                    run.step()
                for cache, model in run.left_behind:
                    check(cache, model)
        except Exception as error:
            raise AssertionError(f"seed {seed}, after: {'; '.join(run.done)}") from error
