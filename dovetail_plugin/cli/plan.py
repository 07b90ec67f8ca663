"""`dovetail plan`: shows what goes where, from configs alone."""

import argparse
import json
from typing import TYPE_CHECKING

from ..planning.device_plan import format_bytes
from ..planning.known_shapes import SHAPES
from .common import (
    FLOAT_DTYPES,
    MOST_BLOCKS,
    HelpFormatter,
    add_hub_arguments,
    add_target_argument,
    hub_options,
    model_name,
    size,
    whole_number,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..policy.device_split import DeviceSplitPolicy

EXPORTED_DTYPES = ("int8", "int4")

MOST_ROWS = 2**30
"""More tokens than the context of any model."""

DESCRIPTION = """\
Show where every part of a target and its draft goes and how many bytes it takes. Only configs are read: nothing is
downloaded except a config.json, nothing is loaded, and neither the model nor the GPU has to be on this machine.

The draft's blocks get GPU memory first, then its head, then its embedding table, and last as many of the target's last
layers as still fit, with their KV cache. If the embedding table does not fit, its rows are gathered on the CPU. If the
head does not fit, the draft proposes only its most frequent tokens. If not even that fits, the draft runs on the CPU.
The text is the same in every case. A target that does not fit in RAM is refused, with what would help.
"""
EPILOG = """\
examples:
  dovetail plan --target DIR --draft DIR                        # this machine, its GPU and its memory
  dovetail plan --target llama-3.1-8b-shape --vram 4GiB --ram 32GiB
  dovetail plan --target llama-2-13b-shape --vram 2GiB --ram 16GiB --dtype int4 --context 2048
  dovetail plan --target meta-llama/Llama-3.1-8B --draft my-draft --json > plan.json

A size is a number with a unit: 4GiB and 4g are 4 * 2**30 bytes, 4GB is 4 * 10**9.
int8 and int4 are weights of an exported target (`dovetail export`).
well-known shapes, for which nothing is downloaded at all:
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show what goes where and how much memory it takes, before loading",
        description=DESCRIPTION,
        epilog=EPILOG + "".join(f"  {name}\n" for name in SHAPES),
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add_target_argument(
        parser,
        required=True,
        help="the target model: its directory, config.json, GGUF file, hub id or shape (see below)",
    )
    add(
        "--draft",
        "--draft-model",
        "--assistant-model",
        "-md",
        type=model_name,
        metavar="DIR_OR_ID",
        help="the draft: the directory, config.json or hub id of a draft in any format, or `lookup`; default: an "
        "untrained draft",
    )
    add(
        "--blocks",
        type=whole_number(1, MOST_BLOCKS),
        metavar="N",
        help=f"decoder blocks of the untrained draft, 1 to {MOST_BLOCKS}; default: 1",
    )
    add("--vram", type=size, metavar="SIZE", help="GPU memory, 0 for no GPU; default: what is free on this machine")
    add("--ram", type=size, metavar="SIZE", help="memory for parts on the CPU; default: all that this machine has")
    add(
        "--dtype",
        default="auto",
        choices=["auto", *FLOAT_DTYPES, *EXPORTED_DTYPES],
        help="data type of the target; auto keeps the one that is stored",
    )
    add(
        "--draft-dtype",
        default="auto",
        choices=["auto", *FLOAT_DTYPES],
        help="data type of the draft; auto keeps the one that is stored",
    )
    add(
        "--context",
        type=whole_number(1, MOST_ROWS),
        default=4096,
        metavar="N",
        help="tokens of prompt and answer to make room for",
    )
    add(
        "--prefill-rows",
        type=whole_number(1, MOST_ROWS),
        metavar="N",
        help="prompt tokens per pass (`prefill_chunk_size` of generate); default: the whole prompt",
    )
    add(
        "--no-bf16",
        action="store_true",
        help="plan for a GPU that does not compute in bfloat16 (GTX 10 and 16, RTX 20, T4); default: the GPU of this "
        "machine is asked, and with --vram bfloat16 is assumed to work",
    )
    add("--json", action="store_true", help="print the plan as JSON")
    add_hub_arguments(parser, revisions={"--revision": "target", "--draft-revision": "draft"})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print.

    Raises:
        ValueError: a model does not exist, the pair does not fit, or an option is out of range.
    """
    from ..drafts.config import DovetailConfig
    from ..drafts.known_pairs import LOOKUP
    from ..planning.draft_config import load_draft_config
    from ..planning.known_shapes import load_config
    from ..policy.device_split import DeviceSplitPolicy

    policy = DeviceSplitPolicy(vram_budget=args.vram, ram_budget=args.ram)
    if args.blocks is not None and args.draft is not None:
        raise ValueError(
            "--blocks describes the untrained draft that is planned for without --draft; use one of the two."
        )
    target = load_config(args.target, **hub_options(args, args.revision))
    draft: PretrainedConfig | str = LOOKUP
    if args.draft is None:
        draft = DovetailConfig.for_target(target, blocks=args.blocks or 1)
    elif args.draft != LOOKUP:
        draft = load_draft_config(args.draft, **hub_options(args, args.draft_revision))
    options = {"gpu_supports_bf16": False} if args.no_bf16 else {}
    if args.vram is not None and not args.no_bf16:
        options["gpu_supports_bf16"] = True  # the plan may be for another GPU than the one on this machine
    plan = policy.plan(
        target,
        draft,
        dtype=args.dtype,
        draft_dtype=args.draft_dtype,
        context=args.context,
        prefill_rows=args.prefill_rows,
        **options,
    )
    plan.notes.extend(_defaults(args, policy))
    print(json.dumps(plan.as_dict()) if args.json else plan.table())
    return 0


def _defaults(args: argparse.Namespace, policy: "DeviceSplitPolicy") -> list[str]:
    """Say what this machine has, for sizes that were not given."""
    import torch

    notes = []
    if args.vram is None and not torch.cuda.is_available():
        notes.append("--vram not given: torch finds no GPU on this machine")
    elif args.vram is None:
        free = format_bytes(policy.vram_budget_bytes)
        notes.append(f"--vram not given: {torch.cuda.get_device_name(0)} has {free} free")
    if args.ram is None:
        memory = format_bytes(policy.ram_budget_bytes or 0)
        notes.append(f"--ram not given: this machine has {memory} in total, shared with other programs")
    return notes
