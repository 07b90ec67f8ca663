"""A pytest plugin for a checkout of transformers: `pytest -p upstream.plugin --upstream-record FILE TESTS`.

It wraps `generate` and writes a line of JSON for each test as it ends, so that a crash loses nothing.
"""

import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from . import stand_ins, ways
from .drafting import Calls, Wrapper


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("upstream")
    group.addoption("--upstream-way", default=ways.STOCK, choices=(ways.STOCK, *ways.WAYS))
    group.addoption("--upstream-record", type=Path, help="file that gets a line of JSON for each test")
    group.addoption("--upstream-tests", type=Path, help="file with the names of the tests to run, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """Wrap `generate`."""
    record = config.getoption("--upstream-record")
    if record is None:
        return
    way = config.getoption("--upstream-way")
    scope, _, kind = way.partition("/")
    files = [argument.partition("::")[0] for argument in config.args]
    missing = stand_ins.install(Path.cwd(), files)
    wrapper = Wrapper(kind or None, everywhere=scope == "everywhere")
    wrapper.install()
    record.write_text(json.dumps({"missing": sorted(set(missing))}) + "\n", encoding="utf-8")
    config.pluginmanager.register(_Recorder(wrapper, record, config.getoption("--upstream-tests")))


def _is_about_generate(item: Any) -> bool:
    """Whether a test has the mark of the generation tester mixin, or names `generate` in its code."""
    function = inspect.unwrap(item.function)
    marked = item.get_closest_marker("generate") is not None or not inspect.isroutine(function)
    return marked or "generate" in inspect.getsource(function)


class _Recorder:
    """Selects tests and writes down what became of them."""

    def __init__(self, wrapper: Wrapper, record: Path, selected: Path | None) -> None:
        self._wrapper, self._record = wrapper, record
        self._selected = None if selected is None else set(selected.read_text(encoding="utf-8").splitlines())

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out tests that were not asked for, or that do not name `generate`."""
        if self._selected is not None:
            items[:] = [item for item in items if item.nodeid in self._selected]
        else:
            items[:] = [item for item in items if _is_about_generate(item)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Count the calls of each test."""
        self._wrapper.calls, self._outcome, self._text = Calls(), "passed", ""
        yield
        line = {"test": item.nodeid, "outcome": self._outcome, "text": self._text} | asdict(self._wrapper.calls)
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the worst outcome of a test's phases."""
        if report.skipped and self._outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            self._outcome, self._text = "skipped", str(reason)
        elif report.failed:
            self._outcome, self._text = "failed", report.longreprtext
