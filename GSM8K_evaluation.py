"""GSM8K accuracy of a model with a quantized KV cache: chain of thought after eight examples, greedy.

With local questions:  python GSM8K_evaluation.py --data_dir DIR --limit 20 --method RotateKV2
reads DIR/gsm8k/test.jsonl; without --data_dir the Hub's openai/gsm8k.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from rotatekv import load_model
from rotatekv.cli import check_positive, evaluation_parser, method_from_args, model_flags
from rotatekv.evals import gsm8k
from rotatekv.evals.generation import MAX_NEW_TOKENS, complete, decoding
from rotatekv.evals.records import records_sha256
from rotatekv.evals.results import Run
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples, summary
from rotatekv.evals.tokens import check_tokenizer
from rotatekv.external import use_method
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "questions")
    group = parser.add_argument_group("gsm8k")
    group.add_argument("--num_fewshot", type=int, default=8, help="worked examples before each question (default: 8)")
    group.add_argument(
        "--max_new_tokens", type=int, default=MAX_NEW_TOKENS["gsm8k"], help="tokens per answer (default: %(default)s)"
    )
    group.add_argument("--batch_size", type=int, default=1, help="questions answered at once (default: 1)")
    group.add_argument(
        "--agree_with",
        metavar="DIR",
        help="another run's folder, say FP16's: also count the tokens of an answer before the two runs differ",
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    others = Run.of_folder(args.agree_with, "gsm8k").samples if args.agree_with is not None else None

    def metric_of(records: list[dict]) -> dict:
        agreement = {} if others is None else {"agreement": gsm8k.agreement(records, others)}
        return {"accuracy": gsm8k.accuracy(records), **agreement}

    def score_again(records: list[dict]) -> tuple[list[dict], dict]:
        records = [gsm8k.score(record) for record in records]
        return records, metric_of(records)

    if args.rescore is not None:
        return report(rescore(args.rescore, "gsm8k", score_again), args.rescore)
    check_positive(args, "limit", "max_new_tokens", "batch_size")
    name, quant_config = method_from_args(args)
    examples = gsm8k.load_examples(args.num_fewshot)
    questions = gsm8k.load_questions(args.data_dir)
    samples = questions[: args.limit]
    if others is not None:
        gsm8k.check_token_ids(samples, others)
    model, tokenizer = load_model(**model_flags(args))
    check_tokenizer(model, tokenizer, gsm8k.build_prompt(examples, samples[0]["question"]))

    dataset = {"id": "gsm8k/test", "sha256": records_sha256(questions)}
    protocol = {
        "num_fewshot": args.num_fewshot,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "examples_sha256": hashlib.sha256(gsm8k.build_prompt(examples, "").encode()).hexdigest(),
        "decoding": decoding(model, tokenizer, [gsm8k.STOP]),
    }

    def answer(batch: list[dict]) -> list[dict]:
        prompts = [gsm8k.build_prompt(examples, sample["question"]) for sample in batch]
        records = complete(model, tokenizer, prompts, args.max_new_tokens, [gsm8k.STOP])
        return [gsm8k.score({**record, "answers": s["answers"]}) for s, record in zip(batch, records, strict=True)]

    with use_method(model, quant_config, args.calibration_file) as handle:
        run = open_run(args, "gsm8k", name, handle, dataset, **protocol)
        if not score_samples(
            run,
            samples,
            answer,
            unit="question",
            batch_size=args.batch_size,
            running=lambda records: {"accuracy": f"{gsm8k.accuracy(records):.1f} %"},
        ):
            return
    records = [run.samples[sample["id"]] for sample in samples]
    report(finish_run(run, records, metric_of(records), len(records) < len(questions)), run.folder)


def report(metrics: dict, folder: str | Path) -> None:
    print(f"{metrics['n']} questions, {Path(folder) / 'metrics.json'}")
    print(f"gsm8k accuracy: {metrics['metric']['accuracy']:.2f} %  {summary(metrics)}")
    if "agreement" in metrics["metric"]:
        print(f"the same as the other run for {metrics['metric']['agreement']:.1f} tokens of an answer, on average")


if __name__ == "__main__":
    main()
