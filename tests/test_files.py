"""Files and directories are written whole or not at all, whatever happens while they are written."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command_environment
from safetensors.torch import load_file, save_file
from support.files import content

from dovetail_plugin import DovetailError, files
from dovetail_plugin.errors import OccupiedError, WriteError

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs limits and signals")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=command_environment(), capture_output=True, text=True, timeout=120
    )


# --- files -------------------------------------------------------------------------------------------


def test_a_file_is_replaced(tmp_path):
    for text in ("old", "new \u00e9"):
        files.write_text(tmp_path / "a.json", text)
        assert content(tmp_path) == {"a.json": text.encode()}


def test_writers_that_choose_by_suffix_or_replace_the_file(tmp_path):
    with files.whole_file(tmp_path / "order.npy") as part:
        np.save(part, np.arange(3))
    with files.whole_file(tmp_path / "a.safetensors") as part:
        save_file({"x": torch.ones(2)}, part)
    assert np.load(tmp_path / "order.npy").tolist() == [0, 1, 2]
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert sorted(content(tmp_path)) == ["a.safetensors", "order.npy"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert content(tmp_path) == {"link": b"new", "real": b"old"}


@unix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "file", "x")
        for _ in range(2):  # a new directory, and one that exists
            with files.whole_directory(tmp_path / "folder") as part:
                save_file({"x": torch.ones(2)}, part / "a.safetensors")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")}
    assert modes == {"file": 0o666 & ~umask, "folder": 0o777 & ~umask}
    assert stat.S_IMODE((tmp_path / "folder" / "a.safetensors").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
def test_a_file_stays_if_its_writer_fails(tmp_path, error):
    files.write_text(tmp_path / "a", "old")
    expected = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), files.whole_file(tmp_path / "a") as part:
        part.write_text("half")
        raise error
    assert content(tmp_path) == {"a": b"old"}
    files.write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": b"new"}


REASONS = {
    errno.ENOSPC: "disk is full. Free some space",
    errno.EDQUOT: "quota",
    errno.EFBIG: "ulimit -f",
    errno.EACCES: "no permission",
    errno.EROFS: "read-only",
    errno.EIO: os.strerror(errno.EIO),
}


@pytest.mark.parametrize("code", REASONS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_errors_name_the_file_and_a_remedy(tmp_path, monkeypatch, code, step):
    def failing(*_):
        raise OSError(code, "as the system says")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing)
        with pytest.raises(WriteError, match=REASONS[code]) as raised:
            files.write_text(tmp_path / "a", "new")
    assert str(tmp_path / "a") in str(raised.value) and "\n" not in str(raised.value)
    assert isinstance(raised.value, (DovetailError, OSError)) and content(tmp_path) == {}


def test_errors_of_reading_something_else_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), files.whole_file(tmp_path / "a"):
        (tmp_path / "source").read_bytes()
    assert content(tmp_path) == {}


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(WriteError, match="cannot be written"):
        files.write_text(tmp_path / "a", "x")
    with pytest.raises(WriteError, match="cannot be written"):
        files.write_text(tmp_path / "nothing" / "a", "x")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


# --- directories -------------------------------------------------------------------------------------


def write(directory: Path, names=("config.json", "model.safetensors"), text="new") -> None:
    with files.whole_directory(directory) as part:
        for name in names:
            (part / name).write_text(text)


def test_a_directory_appears_whole(tmp_path):
    write(tmp_path / "a" / "b")
    assert content(tmp_path) == {"a/b/config.json": b"new", "a/b/model.safetensors": b"new"}


def test_files_of_a_directory_are_replaced_and_others_stay(tmp_path):
    write(tmp_path, text="old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old.bin").write_text("old")
    with files.whole_directory(tmp_path, replaces=lambda name: name == "old.bin") as part:
        (part / "config.json").write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert content(tmp_path) == {"config.json": b"new", "model.safetensors": b"old", "notes.txt": b"mine"}


def test_files_that_are_kept(tmp_path):
    """They are written only where there are none."""
    for text in ("first", "second"):
        with files.whole_directory(tmp_path / "out", keeps=["notes"]) as part:
            (part / "notes").write_text(text)
            (part / "config.json").write_text(text)
    assert content(tmp_path / "out") == {"notes": b"first", "config.json": b"second"}


def test_the_file_that_readers_look_for_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
    write(tmp_path, names=("a", "config.json", "z"))
    assert moved == ["a", "z", "config.json"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
def test_a_directory_stays_if_its_writer_fails(tmp_path, exists, error):
    if exists:
        write(tmp_path / "out", text="old")
    before = content(tmp_path)
    expected = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), files.whole_directory(tmp_path / "out") as part:
        (part / "config.json").write_text("half")
        raise error
    assert content(tmp_path) == before and (tmp_path / "out").exists() == exists
    write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_a_folder_in_place_of_a_file_stops_before_anything_moves(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OccupiedError, match=r"model\.safetensors is in the way"):
        write(tmp_path)
    assert content(tmp_path) == {"config.json": b"old"}


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match="cannot be written"):
            write(directory)
    assert content(tmp_path) == {"file": b"mine"}


def test_a_directory_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(WriteError, match="cannot be written"), files.whole_directory(tmp_path / "out") as part:
        (part / "config.json").write_text("new")
        write(tmp_path / "out", text="of somebody else")
    assert set(content(tmp_path).values()) == {b"of somebody else"}


def test_occupied_directories_are_refused(tmp_path):
    files.refuse_occupied(tmp_path / "new")
    files.refuse_occupied(tmp_path)
    (tmp_path / f"{files.PART}of a killed process").mkdir()
    files.refuse_occupied(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OccupiedError, match=r"is not empty \(notes\). Choose"):
        files.refuse_occupied(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        files.refuse_occupied(tmp_path / "notes")


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    """Before anything is made there."""
    files.refuse_unwritable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("new")
    files.refuse_unwritable(tmp_path / "link")
    for refuse in (files.refuse_unwritable, files.refuse_occupied):
        with pytest.raises(WriteError, match=r"file/a/b cannot be written: a part of the path is a file\. Choose"):
            refuse(tmp_path / "file" / "a" / "b")
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    for refuse in (files.refuse_unwritable, files.refuse_occupied):
        with pytest.raises(WriteError, match=r"a/b cannot be written: there is no permission"):
            refuse(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


# --- full disks and kills ----------------------------------------------------------------------------

WRITE = """
import os, resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from dovetail_plugin import files
def write(size, kill=False):
    with files.whole_directory(Path("out")) as part:
        (part / "config.json").write_text(str(size))
        save_file({"x": torch.full((size,), float(size))}, part / "model.safetensors")
        if kill: os.kill(os.getpid(), signal.SIGKILL)
"""


@unix
def test_a_real_limit_of_the_disk(tmp_path):
    """The error of safetensors, which is no `OSError`, is explained as well."""
    code = WRITE + "write(10)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nwrite(100_000)"
    done = python(code, tmp_path)
    assert "dovetail_plugin.errors.WriteError: out cannot be written: the file is larger than" in done.stderr
    assert sorted(content(tmp_path)) == ["out/config.json", "out/model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].shape == (10,)


@unix
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_what_was_there(tmp_path, exists):
    if exists:
        assert python(WRITE + "write(10)", tmp_path).returncode == 0
    done = python(WRITE + "write(20, kill=True)", tmp_path)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "out").exists() == exists
    if exists:
        assert load_file(tmp_path / "out" / "model.safetensors")["x"].shape == (10,)
        assert (tmp_path / "out" / "config.json").read_text() == "10"
    assert any(files.PART in name for name in content(tmp_path))
    assert python(WRITE + "write(20)", tmp_path).returncode == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].shape == (20,)
