"""Files of measurements in a directory that others can write to, that is full, or that several processes use."""

import json
import logging
import os
import sys
from dataclasses import replace

import pytest
import torch
from support.simulation import COMPUTERS
from support.workers import workers

from dovetail_plugin import machine
from dovetail_plugin.policy import records
from dovetail_plugin.policy.device_split import DeviceSplitPolicy

MEASURED = COMPUTERS["rows cost a little"].measurements()
unix = pytest.mark.skipif(sys.platform == "win32", reason="needs users and special files")


@pytest.fixture
def file(tmp_path):
    """The file with the measurements of key "a"."""
    records.store("a", MEASURED, tmp_path)
    (file,) = tmp_path.iterdir()
    return file


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def prepare(directory):
    """Ask a new policy for measurements; return them and how often it measured."""
    times, policy = [], DeviceSplitPolicy(vram_budget=0, measured_in=directory)

    def measure(_settings):
        times.append(1)
        return MEASURED

    return policy.planner("a", temperature=0.0).prepare(measure), len(times)


def written(**values):
    return json.dumps({"key": "a", "measurements": MEASURED.as_dict() | values})


# --- what is no file of ours -----------------------------------------------------------------------


def make_pipe(file, _elsewhere):
    os.mkfifo(file)


def link_to_zeros(file, _elsewhere):
    file.symlink_to("/dev/zero")


def link_to_own_file(file, elsewhere):
    elsewhere.write_text(written())
    file.symlink_to(elsewhere)


def fill_beyond_the_limit(file, _elsewhere):
    with file.open("wb") as opened:
        opened.truncate(records.LARGEST_BYTES + 1)


@unix
@pytest.mark.parametrize("make", [make_pipe, link_to_zeros, link_to_own_file, fill_beyond_the_limit])
def test_strange_files_are_replaced_and_never_read(file, tmp_path_factory, make, warnings):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    file.unlink()
    make(file, elsewhere)
    assert prepare(file.parent) == (MEASURED, 1)
    (warning,) = warnings()
    assert str(file) in warning and ("regular file" in warning or "larger than" in warning)
    assert "measured again" in warning
    assert prepare(file.parent) == (MEASURED, 0) and len(warnings()) == 1
    assert file.is_file() and not file.is_symlink()


@unix
def test_a_file_that_becomes_a_pipe_is_not_waited_for(file, monkeypatch, warnings):
    """Between the look at it and its opening."""
    looked, lstat = file.lstat(), type(file).lstat
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setattr(type(file), "lstat", lambda path: looked if path == file else lstat(path))
    assert records.load("a", file.parent) is None
    assert "regular file" in warnings()[0]


@unix
def test_users_of_one_directory_have_their_own_files(file, monkeypatch, warnings):
    """Another user's file is not believed and not replaced, and each user measures once."""
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert prepare(file.parent) == (MEASURED, 1)
    (warning,) = warnings()
    assert str(file) in warning and "another user" in warning
    own = file.with_stem(f"{file.stem}-{other}")
    assert own.is_file() and file.is_file()
    monkeypatch.undo()
    assert prepare(file.parent) == (MEASURED, 0) and len(warnings()) == 1


@unix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_read_again_and_again(file, warnings):
    os.chown(file, 12345, -1)
    assert prepare(file.parent) == (MEASURED, 1)
    assert prepare(file.parent) == (MEASURED, 0)
    assert len(warnings()) == 1


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        written(threads=300_000),
        written(threads=-1),
        written(processors=[0, 100_000]),
        written(processors=[-1]),
        written(processors=[]),
        written(verify_s={"1": 0.1, str(10**30): 0.2}),
        written(level_s={"1": 0.1, str(1 << 21): 0.2}),
        written(verify_s={str(count): 0.1 for count in range(1, 1026)}),
        written(verify_s={"1": 1e300}),
        written(context=-(10**6)),
        written(context=10**30),
        written(draft_s=10**400),
        "[" * 1_000_000,
        '{"key": ' * 100_000,
        "\udcff\udcfe",
    ],
    ids=lambda text: text[-40:][:20],
)
def test_values_out_of_bounds_are_measured_again(file, content, warnings):
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert prepare(file.parent) == (MEASURED, 1)
    (warning,) = warnings()
    assert str(file) in warning and "measured again" in warning
    assert prepare(file.parent) == (MEASURED, 0)


def test_threads_and_processors_of_this_machine_are_used(tmp_path):
    most = max(len(machine.cpus()), torch.get_num_threads())
    measured = replace(MEASURED, threads=most, processors=tuple(machine.cpus()))
    records.store("a", measured, tmp_path)
    assert records.load("a", tmp_path) == measured


# --- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(tmp_path, monkeypatch, step, warnings):
    """Later policies of the process, too, find what was measured, and a later process measures again."""

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        assert prepare(tmp_path) == (MEASURED, 1)
        assert [prepare(tmp_path) for _ in range(3)] == 3 * [(MEASURED, 0)]
        records.store("b", MEASURED, tmp_path)
        assert records.load("b", tmp_path) == MEASURED
    (warning,) = warnings()
    assert str(tmp_path) in warning and "disk is full" in warning and "DOVETAIL_CACHE" in warning
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_interrupted_leaves_nothing_behind(file, monkeypatch):
    """The old file is still whole."""

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.store("a", replace(MEASURED, draft_s=9.0), file.parent)
    assert list(file.parent.iterdir()) == [file]
    assert records.load("a", file.parent) == MEASURED


def test_a_file_in_place_of_the_directory_costs_one_warning(tmp_path, warnings):
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        prepare(tmp_path / "file" / "records")
    (warning,) = warnings()
    assert "cannot be stored" in warning


def test_files_are_whole_whenever_they_are_read(file):
    """Two writers at a time. Files are replaced as a whole, so processes are as safe as these threads."""

    def write(first):
        for number in range(first, first + 100):
            records.store("a", replace(MEASURED, draft_s=float(number)), file.parent)

    with workers(2) as threads:
        waits = [worker.start(write, 1000 * index) for index, worker in enumerate(threads)]
        for _ in range(100):
            found = records.load("a", file.parent)
            assert found is not None and replace(found, draft_s=MEASURED.draft_s) == MEASURED
        for wait in waits:
            wait()
    assert list(file.parent.iterdir()) == [file]
