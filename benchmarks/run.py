"""The figures of benchmarks/results/: the bundled pair, and the same pair inflated to a big shape.

    python benchmarks/run.py                            # everything, about half an hour on two cores
    python benchmarks/run.py --only inflated --shape 1b --budget 8/5/4

Plain `generate` and the draft run on the same prompts one after the other, same model, dtype and threads
(see `dovetail bench`, which does the same for one pair of your own). Let nothing else run meanwhile.
Tables go to the screen, JSON lines to --out.
"""

import argparse
from pathlib import Path

import torch
from inflate import inflate_pair
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts

PAIR = Path(__file__).parent.parent / "examples" / "tiny_pair"
TARGET, DRAFT = PAIR / "dovetail-tiny-target", PAIR / "dovetail-tiny-draft"


def load_bundled(dtype: torch.dtype):
    """The bundled target and draft, both on the CPU."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype)
    return target, DovetailDraft.from_pretrained(DRAFT, dtype=dtype)


def compare(name, target, draft, budget, *, count, new_tokens, out, **options) -> None:
    """One row of the results: `count` GSM8K test prompts, `new_tokens` tokens each."""
    draft.budget = budget
    prompts = load_prompts(None, AutoTokenizer.from_pretrained(TARGET), count)
    comparison = Comparison(target, draft, {"max_new_tokens": new_tokens, "do_sample": False} | options)
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
    print(f"\n{name}, {result.settings['dtype']}, budget {result.settings['budget']}\n{result.table()}\n", flush=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(result.json_line() + "\n")


def parse_budget(text: str) -> TreeBudget | None:
    """`N/D/K` as in the method, or `policy`.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        return None if text == "policy" else TreeBudget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["bundled", "inflated"], default=None)
    parser.add_argument("--shape", default="1b", help="of the inflated pair, see inflate.py")
    parser.add_argument("--budget", type=parse_budget, default=None, help="nodes/depth/top_k; default: the policy's")
    parser.add_argument("--count", type=int, default=None, help="prompts (default: 30 bundled, 12 inflated)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: both, for the bundled")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.jsonl")
    args = parser.parse_args()
    if args.only != "inflated":
        for dtype in [args.dtype] if args.dtype else ["bfloat16", "float32"]:
            target, draft = load_bundled(getattr(torch, dtype))
            compare("bundled pair", target, draft, args.budget, count=args.count or 30, new_tokens=128, out=args.out)
    if args.only != "bundled":
        target, draft = inflate_pair(*load_bundled(torch.float32), args.shape, dtype=torch.bfloat16)
        name = f"inflated pair, {args.shape}"
        compare(name, target, draft, args.budget, count=args.count or 12, new_tokens=64, out=args.out)


if __name__ == "__main__":
    main()
