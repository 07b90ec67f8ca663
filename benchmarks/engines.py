"""The same weights on every engine, side by side: what a pass over N rows costs, and tokens/s without and with a draft.

    python benchmarks/inflate.py --target ... --draft ... --shape 1b --out big
    dovetail export --target big/target --to openvino --weights int8 --out big/ov-int8
    python benchmarks/engines.py --target big/target --draft big/draft \\
        --engine "openvino int8=big/ov-int8" --engine "openvino bf16=big/ov-fp32,inference_precision=bf16"

Engines take turns pass by pass and prompt by prompt, so that a slow minute of the machine is everybody's. "torch"
is stock transformers: `generate` and the model's own cache; "torch, dovetail" is the same model through our cache.
Let nothing else run. Tables go to the screen, JSON lines to --out.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from run import parse_budget
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.adapters import load_exported
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.targets.engine import engine_of
from dovetail_plugin.tree import DraftTree

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 128
OWN = ("dir", "budget", "group", "runner")
"""Settings of an engine that are ours: where it is, its draft's budget and runner, its dynamic quantisation's group."""


@dataclass
class Contender:
    """An engine with the target's weights, its draft and its budget (None: the policy's)."""

    name: str
    target: Any
    draft: DovetailDraft
    budget: TreeBudget | None


def parse_engine(text: str) -> tuple[str, dict[str, str]]:
    """`NAME=DIR,key=value,...` -> name and settings, DIR under "dir".

    Raises:
        argparse.ArgumentTypeError: it does not look like that.
    """
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    pairs = [part.partition("=") for part in parts[1:]]
    if not rest or not all(value for _, _, value in pairs):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR or NAME=DIR,key=value,..., got {text!r}")
    return name, {"dir": parts[0]} | {key: value for key, _, value in pairs}


def load_contender(name: str, settings: dict[str, str], draft_dir: Path, budget: TreeBudget | None) -> Contender:
    """Load an exported engine; settings other than OWN go to its `from_pretrained`."""
    options: dict[str, Any] = {key: value for key, value in settings.items() if key not in OWN}
    if "exact" in options:
        options["exact"] = options["exact"] == "true"
    if "group" in settings:
        options["ov_config"] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": settings["group"]}
    if "budget" in settings:
        budget = parse_budget(settings["budget"])
    target = load_exported(settings["dir"], **options)
    draft = DovetailDraft.from_pretrained(draft_dir)
    draft.runner = settings.get("runner", "auto")
    return Contender(name, target, draft, budget)


def stock_pass(model: Any, ids: torch.Tensor) -> Any:
    """A function of N that times a pass over N rows behind `ids` with transformers' own cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def timed(rows: int) -> float:
        with torch.inference_mode():
            start_s = time.perf_counter()
            model(input_ids=torch.arange(5, 5 + rows)[None], past_key_values=cache, use_cache=True)
            seconds = time.perf_counter() - start_s
            cache.crop(CONTEXT if cache.get_seq_length() > CONTEXT else 0)
        return seconds

    return timed


def target_pass(model: Any, ids: torch.Tensor) -> Any:
    """The same through the `Target` that drafts are verified with."""
    engine = engine_of(model)
    session = engine.session(
        engine.cache(None), max_length=CONTEXT + 512, max_nodes=max(ROWS), prefill_chunk=None, model_kwargs={}
    )
    target = session.__enter__()
    target.prefill(ids, None)

    def timed(rows: int) -> float:
        tree = DraftTree.chain(list(range(5, 5 + rows)))
        start_s = time.perf_counter()
        target.score(tree)
        seconds = time.perf_counter() - start_s
        target.keep([0])
        return seconds

    return timed


def pass_seconds(contenders: list[Contender], stock: Any, repeats: int) -> dict[str, dict[int, float]]:
    """Median ms of a pass over N rows for every engine, in turns."""
    ids = torch.arange(CONTEXT)[None] % 1000 + 5
    passes = {"torch": stock_pass(stock, ids)} | {c.name: target_pass(c.target, ids) for c in contenders}
    seconds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in passes}
    for repeat in tqdm(range(repeats + 1), desc="passes", unit="turn"):
        for name, timed in passes.items():
            for rows in ROWS:
                elapsed_s = timed(rows)
                if repeat:  # the first turn warms up
                    seconds[name][rows].append(elapsed_s)
    return {
        name: {rows: 1e3 * statistics.median(times) for rows, times in by_rows.items()}
        for name, by_rows in seconds.items()
    }


def speeds(contenders: list[Contender], prompts: list[torch.Tensor], new_tokens: int) -> dict[str, dict[str, Any]]:
    """A `BenchResult` as a dict for every engine; engines take turns on each prompt."""
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    comparisons = {c.name: Comparison(c.target, c.draft, options) for c in contenders}
    for contender in contenders:
        contender.draft.budget = contender.budget
        comparisons[contender.name].warm_up(prompts[0])
    for input_ids in tqdm(prompts, desc="texts", unit="prompt"):
        for comparison in comparisons.values():
            comparison.add(input_ids)
    budgets = {c.name: str(c.budget or "policy") for c in contenders}
    return {name: asdict(c.result(budget=budgets[name])) for name, c in comparisons.items()}


def print_tables(passes: dict[str, dict[int, float]], texts: dict[str, dict[str, Any]]) -> None:
    """Both tables as Markdown."""
    print(f"\n| ms, {CONTEXT} tokens of context | " + " | ".join(f"N={rows}" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for name, by_rows in passes.items():
        print(f"| {name} | " + " | ".join(f"{by_rows[rows]:.1f}" for rows in ROWS) + " |")
    stock = next(iter(texts.values()))["plain_tokens_per_s"]
    columns = ["engine", "budget", "plain", "draft", "to its own plain", "to torch plain", "acceptance", "draft ms"]
    columns += ["verify ms", "accept ms", "texts"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, r in texts.items():
        phases = r["phase_ms_per_round"]
        same = f"{r['identical']} of {r['prompts']}, {r['ties']} at a tie, {r['differences']} differ"
        print(
            f"| {name} | {r['settings']['budget']} | {r['plain_tokens_per_s']:.1f} | {r['draft_tokens_per_s']:.1f} | "
            f"{r['ratio']:.2f} | {r['draft_tokens_per_s'] / stock:.2f} | {r['acceptance_length']:.2f} | "
            f"{phases['draft']:.1f} | {phases['verify']:.1f} | {phases['accept']:.1f} | {same} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="for torch, in its stored dtype")
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--engine", type=parse_engine, action="append", default=[], help="NAME=DIR[,key=value...]")
    parser.add_argument("--budget", type=parse_budget, default=None, help="default: the policy's")
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9, help="of every pass")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engines.jsonl")
    args = parser.parse_args()
    stock = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    contenders = [Contender("torch, dovetail", stock, DovetailDraft.from_pretrained(args.draft), args.budget)]
    contenders += [load_contender(name, settings, args.draft, args.budget) for name, settings in args.engine]
    passes = pass_seconds(contenders, stock, args.repeats)
    prompts = load_prompts(None, AutoTokenizer.from_pretrained(args.target), args.count)
    texts = speeds(contenders, prompts, args.new_tokens)
    print_tables(passes, texts)
    line = {"parameters": stock.num_parameters(), "context": CONTEXT, "pass_ms": passes, "texts": texts} | provenance()
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
