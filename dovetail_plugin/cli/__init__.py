"""The `dovetail` command: one module for each subcommand, with `add_parser` and `run`.

A caller's mistake ends with one line on stderr and status 2, not with a traceback.
"""

import argparse
import sys

from ..cli import bench, convert, export, generate, plan, train

DESCRIPTION = """\
Make a large language model on the CPU talk faster with a small draft model on the GPU, word for word the same.

  dovetail generate   talk to a model, plain or with a draft, or both side by side
  dovetail bench      measure what a draft brings on this machine
  dovetail plan       show what goes where and what it takes, before loading
  dovetail train      train a draft for a model
  dovetail convert    write a draft in another project's format
  dovetail export     export a model to a faster CPU engine
"""
EPILOG = """\
examples:
  dovetail train --target DIR --data chats.jsonl --out my-draft
  dovetail generate --target DIR --draft my-draft --prompt "How much is 17 times 3?" --compare
  dovetail bench --target DIR --draft my-draft --out results.jsonl

`dovetail COMMAND --help` explains a command. DIR is a model's directory or its id on the hub.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dovetail",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{generate,bench,plan,train,convert,export}"
    )
    for module in (generate, bench, plan, train, convert, export):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"dovetail {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
