"""Compare plain `generate` with the draft, on the bundled pair and on the same pair inflated to a larger shape.

    python benchmarks/run.py                            # everything, about half an hour on two cores
    python benchmarks/run.py --only inflated --shape 1b --budget 8/5/4
    python benchmarks/run.py --only bundled --dtype float32 --count 1 --new-tokens 4      # a quick check

Both sides run on the same prompts one after the other, with the same model, dtype and threads. `dovetail bench` does
the same for one pair of your own. Let nothing else run on the machine meanwhile.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import (
    argument_parser,
    bundled_prompts,
    load_bundled,
    load_inflated,
    parse_budget,
    parse_shape,
    positive,
    store,
)
from tqdm import tqdm

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.compare import Comparison


def compare(
    name: str,
    target: Any,
    draft: DovetailDraft,
    budget: TreeBudget | None,
    *,
    count: int,
    new_tokens: int,
    out: Path,
) -> None:
    """Measure one row of the results.

    Args:
        name: names the pair in the table and the JSON line.
        target: on the CPU.
        draft: attached to the target.
        budget: fixed budget of all rounds. None leaves it to the policy.
        count: number of prompts.
        new_tokens: tokens to generate per prompt.
        out: the JSON line is appended to this file.
    """
    draft.budget = budget
    prompts = bundled_prompts(count)
    comparison = Comparison(target, draft, {"max_new_tokens": new_tokens, "do_sample": False})
    comparison.warm_up(prompts[0])
    for input_ids in tqdm(prompts, desc=name, unit="prompt"):
        comparison.add(input_ids)
    result = comparison.result(
        name=name,
        parameters=target.num_parameters(),
        draft_parameters=draft.num_parameters(),
        dtype=str(target.dtype).removeprefix("torch."),
        budget=str(budget or "policy"),
        **comparison.options,
    )
    print(f"\n{name}, {result.settings['dtype']}, budget {result.settings['budget']}\n{result.table()}\n")
    store(asdict(result), out)


def main() -> None:
    parser = argument_parser(__doc__, "cpu.jsonl")
    add = parser.add_argument
    add("--only", choices=["bundled", "inflated"], default=None, help="run one of the two pairs (default: both)")
    add("--shape", type=parse_shape, default="1b", help="shape of the inflated pair, see inflate.py")
    add("--budget", type=parse_budget, default=None, help="nodes/depth/top_k (default: the policy chooses)")
    add("--count", type=positive, default=None, help="number of prompts (default: 30 bundled, 12 inflated)")
    add("--new-tokens", type=positive, default=None, help="tokens per prompt (default: 128 bundled, 64 inflated)")
    add("--dtype", choices=["float32", "bfloat16"], default=None, help="of the bundled pair (default: both in turn)")
    args = parser.parse_args()
    if args.only != "inflated":
        sizes = dict(count=args.count or 30, new_tokens=args.new_tokens or 128)
        for dtype in [args.dtype] if args.dtype else ["bfloat16", "float32"]:
            compare("bundled pair", *load_bundled(getattr(torch, dtype)), args.budget, **sizes, out=args.out)
    if args.only != "bundled":
        sizes = dict(count=args.count or 12, new_tokens=args.new_tokens or 64)
        pair = load_inflated(args.shape, torch.bfloat16)
        compare(f"inflated pair, {args.shape}", *pair, args.budget, **sizes, out=args.out)


if __name__ == "__main__":
    main()
