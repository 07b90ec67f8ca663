"""examples/openvino_int8.py generates with an int8 export of the bundled target."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "examples" / "tiny_pair" / "dovetail-tiny-target"

pytestmark = pytest.mark.skipif("not config.getoption('--engine') == 'openvino'", reason="needs --engine openvino")


def test_example_generates(tmp_path):
    export = tmp_path / "export"
    shutil.copytree(engines.current().exporter.path(AutoModelForCausalLM.from_pretrained(TARGET), "int8"), export)
    AutoTokenizer.from_pretrained(TARGET).save_pretrained(export)
    command = [sys.executable, ROOT / "examples" / "openvino_int8.py", "--target", export, "--max-new-tokens", "24"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DOVETAIL_CACHE": str(tmp_path / "measurements")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
