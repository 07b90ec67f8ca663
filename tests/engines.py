"""The engines that the tests run over, one of them at a time: `pytest --engine NAME`.

`families.tiny_target` and the bundled target pass through `current().target`, so one test file serves all
engines. Tests of the internals of torch targets are marked `torch_only`. To add an engine, add a class with an entry
in `ENGINES`, and a script that exports checkpoints for it.
"""

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import pytest
from transformers import PreTrainedModel

TESTS = Path(__file__).resolve().parent
SHARED_FILES = {
    "test_bad_input.py",
    "test_bundled.py",
    "test_default_policy.py",
    "test_families.py",
    "test_options.py",
    "test_sampling.py",
}
"""Test files that run over every engine."""


class EngineUnderTest(Protocol):
    """How tests get a target of one engine.

    Attributes:
        own_files: test files that run over this engine only; None for the engine that runs all files.
    """

    own_files: set[str] | None

    def target(self, model: PreTrainedModel, own_runner: bool = False) -> Any:
        """A target that computes what `model` does, in fp32.

        Args:
            model: in torch, fp32.
            own_runner: whether drafts run in the engine too, which takes seconds to prepare; otherwise in torch.
        """

    def session_class(self) -> type:
        """The class whose `prefill` and `score` run the target's passes."""


class Exporter:
    """Stored models of an engine, made on first use and found again by a hash of their weights.

    Args:
        script: exports models; see tests/export_openvino.py for its input and output.
        python: interpreter of the environment that has what the script imports.
        directory: exports are stored here.
    """

    def __init__(self, script: Path, python: str, directory: Path) -> None:
        self._command, self.directory = [python, str(script)], directory
        self._process: subprocess.Popen[str] | None = None

    def path(self, model: PreTrainedModel, kind: str = "f32") -> Path:
        """The directory with this model's export. Tests must not write to it."""
        with tempfile.TemporaryDirectory() as source:
            model.save_pretrained(source)
            config = json.loads((Path(source) / "config.json").read_text())
            config.pop("transformers_version")
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
            for file in sorted(Path(source).glob("*.safetensors")):
                digest.update(file.read_bytes())
            out = self.directory / f"{config['model_type']}-{kind}-{digest.hexdigest()[:16]}"
            if not out.exists():
                self._export(source, out, kind)
        return out

    def _export(self, source: str, out: Path, kind: str) -> None:
        part = out.with_name(f"{out.name}.part{os.getpid()}")  # so that an interrupted export is not used
        shutil.rmtree(part, ignore_errors=True)
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"source": source, "out": str(part), "kind": kind}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        log = self.directory / "export.log"
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)} ended; see {log}.")
        if error := json.loads(answer)["error"]:
            raise RuntimeError(f"{out.name} could not be exported: {error} (see {log})")
        try:
            part.rename(out)
        except OSError:  # another worker of this run was faster
            if not out.exists():
                raise
            shutil.rmtree(part)

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / "export.log").open("a") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            atexit.register(self._end)
        return self._process

    def _end(self) -> None:
        assert self._process is not None
        self._process.communicate()  # the process ends when its stdin is closed


class Torch:
    """The model itself is the target."""

    own_files = None

    def __init__(self, _config: pytest.Config) -> None:
        pass

    def target(self, model: PreTrainedModel, own_runner: bool = False) -> PreTrainedModel:
        return model

    def session_class(self) -> type:
        from dovetail_plugin.targets.torch_session import TorchSession

        return TorchSession


class OpenVINO:
    """The target is an `OpenVINOTarget` of the model's export."""

    own_files = {
        "test_export.py",
        "test_openvino.py",
        "test_openvino_draft.py",
        "test_openvino_example.py",
        "test_openvino_files.py",
        "test_openvino_optimum.py",
        "test_openvino_state.py",
        "test_stored_threads.py",
    }

    def __init__(self, config: pytest.Config) -> None:
        directory = Path(config.getoption("--exports")) / "openvino"
        self.exporter = Exporter(TESTS / "export_openvino.py", config.getoption("--exporter"), directory)

    def target(self, model: PreTrainedModel, own_runner: bool = False, kind: str = "f32", **options: Any) -> Any:
        from dovetail_plugin.adapters.openvino import OpenVINOTarget

        target = OpenVINOTarget.from_pretrained(self.exporter.path(model, kind), **({"threads": 1} | options))
        if not own_runner:
            target.dovetail_engine.draft_runner = lambda _draft: None
        return target

    def session_class(self) -> type:
        from dovetail_plugin.adapters.openvino.session import OpenVINOSession

        return OpenVINOSession


class OnnxRuntime:
    """The target is an `OnnxRuntimeTarget` of the model's export, which is made in a separate environment."""

    own_files = {"test_onnxruntime.py", "test_onnxruntime_files.py", "test_stored_threads.py"}

    def __init__(self, config: pytest.Config) -> None:
        directory = Path(config.getoption("--exports")) / "onnxruntime"
        self.exporter = Exporter(TESTS / "export_onnx.py", config.getoption("--exporter"), directory)

    def target(self, model: PreTrainedModel, own_runner: bool = False, kind: str = "f32", **options: Any) -> Any:
        from dovetail_plugin.adapters.onnxruntime import OnnxRuntimeTarget

        return OnnxRuntimeTarget.from_pretrained(self.exporter.path(model, kind), **({"threads": 1} | options))

    def session_class(self) -> type:
        from dovetail_plugin.adapters.onnxruntime.session import OnnxRuntimeSession

        return OnnxRuntimeSession


ENGINES = {"torch": Torch, "openvino": OpenVINO, "onnxruntime": OnnxRuntime}

_current: EngineUnderTest | None = None


def current() -> Any:
    """The engine chosen for this session."""
    assert _current is not None, "tests/conftest.py chooses the engine when pytest is configured"
    return _current


def is_current(name: str) -> bool:
    """Whether this engine was chosen."""
    return type(_current) is ENGINES[name]


# --- called by conftest.py -------------------------------------------------------------------------


def add_options(parser: pytest.Parser) -> None:
    """Add the options of this module to pytest's command line."""
    group = parser.getgroup("engines")
    group.addoption("--engine", choices=sorted(ENGINES), default="torch", help="engine that runs the targets")
    group.addoption("--exporter", default=sys.executable, help="python that has the engine's exporter (default: this)")
    group.addoption("--exports", default=str(TESTS.parent / "build" / "exports"), help="directory for exported models")


def choose(config: pytest.Config) -> None:
    """Make the engine of the command line the current one."""
    global _current
    _current = ENGINES[config.getoption("--engine")](config)


def runs(file: Path) -> bool:
    """Whether a test file runs with the current engine."""
    own = current().own_files
    return own is None or not file.name.startswith("test_") or file.name in SHARED_FILES | own


def skip_torch_only(items: list[pytest.Item]) -> None:
    """Skip tests marked `torch_only(reason)` if another engine runs."""
    if is_current("torch"):
        return
    for item in items:
        if mark := item.get_closest_marker("torch_only"):
            item.add_marker(pytest.mark.skip(reason=f"torch only: {mark.args[0]}"))
