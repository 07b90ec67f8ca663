"""The policy in a simulated world: its rate over that of the best static budget, case by case.

    python benchmarks/policy_simulation.py                # about five minutes
    python benchmarks/policy_simulation.py --texts 1

The world is `tests/support/simulation.py`; nothing in it depends on the machine. Each figure is the mean over some
texts, with the lowest in brackets. A table goes to the screen, one JSON line to --out.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import argument_parser, positive, store
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.scenarios import SCENARIOS
from support.simulation import KINDS


def simulate(texts: int, scenarios: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return scenario -> kind of text -> shares, one for each text."""
    shares: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in scenarios}
    cases = [(text, kind, name) for text in range(1, texts + 1) for kind in KINDS for name in scenarios]
    for text, kind, name in tqdm(cases, unit="case"):
        with tempfile.TemporaryDirectory() as directory:
            shares[name][kind].append(round(SCENARIOS[name].share(kind, text, Path(directory)), 4))
    return shares


def table(shares: dict[str, dict[str, list[float]]]) -> str:
    """Return mean and lowest share for each scenario and kind, in Markdown."""
    lines = ["| scenario | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for name, kinds in shares.items():
        cells = [f"{np.mean(kinds[kind]):.3f} ({min(kinds[kind]):.3f})" for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__, "policy_simulation.jsonl")
    parser.add_argument("--texts", type=positive, default=5, help="texts of each kind")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="of the world")
    args = parser.parse_args()
    shares = simulate(args.texts, args.scenario)
    print(table(shares))
    result: dict[str, Any] = {"name": "policy_simulation", "texts": args.texts, "shares": shares}
    store(result, args.out)


if __name__ == "__main__":
    main()
