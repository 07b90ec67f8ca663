"""Helpers of the benchmark scripts: the bundled pair, command-line arguments, and how results are stored.

A script prints its tables for people and then calls `store`, which prints the same numbers as one JSON line with
command, code version, package versions and machine, and appends that line to --out.
"""

import argparse
import atexit
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from inflate import Shape, inflate_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DeviceSplitPolicy, DovetailDraft, TreeBudget
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.cli.common import HelpFormatter

RESULTS = Path(__file__).parent / "results"
PAIR = Path(__file__).parent.parent / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"

# --- models and prompts ----------------------------------------------------------------------------


def load_bundled(dtype: torch.dtype) -> tuple[Any, DovetailDraft]:
    """Load the bundled target and draft on the CPU in `dtype`."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype)
    return target, DovetailDraft.from_pretrained(DRAFT, dtype=dtype)


def load_inflated(shape: str, dtype: torch.dtype) -> tuple[Any, DovetailDraft]:
    """Load the bundled pair, inflated to a shape (see inflate.py), on the CPU in `dtype`."""
    return inflate_pair(*load_bundled(torch.float32), shape, dtype=dtype)


def bundled_prompts(count: int) -> list[torch.Tensor]:
    """Return the first `count` GSM8K test questions for the bundled target, each (1, T) int64."""
    return load_prompts(None, AutoTokenizer.from_pretrained(TARGET), count)


def fresh_policy() -> DeviceSplitPolicy:
    """Make a policy that measures this machine again, because its stored measurements start empty."""
    directory = tempfile.TemporaryDirectory(prefix="dovetail-benchmark-")
    atexit.register(directory.cleanup)
    return DeviceSplitPolicy(measured_in=directory.name)


# --- command line ----------------------------------------------------------------------------------


def argument_parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Make a parser with the option --out.

    Args:
        description: the script's docstring.
        results: name of the file in benchmarks/results/ that --out stands for by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--out", type=output_file, default=RESULTS / results, metavar="FILE.jsonl", help="append the JSON line here"
    )
    return parser


def output_file(text: str) -> Path:
    """Type of --out. A missing directory is refused before the measurement, not after it."""
    file = Path(text)
    if not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{str(file.parent)!r} is not a directory. Create it first.")
    return file


def positive(text: str) -> int:
    """Type of counts: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid count. Use an integer of at least 1.")
    return value


def parse_shape(text: str) -> str:
    """Type of --shape: the text itself, if `inflate.Shape` can read it."""
    try:
        Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse_budget(text: str) -> TreeBudget | None:
    """Type of --budget: "nodes/depth/top_k", or "policy", which gives None."""
    try:
        return None if text == "policy" else TreeBudget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --- results ---------------------------------------------------------------------------------------


def store(result: dict[str, Any], out: Path) -> None:
    """Print `result` with its provenance as one JSON line and append the line to `out`."""
    line = json.dumps(result | provenance())
    print(line, flush=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(line + "\n")
