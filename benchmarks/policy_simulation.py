"""The policy in a simulated world: its rate over that of the best static budget, case by case.

    python benchmarks/policy_simulation.py                # about five minutes
    python benchmarks/policy_simulation.py --texts 1

The world is `tests/support/simulation.py`; nothing in it depends on the machine. Each figure is the mean over some
texts, with the lowest in brackets. A table goes to the screen, one JSON line to --out.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dovetail_plugin.bench.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.simulation import KINDS, SCENARIOS


def simulate(texts: int) -> dict[str, dict[str, list[float]]]:
    """Scenario -> kind of text -> shares, one for each text."""
    shares: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in SCENARIOS}
    cases = [(text, kind, name) for text in range(1, texts + 1) for kind in KINDS for name in SCENARIOS]
    for text, kind, name in tqdm(cases, unit="case"):
        with tempfile.TemporaryDirectory() as directory:
            shares[name][kind].append(round(SCENARIOS[name].share(kind, text, Path(directory)), 4))
    return shares


def table(shares: dict[str, dict[str, list[float]]]) -> str:
    """Mean and lowest share for each scenario and kind, in Markdown."""
    lines = ["| scenario | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for name, kinds in shares.items():
        cells = [f"{np.mean(kinds[kind]):.3f} ({min(kinds[kind]):.3f})" for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=5, help="texts of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "policy_simulation.jsonl")
    args = parser.parse_args()
    result: dict[str, Any] = {"name": "policy_simulation", "texts": args.texts, "shares": simulate(args.texts)}
    print(table(result["shares"]))
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(result | provenance()) + "\n")


if __name__ == "__main__":
    main()
