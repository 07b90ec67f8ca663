"""The scripts in examples/ run as a user runs them, on the bundled pair.

`test_openvino_example.py` runs the one that needs OpenVINO.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MOST_LINES = 50


def run(script: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, from an empty folder; measurements stay there."""
    env = {**os.environ, "DOVETAIL_CACHE": str(folder / "measurements")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(script):
    assert len(script.read_text().splitlines()) < MOST_LINES


def test_compare_reports_identical_text(tmp_path):
    done = run("compare.py", "--max-new-tokens", 24, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain:" in done.stdout and "with the draft:" in done.stdout
    assert "identical text:" in done.stdout


def test_chat_continues_the_conversation(tmp_path):
    says = ("--say", "A pen costs 3 dollars. How much do 12 pens cost?", "--say", "And how much do 20 pens cost?")
    done = run("chat.py", *says, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens per round]") == 2
    assert "####" in done.stdout


def test_train_tiny_writes_a_draft(tmp_path):
    done = run("train_tiny.py", "--steps", 4, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "my-draft").iterdir()}


def test_openvino_example_says_what_it_needs(tmp_path):
    """Without OpenVINO, the extra; with it, the directory that is missing."""
    done = run("openvino_int8.py", "--target", tmp_path / "no-export", folder=tmp_path)
    assert done.returncode != 0
    if importlib.util.find_spec("openvino") is None:
        assert "pip install '.[openvino]'" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert "no-export" in done.stderr
