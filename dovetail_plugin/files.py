"""Writes files and directories whole or not at all.

What is written lies beside its destination, in the same file system, until it is complete and on the disk; then it is
renamed. A full disk, an interruption or a kill so leaves what was there before. Only a kill leaves the unfinished part,
under a name that starts with `PART`. Permissions are those that the umask gives. This module does not know what the
files contain.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import DovetailError, OccupiedError, WriteError

PART = ".part-"
"""Start of the names of unfinished files and directories."""

REASONS = {
    "ENOSPC": "the disk is full. Free some space, or choose another directory.",
    "EDQUOT": "the disk quota is used up. Free some space, or choose another directory.",
    "EFBIG": "the file is larger than this process may write. Raise the limit (`ulimit -f`), or choose another disk.",
    "EACCES": "there is no permission to write there. Choose another directory.",
    "EPERM": "there is no permission to write there. Choose another directory.",
    "EROFS": "the file system is read-only. Choose another directory.",
    "ENOTDIR": "a part of the path is a file. Choose another directory.",
    "ENAMETOOLONG": "the name is too long. Choose a shorter one.",
}
"""Name of an error of the system -> what it means and what to do."""


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file; when the block ends, it takes the place of `file`.

    The path has the suffix of `file`. If the block raises, the new file is deleted. A link in place of `file` is
    replaced, not followed.

    Raises:
        WriteError: the file cannot be written.
    """
    final = Path(os.path.realpath(file.parent)) / file.name
    part = beside(final)
    with _explained(file, final, part):
        try:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # the block may have put another file there
            _flush(part)
            os.replace(part, final)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        _flush_directory(final.parent)


def write_text(file: Path, text: str) -> None:
    """Write a file of UTF-8 text, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_directory(
    directory: Path,
    *,
    last: str = "config.json",
    replaces: Callable[[str], bool] = lambda _: False,
    keeps: Collection[str] = (),
) -> Iterator[Path]:
    """Yield an empty directory; when the block ends, what it holds takes its place in `directory`.

    A directory that does not exist appears in one step. In one that exists, each file is replaced in one step when all
    of them are on the disk; other content stays. If the block or a step raises, nothing changes. A kill between two of
    these steps leaves some files new and others old.

    Args:
        directory: its parents are created as needed.
        last: name of the file that is put in its place last, because readers look for it first.
        replaces: whether a file in `directory` that the new files do not replace belongs to the old ones, and is
            deleted with them.
        keeps: names of files that stay if they exist in `directory`, although there are new ones.

    Raises:
        WriteError: it cannot be written.
    """
    final = Path(os.path.realpath(directory))
    exists = final.is_dir()
    part = (final / f"{PART}{secrets.token_hex(6)}") if exists else beside(final)
    with _explained(directory, final, part):
        final.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            yield part
            _flush_tree(part, mode=part.stat().st_mode)
            if exists:
                _move_into(part, final, last, replaces, keeps)
            else:
                os.rename(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _flush_directory(final if exists else final.parent)


def refuse_occupied(directory: Path, remedy: str = "Choose another directory.") -> None:
    """Refuse a directory to be written that has content, before any work. What a kill left does not count.

    Raises:
        OccupiedError: it is a file, or not empty.
        WriteError: see `refuse_unwritable`.
    """
    if directory.is_dir():
        names = sorted(name for name in os.listdir(directory) if not name.startswith(PART))
        if names:
            more = ", ..." if len(names) > 3 else ""
            raise OccupiedError(f"{directory} is not empty ({', '.join(names[:3])}{more}). {remedy}")
    elif os.path.lexists(directory):
        raise OccupiedError(f"{directory} is a file, and a directory is needed. {remedy}")
    refuse_unwritable(directory)


def refuse_unwritable(directory: Path) -> None:
    """Refuse a directory in which nothing can be written, before any work. It need not exist yet.

    Raises:
        WriteError: it or a part of its path is a file, or there is no permission.
    """
    place = Path(os.path.realpath(directory))
    nearest = next(part for part in (place, *place.parents) if os.path.lexists(part))
    reason = None if nearest.is_dir() else REASONS["ENOTDIR"]
    if reason is None and not os.access(nearest, os.W_OK | os.X_OK):
        reason = REASONS["EACCES"]
    if reason is not None:
        raise WriteError(f"{directory} cannot be written: {reason}")


def beside(path: Path) -> Path:
    """Return a new name in the same directory, with the same suffix."""
    return path.with_name(f"{PART}{secrets.token_hex(6)}-{path.name[-40:]}")


def _move_into(part: Path, final: Path, last: str, replaces: Callable[[str], bool], keeps: Collection[str]) -> None:
    """Put the content of `part` into its place in `final`, delete what it replaces, and delete `part`."""
    new = (name for name in os.listdir(part) if name not in keeps or not os.path.lexists(final / name))
    names = sorted(new, key=lambda name: (name == last, name))
    for name in names:
        if (final / name).is_dir() or ((part / name).is_dir() and os.path.lexists(final / name)):
            raise OccupiedError(f"{final / name} is in the way. Move it, or choose another directory.")
    gone = [n for n in set(os.listdir(final)).difference(names) if replaces(n) and not (final / n).is_dir()]
    old = part / f"{PART}old"
    old.mkdir()
    for name in (*names, *gone):
        if os.path.lexists(final / name):
            _keep(final / name, old / name)
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            os.replace(part / name, final / name)
        for name in gone:
            done.append(name)
            (final / name).unlink()
    except BaseException:
        for name in done:
            if os.path.lexists(old / name):
                os.replace(old / name, final / name)
            elif not os.path.lexists(part / name):
                (final / name).unlink()
        raise
    shutil.rmtree(part, ignore_errors=True)


def _keep(file: Path, copy: Path) -> None:
    """Have a file under another name too: as a second link to it, or as a copy where there are no such links."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(file, copy, follow_symlinks=False)


def _flush_tree(directory: Path, mode: int) -> None:
    """Have all files of a directory on the disk, with the permissions that the umask gives, as `mode` shows."""
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder) / name
            file.chmod(mode & 0o666)
            _flush(file)
        _flush_directory(Path(folder))


def _flush(file: Path) -> None:
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def _flush_directory(directory: Path) -> None:
    """Have the names in a directory on the disk, where the system can do that."""
    if os.name == "posix":
        with suppress(OSError):
            opened = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


@contextmanager
def _explained(path: Path, final: Path, part: Path) -> Iterator[None]:
    """Turn errors of writing `part` or renaming it to `final` into a `WriteError` that names `path`; others pass."""
    try:
        yield
    except WriteError as error:  # of something that was to be a part of this
        if str(part) not in str(error):
            raise
        raise type(error)(str(error).replace(str(part), str(path))) from error
    except DovetailError:
        raise
    except (OSError, SafetensorError) as error:
        code = _code_of(error)
        named = getattr(error, "filename", None)
        about = None if named is None else Path(os.path.realpath(os.fsdecode(named)))
        if code is None or not (about is None or about.is_relative_to(part) or final.is_relative_to(about)):
            raise
        name = errno.errorcode.get(code, "")
        reason = REASONS.get(name) or f"{os.strerror(code)}. Choose another directory."
        raise WriteError(f"{path} cannot be written: {reason}") from error


def _code_of(error: Exception) -> int | None:
    """Return the number of the system's error; safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"(?:code:|os error) (\d+)", str(error))
    return int(found[1]) if found else None
