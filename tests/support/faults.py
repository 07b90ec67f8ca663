"""Broken directories of drafts: refused loads, what a load takes from memory, and random changes of files."""

import json
import logging
import random
import string
import tracemalloc
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail_plugin import DovetailDraft, DovetailError
from dovetail_plugin.errors import InputError

WEIGHTS, MIB = "model.safetensors", 2**20


class TensorBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made, other than on the meta device. `most` is the largest one."""

    def __init__(self):
        super().__init__()
        self.total = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                size = tensor.untyped_storage().nbytes()
                self.total, self.most = self.total + size, max(self.most, size)
        return out


@contextmanager
def at_most(tensor_bytes: int, python_bytes: int):
    """Fail if a tensor of more bytes is made within, or if Python and NumPy hold more bytes at once."""
    tracemalloc.start()
    try:
        with TensorBytes() as made:
            yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert made.most <= tensor_bytes, f"a tensor of {made.most} bytes was made"
        assert peak <= python_bytes, f"Python held {peak} bytes"


class Said(logging.Handler):
    """Counts what is logged and warned within."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        self._loggers = [logging.getLogger(name) for name in ("transformers", "dovetail_plugin", "torch")]
        for logger in self._loggers:
            logger.addHandler(self)
        self._catch = warnings.catch_warnings(record=True)
        self._warned = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error):
        self.lines += [str(warning.message) for warning in self._warned]
        self._catch.__exit__(*error)
        for logger in self._loggers:
            logger.removeHandler(self)


def refused(directory: Path, match: str, error: type[Exception] = InputError, **options) -> str:
    """The message of a load that is refused, within little memory and without other lines."""
    with Said() as said, at_most(tensor_bytes=MIB, python_bytes=16 * MIB), pytest.raises(error, match=match) as raised:
        DovetailDraft.from_pretrained(directory, **options)
    assert isinstance(raised.value, DovetailError)
    assert str(directory) in str(raised.value)
    assert said.lines == []
    return str(raised.value)


# --- random changes ------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**70), 10**30, 10**400, 1e30, 1e308, -0.0, 0.5, 1e-300]),
    st.floats(),
    st.sampled_from(
        ["", "default", "yarn", "linear", "dynamic", "longrope", "zzz", "float16", "Tensor", "32", "\ud800"]
    ),
    st.text(string.printable, max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "rope_theta", "greedy", "0", "type", "x"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)


@st.composite
def changed_configs(draw, config: dict, others: list[str]):
    """A config with some fields changed, dropped, added or nested deeply, also inside of its objects."""
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 3))):
        at = config
        while (inner := [value for value in at.values() if isinstance(value, dict) and value]) and draw(st.booleans()):
            at = draw(st.sampled_from(inner))
        field = draw(st.one_of(st.sampled_from(sorted(at) or ["x"]), st.sampled_from(others)))
        kind = draw(st.sampled_from(["change", "change", "change", "drop", "nest"]))
        if kind == "drop":
            at.pop(field, None)
        elif kind == "nest":
            value = draw(SCALARS)
            for _ in range(draw(st.sampled_from([1, 20, 40, 400]))):
                value = [value]
            at[field] = value
        else:
            at[field] = draw(VALUES)
    return config


def damage(file: Path, rng: random.Random) -> None:
    """Change bytes of a file: cut it, empty it, flip, insert, repeat or drop some, mostly near its start or end."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(["cut", "empty", "flip", "flip", "flip", "insert", "double", "drop", "text"])
    where = rng.choice(
        [
            rng.randrange(len(data)),
            rng.randrange(min(len(data), 400)),
            len(data) - 1 - rng.randrange(min(len(data), 400)),
        ]
    )
    if kind == "cut":
        data = data[:where]
    elif kind == "empty":
        data = bytearray()
    elif kind == "flip":
        for _ in range(rng.randint(1, 4)):
            near = min(max(where + rng.randint(-20, 20), 0), len(data) - 1)
            data[near] = rng.choice([0, 255, data[near] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    elif kind == "insert":
        data[where:where] = rng.randbytes(rng.randint(1, 30))
    elif kind == "double":
        data = data * 2
    elif kind == "drop":
        del data[where : where + rng.randint(1, 30)]
    else:
        data = bytearray(rng.choice([b"null", b"[]", b"{}", b"<html>no</html>", b"\xff\xfe{\x00}\x00", b"[" * 100_000]))
    file.write_bytes(data)
