"""The state that a training run resumes from: the draft, its optimizer, and how far the run is.

The folder `resume` of the output directory holds a README, `progress.json` and the safetensors file that it names, with
its checksum. Nothing is pickled, so reading a state runs no code. The learning rate, the order of the data and the
noise depend only on the number of the step, so they are not stored. A folder without the README belongs to somebody
else: it is refused, and never deleted.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..drafts.checkpoints.files import look_into_safetensors, read_json, read_safetensors
from ..errors import InputError, MissingFileError, OccupiedError
from ..files import PART, whole_directory, whole_file, write_text

STATE = "resume"
"""Folder in the output directory that holds the state to resume from."""

README = "README.txt"
README_TEXT = (
    "State of an unfinished run of `dovetail train`; --resume continues from it.\n"
    "It is replaced while the run goes on, and deleted when it is finished.\n"
)
PROGRESS = "progress.json"
AGAIN = "Delete the folder and start again without --resume."


@dataclass
class History:
    """Losses and estimates of a run. They are stored with the checkpoint and plotted.

    Attributes:
        steps: numbers of the steps, from 1.
        losses: training loss of each step.
        eval_steps: steps after which acceptance was estimated.
        acceptance: estimated acceptance length of each of these steps.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)

    @classmethod
    def from_dict(cls, stored: Any, done: int, what: str) -> "History":
        """Read the history of `done` steps.

        Raises:
            InputError: it is not one; `what` names the file.
        """
        names = ("steps", "losses", "eval_steps", "acceptance")
        if not isinstance(stored, dict) or set(stored) != set(names):
            raise InputError(f"{what} has no history of a run. {AGAIN}")
        lists = [stored[name] for name in names]
        if not all(isinstance(values, list) and all(_is_number(value) for value in values) for values in lists):
            raise InputError(f"{what}: its history has values that are not numbers. {AGAIN}")
        steps, losses, eval_steps, acceptance = lists
        if steps != list(range(1, done + 1)) or len(losses) != done or len(eval_steps) != len(acceptance):
            raise InputError(f"{what}: its history does not have {done} steps. {AGAIN}")
        return cls(*lists)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: number of steps that are done.
        key: values that a resumed run must have; see `changed`.
        history: of these steps.
        seconds: that the run has taken.
    """

    step: int
    key: dict[str, Any]
    history: History
    seconds: float


def own_state(out: Path) -> Path | None:
    """Return the folder with the state of an unfinished run in an output directory; None if there is none.

    Raises:
        OccupiedError: there is something else under its name.
    """
    directory = out / STATE
    if directory.is_symlink() or not directory.is_dir():
        if os.path.lexists(directory):
            raise OccupiedError(
                f"{directory} is a file or a link, and training keeps its state there. Move it, or change --out."
            )
        return None
    try:
        own = (directory / README).read_text(encoding="utf-8") == README_TEXT
    except (OSError, ValueError):
        own = False
    if not own:
        raise OccupiedError(
            f"{directory} is not a state that this version of `dovetail train` has written, so it is neither read nor "
            "replaced. Move it, or use another --out."
        )
    return directory


def save_state(out: Path, progress: Progress, draft: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save the state of a run. It replaces the previous state once it is complete.

    Raises:
        WriteError: it cannot be written; the previous state is unchanged.
        OccupiedError: see `own_state`.
    """
    directory = own_state(out)
    if directory is None:
        directory = out / STATE
        with whole_directory(directory) as part:
            (part / README).write_text(README_TEXT, encoding="utf-8")
    file = directory / f"state-{progress.step:08d}.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(draft, optimizer)}
    with whole_file(file) as part:
        save_file(tensors, part)
        checksum = _checksum(part)
    body = asdict(progress) | {"file": file.name, "sha256": checksum}
    write_text(directory / PROGRESS, json.dumps({"progress": body, "sha256": _digest(body)}))
    for other in _state_files(directory):
        if other not in (file, directory / PROGRESS, directory / README):
            other.unlink()


def read_progress(directory: Path) -> Progress | None:
    """Read how far a run is; None if it was ended before its first state was complete.

    Raises:
        InputError: the file is damaged.
    """
    body = _read_body(directory)
    if body is None:
        return None
    what = str(directory / PROGRESS)
    return Progress(body["step"], body["key"], History.from_dict(body["history"], body["step"], what), body["seconds"])


def load_state(directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore draft and optimizer.

    Raises:
        InputError: a file is damaged, or does not fit the draft. Neither has changed.
        MissingFileError: the file with the tensors is missing.
    """
    body = _read_body(directory)
    assert body is not None, "read_progress has found it"
    file = directory / body["file"]
    if not file.is_file():
        raise MissingFileError(f"{file} is missing, and {directory / PROGRESS} names it. {AGAIN}")
    if _checksum(file) != body["sha256"]:
        raise InputError(f"{file} is damaged: its checksum is not that of {PROGRESS}. {AGAIN}")
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in look_into_safetensors(str(file)).items()}
    weights = draft.state_dict()
    wanted = {f"draft.{name}": (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        wanted |= {f"optimizer.{number}.{name}": (parameter.shape, parameter.dtype) for name in MOMENTS}
        wanted[f"optimizer.{number}.step"] = (torch.Size([]), torch.float32)
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise InputError(f"{file} does not fit the draft of this run: {', '.join(names[:4])} differ. {AGAIN}")
    tensors = read_safetensors(str(file))
    draft.load_state_dict({name: tensors[f"draft.{name}"] for name in weights})
    state = {
        number: {name: tensors[f"optimizer.{number}.{name}"] for name in (*MOMENTS, "step")}
        for number in range(len(parameters))
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors that AdamW keeps for each parameter, of the parameter's shape; it also keeps its number of steps."""


def remove_state(out: Path) -> None:
    """Delete the files of the state, and their folder unless something else is in it."""
    directory = own_state(out)
    if directory is None:
        return
    for file in _state_files(directory):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        directory.rmdir()


def _state_files(directory: Path) -> list[Path]:
    """Paths of the files that belong to states, the README last; also those that a kill left unfinished."""
    states = (file for pattern in ("state-*.safetensors", f"{PART}*") for file in directory.glob(pattern))
    return [*(file for file in states if file.is_file()), directory / PROGRESS, directory / README]


def _tensors(draft: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"draft.{name}", tensor) for name, tensor in draft.state_dict().items())
    for number, values in optimizer.state_dict()["state"].items():
        yield from ((f"optimizer.{number}.{name}", torch.as_tensor(values[name])) for name in (*MOMENTS, "step"))


def _read_body(directory: Path) -> dict[str, Any] | None:
    file = directory / PROGRESS
    if not file.exists():
        return None
    content = read_json(str(file), str(file), most_bytes=MOST_PROGRESS_BYTES)
    body = content.get("progress")
    if not isinstance(body, dict) or content.get("sha256") != _digest(body):
        raise InputError(f"{file} is damaged: its checksum is not that of its content. {AGAIN}")
    good = (
        isinstance(body.get("step"), int)
        and isinstance(body.get("key"), dict)
        and _is_number(body.get("seconds"))
        and isinstance(body.get("sha256"), str)
        and body.get("file") == f"state-{body['step']:08d}.safetensors"
    )
    if not good:
        raise InputError(f"{file} does not describe the state of a run. {AGAIN}")
    return body


MOST_PROGRESS_BYTES = 2**30
"""The history has some dozen bytes for each step."""


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        hashed = hashlib.sha256()
        while block := opened.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
