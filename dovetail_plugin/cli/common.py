"""Arguments and loading that the subcommands share."""

import argparse
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..modeling import DovetailDraft
from ..tree import TreeBudget


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, examples as they are written."""


@dataclass(frozen=True)
class LoadedPair:
    """A target with its tokenizer and draft."""

    target: PreTrainedModel
    tokenizer: Any
    draft: DovetailDraft


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """--target, --draft and where and how they are loaded."""
    group = parser.add_argument_group("models")
    group.add_argument("--target", required=True, metavar="DIR_OR_ID", help="the model that talks, on the CPU")
    group.add_argument("--draft", required=True, metavar="DIR_OR_ID", help="its Dovetail draft")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of both models; auto: as stored",
    )
    group.add_argument(
        "--draft-device", default="auto", help="cuda, cuda:1, cpu; auto: the GPU if there is one, else the CPU"
    )
    group.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """--nodes, --depth, --top-k: the draft budget."""
    group = parser.add_argument_group("draft budget (default: the draft's own)")
    group.add_argument(
        "--nodes", type=int, default=None, help="rows the target verifies in a round, the last token included"
    )
    group.add_argument("--depth", type=int, default=None, help="levels of the draft tree")
    group.add_argument("--top-k", type=int, default=None, help="nodes grown further on a level; 1 drafts a chain")


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


def load_pair(args: argparse.Namespace) -> LoadedPair:
    """Load target, tokenizer and draft as `add_pair_arguments` says, with the budget asked for."""
    draft = DovetailDraft.from_pretrained(args.draft, dtype=args.dtype, device_map=args.draft_device)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype)
    set_budget(draft, args)
    return LoadedPair(target, AutoTokenizer.from_pretrained(args.target), draft)


def set_budget(draft: DovetailDraft, args: argparse.Namespace) -> None:
    """Replace those parts of the draft's budget that were given."""
    own = draft.budget
    draft.budget = TreeBudget(
        nodes=own.nodes if args.nodes is None else args.nodes,
        depth=own.depth if args.depth is None else args.depth,
        top_k=own.top_k if args.top_k is None else args.top_k,
    )
