"""The errors of this package. `DovetailError` is their common base, so that one `except` catches all of them.

Each class is also the built-in error of its kind, so that `except ValueError` and `except OSError` catch them as well.
"""


class DovetailError(Exception):
    """Base of the errors of this package."""


class InputError(DovetailError, ValueError):
    """A file, a config or an argument cannot be used. The message names it and says what to do."""


class MissingFileError(DovetailError, OSError):
    """A checkpoint lacks a file, or there is no such checkpoint."""


class WriteError(DovetailError, OSError):
    """A file or directory cannot be written. The message names it and says what to do. Nothing there has changed."""


class OccupiedError(WriteError, FileExistsError):
    """A file or directory to be written exists, and what it holds is not replaced."""
