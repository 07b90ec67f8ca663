"""Random changes of the files that training reads: the right result, or an error that names the file."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import byte_target, byte_tokenizer, chat, write_jsonl
from support.faults import damage
from support.training import assert_same, config_for, interrupted_after, record, weights

from dovetail_plugin import DovetailDraft, DovetailError
from dovetail_plugin.training import features, output, state, train
from dovetail_plugin.training.data import encode, read_jsonl

pytestmark = [
    pytest.mark.usefixtures("fixed_budget"),
    pytest.mark.torch_only("about files, which are the same for every engine"),
]

SHORT = [pytest.param(range(20), id="20"), pytest.param(range(20, 220), id="200", marks=pytest.mark.nightly)]
"""Seeds of the changes: a few in every run, the others now and then."""


def change(directory: Path, seed: int) -> Path:
    """Damage, delete, empty or exchange one of the files below a directory; returns it."""
    rng = random.Random(seed)
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    file, other = rng.choice(files), rng.choice(files)
    kind = rng.choice(["damage"] * 7 + ["delete", "exchange", "directory"])
    if kind == "damage":
        damage(file, rng)
    elif kind == "exchange":
        held = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(held)
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
    return file


def outcome(seeds, valid, tmp_path, attempt) -> None:
    """Try each change on a copy of `valid`. `attempt(copy)` returns whether the result is the right one."""
    refused = 0
    for seed in seeds:
        copy = Path(shutil.copytree(valid, tmp_path / str(seed)))
        changed, message = change(copy, seed), None
        try:
            assert attempt(copy), f"seed {seed}: {changed} was changed, and the result is another one"
        except DovetailError as error:
            message = str(error)
        if message is not None:
            refused += 1
            assert str(copy) in message and "\n" not in message and len(message) < 2000, f"seed {seed}: {message}"
        shutil.rmtree(copy)
    assert refused >= len(seeds) / 4, "the changes were too small to test anything"


# --- data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SHORT)
def test_data(seeds, tmp_path):
    """What is read can be encoded, whatever its text is."""
    (tmp_path / "valid").mkdir()
    rows = [{"messages": chat(3)}, {"prompt": "caf\u00e9", "completion": "\U0001f600"}, {"text": "plain"}]
    write_jsonl(tmp_path / "valid" / "rows.jsonl", rows * 2)
    tokenizer = byte_tokenizer()

    def attempt(copy):
        return all(len(encode(row, tokenizer, 99)) < 100 for row in read_jsonl([copy / "rows.jsonl"]))

    outcome(seeds, tmp_path / "valid", tmp_path, attempt)


# --- features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", SHORT)
def test_features(seeds, tmp_path, monkeypatch):
    """Without an index they are computed again, which is right as well."""
    monkeypatch.setattr(features, "SHARD_SEQUENCES", 2)
    target, tokenizer = byte_target(), byte_tokenizer()
    sequences = [encode({"messages": chat(number)}, tokenizer, 40) for number in range(5)]
    right = features.FeatureCache(tmp_path / "valid", target, sequences, 0).load([*range(5)])

    def attempt(copy):
        return torch.equal(features.FeatureCache(copy, target, sequences, 0).load([*range(5)]), right)

    outcome(seeds, tmp_path / "valid", tmp_path, attempt)


# --- states ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(training_files, tmp_path_factory):
    """The output directory of a run that was interrupted after 3 of 6 steps."""
    directory = tmp_path_factory.mktemp("runs") / "unfinished"
    with interrupted_after(3):
        train(config_for(training_files, directory))
    return directory


@pytest.mark.parametrize("seeds", SHORT)
def test_states(seeds, training_files, unfinished, tmp_path):
    """Draft, optimizer and history are those that were saved; without `progress.json` the run starts again."""

    def restored(out):
        before = output.look(config_for(training_files, out), resume=True, overwrite=False)
        if before.state is None:
            return None
        draft = DovetailDraft.for_target(byte_target())
        optimizer = torch.optim.AdamW(draft.parameters())
        state.load_state(before.state, draft, optimizer)
        moments = [values["exp_avg"] for values in optimizer.state_dict()["state"].values()]
        return before.progress, [*draft.state_dict().values(), *moments]

    progress, tensors = restored(unfinished)

    def attempt(copy):
        found = restored(copy)
        if found is None:
            return not (copy / "resume" / "progress.json").exists()
        same = all(torch.equal(one, other) for one, other in zip(found[1], tensors, strict=True))
        return found[0] == progress and same

    outcome(seeds, unfinished, tmp_path, attempt)


@pytest.mark.nightly
@pytest.mark.parametrize("seeds", [range(20 * part, 20 * part + 20) for part in range(4)], ids=str)
def test_resuming(seeds, training_files, unfinished, tmp_path):
    """The whole run, to its end."""
    train(config_for(training_files, tmp_path / "right"))

    def attempt(copy):
        train(config_for(training_files, copy), resume=True)
        assert_same(weights(copy), weights(tmp_path / "right"), atol=1e-6, rtol=1e-6)
        return record(copy)["history"]["steps"] == [1, 2, 3, 4, 5, 6]

    outcome(seeds, unfinished, tmp_path, attempt)


@pytest.mark.parametrize("seeds", SHORT)
def test_the_record_of_a_finished_run(seeds, training_files, unfinished, tmp_path):
    """A run is finished, or is not taken for one."""
    finished = Path(shutil.copytree(unfinished, tmp_path / "finished"))
    train(config_for(training_files, finished), resume=True)
    (tmp_path / "valid").mkdir()
    shutil.copy(finished / "training.json", tmp_path / "valid")

    def attempt(copy):
        before = output.look(config_for(training_files, copy, steps=6), resume=True, overwrite=False)
        return before.is_finished(6) or not (copy / "training.json").exists()

    outcome(seeds, tmp_path / "valid", tmp_path, attempt)
