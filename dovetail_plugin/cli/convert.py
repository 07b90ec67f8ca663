"""`dovetail convert`: a draft from one format to another."""

import argparse
from pathlib import Path

from ..drafts.convert import FORMATS, write_draft
from ..drafts.model import DovetailDraft
from .common import HelpFormatter

EPILOG = """\
examples:
  dovetail convert yuhuili/EAGLE3-LLaMA3.1-Instruct-8B my-draft --to dovetail
  dovetail convert my-eagle3-draft served --to vllm

SRC is a directory or hub id of any draft that Dovetail reads: its own, the Dovetail paper's, EAGLE-1, EAGLE-2, EAGLE-3,
speculators' eagle3. Conversion is not needed to generate: every command takes these drafts as they are.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="write a draft in another project's format",
        description="Read a draft of any known format and write it in another one.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="directory or hub id of the draft")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory for the result")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of the result")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="as stored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert.

    Raises:
        ValueError: the source is no draft, or the format cannot hold it. OSError: see `write_draft`.
    """
    draft = DovetailDraft.from_pretrained(args.source, dtype=args.dtype)
    write_draft(draft, args.destination, args.to)
    print(f"{args.source} ({draft.config.fusion}) written to {args.destination} as {args.to}")
    return 0
