"""`dovetail train`: train a draft for a target."""

import argparse
import dataclasses
from pathlib import Path

from ..training import TrainingConfig
from ..training import train as train_draft
from ..training.config import DTYPES, FUSIONS, PRECISIONS
from .common import HelpFormatter, check_model

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
    """Declare the subcommand; every option is a field of `TrainingConfig`."""
    parser = commands.add_parser(
        "train",
        help="train a draft for a model",
        description="Train a draft to predict a frozen target's next features.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--target", required=True, metavar="DIR_OR_ID", help="the model the draft is for")
    add("--data", required=True, type=Path, nargs="+", metavar="FILE.jsonl", help="text to train on")
    add("--out", required=True, type=Path, help="directory for the draft")
    add("--resume", action="store_true", help="continue from the last state in --out")
    add("--blocks", type=int, default=1, help="decoder blocks of the draft")
    add("--fusion", choices=FUSIONS, default="dgf", help="how feature and token are mixed")
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--batch-size", type=int, default=16, help="sequences in a step")
    add("--accumulate", type=int, default=1, help="parts a step is cut into, to save memory")
    add("--max-length", type=int, default=1024, help="tokens; longer sequences are cut")
    add("--lr", type=float, default=1e-3, help="peak learning rate, cosine schedule")
    add("--warmup-steps", type=int, default=100, help="steps of rising learning rate")
    add("--clip", type=float, default=0.5, help="largest gradient norm")
    add("--feature-noise", type=float, default=0.1, help="uniform noise on input features, in units of their RMS")
    add("--ce-weight", type=float, default=0.5, help="weight of the soft cross-entropy beside SmoothL1")
    add("--rollout", type=int, default=3, help="passes; from the second on the draft reads its own predictions")
    add("--held-out", type=int, default=32, help="sequences kept for the acceptance estimate")
    add("--eval-every", type=int, default=200, help="steps between estimates")
    add("--save-every", type=int, default=500, help="steps between states to resume from")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the target while training")
    add("--save-dtype", choices=DTYPES, default="bfloat16", help="of the stored draft")
    add("--mixed-precision", choices=PRECISIONS, default="no", help="of the draft's passes")
    add("--cache-features", type=Path, default=None, metavar="DIR", help="compute target features once, keep them here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and say where the draft is."""
    check_model("--target", args.target)
    names = {f.name for f in dataclasses.fields(TrainingConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    config = TrainingConfig(**(values | {"data": tuple(args.data)}))
    train_draft(config, resume=args.resume)
    print(f"draft saved to {config.out}")
    return 0
