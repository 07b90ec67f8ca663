"""`dovetail bench`: plain `generate` against the draft on the same prompts, as a table and a JSON line."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..benchmark import Comparison, load_prompts
from ..machine import thread_count
from .common import (
    HelpFormatter,
    add_budget_arguments,
    add_pair_arguments,
    add_sampling_arguments,
    generate_options,
    load_pair,
)

EPILOG = """\
examples:
  dovetail bench --target DIR --draft DIR
  dovetail bench --target DIR --draft DIR --count 20 --max-new-tokens 64 --nodes 8 --depth 5 --top-k 4
  dovetail bench --target DIR --draft DIR --prompts my.jsonl --out results.jsonl

Each prompt is generated both ways, one right after the other, with the same model, dtype and threads.
tokens/s counts whole calls of generate, prompt included. Let nothing else run on the machine meanwhile.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="measure what a draft brings on this machine",
        description="Run plain generate and the draft on the same prompts, interleaved, and compare.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help="lines with prompt, question, turns or messages; default: GSM8K test questions",
    )
    parser.add_argument("--count", type=int, default=20, help="prompts to run")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON line to this file")
    add_pair_arguments(parser)
    add_sampling_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, compare, print. Status 1 if a greedy text differs other than at a tie."""
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}.")
    pair = load_pair(args)
    prompts = load_prompts(args.prompts, pair.tokenizer, args.count)
    comparison = Comparison(pair.target, pair.draft, generate_options(args), seed=args.seed)
    with thread_count(args.threads):
        comparison.warm_up(prompts[0])
        for input_ids in tqdm(prompts, desc="bench", unit="prompt"):
            comparison.add(input_ids)
        result = comparison.result(
            target=pair.target.config.name_or_path.rstrip("/").rsplit("/", 1)[-1],
            parameters=pair.target.num_parameters(),
            draft_parameters=pair.draft.num_parameters(),
            dtype=str(pair.target.dtype).removeprefix("torch."),
            draft_device=str(pair.draft.device),
            budget=str(pair.draft.budget or "policy"),
            **comparison.options,
        )
        line = result.json_line()
    print(result.table())
    print(line)
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    return int(result.differences > 0 and not args.do_sample)
