"""Starts pytest in a checkout of transformers, and collects the records of the plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import ways

MODELS = ("llama", "gemma3", "qwen3", "gpt2", "mistral")
FILES = ("tests/generation/test_utils.py", *(f"tests/models/{name}/test_modeling_{name}.py" for name in MODELS))
"""The tests of `generate`, and those of models, which inherit the generation tester mixin."""

OPTIONS = (
    "-p",
    "no:cacheprovider",
    "-p",
    "upstream.plugin",
    "-o",
    "addopts=",
    "-o",
    "log_cli=false",
    "-q",
    "--tb=short",
)
SECONDS = 3600
"""Longest run."""

Records = dict[str, dict[str, Any]]


def run(checkout: Path, way: str, names: list[str] | None = None, keywords: str = "") -> tuple[Records, list[str]]:
    """Run tests in one way.

    Args:
        checkout: directory with transformers' `tests/`.
        way: `ways.STOCK` or one of `ways.WAYS`.
        names: of the tests; None for all.
        keywords: pytest's `-k`.

    Returns:
        Record of each test, and the names of transformers that the tests import and that are not there.

    Raises:
        RuntimeError: pytest could not collect the tests, or ended before all had run.
    """
    with TemporaryDirectory() as directory:
        record, selected = Path(directory) / "record.jsonl", Path(directory) / "tests.txt"
        command = [sys.executable, "-m", "pytest", *OPTIONS, "--upstream-way", way, "--upstream-record", str(record)]
        if names is not None:
            selected.write_text("\n".join(names), encoding="utf-8")
            command += ["--upstream-tests", str(selected)]
        if keywords:
            command += ["-k", keywords]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "DOVETAIL_CACHE": str(Path(directory) / "records"),
            "PYTHONPATH": os.pathsep.join(path for path in (os.environ.get("PYTHONPATH"), *_own_paths()) if path),
        }
        done = subprocess.run(
            [*command, *FILES], cwd=checkout, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    header, *records = [json.loads(line) for line in lines] or [None]
    found = {line["test"]: line for line in records}
    if done.returncode not in (0, 1) or header is None or (names is not None and set(names) != set(found)):
        raise RuntimeError(
            f"pytest ended early ({way}, status {done.returncode}):\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        )
    return found, header["missing"]


def _own_paths() -> tuple[str, str]:
    tests = Path(__file__).resolve().parent.parent
    return str(tests), str(tests.parent)


def selected(records: Records, way: str) -> list[str]:
    """Names of the tests that a way is about, of those that pass in the baseline."""
    count = "asking" if way.startswith(ways.SCOPES[0]) else "total"
    return [name for name, record in records.items() if record["outcome"] == "passed" and record[count]]
