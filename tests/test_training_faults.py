"""Training on a full disk, killed while it writes, and given states and targets that are damaged or hostile."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
from helpers import refusal, run_python
from safetensors.torch import save_file
from support.files import content
from support.training import (
    assert_same,
    command_for,
    config_for,
    history,
    interrupted_after,
    weights,
)

from dovetail_plugin import DovetailDraft, files
from dovetail_plugin.cli import main
from dovetail_plugin.errors import InputError, MissingFileError, OccupiedError, WriteError
from dovetail_plugin.training import state, train

pytestmark = pytest.mark.usefixtures("fixed_budget")


# --- full disks and kills ----------------------------------------------------------------------------


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("second", ["save_file", "replace"])
def test_a_full_disk_leaves_the_last_state(training_files, training_runs, tmp_path, monkeypatch, second):
    """The second state cannot be written; the run resumes from the first one."""
    config, saves = config_for(training_files, tmp_path / "new", steps=4, save_every=1), []
    owner = {"save_file": state, "replace": os}[second]
    real = getattr(owner, second)

    def filling_up(*arguments):
        saves.append(1)
        return (full if len(saves) > (1 if second == "save_file" else 3) else real)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, second, filling_up)
        with pytest.raises(WriteError, match=r"new/resume/.* cannot be written: the disk is full. Free some space"):
            train(config)
    assert not [name for name in content(config.out) if files.PART in name]
    with interrupted_after(None) as rest:
        train(config, resume=True)
    assert rest.steps in ([1, 2, 3], [2, 3])
    assert_same(weights(config.out), weights(training_runs / "finished"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["new", "finished"])
def test_a_full_disk_at_the_end_leaves_what_was_there(training_files, copied_run, tmp_path, monkeypatch, name):
    directory = copied_run(name) if name == "finished" else tmp_path / name
    before = content(directory)
    steps, options = (6, {"resume": True}) if name == "finished" else (4, {})
    with monkeypatch.context() as patch:
        patch.setattr("dovetail_plugin.training.output.plot_history", full)
        with pytest.raises(WriteError, match=f"{name} cannot be written: the disk is full"):
            train(config_for(training_files, directory, steps=steps, save_every=99), **options)
    assert content(directory) == before and directory.exists() == (name == "finished")
    train(config_for(training_files, directory, steps=steps, save_every=99), **options)
    assert len(history(directory)["steps"]) == steps


KILL = """
import os, signal
from dovetail_plugin.training import output, state
real = {module}.{name}
def kill(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{name} = kill
from dovetail_plugin.cli import main
main({arguments!r})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize(("module", "name"), [("state", "save_file"), ("output", "plot_history")])
def test_a_killed_run_resumes(training_files, copied_run, module, name):
    """Killed while it writes its second state, or the finished draft."""
    directory = copied_run("unfinished")
    code = KILL.format(
        module=module, name=name, arguments=command_for(config_for(training_files, directory), "--resume")
    )
    done = run_python("-c", code, cwd=directory)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (directory / "config.json").exists()
    train(config_for(training_files, directory), resume=True)
    assert history(directory)["steps"] == [1, 2, 3, 4, 5, 6]
    assert not (directory / "resume").exists()


# --- hostile and damaged states ----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer"])
def test_code_that_comes_with_a_target_is_not_run(training_files, tmp_path, capsys, monkeypatch, part):
    """And nobody is asked on standard input."""
    target = shutil.copytree(training_files / "target", tmp_path / "target")
    file, name = ("config.json", "code.Config") if part == "AutoConfig" else ("tokenizer_config.json", ["code.T", None])
    stored = json.loads((target / file).read_text()) | {"auto_map": {part: name}}
    if part == "AutoConfig":
        stored["model_type"] = "unknown-to-transformers"
    else:
        stored["tokenizer_class"] = "UnknownToTransformers"
    (target / file).write_text(json.dumps(stored))
    (target / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    config = dataclasses.replace(config_for(training_files, tmp_path / "new", steps=1), target=str(target))
    with contextlib.suppress(ValueError):  # transformers may take a tokenizer of its own instead
        train(config)
    if part == "AutoConfig":
        said = "comes with Python code, which runs only with --trust-remote-code. Read it first"
        assert said in refusal(capsys, *command_for(config))
    assert not (tmp_path / "ran").exists()


OWN_CLASSES = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_that_comes_with_a_target_is_run_if_allowed(training_files, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    target = shutil.copytree(training_files / "target", tmp_path / "target")
    stored = json.loads((target / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (target / "config.json").write_text(json.dumps(stored | own))
    (target / "own.py").write_text(OWN_CLASSES)
    config = dataclasses.replace(config_for(training_files, tmp_path / "new", steps=1), target=str(target))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        train(config)
    assert main(command_for(config, "--trust-remote-code")) == 0
    assert DovetailDraft.from_pretrained(config.out).config.target_name_or_path == "target"


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


ACCELERATE = (
    *("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "sampler.bin", "scaler.pt"),
    *("model.safetensors", "pytorch_model.bin", "dl_state_dict.bin"),
)
"""Files that accelerate's `load_state` reads, pickles among them."""


def test_no_pickle_in_a_state_is_run(training_files, copied_run, tmp_path):
    """Neither in files that accelerate would read, nor in place of those of the state."""
    directory, ran = copied_run("unfinished"), tmp_path / "ran"
    pickle.loads(pickle.dumps(Hostile(ran))).close()
    ran.unlink()  # it works where it is run
    for name in ACCELERATE:
        (directory / "resume" / name).write_bytes(pickle.dumps(Hostile(ran)))
    with interrupted_after(4):
        train(config_for(training_files, directory), resume=True)
    assert not ran.exists()
    for name in ("state-00000004.safetensors", "progress.json", "README.txt"):
        copied = shutil.copytree(directory, tmp_path / f"with {name}")
        for hostile in (pickle.dumps(Hostile(ran)), torch_pickle(Hostile(ran), tmp_path)):
            (copied / "resume" / name).write_bytes(hostile)
            with pytest.raises((InputError, OccupiedError), match="resume"):
                train(config_for(training_files, copied), resume=True)
    assert not ran.exists()


def torch_pickle(value, tmp_path):
    torch.save(value, tmp_path / "pickle")
    return (tmp_path / "pickle").read_bytes()


def test_a_state_that_does_not_fit(training_files, copied_run):
    """With right checksums, but other tensors or none."""
    directory = copied_run("unfinished") / "resume"
    file = directory / "state-00000002.safetensors"
    progress = json.loads((directory / "progress.json").read_text())

    def sign():
        progress["progress"]["sha256"] = state._checksum(file)
        progress["sha256"] = state._digest(progress["progress"])
        (directory / "progress.json").write_text(json.dumps(progress))

    save_file({"draft.norm": torch.zeros(3)}, file)
    sign()
    with pytest.raises(InputError, match=r"state-00000002\.safetensors does not fit the draft of this run: draft\."):
        train(config_for(training_files, directory.parent), resume=True)
    file.unlink()
    with pytest.raises(MissingFileError, match=r"state-00000002\.safetensors is missing"):
        train(config_for(training_files, directory.parent), resume=True)
    progress["progress"]["file"] = "../../secret.safetensors"
    progress["sha256"] = state._digest(progress["progress"])
    (directory / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(InputError, match="does not describe the state of a run"):
        train(config_for(training_files, directory.parent), resume=True)
