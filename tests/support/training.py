"""Short training runs of a byte-level target, for tests of training and of what it writes."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers import byte_target, byte_tokenizer, chat, write_jsonl
from safetensors.torch import load_file

from dovetail_plugin.training import TrainingConfig, train
from dovetail_plugin.training import loop as loop_module

SIZES = dict(steps=6, batch_size=4, max_length=48, warmup_steps=2, rollout=2, held_out=3, eval_every=3, save_every=2)


def write_files(directory: Path) -> Path:
    """Write a target with its tokenizer, and 16 chats."""
    byte_target().save_pretrained(directory / "target")
    byte_tokenizer().save_pretrained(directory / "target")
    write_jsonl(directory / "chats.jsonl", [{"messages": chat(n)} for n in range(16)])
    return directory


def config_for(files: Path, out: Path, **changes: Any) -> TrainingConfig:
    """A run of 6 steps on these files, with changed fields."""
    sizes = SIZES | {"save_dtype": "float32"} | changes
    return TrainingConfig(str(files / "target"), (files / "chats.jsonl",), out, **sizes)


def command_for(config: TrainingConfig, *more: str) -> list[str]:
    """Arguments of `dovetail` for a config."""
    names = ("steps", "batch_size", "max_length", "warmup_steps", "rollout", "held_out", "eval_every", "save_every")
    options = ["--target", config.target, "--data", *map(str, config.data), "--out", str(config.out)]
    for name in (*names, "save_dtype"):
        options += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return ["train", *options, *more]


class interrupted_after:
    """Within, training is interrupted when this many steps are done. `steps` are the numbers of those that ran."""

    def __init__(self, done: int | None) -> None:
        self.done, self.steps = done, []

    def __enter__(self) -> "interrupted_after":
        self._step = step = loop_module._Run._step

        def counted(run, number):
            if self.done is not None and len(self.steps) == self.done:
                raise KeyboardInterrupt
            self.steps.append(number)
            return step(run, number)

        loop_module._Run._step = counted
        return self

    def __exit__(self, kind, *_: Any) -> bool:
        loop_module._Run._step = self._step
        return kind is KeyboardInterrupt


def write_runs(files: Path, directory: Path) -> Path:
    """Write a finished run of 4 steps to `finished`, and one of 6 steps, interrupted after 3, to `unfinished`."""
    train(config_for(files, directory / "finished", steps=4))
    with interrupted_after(3):
        train(config_for(files, directory / "unfinished"))
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "training.json").read_text())


def history(directory: Path) -> dict[str, Any]:
    return record(directory)["history"]


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
