"""The tests' own helpers: what may import what, and which tests are selected."""

import ast
from pathlib import Path

import pytest
from support.environments import PARTS, part_of

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_file_imports_a_test_file(file):
    """What several test files use belongs into tests/support."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert not {name for name in names if name.split(".")[-1].startswith("test_") or name == "conftest"}


def test_parts_of_the_nightly_tests_are_all_reached():
    """Neither ids nor hashes leave a part out, so every nightly test runs for some commit."""
    assert {part_of(f"tests/test_x.py::test_y[{number}]") for number in range(40 * PARTS)} == set(range(PARTS))
    assert {part_of(f"{number:040x}") for number in range(40 * PARTS)} == set(range(PARTS))


SELECTION = """
import pytest
@pytest.mark.parametrize("number", range(40))
@pytest.mark.nightly
def test_long(number): pass
def test_short(): pass
"""


@pytest.mark.parametrize(
    ("which", "least", "most"), [("none", 1, 1), ("all", 41, 41), ("0d24aa6", 1, 20), ("b03fccc", 1, 20)]
)
def test_nightly_selection(pytester, which, least, most):
    pytester.makeini("[pytest]\nmarkers =\n    nightly: long\n")
    pytester.makeconftest(
        "from support import environments\n"
        "def pytest_addoption(parser): environments.add_options(parser)\n"
        "def pytest_collection_modifyitems(config, items): environments.select_nightly(config, items)\n"
    )
    pytester.makepyfile(SELECTION)
    passed = [pytester.inline_run("--nightly", which, "--summary", "unused.json").countoutcomes()[0] for _ in range(2)]
    assert passed[0] == passed[1] and least <= passed[0] <= most


def test_parts_together_are_all_nightly_tests():
    ids = [f"test_long[{number}]" for number in range(40)]
    chosen = [identity for part in range(PARTS) for identity in ids if part_of(identity) == part]
    assert sorted(chosen) == sorted(ids)


def test_summary_of_a_run(pytester):
    pytester.makeconftest(
        "from pathlib import Path\n"
        "from support.environments import Summary\n"
        "def pytest_configure(config): config.pluginmanager.register(Summary(Path('out/summary.json')))\n"
    )
    pytester.makepyfile("import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('not here')\n")
    pytester.inline_run()
    import json

    summary = json.loads((pytester.path / "out" / "summary.json").read_text())
    assert summary["counts"] == {"passed": 1, "skipped": 1}
    assert {"python", "torch", "transformers"} <= summary["versions"].keys()
    assert summary["seconds"] >= 0
