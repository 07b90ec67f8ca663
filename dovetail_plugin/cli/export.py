"""`dovetail export`: a target for OpenVINO or ONNX Runtime, made by optimum's own exporter."""

import argparse
import contextlib
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .common import HelpFormatter, add_target_argument

EPILOG = """\
examples:
  dovetail export --target DIR --to openvino --weights int8 --out DIR-int8
  dovetail export --target DIR --to openvino --weights int4 --out DIR-int4 -- --group-size 64 --trust-remote-code
  dovetail generate --target-ir DIR-int8 --draft DRAFT --prompt "How much is 17 times 3?"

Options after -- are passed on to optimum, which writes the files; `optimum-cli export openvino --help` lists them.
Only some versions of optimum work together with each version of transformers; docs/adapters.md in the source
of Dovetail has install lines.
"""
TASK = "text-generation-with-past"
NEEDS = {"openvino": ("optimum.intel", "optimum-intel"), "onnx": ("optimum.exporters.onnx", "optimum-onnx")}
WEIGHTS = {"openvino": ("fp32", "fp16", "int8", "int4"), "onnx": ("fp32",)}
DEFAULT_WEIGHTS = {"openvino": "int8", "onnx": "fp32"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "export",
        usage="dovetail export --target DIR_OR_ID --to {openvino,onnx} --out DIR [options] [-- OPTIONS OF OPTIMUM]",
        description="Export a target with optimum, so that a faster CPU engine verifies the drafts.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    add_target_argument(parser, required=True, help="the model to export: its directory or hub id")
    parser.add_argument("--to", required=True, choices=sorted(NEEDS), help="format of the result")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS["openvino"],
        help="how weights are stored; default: int8 for openvino, and fp32 for onnx, which has no other",
    )
    parser.add_argument("--out", "-o", required=True, metavar="DIR", help="directory for graph, config and tokenizer")
    parser.set_defaults(run=run, passes_on=True)


def run(args: argparse.Namespace) -> int:
    """Check the request, then run optimum's command; returns its exit status.

    Raises:
        ValueError: there is no such model, or the format does not store such weights.
        ImportError: the exporter is not installed.
        OccupiedError: --out is a file or not empty.
        WriteError: --out cannot be written.
    """
    weights = args.weights or DEFAULT_WEIGHTS[args.to]
    if weights not in WEIGHTS[args.to]:
        raise ValueError(f"--weights {weights} does not go with --to {args.to}; use {', '.join(WEIGHTS[args.to])}.")
    from ..drafts.checkpoints.read import read_config
    from ..files import refuse_occupied, whole_directory
    from .loading import check_model

    check_model("--target", args.target, read_config)  # optimum reads the rest, by the options that it is given
    module, package = NEEDS[args.to]
    if not is_installed(module):
        raise ImportError(
            f"--to {args.to} needs {package}, which is not installed. The versions that work together are in "
            "docs/adapters.md of a checkout of Dovetail."
        )
    out = Path(args.out)
    refuse_occupied(out)
    with contextlib.suppress(_Failed), whole_directory(out) as part:
        status = run_optimum(args, weights, part)
        if status != 0:
            raise _Failed
    return status


class _Failed(Exception):
    """The exporter has failed and has said why."""


SAFE_START = """
import os, sys
here = os.path.realpath(os.getcwd())
sys.path[:] = [p for p in sys.path if os.path.isabs(p) and os.path.realpath(p) != here]
import runpy
runpy.run_module("optimum.commands.optimum_cli", run_name="__main__", alter_sys=True)
"""
"""Starts optimum without the current directory among the places that modules come from: it may be a downloaded one."""


def optimum_command(args: argparse.Namespace, weights: str, out: Path) -> list[str]:
    """The command line of optimum for an export to the directory `out`."""
    command = [sys.executable, "-c", SAFE_START, "export", args.to, "--model", args.target]
    command += ["--task", TASK]
    if args.to == "openvino":
        command += ["--weight-format", weights]
    return [*command, *args.passed_on, str(out)]


def run_optimum(args: argparse.Namespace, weights: str, out: Path, output: Any = None) -> int:
    """Export to the directory `out`, and return the exit status of optimum.

    Args:
        args: with `target`, `to` and `passed_on`.
        weights: one of `WEIGHTS`.
        out: directory that optimum makes.
        output: file for what optimum prints on its standard output; default: that of this process.
    """
    command = optimum_command(args, weights, out)
    return subprocess.run(command, check=False, env=_environment(), stdout=output).returncode


def _environment() -> dict[str, str]:
    """This environment; Python processes that optimum starts leave out the current directory, from 3.11 on."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def is_installed(module: str) -> bool:
    """Return whether a module is installed. None is imported, and the current directory does not count."""
    here = os.path.realpath(os.getcwd())
    path: Any = [place for place in sys.path if os.path.isabs(place) and os.path.realpath(place) != here]
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:end]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _find(name: str, path: Any) -> "importlib.machinery.ModuleSpec | None":
    for finder in sys.meta_path:
        top_level = "." not in name and finder is not importlib.machinery.PathFinder
        spec = finder.find_spec(name, None if top_level else path)
        if spec is not None:
            return spec
    return None
