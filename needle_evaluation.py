"""Needle in a haystack: one sentence, or a random number, hidden in a long text and asked for, over lengths and depths.

With no data and no network:  python needle_evaluation.py --needle_type passkey --method RotateKV2
Finished runs side by side:   python needle_evaluation.py --compare DIR,DIR --output passkey.png
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rotatekv import load_model
from rotatekv.cli import add_switch, check_positive, evaluation_parser, method_from_args, model_flags
from rotatekv.errors import UserError
from rotatekv.evals.generation import MAX_NEW_TOKENS, check_context, decoding
from rotatekv.evals.needle import (
    CONTEXT_LENGTHS,
    DEPTHS,
    KEY_PHRASE,
    NEEDLE,
    NEEDLE_TYPES,
    RETRIEVAL_QUESTION,
    Prompts,
    answer_cell,
    cells,
    load_haystack,
    means,
    parse_grid,
    scored,
    use_chat,
    wording,
)
from rotatekv.evals.needle_figure import read_grid, write_heat_maps, write_report
from rotatekv.evals.needle_keys import KEY_NAMES, NEEDLE_KEYS, check_keys
from rotatekv.evals.running import finish_run, open_run, rescore, score_samples, summary
from rotatekv.evals.tokens import check_token_ids
from rotatekv.external import use_method
from rotatekv.scripts import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__, "cells")
    group = parser.add_argument_group("needle")
    grid = "as a list (10,20,50) or min:max:steps (10:50:5); default"
    group.add_argument(
        "--needle_type",
        choices=list(NEEDLE_TYPES),
        default="standard",
        help="standard (default): a sentence; passkey: a random number, which a small model can find; multikey: "
        "several such numbers, each under a name, of which one is asked for (as in RULER)",
    )
    group.add_argument(
        "--needle_keys",
        type=int,
        metavar="N",
        help=f"how many pass keys multikey hides, the asked one too: 2 to {len(KEY_NAMES)} (default: {NEEDLE_KEYS})",
    )
    group.add_argument("--context_lengths", default=CONTEXT_LENGTHS, help=f"prompt tokens, {grid}: %(default)s")
    group.add_argument("--depths", default=DEPTHS, help=f"percent before the needle, {grid}: %(default)s")
    group.add_argument("--haystack", default="essays", help="essays (embedded; default), wikitext2, a file or a folder")
    group.add_argument("--needle", help=f'standard default: "{NEEDLE}"')
    group.add_argument("--retrieval_question", help=f'standard default: "{RETRIEVAL_QUESTION}"')
    group.add_argument("--key_phrase", help=f'part of the needle that counts as recall (default: "{KEY_PHRASE}")')
    group.add_argument(
        "--introduction",
        help="what stands before the haystack (default: the needle type's own); '' for a base model, which may copy it "
        "in place of the answer",
    )
    group.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS["needle"], help="default: %(default)s")
    add_switch(group, "chat_template", "ask in the chat template (default: where there is one)", default=None)
    group.add_argument("--compare", metavar="DIR,DIR", help="draw these finished runs side by side, and end")
    group.add_argument("--output", help="the png that --compare writes (default: needle_compare.png)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare is not None:
        return compare(args)
    if args.output is not None:
        raise UserError("--output is for --compare; a run writes its heat map into its own folder")
    if args.rescore is not None:
        return score_again(args.rescore)
    check_positive(args, "limit", "max_new_tokens")
    name, quant_config = method_from_args(args)
    needle, question, key_phrase = wording(args.needle_type, args.needle, args.retrieval_question, args.key_phrase)
    lengths = parse_grid(args.context_lengths, "context_lengths", lowest=1)
    depths = parse_grid(args.depths, "depths", lowest=0, highest=100)
    keys = check_keys(args.needle_type, args.needle_keys)
    samples = cells(lengths, depths, args.seed, args.needle_type, needle, key_phrase, keys or NEEDLE_KEYS)[: args.limit]
    haystack = load_haystack(args.haystack, args.data_dir)
    model, tokenizer = load_model(**model_flags(args))
    check_context(model, samples[-1]["length"], args.max_new_tokens)
    kind = NEEDLE_TYPES[args.needle_type]
    introduction = {} if args.introduction is None else {"introduction": args.introduction}
    if introduction:
        kind = replace(kind, before=args.introduction)
    chat = use_chat(args.chat_template, tokenizer)
    prompts = Prompts(tokenizer, kind, haystack, question, chat)
    for sample in samples:
        if sample["length"] == samples[0]["length"]:  # the shortest; before a run opens
            check_token_ids(model, prompts.build_cell(sample).ids)

    dataset = {"id": haystack.name, "sha256": haystack.sha256}
    protocol = {
        "needle_type": args.needle_type,
        "context_lengths": lengths,
        "depths": depths,
        "needle": needle,
        "retrieval_question": question,
        "key_phrase": key_phrase,
        "max_new_tokens": args.max_new_tokens,
        **introduction,  # earlier runs without it are found again
        **({} if keys is None else {"needle_keys": keys}),
        "chat_template": chat,
        "decoding": decoding(model, tokenizer, kind.stop_strings),
    }
    with use_method(model, quant_config, args.calibration_file) as handle:
        run = open_run(args, "needle", name, handle, dataset, **protocol)
        if not score_samples(
            run,
            samples,
            lambda batch: [answer_cell(model, tokenizer, prompts, cell, args.max_new_tokens) for cell in batch],
            unit="cell",
            running=lambda records: {key: f"{value:.1f}" for key, value in means(records).items()},
        ):
            return
    records = [run.samples[sample["id"]] for sample in samples]
    metrics = finish_run(run, records, means(records), len(records) < len(lengths) * len(depths), write_report)
    report(records, metrics, run.folder)


def report(records: list[dict], metrics: dict, folder: Path) -> None:
    print(f"{len(records)} cells, {folder / 'metrics.json'}")
    needle_type, metric = metrics["config"]["needle_type"], metrics["metric"]
    print(
        f"needle ({needle_type}) rouge1: {metric['rouge1']:.2f}, recall: {metric['recall']:.2f} %  {summary(metrics)}"
    )


def score_again(folder: str) -> None:
    records: list[dict] = []

    def metric_of(found: list[dict]) -> tuple[list[dict], dict]:
        records.extend(map(scored, found))
        return records, means(records)

    report(records, rescore(folder, "needle", metric_of, write_report), Path(folder))


def compare(args: argparse.Namespace) -> None:
    folders = [folder.strip() for folder in args.compare.split(",") if folder.strip()]
    if not folders:
        raise UserError("--compare needs folders of finished needle runs: DIR,DIR")
    output = Path(args.output or "needle_compare.png")
    write_heat_maps(output, [read_grid(folder) for folder in folders])
    print(f"{len(folders)} runs: {output}")


if __name__ == "__main__":
    main()
