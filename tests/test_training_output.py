"""What training finds in its output directory, what it writes there, and what it never touches."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from helpers import refusal
from support.files import content
from support.training import (
    assert_same,
    command_for,
    config_for,
    history,
    interrupted_after,
    record,
    weights,
)

from dovetail_plugin import DovetailDraft, files
from dovetail_plugin.cli import main
from dovetail_plugin.errors import InputError, OccupiedError, WriteError
from dovetail_plugin.training import state, train

pytestmark = pytest.mark.usefixtures("fixed_budget")


# --- what is written ---------------------------------------------------------------------------------


def test_the_state_goes_when_the_run_is_finished(training_files, copied_run, tmp_path):
    directory = copied_run("unfinished")
    assert sorted(content(directory)) == [
        "resume/README.txt",
        "resume/progress.json",
        "resume/state-00000002.safetensors",
    ]
    train(config_for(training_files, directory), resume=True)
    assert not (directory / "resume").exists()
    assert not [name for name in content(tmp_path) if files.PART in name]


def test_the_record_of_a_run(training_files, training_runs):
    found = record(training_runs / "finished")
    assert found["data"] == [{"file": "chats.jsonl", "bytes": (training_files / "chats.jsonl").stat().st_size}]
    assert found["versions"]["torch"] == torch.__version__ and {"python", "transformers"} <= found["versions"].keys()
    assert found["date"].startswith("20") and found["date"].endswith("+00:00") and 0 < found["seconds"] < 600
    assert str(training_files) not in json.dumps(found)  # no paths of this machine


def test_the_draft_keeps_its_token_order(training_runs, tmp_path):
    """In a copy that `save_pretrained` makes, too."""
    order = np.load(training_runs / "finished" / "token_order.npy")
    draft = DovetailDraft.from_pretrained(training_runs / "finished")
    assert draft.token_order.tolist() == order.tolist() and order.tolist() != list(range(len(order)))
    draft.save_pretrained(tmp_path / "copy")
    assert np.load(tmp_path / "copy" / "token_order.npy").tolist() == order.tolist()


# --- an output directory that is used ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["finished", "unfinished"])
def test_a_run_is_not_replaced_unasked(training_files, copied_run, name):
    directory = copied_run(name)
    before = content(directory)
    with pytest.raises(OccupiedError, match=r"Use --resume to continue, --overwrite-output-dir to start again"):
        train(config_for(training_files, directory))
    assert content(directory) == before


def test_a_run_is_replaced_if_asked(training_files, copied_run, training_runs):
    directory = copied_run("unfinished")
    (directory / "notes.txt").write_text("mine")
    train(config_for(training_files, directory, steps=4), overwrite_output_dir=True)
    assert_same(weights(directory), weights(training_runs / "finished"), atol=0, rtol=0)
    assert (directory / "notes.txt").read_text() == "mine" and not (directory / "resume").exists()


def test_an_overwriting_run_does_not_resume_the_old_one(training_files, copied_run):
    directory = copied_run("unfinished")
    with interrupted_after(1):
        train(config_for(training_files, directory, seed=1), overwrite_output_dir=True)
    with interrupted_after(None) as again:
        train(config_for(training_files, directory, seed=1), resume=True)
    assert again.steps == [*range(6)]


def test_resume_of_a_finished_run_does_nothing(training_files, copied_run, capsys):
    directory = copied_run("finished")
    before = content(directory)
    assert main(command_for(config_for(training_files, directory, steps=4), "--resume")) == 0
    assert "is finished: 4 steps are done" in capsys.readouterr().out
    draft = train(config_for(training_files, directory, steps=4), resume=True)
    assert draft.num_parameters() and content(directory) == before


def test_a_finished_run_goes_on_to_more_steps(training_files, copied_run):
    directory = copied_run("finished")
    before = weights(directory)
    with interrupted_after(None) as more:
        train(config_for(training_files, directory, steps=7), resume=True)
    assert more.steps == [4, 5, 6]
    assert history(directory)["steps"] == [1, 2, 3, 4, 5, 6, 7] and len(history(directory)["losses"]) == 7
    moved = max(float((before[name] - weights(directory)[name]).abs().max()) for name in before)
    assert 0 < moved < 0.02  # it started from those weights, and the rate is 0.001


def test_an_unfinished_run_goes_on_to_more_steps(training_files, copied_run):
    directory = copied_run("unfinished")
    with interrupted_after(None) as more:
        train(config_for(training_files, directory, steps=7), resume=True)
    assert more.steps == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["finished", "unfinished"])
@pytest.mark.parametrize(("field", "value"), [("lr", 5e-4), ("blocks", 2), ("held_out", 4)])
def test_resume_refuses_other_settings(training_files, copied_run, name, field, value):
    directory = copied_run(name)
    with pytest.raises(InputError, match=f"cannot resume from .*{name}.*{field} was .* and is {value}"):
        train(config_for(training_files, directory, **{field: value}), resume=True)


def test_resume_refuses_other_data(training_files, copied_run, tmp_path):
    lines = (training_files / "chats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1]))
    config = config_for(training_files, copied_run("unfinished"))
    with pytest.raises(InputError, match=r"cannot resume from .*sequences was"):
        train(dataclasses.replace(config, data=(tmp_path / "other.jsonl",)), resume=True)


def test_a_run_of_an_earlier_version(training_files, copied_run):
    directory = copied_run("finished")
    old = record(directory)
    (directory / "training.json").write_text(json.dumps({name: old[name] for name in ("config", "history")}))
    with pytest.raises(InputError, match=r"training\.json does not say .*--init-from"):
        train(config_for(training_files, directory, steps=7), resume=True)


# --- starting from a draft ---------------------------------------------------------------------------


def test_training_starts_from_a_draft(training_files, training_runs, tmp_path):
    config = config_for(
        training_files, tmp_path / "new", init_from=str(training_runs / "finished"), lr=1e-9, feature_noise=0.0
    )
    train(config)
    assert_same(weights(config.out), weights(training_runs / "finished"), atol=1e-6, rtol=0)
    assert history(config.out)["steps"] == [1, 2, 3, 4, 5, 6]
    assert record(config.out)["config"]["init_from"] == "finished"


@pytest.mark.usefixtures("offline_hub")
def test_a_draft_that_cannot_be_trained_on(training_files, training_runs, tmp_path, capsys, monkeypatch):
    taken = str(training_runs / "finished")
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"blocks is 3, and .*finished has 1\. Leave"):
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
        train(config_for(training_files, tmp_path / "new", init_from=taken, blocks=3))
    config = config_for(training_files, tmp_path / "new")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    assert "--init-from no/such: no such directory" in refusal(capsys, *command_for(config, "--init-from", "no/such"))
    assert not (tmp_path / "new").exists()


# --- what is not its own -----------------------------------------------------------------------------


def test_a_foreign_resume_folder_is_refused(training_files, tmp_path):
    """And neither deleted nor read, with any of the options."""
    directory = tmp_path / "project"
    (directory / "resume").mkdir(parents=True)
    (directory / "resume" / "cv.pdf").write_text("mine")
    (directory / "resume" / "progress.json").write_text("{}")
    before = content(directory)
    for options in ({}, {"resume": True}, {"overwrite_output_dir": True}):
        with pytest.raises(OccupiedError, match=r"project/resume is not a state that .*Move it, or use another --out"):
            train(config_for(training_files, directory), **options)
    assert content(directory) == before


def test_a_resume_folder_that_appears_later_is_left_alone(training_files, tmp_path):
    config = config_for(training_files, tmp_path / "new")

    def put_there(*_):
        (config.out / "resume").mkdir(parents=True)
        (config.out / "resume" / "cv.pdf").write_text("mine")
        return real(*_)

    with pytest.MonkeyPatch.context() as patch:
        real = state.own_state
        patch.setattr(state, "own_state", lambda out: put_there(out) if not out.exists() else real(out))
        with pytest.raises(OccupiedError, match="resume is not a state"):
            train(config)
    assert list(content(config.out)) == ["resume/cv.pdf"]


def test_foreign_files_in_its_own_folder_stay(training_files, copied_run):
    directory = copied_run("unfinished")
    (directory / "resume" / "notes.txt").write_text("mine")
    train(config_for(training_files, directory), resume=True)
    assert [f.name for f in (directory / "resume").iterdir()] == ["notes.txt"]
    assert (directory / "model.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite_output_dir": True}], ids=str)
def test_another_checkpoint_is_refused(training_files, options):
    target = training_files / "target"
    before = content(target)
    with pytest.raises(OccupiedError, match="contains a checkpoint that is not a Dovetail draft"):
        train(config_for(training_files, target), **options)
    assert content(target) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "line 1: not valid JSON"), (None, "there is no such file"), ("folder", "is a directory"), (b"", "no rows")],
)
def test_wrong_data_is_refused_before_anything_is_loaded(training_files, tmp_path, capsys, monkeypatch, data, message):
    file = tmp_path / "rows.jsonl"
    if data == "folder":
        file.mkdir()
    elif data is not None:
        file.write_bytes(data)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    config = dataclasses.replace(config_for(training_files, tmp_path / "new"), data=(file,))
    line = refusal(capsys, *command_for(config))
    assert str(file) in line and message in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"cache_features": "file"}, "file is a file. Name a directory for target features"),
        ({"cache_features": "file/features"}, "file/features cannot be written: a part of the path is a file"),
        ({"cache_features": "damaged"}, "damaged/index.json"),
        ({"out": "file/draft"}, "file/draft cannot be written: a part of the path is a file"),
    ],
)
def test_places_that_cannot_be_used_are_refused_before_anything_is_loaded(
    training_files, tmp_path, capsys, monkeypatch, place, message
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "index.json").write_text("{")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    config = config_for(training_files, tmp_path / "new")
    config = dataclasses.replace(config, **{name: tmp_path / value for name, value in place.items()})
    options = [] if config.cache_features is None else ["--cache-features", config.cache_features]
    assert message in refusal(capsys, *command_for(config), *options)
    assert sorted(content(tmp_path)) == ["damaged/index.json", "file"]


def test_a_finished_run_needs_no_permission(training_files, copied_run, monkeypatch):
    directory = copied_run("finished")
    monkeypatch.setattr(os, "access", lambda *_: False)
    train(config_for(training_files, directory, steps=4), resume=True)
    with pytest.raises(WriteError, match="finished cannot be written: there is no permission"):
        train(config_for(training_files, directory, steps=5), resume=True)
