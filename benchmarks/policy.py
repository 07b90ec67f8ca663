"""The policy against every static budget of a grid, and what a useless draft costs.

    python benchmarks/policy.py                                  # bundled pair, greedy
    python benchmarks/policy.py --shape 500m --dtype bfloat16 --temperature 0.7
    python benchmarks/policy.py --busy                           # another process takes a core half-way

First every budget of the grid runs on some prompts. Then the best few and the policy run on other prompts, in turns
prompt by prompt, so that neither a lucky budget nor a slow minute decides. tokens/s is all tokens over all seconds of
whole calls of `generate`. At the end the policy meets a draft with random weights and plain `generate`. Let nothing
else run. Tables go to the screen, one JSON line to --out.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import TARGET, load_bundled, store
from inflate import inflate_pair
from tqdm import tqdm
from transformers import AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.compare import Comparison, Run, timed_generate
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.policy.device_split import DeviceSplitPolicy

CHAINS = [TreeBudget(depth + 1, depth, 1) for depth in range(1, 9)]
TREES = [
    TreeBudget(nodes, depth, top_k)
    for nodes in (4, 8, 16, 32)
    for depth in (1, 2, 3, 4, 6, 8)
    for top_k in (4, 8)
    if depth + 1 < nodes <= 1 + top_k + top_k**2 * (depth - 1)
]
GRID = [TreeBudget(1, 1, 1), *CHAINS, *TREES]
POLICY = "policy"


@contextmanager
def busy_core():
    """Another process computes on the first processor while this is open."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    while True:
        pass


def run_all(target, draft, budgets, prompts, options, *, first_seed: int, label: str) -> dict[str, list[Run]]:
    """Every budget on every prompt, prompt by prompt; equal seeds for all budgets of a prompt."""
    runs: dict[str, list[Run]] = {str(budget or POLICY): [] for budget in budgets}
    for number, input_ids in enumerate(tqdm(prompts, desc=label, unit="prompt")):
        turn = number % len(budgets)
        for budget in [*budgets[turn:], *budgets[:turn]]:
            torch.manual_seed(first_seed + number)
            draft.budget = budget
            run = timed_generate(target, input_ids, **options, assistant_model=draft)
            runs[str(budget or POLICY)].append(run)
            if budget is None:
                rounds = draft.report.rounds
                PREDICTIONS.extend((r.predicted_s, r.total_s) for r in rounds)
    return runs


PREDICTIONS: list[tuple[float, float]] = []
"""(predicted, measured) seconds of every round that the policy chose."""


def tokens_per_s(runs: list[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def compare(args, target, draft, tokenizer, options) -> dict[str, Any]:
    """Grid, then finalists and policy."""
    prompts = load_prompts(None, tokenizer, args.grid_prompts + args.prompts)
    grid_prompts, prompts = prompts[: args.grid_prompts], prompts[args.grid_prompts :]
    for budget in (None, *GRID[::5]):  # warm up, and measure the machine
        draft.budget = budget
        timed_generate(target, grid_prompts[0], **(options | {"max_new_tokens": 8}), assistant_model=draft)
    grid = run_all(target, draft, GRID, grid_prompts, options, first_seed=0, label="grid")
    ranked = sorted(grid, key=lambda name: -tokens_per_s(grid[name]))
    finalists = [TreeBudget.parse(name) for name in ranked[: args.finalists]]
    half = len(prompts) // 2 if args.busy else 0
    seconds = {
        "free": run_all(target, draft, [None, *finalists], prompts[half:], options, first_seed=100, label="best")
    }
    if args.busy:
        with busy_core():
            seconds["busy"] = run_all(
                target, draft, [None, *finalists], prompts[:half], options, first_seed=500, label="busy core"
            )
    result: dict[str, Any] = {"grid": {name: tokens_per_s(grid[name]) for name in ranked}}
    for when, runs in seconds.items():
        speeds = {name: tokens_per_s(own) for name, own in runs.items()}
        best = max((name for name in speeds if name != POLICY), key=speeds.__getitem__)
        result[when] = {"tokens_per_s": speeds, "best": best, "ratio": speeds[POLICY] / speeds[best]}
    errors = [abs(predicted / measured - 1) for predicted, measured in PREDICTIONS]
    return result | {"prediction_error": statistics.median(errors), "rounds": len(errors)}


def useless(target, tokenizer, options, count: int) -> dict[str, float]:
    """A draft with random weights: the ratio to plain `generate`, median over prompts, the first ones included."""
    torch.manual_seed(1)
    draft = DovetailDraft.for_target(target)
    draft.policy = DeviceSplitPolicy(measured_in=tempfile.mkdtemp())
    comparison = Comparison(target, draft, options)
    prompts = load_prompts(None, tokenizer, count)
    comparison.warm_up(prompts[0])
    draft.policy.modes.clear()  # it has to find out within the runs that count
    for input_ids in tqdm(prompts, desc="useless draft", unit="prompt"):
        comparison.add(input_ids)
    result = comparison.result()
    plain_s, drafted_s = (sum(pair[side].seconds for pair in comparison.pairs) for side in (0, 1))
    return {"ratio": result.ratio, "total_ratio": plain_s / drafted_s, "acceptance_length": result.acceptance_length}


def print_tables(result: dict[str, Any]) -> None:
    """What people read."""
    print("\ngrid, tokens/s, best first:")
    print("  " + ", ".join(f"{name} {speed:.1f}" for name, speed in list(result["grid"].items())[:12]))
    print("  " + f"... off (1/1/1) {result['grid']['1/1/1']:.1f}")
    for when in ("free", "busy"):
        if when in result:
            part = result[when]
            print(f"\n{when} cores: " + ", ".join(f"{name} {s:.1f}" for name, s in part["tokens_per_s"].items()))
            print(f"policy to the best static budget ({part['best']}): {part['ratio']:.3f}")
    print(f"\npredicted against measured seconds of {result['rounds']} rounds: median error "
          f"{result['prediction_error']:.1%}")  # fmt: skip
    if "useless" in result:
        part = result["useless"]
        print(f"useless draft: {part['ratio']:.3f} of plain generate (all seconds: {part['total_ratio']:.3f}), "
              f"acceptance length {part['acceptance_length']:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=None, help="inflate the bundled pair to this shape (see inflate.py)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--grid-prompts", type=int, default=3, help="prompts that the whole grid runs on")
    parser.add_argument("--prompts", type=int, default=16, help="further prompts, for the best budgets and the policy")
    parser.add_argument("--finalists", type=int, default=5, help="budgets of the grid that meet the policy")
    parser.add_argument("--busy", action="store_true", help="half of those prompts while a process takes a core")
    parser.add_argument("--useless-prompts", type=int, default=8, help="prompts of the random draft; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "policy.jsonl")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.shape:
        target, draft = inflate_pair(*load_bundled(torch.float32), args.shape, dtype=dtype)
    else:
        target, draft = load_bundled(dtype)
    draft.policy = DeviceSplitPolicy(measured_in=tempfile.mkdtemp())
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    result = compare(args, target, draft, tokenizer, options)
    if args.useless_prompts:
        result["useless"] = useless(target, tokenizer, options, args.useless_prompts)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    print_tables(result)
    store({"name": "policy", "settings": settings} | result, args.out)


if __name__ == "__main__":
    main()
