"""Runs families in processes of their own: a family that hangs, crashes or asks for gigabytes costs its own outcome.

`Worker` starts one process that has imported torch and transformers, and sends it names; it forks for each of them, so
that a family takes a second instead of ten. Run as a script, this file is that process.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

SECONDS, GIBIBYTES = 120, 6
TESTS = Path(__file__).resolve().parent.parent


class Worker:
    """The process, which lives until `close`."""

    def __init__(self) -> None:
        untraced = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_PROCESS")}
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model_table.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=untraced | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def outcomes(self, name: str, prompt_kind: str) -> dict:
        """The fields of `Outcomes` for a family and a kind of prompt."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, prompt_kind]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Answer requests until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print
    import torch
    import transformers

    from model_table import outcomes  # noqa: F401 - children find it imported

    for name in ("llama", "mixtral", "qwen2_vl", "auto"):
        __import__(f"transformers.models.{name}.modeling_{name}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(answer(*json.loads(line)) + "\n")
        answers.flush()


def answer(name: str, prompt_kind: str) -> str:
    """Fork, and return what the child found as JSON."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiving)
        _child(name, prompt_kind, sending)
    os.close(sending)
    parts, reason = [], f"it takes more than {SECONDS} s"
    while select.select([receiving], [], [], SECONDS)[0]:
        part = os.read(receiving, 1 << 16)
        if not part:
            reason = "its process ended"
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(receiving)
    os.waitpid(child, 0)
    text = b"".join(parts).decode()
    return text or json.dumps({"plain": reason, "stock": "", "drafts": {}, "shape": "", "acceptance": 0, "variety": 0})


def _child(name: str, prompt_kind: str, sending: int) -> None:
    from model_table.outcomes import outcomes_of

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of hundreds of models; errors are in the outcomes
        resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES << 30, GIBIBYTES << 30))
        found = asdict(outcomes_of(name, prompt_kind))
        os.write(sending, json.dumps(found).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve()
