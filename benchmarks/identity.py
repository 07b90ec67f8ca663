"""Count drafted texts that differ from plain ones, over prompts of all bundled data, with the default policy, in fp32.

    python benchmarks/identity.py                        # 10,000 prompts of 64 tokens, about an hour on two cores
    python benchmarks/identity.py --part 1/2 --progress FILE & python benchmarks/identity.py --part 2/2 --progress FILE
    python benchmarks/identity.py --count 800 --threads 4
    python benchmarks/identity.py --count 32 --threads 4 --shape 500m --new-tokens 32   # with the inflated pair
    python benchmarks/identity.py --count 1000 --weights int8                           # with packed weights
    python benchmarks/identity.py --count 2 --new-tokens 4                              # a quick check

A text is checked with one plain pass over it: each token must be the best one. Where the two best logits are within
0.001, plain `generate` decides. With packed weights, whose rows do not depend on each other, plain `generate` decides
about all texts. A run that is interrupted goes on where it was, if `--progress` names the same file.
Several processes may share such a file: each does its part of the prompts, and whatever ends last has all of them.
With several threads, which share target and draft, the result also holds their seconds divided by those of one thread
for the same calls, with the draft and without: medians of runs in turns, of calls alone.
"""

import argparse
import gzip
import json
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import PAIR, TARGET, argument_parser, load_bundled, load_inflated, positive, store
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import CpuWeights, DovetailDraft
from dovetail_plugin.bench.provenance import provenance
from dovetail_plugin.kernels import KINDS

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 64
TIE = 1e-3
TIMED_PROMPTS = 32
REPEATS = 3


def texts() -> list[str]:
    """Return all texts of the bundled data."""
    found = []
    for file in sorted((PAIR / "data").glob("*.gz")):
        raw = gzip.decompress(file.read_bytes()).decode("utf-8")
        rows = json.loads(raw) if file.name.endswith(".json.gz") else map(json.loads, raw.splitlines())
        found += [" ".join(str(value) for value in row.values()) for row in rows]
    for file in sorted((ROOT / "dovetail_plugin" / "prompts").glob("*.jsonl")):
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found += [" ".join(str(value) for value in row.values()) for row in rows]
    return found


def prompts(count: int) -> list[Tensor]:
    """Return `count` prompts (1, 64) int64: the texts one after another, cut into pieces, evenly spread.

    Raises:
        SystemExit: there are fewer pieces.
    """
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = [token for text in texts() for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces = len(ids) // PROMPT_TOKENS
    if count > pieces:
        raise SystemExit(f"--count {count} is more than the {pieces} prompts of the bundled data.")
    starts = [PROMPT_TOKENS * (number * pieces // count) for number in range(count)]
    return [torch.tensor(ids[start : start + PROMPT_TOKENS])[None] for start in starts]


def checked(target: Any, draft: DovetailDraft, input_ids: Tensor, new_tokens: int, *, by_pass: bool = True) -> str:
    """Generate with the draft and return "equal", "equal (generate)" or "different".

    Args:
        target: model.
        draft: its draft.
        input_ids: (1, T) int64.
        new_tokens: tokens to generate.
        by_pass: whether one pass over the text may decide; else plain `generate` does.
    """
    drafted = generate(target, draft, input_ids, new_tokens)
    if not by_pass:
        plain = generate(target, None, input_ids, new_tokens)
        return "equal (generate)" if torch.equal(plain, drafted) else "different"
    with torch.no_grad():
        logits = target(input_ids=drafted[:, :-1]).logits[0, input_ids.shape[1] - 1 :]
    best = logits.topk(2)
    if bool((best.values[:, 0] - best.values[:, 1] > TIE).all()):
        return "equal" if torch.equal(best.indices[:, 0], drafted[0, input_ids.shape[1] :]) else "different"
    plain = generate(target, None, input_ids, new_tokens)
    return "equal (generate)" if torch.equal(plain, drafted) else "different"


def generate(target: Any, draft: DovetailDraft | None, input_ids: Tensor, new_tokens: int) -> Tensor:
    """Generate greedily, without an end of text."""
    assistant = {} if draft is None else {"assistant_model": draft}
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return target.generate(input_ids, **assistant, **options)


def seconds_to_lone_seconds(
    target: Any, draft: DovetailDraft | None, ids: list[Tensor], new_tokens: int, threads: int
) -> float:
    """Return the seconds of `threads` threads divided by those of one thread, for the same calls of `generate`.

    The one thread is the main one, and the others have ended before it runs: a thread's OpenMP threads live as long as
    it does, and with more of them than cores OpenMP lets each sleep where it waits, which slows down a lone call, too.
    """

    def one(prompt: Tensor) -> None:
        generate(target, draft, prompt, new_tokens)

    def lone() -> float:
        start_s = time.perf_counter()
        for prompt in ids:
            one(prompt)
        return time.perf_counter() - start_s

    def several() -> float:
        start_s = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, ids))
        return time.perf_counter() - start_s

    return statistics.median(several() / lone() for _ in range(REPEATS))


def finished(file: Path) -> dict[int, tuple[str, str]]:
    """Return number -> verdict and git revision of the prompts that are done, one a line of `file`."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {number: (verdict, revision) for number, verdict, revision in map(json.loads, lines)}


def part(text: str) -> tuple[int, int]:
    """Parse "K/N" for argparse."""
    number, parts = (int(value) for value in text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(text)
    return number, parts


def run(
    target: Any, draft: DovetailDraft, ids: list[Tensor], args: argparse.Namespace, file: Path, numbers: range
) -> None:
    """Check the prompts with these numbers, and write the verdicts into `file`."""
    done, revision = finished(file), provenance()["git"]
    left = [number for number in numbers if number not in done]
    lock = threading.Lock()

    def one(number: int) -> None:
        verdict = checked(target, draft, ids[number], args.new_tokens, by_pass=args.weights is None)
        with lock, open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps([number, verdict, revision]) + "\n")
            bar.update()

    with (
        tqdm(total=len(numbers), initial=len(numbers) - len(left), desc="prompts", unit="prompt") as bar,
        ThreadPoolExecutor(args.threads) as pool,
    ):
        list(pool.map(one, left))


def main() -> None:
    """Run the command line."""
    parser = argument_parser(__doc__, "identity_prompts.jsonl")
    parser.add_argument("--count", type=positive, default=10_000, help="number of prompts")
    parser.add_argument("--new-tokens", type=positive, default=64, help="tokens of each text")
    parser.add_argument("--threads", type=positive, default=1, help="threads that generate at once")
    parser.add_argument("--shape", help="inflate the bundled pair to this shape of inflate.py")
    parser.add_argument("--weights", choices=KINDS, help="pack the weights of the bundled target; not with --shape")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="K/N", help="the K-th of N parts of the prompts")
    parser.add_argument("--progress", type=Path, help="file with the prompts that are done; new without it")
    args = parser.parse_args()
    if args.shape and args.weights:
        parser.error("--weights packs the bundled target. Leave out --shape.")
    target, draft = load_inflated(args.shape, torch.float32) if args.shape else load_bundled(torch.float32)
    if args.weights:
        weights = CpuWeights(args.weights)
        target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32, quantization_config=weights)
    ids = prompts(args.count)
    file = args.progress or args.out.with_name(f"{args.out.stem}.{time.time_ns()}.progress")
    checked(target, draft, ids[0], args.new_tokens)  # measures the machine
    number, parts = args.part
    run(target, draft, ids, args, file, range(number - 1, len(ids), parts))
    done = finished(file).values()
    counts, revisions = Counter(verdict for verdict, _ in done), Counter(revision for _, revision in done)
    result = {
        "name": "identity",
        "prompts": args.count,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "shape": args.shape,
        "weights": args.weights,
        "verdicts": dict(counts),
        "prompts_of_revision": dict(revisions),
    }
    if args.threads > 1:
        timed = ids[:TIMED_PROMPTS]
        result["seconds_to_lone_seconds"] = {
            name: round(seconds_to_lone_seconds(target, assistant, timed, args.new_tokens, args.threads), 3)
            for name, assistant in (("draft", draft), ("plain", None))
        }
    print(f"{len(done)} of {args.count} prompts: " + ", ".join(f"{n} {v}" for v, n in counts.items()))
    if len(done) == args.count:
        store(result, args.out)
    if args.progress is None:
        file.unlink()
    raise SystemExit(1 if counts["different"] else 0)


if __name__ == "__main__":
    main()
