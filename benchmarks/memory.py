"""Peak memory of a generation with the draft against a plain one, each in a process of its own.

    python benchmarks/memory.py --prompt-tokens 1500

Expected above plain: the draft's weights and cache, N rows of logits and features, and nothing of the size
of the target's cache. Prints a table and one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from run import load_bundled

from dovetail_plugin.bench.provenance import provenance

MODES = ("plain", "draft")


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mode: str, prompt_tokens: int, new_tokens: int) -> None:
    """In the child: load both models either way, generate one way, print the peaks as JSON."""
    target, draft = load_bundled(torch.float32)
    ids = torch.randint(4, target.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    extra = {"assistant_model": draft} if mode == "draft" else {}
    loaded = peak_mib()
    target.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **extra)
    print(json.dumps({"loaded_mib": loaded, "peak_mib": peak_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind; the smallest peak counts")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        measure(args.mode, args.prompt_tokens, args.new_tokens)
        return
    command = [sys.executable, __file__, "--prompt-tokens", str(args.prompt_tokens)]
    command += ["--new-tokens", str(args.new_tokens)]
    peaks = {}
    for mode in MODES:
        runs = [
            json.loads(subprocess.run([*command, "--mode", mode], capture_output=True, text=True, check=True).stdout)
            for _ in range(args.repeats)
        ]
        peaks[mode] = min(run["peak_mib"] for run in runs)
    target, _ = load_bundled(torch.float32)
    config, tokens = target.config, args.prompt_tokens + args.new_tokens
    cache_mib = 2 * 4 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim / 2**20
    print(f"prompt {args.prompt_tokens}, new tokens {args.new_tokens}, float32")
    print(f"{'peak, plain generate':32}{peaks['plain']:10.1f} MiB")
    print(f"{'peak, with the draft':32}{peaks['draft']:10.1f} MiB")
    print(f"{'difference':32}{peaks['draft'] - peaks['plain']:10.1f} MiB")
    print(f"{'target cache, for comparison':32}{cache_mib:10.1f} MiB")
    print(json.dumps({"peaks_mib": peaks, "target_cache_mib": cache_mib} | provenance()))


if __name__ == "__main__":
    main()
