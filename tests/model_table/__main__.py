"""Tries families: `python -m model_table [NAME ...]` prints what happened, `--write` renews their rows and the page.

Names are those of `Family.name`, with `[image]` behind them for a prompt with an image; all families without names.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import transformers

from . import page, table
from .discovery import FAMILIES
from .worker import Worker


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="model_table", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="write what was tried to table.json and docs/models.md")
    parser.add_argument("--json", type=Path, help="write the outcomes to a file")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    args = parser.parse_args()
    version, table_now = ".".join(transformers.__version__.split(".")[:2]), table.load()
    if args.write and args.names and table_now["transformers"] != version:
        parser.error(
            f"the table is of transformers {table_now['transformers']}: leave out the names to renew all of it"
        )
    asked = [(name.removesuffix("[image]"), "image" if name.endswith("[image]") else "text") for name in args.names]
    found = run(asked or table.cases(FAMILIES), args.workers)
    if args.json:
        args.json.write_text(json.dumps({label(*case): outcomes for case, outcomes in found.items()}, indent=1) + "\n")
    if args.write:
        verdicts: dict[str, dict[str, str]] = {}
        for name, kind in table.cases(FAMILIES):
            if (name, kind) in found:
                verdicts.setdefault(name, {})[kind] = table.verdict(name, kind, found[name, kind])
            elif kind in (known := table_now["verdicts"].get(name, {})):
                verdicts.setdefault(name, {})[kind] = known[kind]
        table.save(version, verdicts)
        page.write(table.load())


def label(name: str, kind: str) -> str:
    """A case as it is written on the command line."""
    return name if kind == "text" else f"{name}[{kind}]"


def run(cases: list[tuple[str, str]], workers: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The outcomes of all cases, which are printed as they come."""
    free: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(workers):
        free.put(Worker())

    def try_one(case: tuple[str, str]) -> dict[str, Any]:
        worker, start = free.get(), time.perf_counter()
        try:
            outcomes = worker.outcomes(*case)
        finally:
            free.put(worker)
        verdict = table.verdict(*case, outcomes)
        print(f"{label(*case)}: {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)
        return outcomes

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(cases, pool.map(try_one, cases), strict=True))
    while not free.empty():
        free.get().close()
    return found


if __name__ == "__main__":
    main()
