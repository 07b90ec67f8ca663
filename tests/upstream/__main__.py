"""`python -m upstream CHECKOUT --out FILE` runs transformers' own tests of `generate` with drafts, for half an hour.

CHECKOUT is a clone of transformers, or its `tests/` and conftest.py alone. The tests need `parameterized` and `httpx`.
Ends with status 1 if a test that passes without drafts does not pass with them, and differences.py has no reason.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

from . import judgement, runs, ways
from .differences import DIFFERENCES, REFUSALS

NEEDED = ("parameterized", "httpx")


def main() -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file for the outcomes")
    parser.add_argument(
        "-k", dest="keywords", default="", help="only these tests, as pytest's -k (differences not used are no error)"
    )
    args = parser.parse_args()
    if not (args.checkout / "tests/generation/test_utils.py").is_file():
        parser.error(f"{args.checkout} has no tests/generation/test_utils.py. Pass a clone of transformers.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"transformers' tests need {' and '.join(missing)}. Run pip install {' '.join(missing)}.")

    records, stand_ins = runs.run(args.checkout, ways.STOCK, keywords=args.keywords)
    calling = {name: record for name, record in records.items() if record["total"] or record["outcome"] != "passed"}
    tests = {name: {ways.STOCK: judgement.baseline(record)} for name, record in calling.items()}
    for way in ways.WAYS:
        names = runs.selected(records, way)
        drafted, _ = runs.run(args.checkout, way, names) if names else ({}, [])
        for name, record in drafted.items():
            tests[name][way] = judgement.drafted(record, REFUSALS)
        print(f"{way}: {len(names)} tests", flush=True)

    found = judgement.problems(tests, DIFFERENCES)
    if args.keywords:
        found = [problem for problem in found if not problem.startswith("explains nothing")]
    if args.out:
        args.out.write_text(report(tests, len(records), stand_ins), encoding="utf-8")
    print(*found or ["no unexplained difference"], sep="\n")
    return bool(found)


def report(tests: dict[str, dict[str, str]], collected: int, stand_ins: list[str]) -> str:
    """The outcomes as JSON, one line for each test."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    compared = {name: outcomes for name, outcomes in tests.items() if outcomes[ways.STOCK] == "passed"}
    others = {name: outcomes[ways.STOCK] for name, outcomes in tests.items() if name not in compared}

    def lines(entries: dict[str, str]) -> str:
        return "{\n" + ",\n".join(f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in entries.items()) + "\n }"

    return (
        "{\n"
        f' "versions": {json.dumps(versions)},\n'
        f' "collected": {collected},\n'
        f' "names that transformers lacks": {json.dumps(stand_ins)},\n'
        f' "compared": {lines({name: shortened(outcomes) for name, outcomes in compared.items()})},\n'
        f' "not compared": {lines(others)}\n'
        "}\n"
    )


def shortened(outcomes: dict[str, str]) -> dict[str, str]:
    """Outcomes of a test by way, or by scope where all kinds of drafts have the same."""
    short = {}
    for scope in ways.SCOPES:
        found = {way: outcome for way, outcome in outcomes.items() if way.startswith(scope)}
        short |= {scope: next(iter(found.values()))} if len(set(found.values())) == 1 else found
    return short


if __name__ == "__main__":
    sys.exit(main())
