"""Peak memory of a generation with the draft and of a plain one, each measured in its own process.

    python benchmarks/memory.py --prompt-tokens 1500

The draft should add its weights and cache and N rows of logits and features, and nothing of the size of the target's
cache. Uses the bundled pair in float32.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from common import TARGET, argument_parser, load_bundled, positive, store
from transformers import AutoConfig

MODES = ("plain", "draft")


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mode: str, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Runs in the child: load both models, generate once, return the peaks after loading and after generation."""
    target, draft = load_bundled(torch.float32)
    ids = torch.randint(4, target.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    extra = {"assistant_model": draft} if mode == "draft" else {}
    loaded_mib = peak_mib()
    target.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **extra)
    return {"loaded_mib": loaded_mib, "peak_mib": peak_mib()}


def measure_in_child(mode: str, args: argparse.Namespace) -> dict[str, float]:
    """Run `measure` in a new process."""
    sizes = ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    done = subprocess.run(
        [sys.executable, __file__, "--mode", mode, *sizes], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def cache_mib(config: Any, tokens: int) -> float:
    """Size of the target's float32 key/value cache for this many tokens."""
    return 2 * 4 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim / 2**20


def main() -> None:
    parser = argument_parser(__doc__, "memory.jsonl")
    add = parser.add_argument
    add("--prompt-tokens", type=positive, default=1500, help="length of the random prompt")
    add("--new-tokens", type=positive, default=200, help="tokens to generate")
    add("--repeats", type=positive, default=3, help="processes of each kind; the smallest peak counts")
    add("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args.prompt_tokens, args.new_tokens)))
        return
    peaks = {mode: min(measure_in_child(mode, args)["peak_mib"] for _ in range(args.repeats)) for mode in MODES}
    target_cache_mib = cache_mib(AutoConfig.from_pretrained(TARGET), args.prompt_tokens + args.new_tokens)
    print(f"prompt {args.prompt_tokens} tokens, {args.new_tokens} new tokens, float32")
    print(f"{'peak, plain generate':32}{peaks['plain']:10.1f} MiB")
    print(f"{'peak, with the draft':32}{peaks['draft']:10.1f} MiB")
    print(f"{'difference':32}{peaks['draft'] - peaks['plain']:10.1f} MiB")
    print(f"{'target cache, for comparison':32}{target_cache_mib:10.1f} MiB")
    store({"peaks_mib": peaks, "target_cache_mib": target_cache_mib}, args.out)


if __name__ == "__main__":
    main()
