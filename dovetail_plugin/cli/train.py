"""`dovetail train`: trains a draft for a target. Options, types, defaults and help come from `TrainingConfig`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from ..training.config import TrainingConfig
from .common import (
    HelpFormatter,
    add_hub_arguments,
    add_target_argument,
    add_trust_argument,
    hub_options,
    model_name,
    number,
    whole_number,
)

EPILOG = """\
examples:
  dovetail train --target DIR --data chats.jsonl --out my-draft
  dovetail train --target DIR --data chats.jsonl --out my-draft --blocks 3 --mixed-precision bf16
  dovetail train --target DIR --data chats.jsonl --out my-draft --resume          # after an interruption
  accelerate launch -m dovetail_plugin train --target DIR --data chats.jsonl --out my-draft   # several GPUs

Each line of the data is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. Text that
the target wrote itself gives the best draft. The draft learns only where the assistant speaks.
held_out_acceptance in the progress bar estimates the tokens that one verification of a greedy chain gives.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand; what is not about the output or the hub is a field of `TrainingConfig`."""
    parser = commands.add_parser(
        "train",
        usage="dovetail train --target DIR_OR_ID --data FILE.jsonl [FILE.jsonl ...] --out DIR [options]",
        description="Train a draft to predict the next features of a frozen target.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(TrainingConfig)}
    add_target_argument(parser, required=True, help=helps["target"])
    parser.add_argument("--data", required=True, type=Path, nargs="+", metavar="FILE.jsonl", help=helps["data"])
    parser.add_argument("--out", "-o", required=True, type=Path, metavar="DIR", help=helps["out"])
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its last state, or from its draft if it is finished and --steps is larger",
    )
    parser.add_argument(
        "--overwrite-output-dir", action="store_true", help="start again although --out holds a run, and replace it"
    )
    hints = get_type_hints(TrainingConfig)
    for field in dataclasses.fields(TrainingConfig):
        if field.default is dataclasses.MISSING:
            continue
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            option, default=field.default, help=helps[field.name], **_how_to_read(field, hints[field.name])
        )
    revisions = {"--revision": "target", "--draft-revision": "draft of --init-from"}
    add_trust_argument(add_hub_arguments(parser, revisions))
    parser.set_defaults(run=run)


def _how_to_read(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field, by its type. `TrainingConfig` checks the ranges."""
    if "choices" in field.metadata:
        return {"choices": field.metadata["choices"]}
    if hint is int:
        return {"type": whole_number(0, field.metadata.get("most")), "metavar": "N"}
    if hint is float:
        return {"type": number(0), "metavar": "X"}
    if hint == str | None:
        return {"type": model_name, "metavar": "DIR_OR_ID"}
    return {"type": Path, "metavar": "DIR"}


def run(args: argparse.Namespace) -> int:
    """Train, and print where the draft is.

    Raises:
        ValueError: a setting is out of range, or target or data cannot be read.
    """
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    config = TrainingConfig(**(values | {"data": tuple(args.data)}))

    from ..targets.gguf import is_gguf
    from ..training.output import look
    from .loading import check_model, check_target, read_config, target_source

    before = look(config, resume=args.resume, overwrite=args.overwrite_output_dir)
    if before.progress is not None and before.is_finished(config.steps):
        print(f"{config.out} is finished: {before.progress.step} steps are done. Nothing to do.")
        return 0
    if is_gguf(args.target):
        raise ValueError(
            f"--target {args.target}: drafts are trained with a target that has floats. Give the directory of the "
            "model that the file was made from. The draft then fits the file, too."
        )
    check_target(args)
    from_hub = hub_options(args, args.draft_revision)
    if args.init_from is not None:
        check_model("--init-from", args.init_from, read_config, **from_hub)
    from ..training.loop import train

    train(
        config,
        resume=args.resume,
        overwrite_output_dir=args.overwrite_output_dir,
        target_options=target_source(args),
        draft_options=from_hub,
    )
    print(f"draft saved to {config.out}")
    return 0
