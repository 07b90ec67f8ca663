"""The `dovetail` command: one module for each subcommand, with `add_parser` and `run`.

Only the module of the chosen subcommand is imported, and it imports torch and transformers only to run, so that help
and mistakes in the options come at once. A mistake of the caller ends with one line on stderr and status 2.
"""

import argparse
import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from .common import HelpFormatter, Parser

COMMANDS = {
    "generate": "generate text with a target and a draft",
    "bench": "measure what a draft gains on this machine",
    "plan": "show what is placed where and how much memory it takes, before loading",
    "train": "train a draft for a target",
    "convert": "write a draft in another project's format",
    "export": "export a target to a faster CPU engine (OpenVINO or ONNX Runtime)",
}
DESCRIPTION = """\
Generate text with a large language model faster, with the same text: a small draft model proposes tokens, and the
target model verifies several of them in one pass. The target can stay on the CPU while the draft uses a small GPU.
"""
EPILOG = """\
examples:
  dovetail train --target DIR --data chats.jsonl --out my-draft
  dovetail generate --target DIR --draft my-draft --prompt "How much is 17 times 3?" --compare
  dovetail bench --target DIR --draft my-draft --out results.jsonl

DIR is the directory of a model or its id on the hub. `dovetail COMMAND --help` describes the options of a command.
"""
BROKEN_PIPE, INTERRUPTED = 128 + 13, 128 + 2
"""Exit statuses of a shell command that SIGPIPE or SIGINT has ended."""


class _ShowVersion(argparse.Action):
    """Prints the versions of the package and of its main dependencies, without importing those."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        others = []
        for package in ("torch", "transformers"):
            try:
                others.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                others.append(f"{package} not installed")
        print(f"dovetail {__version__} ({', '.join([*others, f'Python {platform.python_version()}'])})")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit status: 0, or 2 after a mistake of the caller. `bench` returns 1 if a greedy text differs.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has seen enough, as in `dovetail ... | head -1`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - used until the process ends
        return BROKEN_PIPE
    except (ValueError, OSError, ImportError) as error:
        return _fail(argv, str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail(argv, f"not enough memory; give a smaller --max-new-tokens or use a smaller model ({error})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments with the parser of the chosen command alone; what follows `--` becomes `passed_on`.

    Raises:
        SystemExit: help or the version was asked for, or an argument is wrong.
    """
    parser = Parser(prog="dovetail", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show versions and exit")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == chosen:
            importlib.import_module(f".{name}", __name__).add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:end])
    args.passed_on = argv[end + 1 :]
    command = commands.choices[args.command]
    if unknown:
        command.refuse(unknown[0])
    if args.passed_on and not getattr(args, "passes_on", False):
        command.error("arguments after -- are for `dovetail export`, which passes them on to optimum")
    return args


def _fail(argv: list[str], message: str) -> int:
    """Report an error on one line of stderr."""
    line = f"dovetail {argv[0]}: {' '.join(message.split())}"
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)  # arguments may be no text
    return 2
