"""`dovetail bench`: plain `generate` against the draft on the same prompts, as a table, as JSON and as a picture."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import (
    ALL_ENGINES,
    MOST_BLOCKS,
    MOST_NEW_TOKENS,
    HelpFormatter,
    add_budget_arguments,
    add_generation_arguments,
    add_pair_arguments,
    check_writable,
    engine_names,
    number,
    parse_engine,
    whole_number,
)

MOST_PROMPTS = 100_000
MOST_REPEATS = 10_000
CONTEXT, REPEATS = 128, 9
"""Defaults of --context and --repeats."""

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
  dovetail bench --target DIR --draft DIR --engines --plot engines.png       # which engine is the fastest here

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
    _add_engines_arguments(parser)
    _add_synthetic_arguments(parser)
    add_generation_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def _add_engines_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "engines",
        "Compare the target on all engines that are installed: milliseconds of a pass over 1 to 32 rows, how far that "
        "is from what this machine's memory and arithmetic allow, and tokens/s without and with the draft. All engines "
        "are loaded at once and take turns.",
    )
    group.add_argument(
        "--engines",
        nargs="?",
        const="all",
        type=engine_names,
        metavar="NAMES",
        help=f"the engines beside torch, separated by commas: {', '.join(ALL_ENGINES)}; without NAMES: all",
    )
    group.add_argument(
        "--engine",
        type=parse_engine,
        action="append",
        default=[],
        metavar="NAME=DIR[,key=value...]",
        help="an exported target to compare, with options of its from_pretrained, or a GGUF file of the target, which "
        "llama.cpp runs without a draft (needs xllamacpp); can be repeated",
    )
    group.add_argument(
        "--context",
        type=whole_number(1, MOST_NEW_TOKENS),
        metavar="N",
        help=f"tokens before each timed pass; default: {CONTEXT}",
    )
    group.add_argument(
        "--repeats",
        type=whole_number(1, MOST_REPEATS),
        metavar="N",
        help=f"timed passes of each engine for each number of rows; default: {REPEATS}",
    )


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
    if args.engines is not None:
        return _run_engines(args)
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
    if tried is not None:
        plots.draw(args.plot, result, [r for report in comparison.reports for r in report.rounds], tried)
    return _publish(args, result, line)


def _run_engines(args: argparse.Namespace) -> int:
    """Compare engines, print, and return the exit status."""
    from ..bench import engines_plot
    from ..machine import thread_count
    from .engines import run_engines

    args.context, args.repeats = args.context or CONTEXT, args.repeats or REPEATS
    with thread_count(args.threads):
        result = run_engines(args)
        line = result.json_line()
    if args.plot is not None:
        engines_plot.draw(args.plot, result)
    return _publish(args, result, line)


def _publish(args: argparse.Namespace, result: Any, line: str) -> int:
    """Append the line of JSON to --out, print it or the table, and return the exit status."""
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    if args.plot is not None:
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
    _check_engines(args)
    if args.out is not None:
        check_writable("--out", args.out)


def _check_engines(args: argparse.Namespace) -> None:
    """Refuse options that do not go with --engines, or need it.

    Raises:
        ValueError: names the option.
    """
    if args.engines is None:
        for option in ("engine", "context", "repeats"):
            if getattr(args, option):
                raise ValueError(f"--{option} is for the comparison of engines; add --engines.")
        return
    for option in ("target_ir", "weights", "vram", "synthetic_acceptance"):
        if getattr(args, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(
                f"{name} does not go with --engines, which compares --target on all engines; leave it out."
            )
