"""Target on the CPU, draft on the GPU, end to end: real acceptance at the cost of a big shape.

    python benchmarks/heterogeneous.py                 # 7B on a machine with a GPU and the memory for it, else 500m
    python benchmarks/heterogeneous.py --shape 13b
    python benchmarks/heterogeneous.py --shape 256,704,16 --prompts 1 --new-tokens 16      # a quick check

Needs nothing but the repository: the bundled pair is inflated to the shape (see inflate.py), so its acceptance is real
and its cost is that of the shape. For every GSM8K question plain `generate`, the policy and static budgets run in
turns, greedy, on the same CPU; texts are compared. Then a part of the target's layers moves to the GPU and the same
questions run again. Parts that would pass --minutes are left out and named. Without a GPU all of it runs on the CPU.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inflate import inflate_pair
from run import TARGET, load_bundled
from transformers import AutoTokenizer

from dovetail_plugin import TreeBudget
from dovetail_plugin.bench.compare import Run, tie_tolerance, timed_generate, top_gap_at_difference
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.policy.device_split import DeviceSplitPolicy
from dovetail_plugin.targets.layers_on_gpu import decoder_layers, place_layers

STATIC = {"7/4/10": "paper, laptop", "16/7/10": "paper, server", "60/7/10": "EAGLE-2"}
PHASES = ("draft", "transfer", "verify", "accept", "other")


@dataclass
class Side:
    """One way to generate: its runs, and the rounds of those that drafted."""

    runs: list[Run] = field(default_factory=list)
    rounds: list[Any] = field(default_factory=list)
    identical: int = 0
    ties: int = 0

    @property
    def tokens_per_s(self) -> float:
        return sum(run.tokens for run in self.runs) / sum(run.seconds for run in self.runs)

    def summary(self, plain: "Side") -> dict[str, Any]:
        """Numbers of this side, the ratio to `plain` over the prompts that both ran on."""
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
                "shares": {p: sum(r.seconds[p] for r in self.rounds) / total_s for p in PHASES},
            }
        return result


class Bench:
    """The pair and the clock of the whole script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end_s = time.perf_counter() + 60 * args.minutes
        self.left_out: list[str] = []
        dtype = getattr(torch, args.dtype)
        self.target, self.draft = inflate_pair(*load_bundled(torch.float32), args.shape, dtype=dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.draft.to(self.device)
        self.draft.policy = DeviceSplitPolicy(measured_in=tempfile.mkdtemp())
        self.prompts = load_prompts(None, AutoTokenizer.from_pretrained(TARGET), args.prompts)
        self.options = {"max_new_tokens": args.new_tokens, "do_sample": False}

    def generate(self, input_ids: torch.Tensor, budget: TreeBudget | str | None, **options: Any) -> Run:
        """One call; budget None is the policy, "plain" goes without a draft."""
        options = self.options | options
        if budget == "plain":
            return timed_generate(self.target, input_ids, **options)
        self.draft.budget = budget
        return timed_generate(self.target, input_ids, **options, assistant_model=self.draft)

    def sides(self, budgets: dict[str, Any], label: str) -> dict[str, Side]:
        """Every way on every prompt, in turns, as far as time goes."""
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
    """What the probe found: V(N), draft levels, transfers."""
    (cost,) = bench.draft.policy.costs.values()
    found = cost.measured
    return {
        "verify_ms": {n: 1e3 * s for n, s in sorted(found.verify_s.items())},
        "level_ms": {n: 1e3 * s for n, s in sorted(found.level_s.items())},
        "tree_of_one_level_ms": 1e3 * found.draft_s,
        "transfer_ms": 1e3 * found.transfer_s,
        "threads": found.threads,
    }


def offload(bench: Bench, share: float) -> dict[str, Any]:
    """The same questions with the last layers on the GPU."""
    count = len(decoder_layers(bench.target))
    layers = range(count - max(round(share * count), 1), count)
    place_layers(bench.target, layers, bench.device)
    bench.draft.policy = DeviceSplitPolicy(measured_in=tempfile.mkdtemp())
    sides = bench.sides({"plain": "plain", "policy": None}, f"{len(layers)} of {count} layers on {bench.device.type}")
    return {"layers": len(layers), "of": count, "measured": measured(bench)} | {
        name: side.summary(sides["plain"]) for name, side in sides.items()
    }


def print_side(name: str, side: dict[str, Any]) -> None:
    line = f"{name:32}{side['tokens_per_s']:9.2f}{side['ratio']:7.2f}"
    if "shares" in side:
        line += f"{side['acceptance_length']:7.2f}{side['nodes_per_round']:7.1f}{side['round_ms']:9.1f}"
        line += "".join(f"{side['shares'][phase]:9.1%}" for phase in PHASES)
        line += f"   {side['identical']} of {side['prompts']}, {side['ties']} at a tie"
    print(line)


def print_tables(result: dict[str, Any]) -> None:
    """What people read."""
    found = result["measured"]
    print(f"\n{result['name']}: draft on {result['draft_device']}, {found['threads']} threads")
    print("V(N), ms:        " + ", ".join(f"{n}: {ms:.1f}" for n, ms in found["verify_ms"].items()))
    print("draft level, ms: " + ", ".join(f"{n} rows: {ms:.2f}" for n, ms in found["level_ms"].items()))
    print(f"transfer, ms:    {found['transfer_ms']:.3f}")
    if result["vram_mib"]:
        print(f"VRAM, most used: {result['vram_mib']:.0f} MiB")
    columns = f"\n{'':32}{'tokens/s':>9}{'ratio':>7}{'accept':>7}{'nodes':>7}{'round ms':>9}"
    print(columns + "".join(f"{phase:>9}" for phase in PHASES) + "   texts")
    for name, side in result["sides"].items():
        print_side(f"{name} ({STATIC[name]})" if name in STATIC else name, side)
    if part := result.get("offload"):
        print(f"\nwith {part['layers']} of {part['of']} layers moved to {result['draft_device']}")
        for name in ("plain", "policy"):
            print_side(name, part[name])
        print(f"policy to plain generate on the CPU alone: {part['to_cpu_plain']:.2f}")
    for what in result["left_out"]:
        print(f"left out for time: {what}")


def default_shape() -> str:
    """7B where a GPU and the memory for 12 GB of weights are at hand, with room for making them."""
    memory = torch.cuda.is_available() and Path("/proc/meminfo").exists()
    free_kib = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) if memory else 0
    return "7b" if free_kib > 30 * 2**20 else "500m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=None, help="of the inflated pair; default: 7b, or 500m without a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--offload-share", type=float, default=0.25, help="of the target's layers; 0 leaves it out")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would take longer altogether")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "heterogeneous.jsonl")
    args = parser.parse_args()
    args.shape = args.shape or default_shape()
    bench = Bench(args)
    budgets = {"plain": "plain", "policy": None} | {name: TreeBudget.parse(name) for name in STATIC}
    sides = bench.sides(budgets, "draft on " + bench.device.type)
    cuda = bench.device.type == "cuda"
    result: dict[str, Any] = {
        "name": f"inflated pair, {args.shape}, {args.dtype}",
        "draft_device": torch.cuda.get_device_name() if cuda else "the CPU",
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
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(result | provenance()) + "\n")


if __name__ == "__main__":
    main()
