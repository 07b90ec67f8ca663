"""`dovetail plan`: what goes where, from configs alone."""

import argparse
import json

import torch

from ..drafts.config import DovetailConfig
from ..planning.count_weights import FLOAT_DTYPES, QUANTISED
from ..planning.draft_config import load_draft_config
from ..planning.known_shapes import SHAPES, load_config
from ..planning.make_plan import format_bytes
from ..policy.device_split import DeviceSplitPolicy
from .common import HelpFormatter

DESCRIPTION = """\
Show where every part of a target and its draft goes and how many bytes it takes. Only configs are read: nothing is
downloaded but a config.json, nothing is loaded, and neither the model nor the GPU has to be here.

The GPU is given to the draft's blocks first, then to its head, its embedding table, and last to as many of the
target's last layers as still fit, with their KV cache. Where the embedding does not fit, its rows are gathered on the
CPU; where the head does not fit, the draft proposes only its most frequent tokens; where nothing helps, the draft runs
on the CPU. The text is the same in every case. A target that does not fit the RAM is refused, with what would help.
"""
EPILOG = """\
examples:
  dovetail plan --target DIR --draft DIR                        # this machine, its GPU and its memory
  dovetail plan --target llama-3.1-8b-shape --vram 4GiB --ram 32GiB
  dovetail plan --target llama-2-13b-shape --vram 2GiB --ram 16GiB --dtype int4 --context 2048
  dovetail plan --target meta-llama/Llama-3.1-8B --draft my-draft --json > plan.json

Sizes are bytes, or numbers with a unit: 4GiB and 4g are 4 * 2**30 bytes, 4GB is 4 * 10**9.
int8 and int4 are weights of an exported target (`dovetail export`).
well-known shapes, for which nothing is downloaded at all:
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show what goes where and what it takes, before loading",
        description=DESCRIPTION,
        epilog=EPILOG + "".join(f"  {name}\n" for name in SHAPES),
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--target", required=True, metavar="ID_OR_CONFIG", help="a directory, config.json, hub id or shape (see below)")
    add("--draft", default=None, metavar="ID_OR_CONFIG", help="of its draft, in any format; default: an untrained one")
    add("--blocks", type=int, default=None, help="decoder blocks of the draft, without --draft (1 where not given)")
    add("--vram", default=None, metavar="SIZE", help="memory of the GPU, 0 for none; default: what is free here")
    add("--ram", default=None, metavar="SIZE", help="memory for the CPU's parts; default: what this machine has")
    add("--dtype", default="auto", choices=["auto", *FLOAT_DTYPES, *QUANTISED], help="of the target; auto: as stored")
    add("--draft-dtype", default="auto", choices=["auto", *FLOAT_DTYPES], help="of the draft; auto: as stored")
    add("--context", type=int, default=4096, help="tokens of prompt and answer to make room for")
    add("--prefill-rows", type=int, default=None, help="`prefill_chunk_size` of generate; default: the whole prompt")
    add("--no-bf16", action="store_true", help="the GPU has no bfloat16 (GTX 10 and 16, RTX 20, T4); default: as here")
    add("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print.

    Raises:
        ValueError: there is no such model, the pair does not fit, or a size is none.
    """
    target = load_config(args.target)
    if args.draft is None:
        draft = DovetailConfig.for_target(target, blocks=1 if args.blocks is None else args.blocks)
    elif args.blocks is not None:
        raise ValueError("--blocks says what to plan for without --draft; leave out one of the two.")
    else:
        draft = load_draft_config(args.draft)
    policy = DeviceSplitPolicy(vram_budget=args.vram, ram_budget=args.ram)
    options = {"gpu_supports_bf16": False} if args.no_bf16 else {}
    if args.vram is not None and not args.no_bf16:
        options["gpu_supports_bf16"] = True  # a GPU that is planned for need not be the one that is here
    plan = policy.plan(
        target,
        draft,
        dtype=args.dtype,
        draft_dtype=args.draft_dtype,
        context=args.context,
        prefill_rows=args.prefill_rows,
        **options,
    )
    plan.notes.extend(_taken_from_here(args, policy))
    print(json.dumps(plan.as_dict()) if args.json else plan.table())
    return 0


def _taken_from_here(args: argparse.Namespace, policy: DeviceSplitPolicy) -> list[str]:
    """What this machine answered where a size was not given."""
    notes = []
    if args.vram is None and not torch.cuda.is_available():
        notes.append("--vram not given: torch finds no GPU here")
    elif args.vram is None:
        free = format_bytes(policy.vram_budget_bytes)
        notes.append(f"--vram not given: {torch.cuda.get_device_name(0)} has {free} free")
    if args.ram is None:
        memory = format_bytes(policy.ram_budget_bytes or 0)
        notes.append(f"--ram not given: this machine has {memory} in all, other programs' share included")
    return notes
