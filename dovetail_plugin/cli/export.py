"""`dovetail export`: a target for OpenVINO or ONNX Runtime, made by optimum's own exporter."""

import argparse
import importlib.util
import subprocess
import sys

from .common import HelpFormatter, check_model

EPILOG = """\
examples:
  dovetail export --target DIR --to openvino --weights int8 --out DIR-int8
  dovetail generate --target-ir DIR-int8 --draft DRAFT --prompt "How much is 17 times 3?"

optimum writes the files, and its versions are particular (docs/adapters.md has install lines that work).
"""
TASK = "text-generation-with-past"
NEEDS = {"openvino": ("optimum.intel", "optimum-intel"), "onnx": ("optimum.exporters.onnx", "optimum-onnx")}
WEIGHTS = {"openvino": ("fp32", "fp16", "int8", "int4"), "onnx": ("fp32",)}
DEFAULT_WEIGHTS = {"openvino": "int8", "onnx": "fp32"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "export",
        help="export a target to OpenVINO or ONNX",
        description="Export a model with optimum, so that a faster CPU engine verifies its drafts.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--target", required=True, metavar="DIR_OR_ID", help="the model to export")
    parser.add_argument("--to", required=True, choices=sorted(NEEDS), help="the format")
    parser.add_argument(
        "--weights",
        default=None,
        choices=WEIGHTS["openvino"],
        help="how weights are stored; default: int8 for openvino, fp32 for onnx, which has no other",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="gets the graph, config and tokenizer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, then run optimum's command; returns its exit status.

    Raises:
        ValueError: no such model, or the format does not store such weights.
        ImportError: the exporter is not installed.
    """
    weights = args.weights or DEFAULT_WEIGHTS[args.to]
    if weights not in WEIGHTS[args.to]:
        raise ValueError(f"--weights {weights} does not go with --to {args.to}; use {', '.join(WEIGHTS[args.to])}.")
    check_model("--target", args.target)
    module, package = NEEDS[args.to]
    if not _is_there(module):
        raise ImportError(f"--to {args.to} needs {package}, which is not installed; see docs/adapters.md.")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", args.to, "--model", args.target]
    command += ["--task", TASK]
    if args.to == "openvino":
        command += ["--weight-format", weights]
    return subprocess.run([*command, args.out], check=False).returncode


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
