"""Compare engines that run the same weights: the cost of a pass over N rows, and tokens/s without and with a draft.

    python benchmarks/inflate.py --target ... --draft ... --shape 1b --out big
    dovetail export --target big/target --to openvino --weights int8 --out big/ov-int8
    python benchmarks/engines.py --target big/target --draft big/draft \\
        --packed int8 --packed int4 \\
        --engine "openvino int8=big/ov-int8" --engine "openvino bf16=big/ov-fp32,inference_precision=bf16"

This is `dovetail bench --engines` for chosen engines, with the result in benchmarks/results/. "torch" is transformers
alone: `generate` and the model's own cache. "torch, dovetail" is the same model with this package's session, and
"packed" is that with `CpuWeights`. Let nothing else run on the machine meanwhile.
"""

from dataclasses import asdict
from pathlib import Path

from common import argument_parser, parse_budget, positive, store
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft
from dovetail_plugin.bench.engines import CONTEXT, compare_engines
from dovetail_plugin.bench.prompts import load_prompts
from dovetail_plugin.cli.common import parse_engine
from dovetail_plugin.cli.engines import exported_contender, llamacpp_engine, packed_contender, torch_contender
from dovetail_plugin.kernels import WEIGHTS
from dovetail_plugin.kernels.library import library
from dovetail_plugin.targets.gguf import is_gguf


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
        help="exported target, or GGUF file, to compare; can be repeated",
    )
    add(
        "--packed", choices=WEIGHTS, action="append", default=[], help="the target with packed weights; can be repeated"
    )
    add("--budget", type=parse_budget, default=None, help="nodes/depth/top_k (default: the policy chooses)")
    add("--count", type=positive, default=8, help="number of prompts")
    add("--new-tokens", type=positive, default=64, help="tokens to generate per prompt")
    add("--repeats", type=positive, default=9, help="timed passes for each row count")
    add("--context", type=positive, default=CONTEXT, help="tokens before each timed pass")
    args = parser.parse_args()
    new_draft = lambda: DovetailDraft.from_pretrained(args.draft)  # noqa: E731
    stock = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    contenders = [torch_contender(stock, new_draft(), args.budget)]
    for kind in args.packed:
        contenders.append(packed_contender(kind, str(args.target), new_draft(), args.budget, dtype="auto"))
    files = [(name, settings) for name, settings in args.engine if is_gguf(settings["dir"])]
    for name, settings in (one for one in args.engine if one not in files):
        contenders.append(exported_contender(name, settings, new_draft(), args.budget, stock))
    prompts = load_prompts(None, AutoTokenizer.from_pretrained(args.target), args.count)
    most = max(args.context, max(ids.shape[1] for ids in prompts) + args.new_tokens)
    result = compare_engines(
        contenders,
        stock,
        prompts,
        {"max_new_tokens": args.new_tokens, "do_sample": False},
        kernels=library(),
        others=[llamacpp_engine(name, settings, stock.config, most) for name, settings in files],
        context=args.context,
        repeats=args.repeats,
    )
    print(f"\n{result.table()}")
    store(asdict(result), args.out)


if __name__ == "__main__":
    main()
