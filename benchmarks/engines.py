"""Compare engines that run the same weights: the cost of a pass over N rows, and tokens/s without and with a draft.

    python benchmarks/inflate.py --target ... --draft ... --shape 1b --out big
    dovetail export --target big/target --to openvino --weights int8 --out big/ov-int8
    python benchmarks/engines.py --target big/target --draft big/draft \\
        --packed int8 --packed int4 \\
        --engine "openvino int8=big/ov-int8" --engine "openvino bf16=big/ov-fp32,inference_precision=bf16"

Engines take turns pass by pass and prompt by prompt, so a slow period of the machine affects all of them alike.
"torch" is transformers alone: `generate` and the model's own cache. "torch, dovetail" is the same model with this
package's session, and "packed" is that with `CpuWeights`. Let nothing else run on the machine meanwhile.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, parse_budget, positive, store
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dovetail_plugin import CpuWeights, DovetailDraft, TreeBudget
from dovetail_plugin.adapters import load_exported
from dovetail_plugin.bench.compare import Comparison
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.compat import CACHE
from dovetail_plugin.kernels import KINDS
from dovetail_plugin.targets.base import TargetSession
from dovetail_plugin.targets.engine import engine_of
from dovetail_plugin.tree import DraftTree

ROWS = (1, 2, 4, 8, 16, 32)
"""Row counts whose passes are timed."""
CONTEXT = 128
"""Tokens in the cache before each timed pass."""
OWN_SETTINGS = ("dir", "budget", "group", "runner")
"""Settings of --engine that this script reads itself; see `parse_engine`."""

TimedPass = Callable[[int], float]
"""Runs a pass over this many rows behind `CONTEXT` tokens and returns its seconds."""


@dataclass
class Contender:
    """One engine in the comparison.

    Attributes:
        name: names the engine in the tables.
        target: the target on this engine.
        draft: a draft for this target only.
        budget: fixed budget of all rounds. None leaves it to the policy.
    """

    name: str
    target: Any
    draft: DovetailDraft
    budget: TreeBudget | None


def parse_engine(text: str) -> tuple[str, dict[str, str]]:
    """Type of --engine: "NAME=DIR,key=value,..." -> the name and the settings, with DIR (or a hub id) as "dir".

    Settings that this script reads: `budget` (as --budget), `runner` (of the draft) and `group` (the group size of
    OpenVINO's dynamic quantization). All others are passed to the engine's `from_pretrained`.
    """
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    pairs = [part.partition("=") for part in parts[1:]]
    if not rest or not all(value for _, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid engine. Use NAME=DIR or NAME=DIR,key=value,...")
    settings = {"dir": parts[0]} | {key: value for key, _, value in pairs}
    parse_budget(settings.get("budget", "policy"))
    return name, settings


def load_contender(name: str, settings: dict[str, str], draft_dir: Path, budget: TreeBudget | None) -> Contender:
    """Load the exported target and its own copy of the draft; `settings` are those of `parse_engine`."""
    options: dict[str, Any] = {key: value for key, value in settings.items() if key not in OWN_SETTINGS}
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


def load_packed(kind: str, target: Path, draft: Path, budget: TreeBudget | None) -> Contender:
    """Load the target with packed weights and its own copy of the draft."""
    packed = AutoModelForCausalLM.from_pretrained(target, dtype="auto", quantization_config=CpuWeights(kind))
    return Contender(f"packed {kind}", packed, DovetailDraft.from_pretrained(draft), budget)


def stock_pass(model: Any, ids: torch.Tensor) -> TimedPass:
    """Timed passes behind `ids` with transformers' own cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, **{CACHE: cache})

    def timed(rows: int) -> float:
        with torch.inference_mode():
            start_s = time.perf_counter()
            model(input_ids=torch.arange(5, 5 + rows)[None], use_cache=True, **{CACHE: cache})
            seconds = time.perf_counter() - start_s
            cache.crop(-rows)
        return seconds

    return timed


def session_pass(session: TargetSession, ids: torch.Tensor) -> TimedPass:
    """Timed passes behind `ids` in the session that verifies drafts."""
    session.prefill(ids, None)

    def timed(rows: int) -> float:
        tree = DraftTree.chain(list(range(5, 5 + rows)))
        start_s = time.perf_counter()
        session.score(tree)
        seconds = time.perf_counter() - start_s
        session.keep([0])
        return seconds

    return timed


def pass_ms(contenders: list[Contender], stock: Any, repeats: int) -> dict[str, dict[int, float]]:
    """Median ms of a pass for each engine and row count. Engines take turns."""
    ids = torch.arange(CONTEXT)[None] % 1000 + 5
    limits = dict(max_nodes=max(ROWS), prefill_chunk=None, model_kwargs={})
    with ExitStack() as stack:
        passes = {"torch": stock_pass(stock, ids)}
        for contender in contenders:
            engine = engine_of(contender.target)
            session = stack.enter_context(engine.session(engine.cache(None), **limits))
            passes[contender.name] = session_pass(session, ids)
        measured_ms: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in passes}
        for repeat in tqdm(range(repeats + 1), desc="passes", unit="turn"):
            for name, timed in passes.items():
                for rows in ROWS:
                    seconds = timed(rows)
                    if repeat:  # the first turn warms up
                        measured_ms[name][rows].append(1e3 * seconds)
    return {
        name: {rows: statistics.median(values) for rows, values in by_rows.items()}
        for name, by_rows in measured_ms.items()
    }


def speeds(contenders: list[Contender], prompts: list[torch.Tensor], new_tokens: int) -> dict[str, dict[str, Any]]:
    """The `BenchResult` of each engine as a dict. Engines take turns on each prompt."""
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
    """Print both tables as Markdown."""
    print(f"\n| ms per pass, {CONTEXT} tokens of context | " + " | ".join(f"N={rows}" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for name, by_rows in passes.items():
        print(f"| {name} | " + " | ".join(f"{by_rows[rows]:.1f}" for rows in ROWS) + " |")
    stock = next(iter(texts.values()))["plain_tokens_per_s"]
    columns = ["engine", "budget", "plain tokens/s", "draft tokens/s", "ratio to own plain", "ratio to torch plain"]
    columns += ["acceptance length", "draft ms", "verify ms", "accept ms", "texts"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, r in texts.items():
        phases = r["phase_ms_per_round"]
        same = f"{r['identical']} of {r['prompts']} identical, {r['ties']} ties, {r['differences']} differ"
        print(
            f"| {name} | {r['settings']['budget']} | {r['plain_tokens_per_s']:.1f} | {r['draft_tokens_per_s']:.1f} | "
            f"{r['ratio']:.2f} | {r['draft_tokens_per_s'] / stock:.2f} | {r['acceptance_length']:.2f} | "
            f"{phases['draft']:.1f} | {phases['verify']:.1f} | {phases['accept']:.1f} | {same} |"
        )


def main() -> None:
    parser = argument_parser(__doc__, "engines.jsonl")
    add = parser.add_argument
    add("--target", type=Path, required=True, metavar="DIR", help="target, runs in torch in its stored dtype")
    add("--draft", type=Path, required=True, metavar="DIR", help="draft of this target")
    add(
        "--engine",
        type=parse_engine,
        action="append",
        default=[],
        metavar="NAME=DIR[,key=value...]",
        help="exported target to compare; can be repeated",
    )
    add("--packed", choices=KINDS, action="append", default=[], help="the target with packed weights; can be repeated")
    add("--budget", type=parse_budget, default=None, help="nodes/depth/top_k (default: the policy chooses)")
    add("--count", type=positive, default=8, help="number of prompts")
    add("--new-tokens", type=positive, default=64, help="tokens to generate per prompt")
    add("--repeats", type=positive, default=9, help="timed passes for each row count")
    args = parser.parse_args()
    stock = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    contenders = [Contender("torch, dovetail", stock, DovetailDraft.from_pretrained(args.draft), args.budget)]
    contenders += [load_packed(kind, args.target, args.draft, args.budget) for kind in args.packed]
    contenders += [load_contender(name, settings, args.draft, args.budget) for name, settings in args.engine]
    passes = pass_ms(contenders, stock, args.repeats)
    prompts = load_prompts(None, AutoTokenizer.from_pretrained(args.target), args.count)
    texts = speeds(contenders, prompts, args.new_tokens)
    print_tables(passes, texts)
    store({"parameters": stock.num_parameters(), "context": CONTEXT, "pass_ms": passes, "texts": texts}, args.out)


if __name__ == "__main__":
    main()
