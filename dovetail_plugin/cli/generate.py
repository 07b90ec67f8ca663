"""`dovetail generate`: streams an answer, generated with the draft, or both with it and without."""

import argparse
import sys
from pathlib import Path

from .common import (
    HelpFormatter,
    add_budget_arguments,
    add_generation_arguments,
    add_pair_arguments,
    generate_options,
)

DESCRIPTION = """\
Generate text with a target and a draft, streaming. Standard output gets the text and nothing else; the report, notes
and progress go to standard error.
"""
EPILOG = """\
examples:
  dovetail generate --target DIR --draft DIR --prompt "How much is 17 times 3?"
  dovetail generate --target DIR --prompt "..."       # with the draft known for the target, otherwise lookup
  dovetail generate --target DIR --draft DIR --prompt-file question.txt > answer.txt
  dovetail generate --target DIR --draft DIR --prompt "..." --compare   # without the draft first, then with it
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "generate",
        usage="dovetail generate --target DIR_OR_ID [--draft DIR_OR_ID] --prompt TEXT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", "-p", metavar="TEXT", help="the user's message; - or none reads it from standard input"
    )
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the user's message, in UTF-8")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="generate without the draft first, on standard error, and compare text and speed",
    )
    add_pair_arguments(parser)
    add_generation_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load both models, stream the text, and print the report.

    Raises:
        ValueError: there is no prompt, an option does not fit the others, or a model cannot be loaded.
    """
    prompt = _read_prompt(args)
    options = generate_options(args)

    import torch
    from transformers import TextStreamer

    from ..bench.compare import Run, timed_generate
    from ..bench.prompts import encode_prompt
    from ..machine import thread_count
    from .loading import load_pair

    class PlainStreamer(TextStreamer):
        """Streams to standard error."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True, file=sys.stderr)

    pair = load_pair(args)
    input_ids = encode_prompt([{"role": "user", "content": prompt}], pair.tokenizer)

    def stream(kind: type[TextStreamer], **extra: object) -> Run:
        torch.manual_seed(args.seed)
        streamer = kind(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return timed_generate(pair.target, input_ids, **options, **extra, streamer=streamer)

    with thread_count(args.threads):
        if args.compare:
            # A few uncounted tokens of each kind, so that neither side pays for first-time set-up.
            for extra in ({}, {"assistant_model": pair.draft}):
                pair.target.generate(input_ids, **(options | {"max_new_tokens": 4}), **extra)
            print("--- without the draft ---", file=sys.stderr)
            plain = stream(PlainStreamer)
            print("\n--- with the draft ---", file=sys.stderr)
        drafted = stream(TextStreamer, assistant_model=pair.draft)
    print(f"\n{pair.draft.report}", file=sys.stderr)
    if args.compare:
        same = torch.equal(plain.ids, drafted.ids)
        print(
            f"identical text: {'yes' if same else 'no'}\n"
            f"tokens/s: plain {plain.tokens_per_s:.1f}, with the draft {drafted.tokens_per_s:.1f}, "
            f"ratio {drafted.tokens_per_s / plain.tokens_per_s:.2f}",
            file=sys.stderr,
        )
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    """The text of --prompt, --prompt-file or standard input.

    Raises:
        ValueError: there is none, or it is not valid UTF-8. OSError: the file cannot be read.
    """
    if args.prompt_file is not None:
        if args.prompt_file.is_dir():
            raise ValueError(f"--prompt-file {args.prompt_file} is a directory; name a file.")
        source, raw = f"--prompt-file {args.prompt_file}", args.prompt_file.read_bytes()
    elif args.prompt not in (None, "-"):
        source, raw = "--prompt", args.prompt.encode("utf-8", errors="surrogateescape")
    elif args.prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; give --prompt TEXT or --prompt-file FILE, or pipe it to standard input.")
    else:
        source, raw = "the prompt from standard input", sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not valid UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"{source} is empty; write what to say to the model.")
    return text
