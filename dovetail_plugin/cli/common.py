"""Arguments and loading that the subcommands share."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..drafts import known_pairs
from ..drafts.base import Draft
from ..drafts.checkpoints.read import read_config
from ..drafts.known_pairs import LOOKUP, draft_name_for
from ..drafts.model import DovetailDraft
from ..planning.apply import apply_plan
from ..planning.device_plan import parse_budget
from ..policy.device_split import DeviceSplitPolicy
from ..tree import TreeBudget


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help where there are any, examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


@dataclass(frozen=True)
class LoadedPair:
    """A target, in torch or exported, with its tokenizer and draft."""

    target: Any
    tokenizer: Any
    draft: Draft


def add_pair_arguments(parser: argparse.ArgumentParser, *, draft_required: bool = True) -> None:
    """--target, --draft and where and how they are loaded."""
    group = parser.add_argument_group("models")
    targets = group.add_mutually_exclusive_group(required=True)
    targets.add_argument("--target", metavar="DIR_OR_ID", help="the model that talks, on the CPU")
    targets.add_argument(
        "--target-ir", metavar="DIR_OR_ID", help="the same, exported to OpenVINO or ONNX (`dovetail export`)"
    )
    group.add_argument(
        "--draft",
        required=draft_required,
        metavar="DIR_OR_ID",
        help="its draft: Dovetail's, the paper's, EAGLE-1 to 3, speculators', a small model of the same tokenizer, or "
        "the word lookup; default, where it may be left out: the one that is known for the target, else lookup",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of both models (of the draft, with --target-ir); auto: as stored",
    )
    group.add_argument(
        "--draft-device", default="auto", help="cuda, cuda:1, cpu; auto: the GPU if there is one, else the CPU"
    )
    group.add_argument(
        "--vram",
        default=None,
        metavar="SIZE",
        help="place both models by a plan for this much GPU memory, e.g. 4GiB (see `dovetail plan`); what the draft "
        "leaves free holds layers of the target",
    )
    group.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """--nodes, --depth, --top-k: a draft budget instead of the policy's."""
    default = TreeBudget()
    group = parser.add_argument_group(
        "draft budget",
        "By default every round drafts what pays on this machine. With one of these, all rounds draft the same.",
    )
    for option, value, text in (
        ("--nodes", default.nodes, "rows the target verifies in a round, the last token included"),
        ("--depth", default.depth, "levels of the draft tree"),
        ("--top-k", default.top_k, "nodes grown further on a level; 1 drafts a chain"),
    ):
        group.add_argument(option, type=int, default=None, help=f"{text} ({value} where another one is given)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate` that people change most."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most")
    group.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--temperature", type=float, default=1.0, help="with --do-sample")
    group.add_argument("--top-p", type=float, default=1.0, help="with --do-sample")
    group.add_argument("--seed", type=int, default=0, help="with --do-sample; both sides use the same")


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `generate` from `add_sampling_arguments`."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    if args.do_sample:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    return options


def check_model(option: str, name: str, read: Callable[[str], Any] = AutoConfig.from_pretrained) -> Any:
    """The config of a model that is about to be loaded.

    Args:
        read: reads it; drafts of other projects have configs that transformers takes for whole models.

    Raises:
        ValueError: there is no such model; says which option named it.
    """
    try:
        return read(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{option} {name}: no such directory, and no hub model of that name within reach.") from error


def load_pair(args: argparse.Namespace) -> LoadedPair:
    """Load target, tokenizer and draft as `add_pair_arguments` says, with the budget asked for.

    Raises:
        ValueError: a model is not there, --draft is no draft, or the device is missing.
    """
    name = check_target(args)
    draft = load_draft(args)
    target = load_target(args)
    set_budget(draft, args)
    if args.vram is not None:
        place_by_plan(args, target, draft)
    return LoadedPair(target, AutoTokenizer.from_pretrained(name), draft)


def place_by_plan(args: argparse.Namespace, target: Any, draft: Draft) -> None:
    """Carry out the plan for `--vram`, and say what it is.

    Raises:
        ValueError: the size is none, the models do not fit it, or there is no GPU.
    """
    if not isinstance(draft, DovetailDraft):
        raise ValueError(f"--vram plans for drafts that read features, not for a {type(draft).__name__}.")
    if args.draft_device != "auto":
        raise ValueError("--vram plans where the draft goes; leave out --draft-device.")
    if parse_budget(args.vram) and not torch.cuda.is_available():
        raise ValueError(f"--vram {args.vram}: torch finds no CUDA device; give 0, or plan with `dovetail plan`.")
    draft.policy = DeviceSplitPolicy(vram_budget=args.vram)
    weights = {} if args.target_ir is None else {"dtype": "int8"}  # an exported target is not split, whatever it is
    plan = draft.policy.plan(target.config, draft.config, **weights)
    apply_plan(plan, target, draft)
    print(plan.table(), file=sys.stderr)


def check_target(args: argparse.Namespace) -> str:
    """The target's name, under --target or --target-ir.

    Raises:
        ValueError: there is no such model.
    """
    name = args.target or args.target_ir
    check_model("--target" if args.target else "--target-ir", name)
    return name


def load_target(args: argparse.Namespace) -> Any:
    """The target, in torch or exported."""
    if args.target_ir:
        from dovetail_plugin.adapters import load_exported

        return load_exported(args.target_ir, threads=args.threads)
    return AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype)


def load_draft(args: argparse.Namespace) -> Draft:
    """The draft that was named, or the one that is known for the target; says on stderr which that is.

    Raises:
        ValueError: --draft is not there or is none, or the device is missing.
    """
    check_device(args)
    options = {"dtype": args.dtype, "device_map": args.draft_device}
    if args.draft is not None:
        if args.draft != LOOKUP:
            check_model("--draft", args.draft, read_config)
        return known_pairs.load_draft(args.draft, **options)
    name, why = draft_name_for(AutoConfig.from_pretrained(args.target or args.target_ir))
    print(f"--draft not given: taking {name} ({why})", file=sys.stderr)
    try:
        return known_pairs.load_draft(name, **options)
    except OSError as error:
        print(f"{name} cannot be loaded, looking up the text instead: {error}", file=sys.stderr)
        return known_pairs.load_draft(LOOKUP)


def check_device(args: argparse.Namespace) -> None:
    """Refuse a --draft-device that is not there, with ValueError."""
    if args.draft_device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--draft-device {args.draft_device}: torch finds no CUDA device; give cpu or auto.")


def set_budget(draft: Draft, args: argparse.Namespace) -> None:
    """Fix the draft's budget if a part of it was given."""
    given = {name: getattr(args, name) for name in ("nodes", "depth", "top_k") if getattr(args, name) is not None}
    draft.budget = TreeBudget(**given) if given else None
