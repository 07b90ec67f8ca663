"""`dovetail generate`: stream an answer, with the draft or both ways."""

import argparse

import torch
from transformers import TextStreamer

from ..bench.compare import Run, timed_generate
from ..bench.prompts import encode_prompt
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
  dovetail generate --target DIR --draft DIR --prompt "How much is 17 times 3?"
  dovetail generate --target DIR --prompt "..."          # with a draft that is known for it, else lookup in the text
  dovetail generate --target DIR --draft DIR --prompt "..." --compare      # plain first, then with the draft
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="talk to a model with its draft",
        description="Generate text with a target on the CPU and its draft on the GPU, streaming.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--prompt", required=True, help="what to say to the model")
    parser.add_argument("--compare", action="store_true", help="generate plainly too, and compare text and speed")
    add_pair_arguments(parser, draft_required=False)
    add_sampling_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, stream, print the report."""
    pair = load_pair(args)
    input_ids = encode_prompt([{"role": "user", "content": args.prompt}], pair.tokenizer)
    options = generate_options(args)

    def stream(**extra: object) -> Run:
        torch.manual_seed(args.seed)
        streamer = TextStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return timed_generate(pair.target, input_ids, **options, **extra, streamer=streamer)

    with thread_count(args.threads):
        if args.compare:
            # A few uncounted tokens of each kind, so that neither side pays for first-time set-up.
            for extra in ({}, {"assistant_model": pair.draft}):
                pair.target.generate(input_ids, **(options | {"max_new_tokens": 4}), **extra)
            print("--- plain generate ---")
            plain = stream()
            print("\n--- with the draft ---")
        drafted = stream(assistant_model=pair.draft)
    print(f"\n{pair.draft.report}")
    if args.compare:
        same = torch.equal(plain.ids, drafted.ids)
        print(f"identical text: {'yes' if same else 'no'}")
        print(
            f"tokens/s: plain {plain.tokens_per_s:.1f}, with the draft {drafted.tokens_per_s:.1f}, "
            f"ratio {drafted.tokens_per_s / plain.tokens_per_s:.2f}"
        )
    return 0
