"""Mistakes made by hand, in every part, and the tests that must fail by them: make breaks (10 minutes).

The tree is copied to a temporary folder. There the tests named below pass first; then each break is put in alone, its
tests must fail, and it is taken out again. ``python tests/breaks.py window crop`` tries those breaks alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What takes longest to import, for all forks, and imports no triton; the package itself comes from the copy.
import datasets  # noqa: F401
import pytest
import torch
import transformers  # noqa: F401
from matplotlib.figure import Figure  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Break:
    """One mistake.

    Attributes:
        file: where it is made. find: the text there, once. put: what stands in its place.
        tests: pytest's names of them, after ``tests/`` or ``tests/test_``; one must fail.
    """

    name: str
    file: str
    find: str
    put: str
    tests: tuple[str, ...]


BREAKS = (
    # The algorithm, in torch
    Break(
        "rotation's inverse",
        "rotatekv/kernels/hadamard.py",
        "(left.T @ blocks @ right)",
        "(left @ blocks @ right)",
        ("transforms.py::test_inverse_undoes_the_transform_and_the_norm_stays",),
    ),
    Break(
        "reorder",
        "rotatekv/methods/rotatekv.py",
        '(self.order,) = self.use_statistics(statistics, "reorder_index")',
        '(self.order,) = (x.roll(1) for x in self.use_statistics(statistics, "reorder_index"))',
        ("families.py::test_rotatekv2_is_the_oracle[llama-decode]",),
    ),
    Break(
        "quantizer's clip",
        "rotatekv/kernels/quantize.py",
        "top = groups.amax(-1) * clip_ratio",
        "top = groups.amax(-1)",
        ("quantize.py::test_quantizer_equals_the_numpy_version",),
    ),
    Break(
        "packing, two low bits",
        "rotatekv/kernels/layout.py",
        "_pack_plane(old & 3, 2)",
        "_pack_plane(old & 1, 2)",
        ("quantize.py::test_the_words_are_the_documented_ones",),
    ),
    Break(
        "packing, 3 and 4 bits",
        "rotatekv/kernels/layout.py",
        "HIGH_PLANE[bits][1]) << 2",
        "HIGH_PLANE[bits][1]) << 1",
        ("quantize.py::test_a_store_gives_back_what_was_appended_in_whatever_pieces",),
    ),
    Break(
        "RoPE undone",
        "rotatekv/rope.py",
        "return cos / norm, -sin / norm",
        "return cos, -sin",
        ("families.py::test_rotatekv2_is_the_oracle[llama, yarn-decode]",),
    ),
    Break(
        "KIVI's groups",
        "rotatekv/methods/kivi.py",
        '"scale": scale.squeeze(-1)',
        '"scale": scale.squeeze(-1).roll(1, 1)',
        ("methods.py::test_a_codec_gives_what_its_paper_says[KIVI2]",),
    ),
    Break(
        "KVQuant's outliers",
        "rotatekv/methods/kvquant.py",
        "scaled.abs().topk(",
        "scaled.topk(",
        ("kvquant.py::test_codec_equals_the_reference",),
    ),
    Break(
        "TurboQuant's levels",
        "rotatekv/methods/turboquant.py",
        "((dimension - 3) / 2)",
        "((dimension - 1) / 2)",
        ("methods.py::test_turboquant_levels_are_the_best_for_a_coordinate_of_the_sphere",),
    ),
    # The cache
    Break(
        "sinks",
        "rotatekv/cache/sinks.py",
        "is_sink &= token_mask.to(is_sink.device)",
        "pass",
        (
            "sinks.py::test_a_sequence_of_padding_alone_has_no_sinks",
            "sinks.py::test_padding_is_never_a_sink_however_large",
        ),
    ),
    Break(
        "recent window",
        "rotatekv/cache/window.py",
        "max(length - self.residual_length, 0)",
        "max(length - self.residual_length + 1, 0)",
        ("cache.py::test_the_window_is_the_last_tokens_in_16_bits_and_the_rest_is_quantized_as_without",),
    ),
    Break(
        "recent window in 8 bits",
        "rotatekv/cache/window.py",
        "amax(-1) / 127",
        "amax(-1) / 63",
        ("window.py::test_eight_bits_round_to_the_largest_of_a_group",),
    ),
    Break(
        "band of a prefill",
        "rotatekv/cache/prefill.py",
        "(token < packed)",
        "(token <= packed)",
        ("window.py::test_prefill_chunks_and_decoding_are_one",),
    ),
    Break(
        "keys of large means in the window",
        "rotatekv/methods/rotatekv_plus.py",
        "FAR_MEAN = 64 ",
        "FAR_MEAN = 2**40 ",
        ("score_errors.py::test_large_key_biases_are_warned_of_where_keys_are_rounded_per_token",),
    ),
    Break(
        "least bits of keys",
        "rotatekv/methods/rotatekv_plus.py",
        "LEAST_KEY_BITS = 1 ",
        "LEAST_KEY_BITS = 0 ",
        ("rotatekv_plus.py::test_a_budget_is_split_over_all_layers_by_cost[1.0]",),
    ),
    Break(
        "crop",
        "rotatekv/methods/stores.py",
        "tensor[:, length % BLOCK :] = 0",
        "tensor[:, length % BLOCK + 1 :] = 0",
        ("cache.py::test_crop_leaves_what_the_first_tokens_alone_had_made",),
    ),
    Break(
        "crop into the first call",
        "rotatekv/cache/record.py",
        "self.until >= tokens",
        "self.until > tokens",
        ("speculation.py::test_a_crop_into_the_first_call_has_the_sinks_of_the_tokens_that_stayed",),
    ),
    Break(
        "select rows",
        "rotatekv/cache/cache.py",
        "self._positions.set(self.positions.index_select(0, rows.to(self.positions.device)))",
        "pass",
        ("cache.py::test_positions_follow_the_caches_operations",),
    ),
    Break(
        "padding",
        "rotatekv/cache/parts.py",
        "self.token_index = torch.cat([self.token_index, self.new + cached])",
        "self.token_index = torch.cat([self.token_index, self.new])",
        ("masks.py::test_rows_of_a_padded_batch_are_those_rows_alone[KIVI2]",),
    ),
    Break(
        "sinks behind a sliding window",
        "rotatekv/cache/sinks.py",
        "token_index=left.token_index - count",
        "token_index=left.token_index",
        ("cache_states.py",),
    ),
    Break(
        "sliding window",
        "rotatekv/cache/tokens.py",
        "unseen = self._kept() - sliding_window + 1",
        "unseen = self._kept() - sliding_window + 17",
        ("families.py::test_rotatekv2_is_the_oracle[mistral, sliding-decode]",),
    ),
    Break(
        "exact prefill",
        "rotatekv/cache/cache.py",
        "self.first_call_is_exact = not cached and not self.config.quantize_prefill",
        "self.first_call_is_exact = False",
        ("exact_prefill.py::test_generate_begins_as_the_stock_model",),
    ),
    Break(
        "a call that failed",
        "rotatekv/cache/cache.py",
        "layer.end_call(self._ends_failed)",
        "layer.end_call(False)",
        ("failures.py::test_a_call_broken_off_anywhere_is_as_if_it_had_not_been[RotateKV2-RuntimeError]",),
    ),
    # Kernels
    Break(
        "fused decode in C++",
        "rotatekv/kernels/cpu/chunk.h",
        "if (column < 0 || column >= count) continue;",
        "if (column <= 0 || column >= count) continue;",
        ("decode.py::test_decoded_logits_are_those_of_the_general_path",),
    ),
    Break(
        "Triton kernel in the interpreter",
        "rotatekv/kernels/triton/quantize.py",
        "_merge_word(high, word, codes >> 2,",
        "_merge_word(high, word, codes >> 1,",
        ("interpreted_triton.py::test_quantize[three_bits_of_80]",),
    ),
    Break(
        "a frame of padding, on the GPU",
        "rotatekv/kernels/triton/coded_queries.py",
        "tl.where(position < 0, -1.0, 1.0)",
        "tl.where(position < 0, 1.0, 1.0)",
        ("interpreted_coded.py::test_coded_attention[padding]",),
    ),
    Break(
        "a code's place in its word, on the GPU",
        "rotatekv/kernels/triton/spread.py",
        "(mask << (2 * b))",
        "(mask << b)",
        ("interpreted_grouped.py::test_grouped_attention[seventeen]",),
    ),
    Break(
        "the mean of values, on the GPU",
        "rotatekv/kernels/triton/coded_merge.py",
        "(packed * decay * share)[:, None]",
        "(total * share)[:, None]",
        ("interpreted_coded.py::test_coded_attention[sinks_window]",),
    ),
    Break(
        "words of values, on the GPU",
        "rotatekv/kernels/triton/coded_write.py",
        "((old & ~taken) | word)",
        "word",
        ("interpreted_coded.py::test_coded_write[ragged_values]",),
    ),
    # The model
    Break(
        "proof of a family",
        "rotatekv/patching/proof.py",
        "if not error < _limit(expected.dtype):",
        "if error > 1e9:",
        ("families.py::test_what_is_refused_says_why_and_is_as_before[diffllama]",),
    ),
    Break(
        "patch undone",
        "rotatekv/patching/changes.py",
        "elif self.name in vars(self.owner):",
        "elif False:",
        ("families.py::test_a_patched_family_is_as_before_when_it_is_unpatched[llama]",),
    ),
    Break(
        "generate's cache",
        "rotatekv/patching/hooks.py",
        "elif generation_config.use_cache:",
        "elif False:",
        ("generate.py::test_fp16_generates_what_the_stock_model_generates",),
    ),
    Break(
        "speculation",
        "rotatekv/patching/hooks.py",
        "return prompt_first(type(model)._get_candidate_generator(model, *args, **kwargs))",
        "return type(model)._get_candidate_generator(model, *args, **kwargs)",
        ("speculation.py::test_speculative_decoding_is_greedy[RotateKV2-prompt lookup]",),
    ),
    # Calibration
    Break(
        "check of a statistics file",
        "rotatekv/statistics.py",
        "if made_for is not None and not _same_model(made_for, model_id):",
        "if False:",
        ("calibration.py::test_a_file_for_another_model_shape_or_group_is_refused",),
    ),
    Break(
        "calibration of the reorder",
        "rotatekv/calibration/reorder.py",
        "torch.argsort(rotate_channels(key_sums.double(), width), dim=-1, stable=True)",
        "torch.argsort(key_sums.double(), dim=-1, stable=True)",
        ("calibration.py::test_indices_equal_the_argsort_of_all_rotated_keys",),
    ),
    Break(
        "calibration of KVQuant",
        "rotatekv/calibration/kvquant.py",
        "position = share / 2 * (tokens - 1)",
        "position = share * (tokens - 1)",
        ("kvquant.py::test_ranges_and_levels_of_a_text_equal_those_of_all_its_numbers",),
    ),
    Break(
        "calibration of RotateKV+",
        "rotatekv/calibration/transform.py",
        "squares = weights.square() * (",
        "squares = weights * (",
        ("plus_calibration.py::test_maps_are_those_of_the_definition",),
    ),
    Break(
        "the split of RotateKV+'s bits",
        "rotatekv/methods/bit_budget.py",
        "(choice.noise[more] - choice.noise[more + 1])",
        "choice.noise[more + 1]",
        ("transform_coding.py::test_no_split_of_a_budget_costs_less",),
    ),
    Break(
        "a key's frame",
        "rotatekv/rope.py",
        "at = self._known[:, start:stop] - origin",
        "at = self._known[:, start:stop]",
        ("rotatekv_plus.py::test_a_score_is_that_of_the_codes_and_of_a_query_turned_to_the_frame",),
    ),
    Break(
        "bits of a code",
        "rotatekv/kernels/transform_coding.py",
        "*range(8, 12), *range(4, 8)",
        "*range(4, 8), *range(8, 12)",
        ("transform_coding.py::test_every_bit_lies_where_the_layout_says",),
    ),
    # Benchmarks
    Break(
        "perplexity's sum",
        "rotatekv/evals/perplexity.py",
        "float(total) / (length - 1)",
        "float(total) / length",
        ("evaluation.py::test_fp16_perplexity_equals_five_lines_on_the_stock_model",),
    ),
    Break(
        "GSM8K's answer",
        "rotatekv/evals/gsm8k.py",
        "text.partition(_MARK)[2]",
        "text.rpartition(_MARK)[2]",
        ("gsm8k.py::test_extracted_number", "gsm8k.py::test_agrees_with_lm_eval"),
    ),
    Break(
        "needle's score", "rotatekv/evals/needle.py", r"(?<!\w){words}", "{words}", ("needle.py::test_recall_by_hand",)
    ),
    Break(
        "a needle's place",
        "rotatekv/evals/needle.py",
        "if point not in taken:",
        "if True:",
        ("needle_keys.py::test_needles_whose_sentence_is_taken_go_on_to_the_next",),
    ),
    Break(
        "LongBench's metric",
        "rotatekv/evals/longbench.py",
        r'prediction.lstrip("\n").split("\n")[0]',
        r'prediction.split("\n")[0]',
        ("longbench.py::test_few_shot_tasks_count_the_first_line",),
    ),
    Break(
        "MileBench's metric",
        "rotatekv/evals/milebench_metrics.py",
        "return min(found)[2]",
        "return max(found)[2]",
        ("milebench.py::test_awkward_choices",),
    ),
    Break(
        "a run resumed",
        "rotatekv/evals/results.py",
        "if good < len(data):",
        "if False:",
        ("results.py::test_a_torn_last_line_is_dropped_from_file_and_samples",),
    ),
    Break(
        "share of a process",
        "rotatekv/distributed.py",
        "items[rank() :: world_size()]",
        "items[rank() : len(items) - 1 : world_size()]",
        ("distributed.py::test_shares_are_the_whole_once",),
    ),
    Break(
        "a flag",
        "rotatekv/cli.py",
        'if value is not None and key != "method"',
        'if value and key != "method"',
        ("cli.py::test_a_flag_overrides_the_preset_and_nothing_else",),
    ),
    # Pictures
    Break(
        "capture",
        "rotatekv/capture/hooks.py",
        "(top.indices % width)",
        "(top.indices // width)",
        ("capture.py::test_massive_activations_are_those_of_the_hidden_states",),
    ),
    Break(
        "a figure",
        "visualize/quantization_error.py",
        "[0.25, 0.5, 0.75]",
        "[0.25, 0.6, 0.75]",
        ("figures.py::test_each_methods_line_is_its_own_error",),
    ),
    Break(
        "the report",
        "visualize/report_page/runs.py",
        'return "partial" if self._of("partial") else "complete"',
        'return "complete"',
        ("report.py::test_every_run_is_there_with_its_values",),
    ),
    # Transform-coded keys and values in C++
    Break(
        "frame's turn",
        "rotatekv/kernels/cpu/frame_queries.h",
        "store(out + k + half, high * load(cos + k) - low * load(sin + k));",
        "store(out + k + half, high * load(cos + k) + low * load(sin + k));",
        ("frame_kernels.py::test_far_positions_do_not_drift",),
    ),
    Break(
        "frame's place",
        "rotatekv/kernels/cpu/chunk.h",
        "place = (at + dropped) % frame / kBlock;",
        "place = at % frame / kBlock;",
        ("frame_kernels.py::test_the_error_is_far_below_what_rounding_keys_costs",),
    ),
    Break(
        "frame rows are never exact",
        "rotatekv/kernels/cpu/frame_queries.h",
        "exact_[i] = rough * kLeastRatio * kLeastRatio > squares_.data()[i];",
        "exact_[i] = false;",
        ("frame_kernels.py::test_the_error_is_a_twentieth_of_what_rounding_keys_costs",),
    ),
    Break(
        "candidates of a frame's scale",
        "rotatekv/kernels/cpu/frames.cpp",
        "{-4, -2, 0, 2, 4, 6, 8, 10}",
        "{-2, -2, 0, 2, 4, 6, 8, 10}",
        ("frame_writes.py::test_writes_are_those_of_torch",),
    ),
    Break(
        "a frame that starts below 0",
        "rotatekv/kernels/cpu/frame_queries.h",
        "sign = row < 0 ? -1.0f : 1.0f;",
        "sign = 1.0f;",
        ("frame_kernels.py::test_the_first_frame_may_begin_with_padding",),
    ),
    Break(
        "weight of the values' mean",
        "rotatekv/kernels/cpu/attention.cpp",
        "weights[k] += part[0] * part[1];",
        "weights[k] = 1.0f;",
        ("plus_kernels.py::test_families", "frame_kernels.py::test_the_error_is_far_below_what_rounding_keys_costs"),
    ),
    Break(
        "values' weights are never exact",
        "rotatekv/kernels/cpu/coded_values.h",
        "out->exact = lost > sum_lanes(squares) * noise;",
        "out->exact = false;",
        ("frame_kernels.py::test_few_tokens_with_all_the_weight",),
    ),
    Break(
        "a value's word keeps its other tokens",
        "rotatekv/kernels/cpu/frames.cpp",
        "(uint32_t(words[first + i]) & kept) | fresh[i]",
        "fresh[i]",
        ("frame_writes.py::test_writes_are_those_of_torch",),
    ),
    Break(
        "frames after odd padding",
        "rotatekv/cache/layer.py",
        "is not None and call.is_padded:",
        "is not None and False:",
        ("plus_kernels.py::test_odd_positions_take_the_general_path",),
    ),
)


def copy_tree(folder: Path) -> None:
    """The files that git knows or would take."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], **environment: str) -> tuple[int, str]:
    """pytest's exit status and the end of its output; in a fork, which has torch and transformers already."""
    names = [f"tests/{x}" if x.startswith("interpreted") else f"tests/test_{x}" for x in tests]
    output = folder / "output.txt"

    def run() -> None:
        os.chdir(folder)
        os.environ |= {**environment, "PYTHONPATH": str(folder)}
        sys.path.insert(0, str(folder))
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *names]))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    return child.exitcode, output.read_text(encoding="utf-8", errors="replace")[-2000:]


def environment_of(tried: Break, folder: Path) -> dict[str, str]:
    """C++ kernels that are broken are built in a folder of their own; Triton is interpreted."""
    if "/triton/" in tried.file:
        return {"TRITON_INTERPRET": "1"}
    return {"ROTATEKV_CACHE_DIR": str(folder / "libraries")} if tried.file.endswith((".h", ".cpp")) else {}


def try_break(folder: Path, tried: Break) -> str:
    """``caught``, or what is wrong."""
    path = folder / tried.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(tried.find) != 1:
        return f"the text stands {text.count(tried.find)} times in {tried.file}"
    path.write_text(text.replace(tried.find, tried.put), encoding="utf-8")
    status, _ = run_tests(folder, tried.tests, **environment_of(tried, folder))
    path.write_text(text, encoding="utf-8")
    return "caught" if status == pytest.ExitCode.TESTS_FAILED else f"NOT CAUGHT (pytest ends with {status})"


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    chosen = [x for x in BREAKS if not names or any(map(x.name.__contains__, names))]
    with tempfile.TemporaryDirectory(prefix="rotatekv-breaks-") as place:
        folder = Path(place)
        copy_tree(folder)
        for triton in (False, True):
            tests = [test for x in chosen for test in x.tests if triton == ("/triton/" in x.file)]
            status, output = run_tests(folder, tests, TRITON_INTERPRET=str(int(triton))) if tests else (0, "")
            if status:
                sys.exit(f"tests fail without any break:\n{output}")
        results = []
        for tried in chosen:
            start = time.monotonic()
            results.append(try_break(folder, tried))
            test, seconds = tried.tests[0].partition("::")[2][:60], time.monotonic() - start
            print(f"{tried.name:<34}{test:<62}{results[-1]}, {seconds:.0f} s", flush=True)
    print(f"{results.count('caught')} of {len(results)} caught")
    sys.exit(set(results) != {"caught"})


if __name__ == "__main__":
    main(sys.argv[1:])
