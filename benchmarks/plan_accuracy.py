"""Compares the bytes of a plan with what processes that load and generate really allocate.

    python benchmarks/plan_accuracy.py                                 # the pair inflated to 1b, bfloat16
    python benchmarks/plan_accuracy.py --shape 500m --dtype float32 --prompt-tokens 500

One process inflates and stores the pair, others load it, so that only what users' programs allocate is counted. Such a
process generates with a tiny pair first and notes its resident set, which is the program itself: libraries, their code
pages and workspaces. Then it loads the pair, resets the kernel's high-water mark and runs one generation with the
draft. Resident pages count whether they are private or mapped from a weight file: both take memory while the model
runs. The storages of all tensors that live after the generation are added up as well.

The gate is 5 % for the tensors and for the totals. The plan's margin has its own line; beside it stands what the
process takes beyond the planned parts. With a GPU, the same is done for every `--vram` budget, placed as planned, with
torch's peak on the GPU. Prints tables and one JSON line, which is also appended to --out. Run nothing else meanwhile.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import DRAFT, TARGET, load_bundled
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.planning.apply import apply_plan
from dovetail_plugin.planning.device_plan import format_bytes, parse_bytes
from dovetail_plugin.planning.make_plan import make_plan

HERE = Path(__file__).parent
SMALL_GPU = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
"""cuBLAS's workspace on small GPUs. A Hopper would take four times as much; with this, figures are comparable."""


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`, RssFile mapped from files."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def forget_peak() -> None:
    """Give freed memory back to the system and set VmHWM to what is resident then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages under some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def model_tensors(*models: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [t for model in models for t in (*model.parameters(), *model.buffers())]


# --- in the child ------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Load the stored pair, place it as planned for the budget and generate once; returns what was planned and seen."""
    dtype, gpu = getattr(torch, args.dtype), args.vram[0] > 0
    budget = TreeBudget()
    warm_up(dtype, "cuda" if gpu else "cpu")
    program_bytes = resident()
    target = AutoModelForCausalLM.from_pretrained(args.pair / "target", dtype=dtype)
    draft = DovetailDraft.from_pretrained(args.pair / "draft", dtype=dtype)
    load_peak_bytes = resident("VmHWM")
    draft.budget = budget
    plan = make_plan(
        target.config,
        draft.config,
        vram_bytes=args.vram[0],
        context=args.prompt_tokens + args.new_tokens,
        max_nodes=budget.nodes,
        prefill_rows=args.prefill_rows,
        dtype=args.dtype,
        draft_dtype=args.dtype,
    )
    apply_plan(plan, target, draft)
    forget_peak()
    seen: dict[str, int] = {"program": program_bytes, "load_peak": load_peak_bytes, "loaded": resident()}
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    output = generate(target, draft, args)
    seen |= {"peak": resident("VmHWM"), "mapped": resident("RssFile")}
    if gpu:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        seen |= {"gpu_peak": torch.cuda.max_memory_allocated(), "gpu_used": total_bytes - free_bytes}
    rows = args.prompt_tokens + args.new_tokens + budget.nodes
    return {"plan": plan.as_dict(), "seen": seen, "live": live_bytes(target, draft, output.past_key_values, rows)}


def warm_up(dtype: torch.dtype, device: str) -> None:
    """Bring in whatever stays after a first generation."""
    target, draft = load_bundled(dtype)
    target.generate(torch.arange(4, 40)[None], max_new_tokens=8, assistant_model=draft.to(device))
    del target, draft
    forget_peak()


def generate(target: Any, draft: DovetailDraft, args: argparse.Namespace) -> Any:
    """A long prompt and a few tokens, with the draft."""
    ids = torch.randint(
        4, target.config.vocab_size, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    options: dict[str, Any] = {} if args.prefill_rows is None else {"prefill_chunk_size": args.prefill_rows}
    return target.generate(
        ids,
        assistant_model=draft,
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


def live_bytes(target: Any, draft: DovetailDraft, cache: Any, most_rows: int) -> dict[str, int]:
    """Bytes of tensors after the generation, by groups of the plan's parts; shared storages count once."""
    rows = draft.turns[cache].drafter.rows
    weights = storage_bytes(model_tensors(target))
    own = storage_bytes(model_tensors(target, draft)) - weights
    kv = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if draft.device.type == "cuda":  # one storage for all blocks, all of it taken
        draft_kv = rows.store.kv.nbytes
    else:  # rows that were never touched take no memory
        draft_kv = sum(row.keys.nbytes + row.values.nbytes for row in rows.layers)
    return {
        "target weights": weights,
        "draft weights and tables": own,
        # The cache that users get holds the text; while it is generated there are rows of a tree behind it.
        "target KV cache": storage_bytes(kv) // cache.get_seq_length() * most_rows,
        "draft KV cache": draft_kv,
    }


# --- in the parent -----------------------------------------------------------------------------

GROUPS = {
    "target weights": r"target: (embedding|layers?|final norm|head|rest)",
    "draft weights and tables": r"draft: (blocks|head|embedding)",
    "target KV cache": r"target: KV cache",
    "draft KV cache": r"draft: KV cache",
}
"""Names that `live_bytes` counts -> the plan's parts."""


def run_child(args: argparse.Namespace, pair: Path, vram_bytes: int) -> dict[str, Any]:
    """Run `measure` in another process."""
    command = [sys.executable, __file__, "--pair", str(pair), "--vram", f"{vram_bytes}b", "--child"]
    for name in ("dtype", "prompt_tokens", "new_tokens", "prefill_rows"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | SMALL_GPU)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Planned and seen bytes, row by row, with the error as a share of what was seen."""
    parts, seen = result["plan"]["parts"], result["seen"]

    def planned(pattern: str, device: str = "cpu|gpu") -> int:
        return sum(p["bytes"] for p in parts if re.match(pattern, p["name"]) and re.fullmatch(device, p["device"]))

    rows = [("tensors: " + name, planned(pattern), result["live"][name]) for name, pattern in GROUPS.items()]
    totals = {"cpu": ("RAM", seen["peak"])}
    if "gpu_peak" in seen:
        rows.append(("VRAM that torch allocates", planned("(?!margin)", "gpu"), seen["gpu_peak"]))
        totals["gpu"] = ("VRAM", seen["gpu_used"])
    for device, (name, used) in totals.items():
        beyond = used - planned("(?!margin)", device)
        rows.append((f"{name} beyond the parts: the margin", planned("margin", device), beyond))
        rows.append((name, planned(".*", device), used))
    return [dict(what=what, planned=plan, seen=real, error=plan / real - 1) for what, plan, real in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows of `compare` as a table."""
    lines = [f"{'':36}{'planned':>12}{'seen':>12}{'error':>9}"]
    for row in rows:
        sizes = "".join(f"{format_bytes(row[key]):>12}" for key in ("planned", "seen"))
        lines.append(f"{row['what']:36}{sizes}{row['error']:>+9.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="1b", help="of the inflated pair, see inflate.py")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    add("--prompt-tokens", type=int, default=1500)
    add("--new-tokens", type=int, default=24)
    add("--prefill-rows", type=int, default=None, help="prefill_chunk_size of generate")
    add("--vram", type=parse_bytes, nargs="+", default=None, metavar="SIZE")
    add("--pair", type=Path, default=None, metavar="DIR", help="a pair that inflate.py wrote; default: inflate one")
    add("--out", type=Path, default=HERE / "results" / "plan.jsonl")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    budgets = args.vram or [0, *([2**30, 2 * 2**30, 4 * 2**30] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as scratch:
        pair = args.pair or Path(scratch) / "pair"
        if args.pair is None:
            inflate = [sys.executable, str(HERE / "inflate.py"), "--target", str(TARGET), "--draft", str(DRAFT)]
            inflate += ["--shape", args.shape, "--dtype", args.dtype, "--out", str(pair)]
            subprocess.run(inflate, check=True)
        results = []
        for vram_bytes in budgets:
            result = run_child(args, pair, vram_bytes)
            rows = compare(result)
            where = f"VRAM {format_bytes(vram_bytes)}" if vram_bytes else "no GPU"
            settings = f"inflated pair, {args.shape}, {args.dtype}, {args.prompt_tokens} prompt tokens, {where}"
            print(f"\n{settings}\n{table(rows)}", flush=True)
            layers = result["plan"]["gpu_layers"]
            results.append({"vram_bytes": vram_bytes, "gpu_layers": len(layers), "rows": rows, "seen": result["seen"]})
    names = ("shape", "dtype", "prompt_tokens", "new_tokens", "prefill_rows")
    line = json.dumps({"plan_accuracy": results} | {name: getattr(args, name) for name in names} | provenance())
    print(line)
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
