"""LongBench and LongBench-E of a model with a quantized KV cache.

Two records of a task:  python LongBench_evaluation.py --tasks qasper --limit 2 --data_dir DIR --method RotateKV2
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

from rotatekv import load_model
from rotatekv.cli import add_switch, check_positive, evaluation_parser, method_from_args, model_flags
from rotatekv.errors import UserError
from rotatekv.evals import longbench
from rotatekv.evals.generation import complete, decoding
from rotatekv.evals.longbench import Task
from rotatekv.evals.records import records_sha256
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples, summary
from rotatekv.evals.tokens import check_tokenizer, context_length
from rotatekv.external import use_method
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "records of each task")
    group = parser.add_argument_group("LongBench")
    names = ", ".join((*longbench.GROUPS, *longbench.TASKS))
    group.add_argument("--tasks", help=f"comma-separated, of {names} (default: paper; of LongBench-E: all)")
    add_switch(group, "longbench_e", "LongBench-E: its 13 tasks, with scores by length too")
    add_switch(group, "e", "the same as --longbench_e")
    group.add_argument(
        "--max_length",
        type=int,
        help="longer prompts lose their middle (default: the model's context minus the answer)",
    )
    group.add_argument("--max_new_tokens", type=int, help="tokens of an answer at most (default: each task's own)")
    add_switch(
        group, "chat_template", "default: where the tokenizer has one; few-shot and code tasks never take it", None
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.rescore is not None:
        return score_again(args.rescore)
    check_positive(args, "limit", "max_new_tokens")
    if args.max_length is not None and args.max_length < 2:
        raise UserError(f"--max_length must be at least 2 (a head and a tail), not {args.max_length}")
    name, quant_config = method_from_args(args)
    of_e = args.e or args.longbench_e
    names = longbench.task_names(args.tasks or ("all" if of_e else "paper"), of_e)
    tasks = [longbench.load_task(task_name) for task_name in names]
    data = [(task, longbench.load_records(task, args.data_dir)) for task in tasks]
    model, tokenizer = load_model(**model_flags(args))
    check_lengths(model, tasks, args.max_length, args.max_new_tokens)

    dataset = {
        "id": "longbench-e" if of_e else "longbench",
        "sha256": records_sha256([record for _, records in data for record in records]),
    }
    protocol = {
        "tasks": names,
        "max_length": args.max_length,
        "max_new_tokens": args.max_new_tokens,
        "chat_template": longbench.wants_chat(tokenizer, args.chat_template),
        "lm_eval": version("lm_eval"),
        "decoding": decoding(model, tokenizer),
    }
    samples: list[dict] = [
        {"id": f"{task.name}/{number}", "task": task, "record": record}
        for task, records in data
        for number, record in enumerate(records[: args.limit])
    ]
    check_tokenizer(model, tokenizer, longbench.prompt_of(samples[0]["task"], samples[0]["record"]))
    with use_method(model, quant_config, args.calibration_file) as handle:
        run = open_run(args, "longbench", name, handle, dataset, **protocol)
        if not score_samples(
            run,
            samples,
            lambda batch: [answer(model, tokenizer, sample, protocol) for sample in batch],
            unit="record",
            running=lambda records: {"average": f"{longbench.metric_of(records)['average']:.2f}"},
        ):
            return
    records = [run.samples[sample["id"]] for sample in samples]
    metric = longbench.metric_of(records)
    metrics = finish_run(run, records, metric, len(records) < sum(len(found) for _, found in data))
    print(f"{longbench.table(records, metric)}\n{len(records)} records, {run.folder / 'metrics.json'}")
    print(f"longbench average: {metric['average']:.2f}  {summary(metrics)}")


def answer(model, tokenizer, sample: dict, protocol: dict) -> dict:
    """Complete one record's prompt from an empty cache and score it."""
    task, record = sample["task"], sample["record"]
    new_tokens = protocol["max_new_tokens"] or task.max_new_tokens
    room = context_length(model) - new_tokens
    chat = protocol["chat_template"] and task.takes_chat
    text = longbench.prompt_of(task, record)
    prompt = longbench.fit_prompt(tokenizer, text, protocol["max_length"] or room, room, chat)
    stop = longbench.stop_options(task, model, tokenizer)
    (done,) = complete(model, tokenizer, [prompt], new_tokens, add_special_tokens=not chat, **stop)
    gold = {field: record[field] for field in ("answers", "all_classes", "length")}
    return {**done, **gold, "score": longbench.score(task, done["prediction"], record)}


def score_again(folder: str) -> None:
    """Compute and print a run's scores again from its predictions."""

    def metric_of(records: list[dict]) -> tuple[list[dict], dict]:
        records = longbench.rescored(records)
        metric = longbench.metric_of(records)
        print(longbench.table(records, metric))
        return records, metric

    metrics = rescore(folder, "longbench", metric_of)
    print(f"longbench average: {metrics['metric']['average']:.2f}  {summary(metrics)}")


def check_lengths(model, tasks: list[Task], max_length: int | None, max_new_tokens: int | None) -> None:
    """Raises UserError where a prompt of ``max_length`` tokens and the longest answer exceed the model's context."""
    context = context_length(model)
    longest = max(tasks, key=lambda task: task.max_new_tokens)
    room = context - (max_new_tokens or longest.max_new_tokens)
    if room < 2:
        raise UserError(f"{longest.name}'s answer of {context - room} tokens fills the context: lower --max_new_tokens")
    if max_length is not None and max_length > room:
        raise UserError(
            f"--max_length {max_length} and {longest.name}'s answer of {context - room} tokens exceed the model's "
            f"context of {context}: pass --max_length {room} or less"
        )


if __name__ == "__main__":
    main()
