"""The output directory of a training run: what is in it before, and what is written when the run is finished.

`look` says before any work how far a run in the directory is, and refuses a directory that must not be changed. `save`
writes the draft with its token order, model card, tokenizer, `training.json` and `loss.png`, all of it or nothing.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..bench.provenance import versions
from ..drafts.card import CARD, model_card
from ..drafts.checkpoints.claims import load_tokenizer
from ..drafts.checkpoints.files import read_json
from ..drafts.model import DovetailDraft
from ..drafts.saving import is_part_of_draft, refuse_other_checkpoint
from ..errors import InputError, OccupiedError
from ..files import refuse_unwritable, whole_directory
from .config import TrainingConfig
from .state import History, Progress, own_state, read_progress

RECORD = "training.json"
"""File with config, history, data and versions; it is there when a run is finished."""


@dataclass(frozen=True)
class Before:
    """Content of an output directory before a run.

    Attributes:
        progress: of the run that is continued, None for a new one.
        state: the folder with its state; None if the run is finished, or new.
    """

    progress: Progress | None = None
    state: Path | None = None

    def is_finished(self, steps: int) -> bool:
        """Return whether a run of this many steps has nothing left to do."""
        return self.progress is not None and self.state is None and self.progress.step >= steps


def look(config: TrainingConfig, *, resume: bool, overwrite: bool) -> Before:
    """Look into the output directory, before any work.

    Args:
        config: settings of the run.
        resume: whether the run may continue what is there.
        overwrite: whether it may replace what an earlier run has left there.

    Raises:
        OccupiedError: it holds an earlier run and may not be used, or something of somebody else under a name that
            training uses.
        InputError: the run there has other settings, or its files are damaged.
        WriteError: nothing can be written there.
    """
    if resume and overwrite:
        raise InputError("resume continues a run and overwrite_output_dir replaces it. Choose one of them.")
    out = config.out
    if out.exists() and not out.is_dir():
        raise OccupiedError(f"--out {out} is a file. Name a directory.")
    refuse_other_checkpoint(out)
    state = own_state(out)
    if resume:
        before = _unfinished(state) or _finished(out) or Before()
        if before.progress is not None:
            _check_settings(config, before.progress, state or out / RECORD)
        if not before.is_finished(config.steps):
            refuse_unwritable(out)
        return before
    if not overwrite and (state is not None or (out / RECORD).exists() or (out / "config.json").exists()):
        what = "the state of an unfinished run" if state is not None else "a draft"
        raise OccupiedError(
            f"{out} holds {what}. Use --resume to continue, --overwrite-output-dir to start again and replace it, or "
            "another --out."
        )
    refuse_unwritable(out)
    return Before()


def _unfinished(state: Path | None) -> Before | None:
    progress = None if state is None else read_progress(state)
    return None if progress is None else Before(progress, state)


def _finished(out: Path) -> Before | None:
    file = out / RECORD
    if not file.exists():
        return None
    content = read_json(str(file), str(file), most_bytes=2**30)
    steps = content["history"].get("steps") if isinstance(content.get("history"), dict) else None
    done = len(steps) if isinstance(steps, list) else 0
    key, seconds = content.get("key"), content.get("seconds")
    if not isinstance(key, dict) or not isinstance(seconds, (int, float)):
        raise InputError(
            f"{file} does not say what the draft was trained on, as that of an earlier version. Use --init-from {out} "
            "with another --out."
        )
    return Before(Progress(done, key, History.from_dict(content.get("history"), done, str(file)), float(seconds)))


MAY_CHANGE = ("target", "data", "out", "steps", "eval_every", "save_every", "save_dtype", "cache_features")
"""Config fields that may differ in a resumed run. Data and target are compared by content instead."""


def settings_key(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that must be equal in a resumed run, as JSON holds them, without directories."""
    left_out = (*MAY_CHANGE, "blocks", "fusion") if config.init_from else MAY_CHANGE  # those are the draft's
    values = {name: value for name, value in asdict(config).items() if name not in left_out}
    return values | {"init_from": None if config.init_from is None else Path(config.init_from).name}


def check_key(key: dict[str, Any], progress: Progress, place: Path) -> None:
    """Refuse to continue a run with other values.

    Raises:
        InputError: names the values that differ.
    """
    saved = progress.key
    changed = [f"{name} was {saved.get(name)} and is {key[name]}" for name in key if saved.get(name) != key[name]]
    if changed:
        raise InputError(
            f"cannot resume from {place}: {', '.join(changed)}. Use the same values, or start again without --resume."
        )


def _check_settings(config: TrainingConfig, progress: Progress, place: Path) -> None:
    check_key(settings_key(config), progress, place)
    if progress.step > config.steps and place.name != RECORD:
        raise InputError(f"cannot resume from {place}: {progress.step} steps are done, and steps is {config.steps}.")


def describe_data(config: TrainingConfig) -> list[dict[str, Any]]:
    """Return name and size in bytes of each data file, for the record."""
    return [{"file": file.name, "bytes": file.stat().st_size} for file in config.data]


def save(
    config: TrainingConfig,
    draft: DovetailDraft,
    progress: Progress,
    data: list[dict[str, Any]],
    target_options: Mapping[str, Any],
) -> None:
    """Write the draft, its token order and card, the tokenizer, config, history and loss plot to `config.out`.

    Args:
        config: settings of the run.
        draft: is converted to `config.save_dtype`.
        progress: of the finished run.
        data: from `describe_data`.
        target_options: arguments of `from_pretrained` for the target's tokenizer.

    Raises:
        WriteError: they cannot be written. What was there is unchanged, and the run can be resumed.
    """
    draft.to(getattr(torch, config.save_dtype))
    numbers = {k: v for k, v in asdict(config).items() if not isinstance(v, (Path, tuple)) and k != "init_from"}
    numbers |= {"target": draft.config.target_name_or_path, "revision": target_options.get("revision")}
    numbers |= {"init_from": progress.key["init_from"]}
    record = {
        "config": numbers,
        "data": data,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(progress.seconds, 3),
        "versions": versions(),
        "key": progress.key,
        "history": asdict(progress.history),
    }
    with whole_directory(config.out, last=RECORD, replaces=is_part_of_draft, keeps=[CARD]) as part:
        (part / CARD).write_text(model_card(draft.config, made=_made(progress)), encoding="utf-8")
        draft.save_pretrained(part)
        load_tokenizer(config.target, **target_options).save_pretrained(part)
        (part / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        plot_history(progress.history, part / "loss.png")


def _made(progress: Progress) -> str:
    """Say in a model card how the draft was made."""
    made = f"It was trained with `dovetail train` in {progress.step} steps"
    if progress.history.acceptance:
        made += (
            f", and its held-out acceptance length is {progress.history.acceptance[-1]:.2f} tokens in greedy chains of "
            f"{progress.key['rollout']}"
        )
    return f"{made}. `{RECORD}` has all settings and losses."


def plot_history(history: History, file: Path) -> None:
    """Plot loss and held-out acceptance over steps as a PNG. Without matplotlib only a note is printed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write("The loss plot was skipped. To get one, run: pip install '.[train]' in a checkout.")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(len(history.losses) // 100, 1)
    losses = torch.tensor(history.losses)[: len(history.losses) // window * window].view(-1, window).mean(1)
    axes.plot(history.steps[window - 1 :: window][: len(losses)], losses.tolist(), color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color="tab:blue")
    right = axes.twinx()
    right.plot(history.eval_steps, history.acceptance, color="tab:orange", marker="o", markersize=3)
    right.set_ylabel("held-out acceptance length (greedy chain)", color="tab:orange")
    figure.savefig(file, dpi=120)
