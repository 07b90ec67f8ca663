"""`dovetail bench`: plain `generate` against the draft on the same prompts, as a table, as JSON and as a picture."""

import argparse
import sys
from pathlib import Path

from .common import (
    MOST_BLOCKS,
    HelpFormatter,
    add_budget_arguments,
    add_generation_arguments,
    add_pair_arguments,
    check_writable,
    number,
    whole_number,
)

MOST_PROMPTS = 100_000

DESCRIPTION = """\
Generate with and without the draft on the same prompts, alternating, and compare. Standard output gets the table, or
with --json one line of JSON instead; notes and progress go to standard error. The exit status is 1 if a greedy text
differs other than at a tie of the target's logits.
"""
EPILOG = """\
examples:
  dovetail bench --target DIR --draft DIR
  dovetail bench --target DIR --draft DIR --count 20 --max-new-tokens 64 --tree-nodes 8 --tree-depth 5 --tree-top-k 4
  dovetail bench --target DIR --draft DIR --prompts my.jsonl --out results.jsonl --plot bench.png
  dovetail bench --target llama-3.2-1b-shape --synthetic-acceptance 0.8      # before there is a draft, or a model

Each prompt is generated both ways, one right after the other, with the same model, dtype and threads.
tokens/s counts whole calls of generate, prompt included. Let nothing else run on the machine meanwhile.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "bench",
        usage="dovetail bench --target DIR_OR_ID [--draft DIR_OR_ID] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="JSON lines with prompt, question, turns or messages; the assistant's answers in them are left out; "
        "default: GSM8K test questions",
    )
    add("--count", type=whole_number(1, MOST_PROMPTS), default=20, metavar="N", help="number of prompts to run")
    add("--json", action="store_true", help="print the result as one line of JSON instead of the table")
    add("--out", "-o", type=Path, metavar="FILE.jsonl", help="append the line of JSON to this file")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the phases of a round, acceptance by depth, the policy's predictions, and fixed tree budgets, which "
        "are tried on a few of the prompts in addition (needs matplotlib)",
    )
    add_pair_arguments(parser)
    _add_synthetic_arguments(parser)
    add_generation_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def _add_synthetic_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "simulated acceptance",
        "Measure before there is a trained draft: target and draft run real passes, but whether a drafted token is "
        "accepted is drawn at random. Without --draft an untrained one is used. --target may be a config.json, or one "
        "of the shapes that `dovetail plan --help` lists; it gets random weights then.",
    )
    group.add_argument(
        "--synthetic-acceptance",
        type=number(0, 1),
        metavar="RATE",
        help="how often the draft's first choice is right; trained drafts reach 0.6 to 0.85",
    )
    group.add_argument(
        "--blocks",
        type=whole_number(1, MOST_BLOCKS),
        metavar="N",
        help=f"decoder blocks of the untrained draft, 1 to {MOST_BLOCKS}; default: 1",
    )


def run(args: argparse.Namespace) -> int:
    """Load, compare, print. Returns 1 if a greedy text differs other than at a tie."""
    _check(args)

    from tqdm import tqdm

    from ..bench import plot as plots
    from ..bench.sweep import PROMPTS, sweep
    from ..machine import thread_count
    from .comparison import prepare

    if args.plot is not None:
        plots.check_file(args.plot)
    comparison, prompts, settings = prepare(args)
    with thread_count(args.threads):
        comparison.warm_up(prompts[0])
        for input_ids in tqdm(prompts, desc="bench", unit="prompt"):
            comparison.add(input_ids)
        tried = sweep(comparison, tqdm(prompts[:PROMPTS], desc="fixed budgets", unit="prompt")) if args.plot else None
        if tried is not None:
            settings["sweep_tokens_per_s"] = tried.as_dict()
        result = comparison.result(**settings)
        line = result.json_line()
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    if tried is not None:
        plots.draw(args.plot, result, [r for report in comparison.reports for r in report.rounds], tried)
        print(f"plot: {args.plot}", file=sys.stderr)
    print(line if args.json else result.table())
    return int(result.differences > 0 and not args.do_sample)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is loaded.

    Raises:
        ValueError: options do not go together, or an output file cannot be written.
    """
    synthetic = args.synthetic_acceptance is not None
    if synthetic and args.do_sample:
        raise ValueError(
            "--do-sample does not go with --synthetic-acceptance, which draws its tokens at random; leave out one."
        )
    if args.blocks is not None and (not synthetic or args.draft is not None):
        raise ValueError("--blocks needs --synthetic-acceptance without --draft: it sizes the untrained draft.")
    if args.out is not None:
        check_writable("--out", args.out)
