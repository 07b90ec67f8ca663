"""Target on the CPU and draft on the GPU, end to end: real acceptance at the cost of a large shape.

    python benchmarks/heterogeneous.py                 # 7b on a machine with a GPU and enough memory, else 500m
    python benchmarks/heterogeneous.py --shape 13b
    python benchmarks/heterogeneous.py --shape 256,704,16 --prompts 1 --new-tokens 16      # a quick check

The bundled pair is inflated to the shape (see inflate.py): its acceptance is real, and its cost is that of the shape.
For each GSM8K question, plain `generate`, the policy and fixed budgets run in turns, greedily, on the same CPU, and
their texts are compared. Then some of the target's layers move to the GPU and the same questions run again. Work that
would exceed --minutes is left out and listed. Without a GPU everything runs on the CPU.
"""

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from common import argument_parser, bundled_prompts, fresh_policy, load_inflated, parse_shape, positive, store

from dovetail_plugin import TreeBudget, machine
from dovetail_plugin.bench.compare import Run, tie_tolerance, timed_generate, top_gap_at_difference
from dovetail_plugin.report import PHASES, Round
from dovetail_plugin.targets.layers_on_gpu import decoder_layers, place_layers

STATIC = {"7/4/10": "paper, laptop", "16/7/10": "paper, server", "60/7/10": "EAGLE-2"}
"""Fixed budgets (nodes/depth/top_k) that are compared with the policy -> where each one comes from."""
ALL_PHASES = (*PHASES, "other")


@dataclass
class Side:
    """One way to generate, over all prompts.

    Attributes:
        runs: one run for each prompt.
        rounds: the rounds of all runs; empty in plain generation.
        identical: number of texts that are the same as the plain text.
        ties: number of texts that differ from the plain text at a tie.
    """

    runs: list[Run] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    identical: int = 0
    ties: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all runs divided by their seconds."""
        return sum(run.tokens for run in self.runs) / sum(run.seconds for run in self.runs)

    def summary(self, plain: "Side") -> dict[str, Any]:
        """Figures for the result. The ratio to `plain` is over the prompts that both sides ran on."""
        count = len(self.runs)
        plain_s = sum(run.seconds for run in plain.runs[:count]) / sum(run.tokens for run in plain.runs[:count])
        result: dict[str, Any] = {"tokens_per_s": self.tokens_per_s, "ratio": self.tokens_per_s * plain_s}
        result |= {"prompts": count, "identical": self.identical, "ties": self.ties}
        if self.rounds:
            total_s = sum(r.total_s for r in self.rounds)
            result |= {
                "acceptance_length": sum(r.emitted for r in self.rounds) / len(self.rounds),
                "nodes_per_round": sum(r.nodes for r in self.rounds) / len(self.rounds),
                "round_ms": 1e3 * total_s / len(self.rounds),
                "shares": {p: sum(r.seconds[p] for r in self.rounds) / total_s for p in ALL_PHASES},
            }
        return result


class Bench:
    """The pair, its prompts, and the time limit of the whole script.

    Attributes:
        end_s: value of `time.perf_counter` after which no prompt is started.
        left_out: descriptions of what was skipped because of the time limit.
        target: inflated target on the CPU.
        draft: inflated draft on `device`.
        device: the GPU if there is one, else the CPU.
        prompts: GSM8K questions, each (1, T) int64.
        options: keyword arguments of `generate`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.end_s = time.perf_counter() + 60 * args.minutes
        self.left_out: list[str] = []
        self.target, self.draft = load_inflated(args.shape, getattr(torch, args.dtype))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.draft.to(self.device)
        self.draft.policy = fresh_policy()
        self.prompts = bundled_prompts(args.prompts)
        self.options = {"max_new_tokens": args.new_tokens, "do_sample": False}

    def generate(self, input_ids: torch.Tensor, budget: TreeBudget | str | None, **options: Any) -> Run:
        """Generate once: with a fixed budget, with the policy (None), or without a draft ("plain")."""
        options = self.options | options
        if budget == "plain":
            return timed_generate(self.target, input_ids, **options)
        self.draft.budget = budget
        return timed_generate(self.target, input_ids, **options, assistant_model=self.draft)

    def sides(self, budgets: dict[str, Any], label: str) -> dict[str, Side]:
        """Run every budget on every prompt, in turns, until the time limit.

        Args:
            budgets: name -> budget, see `generate`. One of them is "plain".
            label: describes the setting on the screen and in `left_out`.
        """
        sides = {name: Side() for name in budgets}
        for budget in budgets.values():
            self.generate(self.prompts[0], budget, max_new_tokens=4)
        longest_s = 0.0
        for number, input_ids in enumerate(self.prompts):
            start_s = time.perf_counter()
            if number and start_s + longest_s > self.end_s:
                self.left_out.append(f"{label}: prompts from {number + 1} on")
                break
            for name, budget in budgets.items():
                self._add(sides[name], self.generate(input_ids, budget), sides["plain"], budget)
            longest_s = max(longest_s, time.perf_counter() - start_s)
            print(f"  {label}, prompt {number + 1}: {time.perf_counter() - start_s:.0f} s", flush=True)
        return sides

    def _add(self, side: Side, run: Run, plain: Side, budget: Any) -> None:
        side.runs.append(run)
        if budget == "plain":
            return
        side.rounds += self.draft.report.rounds
        reference = plain.runs[len(side.runs) - 1].ids
        if torch.equal(reference, run.ids):
            side.identical += 1
        elif top_gap_at_difference(self.target, reference, run.ids) <= tie_tolerance(self.target.dtype):
            side.ties += 1


def measured(bench: Bench) -> dict[str, Any]:
    """The machine measurements of the policy: verification passes, draft levels, transfers, threads."""
    (cost,) = bench.draft.policy.costs.values()
    found = cost.measured
    return {
        "verify_ms": {n: 1e3 * s for n, s in sorted(found.verify_s.items())},
        "level_ms": {n: 1e3 * s for n, s in sorted(found.level_s.items())},
        "tree_of_one_level_ms": 1e3 * found.draft_s,
        "transfer_ms": {size: 1e3 * s for size, s in found.transfer_s.items()},
        "threads": found.threads,
    }


def offload(bench: Bench, share: float) -> dict[str, Any]:
    """Run the same questions with the last layers of the target on the GPU.

    Args:
        share: share of the target's layers to move, rounded, at least one layer.
    """
    count = len(decoder_layers(bench.target))
    layers = range(count - max(round(share * count), 1), count)
    place_layers(bench.target, layers, bench.device)
    bench.draft.policy = fresh_policy()
    sides = bench.sides({"plain": "plain", "policy": None}, f"{len(layers)} of {count} layers on {bench.device.type}")
    return {"layers": len(layers), "of": count, "measured": measured(bench)} | {
        name: side.summary(sides["plain"]) for name, side in sides.items()
    }


def print_side(name: str, side: dict[str, Any]) -> None:
    """Print one line of the table."""
    line = f"{name:32}{side['tokens_per_s']:9.2f}{side['ratio']:7.2f}"
    if "shares" in side:
        line += f"{side['acceptance_length']:7.2f}{side['nodes_per_round']:7.1f}{side['round_ms']:9.1f}"
        line += "".join(f"{side['shares'][phase]:9.1%}" for phase in ALL_PHASES)
        line += f"   {side['identical']} of {side['prompts']} identical, {side['ties']} ties"
    print(line)


def print_tables(result: dict[str, Any]) -> None:
    """Print the measurements and the table of all sides."""
    found = result["measured"]
    print(f"\n{result['name']}: draft on {result['draft_device']}, {found['threads']} threads")
    print("verify N nodes, ms: " + ", ".join(f"{n}: {ms:.1f}" for n, ms in found["verify_ms"].items()))
    print("draft level, ms:    " + ", ".join(f"{n} rows: {ms:.2f}" for n, ms in found["level_ms"].items()))
    print("transfer, ms:       " + ", ".join(f"{size} bytes: {ms:.3f}" for size, ms in found["transfer_ms"].items()))
    if result["vram_mib"]:
        print(f"peak VRAM:          {result['vram_mib']:.0f} MiB")
    columns = f"\n{'':32}{'tokens/s':>9}{'ratio':>7}{'accept':>7}{'nodes':>7}{'round ms':>9}"
    print(columns + "".join(f"{phase:>9}" for phase in ALL_PHASES) + "   texts")
    for name, side in result["sides"].items():
        print_side(f"{name} ({STATIC[name]})" if name in STATIC else name, side)
    if part := result.get("offload"):
        print(f"\n{part['layers']} of {part['of']} target layers moved to {result['draft_device']}:")
        for name in ("plain", "policy"):
            print_side(name, part[name])
        print(f"ratio of the policy to plain generate on the CPU alone: {part['to_cpu_plain']:.2f}")
    for what in result["left_out"]:
        print(f"left out because of --minutes: {what}")


def default_shape() -> str:
    """7b where there is a GPU and enough memory to build 12 GB of weights, else 500m."""
    free_bytes = machine.available_bytes() or 0
    return "7b" if torch.cuda.is_available() and free_bytes > 30 * 2**30 else "500m"


def main() -> None:
    parser = argument_parser(__doc__, "heterogeneous.jsonl")
    add = parser.add_argument
    add("--shape", type=parse_shape, default=None, help="shape of the pair (default: 7b, or 500m without a GPU)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of both models")
    add("--prompts", type=positive, default=4, help="number of prompts")
    add("--new-tokens", type=positive, default=64, help="tokens to generate per prompt")
    add("--offload-share", type=float, default=0.25, help="share of the target's layers to move; 0 skips this part")
    add("--minutes", type=float, default=9.0, help="start no prompt that would end later than this")
    args = parser.parse_args()
    args.shape = args.shape or default_shape()
    bench = Bench(args)
    budgets = {"plain": "plain", "policy": None} | {name: TreeBudget.parse(name) for name in STATIC}
    sides = bench.sides(budgets, "draft on " + bench.device.type)
    cuda = bench.device.type == "cuda"
    result: dict[str, Any] = {
        "name": f"inflated pair, {args.shape}, {args.dtype}",
        "draft_device": torch.cuda.get_device_name() if cuda else "CPU",
        "parameters": bench.target.num_parameters(),
        "draft_parameters": bench.draft.num_parameters(),
        "new_tokens": args.new_tokens,
        "vram_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "measured": measured(bench),
        "sides": {name: side.summary(sides["plain"]) for name, side in sides.items()},
    }
    if args.offload_share > 0:
        part = result["offload"] = offload(bench, args.offload_share)
        part["to_cpu_plain"] = part["policy"]["tokens_per_s"] / result["sides"]["plain"]["tokens_per_s"]
    result["left_out"] = bench.left_out
    print_tables(result)
    store(result, args.out)


if __name__ == "__main__":
    main()
