"""MileBench with a quantized KV cache: questions about many pictures, for LLaVA-like models.

With no weights to be had:
  python MileBench_evaluation.py --model llava-random-smollm2 --data_dir ../shared/data --limit 2 --max_new_tokens 16
"""

from __future__ import annotations

import argparse
import hashlib

from rotatekv.cli import add_switch, check_positive, evaluation_parser, method_from_args, model_flags
from rotatekv.evals.generation import MAX_NEW_TOKENS, complete_inputs, decoding
from rotatekv.evals.milebench import build_prompt, encode_prompt, load_datasets
from rotatekv.evals.milebench_metrics import category_of, rescored, score_record, summarize
from rotatekv.evals.records import records_sha256
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples, summary
from rotatekv.external import use_method
from rotatekv.models.vision import RANDOM_LLAVA, VISION_ALIASES, load_vision_model
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "records of each data set", RANDOM_LLAVA)
    group = parser.add_argument_group(
        "MileBench", f"Models beside local folders and Hub ids: {RANDOM_LLAVA}, {', '.join(VISION_ALIASES)}."
    )
    group.add_argument(
        "--datasets", default="all", help="comma-separated folders in DIR or DIR/milebench (default: all found)"
    )
    group.add_argument(
        "--max_new_tokens",
        type=int,
        default=MAX_NEW_TOKENS["milebench"],
        help="tokens per answer (default: %(default)s)",
    )
    add_switch(group, "adv", "take <DATASET>-adv.json")
    group.add_argument("--combine_image", type=int, metavar="N", help="take <DATASET>_combined_<N>.json")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.rescore is not None:
        metrics = rescore(args.rescore, "milebench", rescored)
        return report(metrics["metric"], metrics["n"], args.rescore, metrics["config"]["model"], summary(metrics))
    check_positive(args, "limit", "max_new_tokens", "combine_image")
    name, quant_config = method_from_args(args)
    names = [part.strip() for part in args.datasets.split(",") if part.strip()]
    samples, records = load_datasets(args.data_dir, names, args.limit, args.adv, args.combine_image)
    model, processor = load_vision_model(**model_flags(args))

    dataset = {
        "id": "milebench/" + ",".join(dict.fromkeys(sample["dataset"] for sample in samples)),
        "sha256": records_sha256(records),
    }
    protocol = {
        "max_new_tokens": args.max_new_tokens,
        "adv": args.adv,
        "combine_image": args.combine_image,
        "decoding": decoding(model, processor.tokenizer),
    }
    with use_method(model, quant_config, args.calibration_file) as handle:
        run = open_run(args, "milebench", name, handle, dataset, **protocol)
        if not score_samples(
            run,
            samples,
            lambda batch: [answer(model, processor, sample, args.max_new_tokens) for sample in batch],
            unit="question",
            running=lambda done: {"average": f"{summarize(done)['average']:.2f}"},
        ):
            return
    done = [run.samples[sample["id"]] for sample in samples]
    metric = summarize(done)
    metrics = finish_run(run, done, metric, args.limit is not None)
    report(metric, len(done), run.folder, model.name_or_path, summary(metrics))


def answer(model, processor, sample: dict, max_new_tokens: int) -> dict:
    """The record of one question, answered greedily from an empty cache."""
    prompt = build_prompt(sample)
    inputs, shown = encode_prompt(processor, model, prompt, max_new_tokens)
    (record,) = complete_inputs(model, processor.tokenizer, inputs, max_new_tokens)
    record |= {name: sample[name] for name in ("dataset", "question_type", "choices", "letters", "image_count")}
    record |= {
        "answers": [sample["answer"]],
        "prompt_sha256": hashlib.sha256(shown.text(processor.image_token).encode()).hexdigest(),
        "images_shown": len(shown.shown),
        "image_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "dropped_parts": len(prompt.body) - len(shown.body),
    }
    return {**record, "score": score_record(record)}


def report(metric: dict, questions: int, path, model: str, end: str) -> None:
    """Print the scores, what they are not, and the last line."""
    datasets = [name for name in metric if name not in ("average", "images", "categories")]
    for name in datasets:
        print(f"{name:<26} {metric[name]:7.2f}")
    for split in ("images", "categories"):
        for name, value in metric[split].items():
            print(f"{split + ': ' + name:<26} {value:7.2f}")
    if foreign := [name for name in datasets if category_of(name) is None]:
        print(f"not part of MileBench, and its average not a MileBench score: {', '.join(foreign)}")
    if model.startswith("llava-random/"):
        print("the vision tower is random: these scores mean nothing, only the cache's use is real")
    print(f"{questions} questions, {path}")
    print(f"milebench average: {metric['average']:.4f}  {end}")


if __name__ == "__main__":
    main()
