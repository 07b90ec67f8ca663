"""Combine the summaries of `make nightly` into one JSON object on stdout.

    python tests/nightly_report.py build/summaries

Reads one file for each run of pytest, as `support/environments.py` writes them.
"""

import json
import subprocess
import sys
from pathlib import Path


def main(directory: str) -> None:
    """Print the commit and the summaries, by the name of the run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(Path(directory).glob("*.json"))}
    print(json.dumps({"commit": commit.stdout.strip(), "runs": runs}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
