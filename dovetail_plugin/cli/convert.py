"""`dovetail convert`: a draft from one format to another."""

import argparse
import sys
from pathlib import Path

from .common import FLOAT_DTYPES, HelpFormatter, add_hub_arguments, hub_options, model_name

FORMATS = ("dovetail", "eagle3", "speculators", "vllm")
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
        usage="dovetail convert SRC DST --to FORMAT [options]",
        description="Read a draft in any format that Dovetail knows and write it in another one.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=model_name, help="directory or hub id of the draft")
    add("destination", metavar="DST", type=Path, help="directory for the result")
    add("--to", required=True, choices=FORMATS, help="format of the result")
    add("--dtype", default="auto", choices=["auto", *FLOAT_DTYPES], help="data type of the result; auto keeps it")
    add_hub_arguments(parser, revisions={"--revision": "draft"})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert the draft.

    Raises:
        ValueError: the source is not a draft, or the format cannot hold it.
        OSError: see `write_draft`.
    """
    from ..drafts.card import model_card, usable_name
    from ..drafts.convert import write_draft
    from ..drafts.model import DovetailDraft
    from ..drafts.saving import license_of
    from ..files import refuse_occupied
    from ..targets.tokenizer_files import copy_tokenizer

    refuse_occupied(args.destination)
    hub = hub_options(args, args.revision)
    draft = DovetailDraft.from_pretrained(args.source, dtype=args.dtype, **hub)
    source = usable_name(Path(args.source).name if Path(args.source).is_dir() else args.source)
    made = "It was converted " + (f"from `{source}` " if source is not None else "") + "with `dovetail convert`."
    left_out: list[str] = []
    write_draft(
        draft,
        args.destination,
        args.to,
        tokenizer=lambda directory: left_out.extend(copy_tokenizer(args.source, directory, **hub)),
        card=model_card(draft.config, made=made, license=license_of(args.source, **hub)),
    )
    if left_out:
        print(f"not copied: {', '.join(left_out)}, which lead out of {args.source}", file=sys.stderr)
    print(f"{args.source} ({draft.config.fusion}) written to {args.destination} as {args.to}")
    return 0
