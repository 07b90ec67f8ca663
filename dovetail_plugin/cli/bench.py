"""`dovetail bench`: plain `generate` against the draft on the same prompts, as a table, a JSON line and a picture.

With `--synthetic-acceptance` no trained draft is needed: see `synthetic.py`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from ..bench import plot as plots
from ..bench.compare import Comparison
from ..bench.prompts import load_prompts, random_prompts
from ..bench.random_model import random_model
from ..bench.sweep import PROMPTS, sweep
from ..bench.synthetic import SyntheticComparison, probabilities
from ..drafts.model import DovetailDraft
from ..machine import thread_count
from ..planning.known_shapes import SHAPES, load_config
from .common import (
    HelpFormatter,
    LoadedPair,
    add_budget_arguments,
    add_pair_arguments,
    add_sampling_arguments,
    check_device,
    check_target,
    generate_options,
    load_draft,
    load_pair,
    load_target,
    set_budget,
)

EPILOG = """\
examples:
  dovetail bench --target DIR --draft DIR
  dovetail bench --target DIR --draft DIR --count 20 --max-new-tokens 64 --nodes 8 --depth 5 --top-k 4
  dovetail bench --target DIR --draft DIR --prompts my.jsonl --out results.jsonl --plot bench.png
  dovetail bench --target llama-3.2-1b-shape --synthetic-acceptance 0.8      # before there is a draft, or a model

Each prompt is generated both ways, one right after the other, with the same model, dtype and threads.
tokens/s counts whole calls of generate, prompt included. Let nothing else run on the machine meanwhile.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="measure what a draft brings on this machine",
        description="Run plain generate and the draft on the same prompts, interleaved, and compare.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=None,
        metavar="FILE.jsonl",
        help="lines with prompt, question, turns or messages; default: GSM8K test questions",
    )
    parser.add_argument("--count", type=int, default=20, help="prompts to run")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON line to this file")
    parser.add_argument(
        "--plot",
        type=Path,
        default=None,
        metavar="FILE.png",
        help="draw phases, acceptance by depth, the policy's forecasts and a sweep of fixed budgets, which is run "
        f"on {PROMPTS} prompts more (needs matplotlib)",
    )
    add_pair_arguments(parser, draft_required=False)
    _add_synthetic_arguments(parser)
    add_sampling_arguments(parser)
    add_budget_arguments(parser)
    parser.set_defaults(run=run)


def _add_synthetic_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "try before training",
        "Real passes of target and draft, but what is accepted is decided by lot. --draft may be left out then, and "
        f"--target may be a shape or a config.json, which gets random weights: {', '.join(SHAPES)}.",
    )
    group.add_argument(
        "--synthetic-acceptance",
        type=float,
        default=None,
        metavar="RATE",
        help="how often the draft's first choice is right, from 0 to 1; trained drafts reach 0.6 to 0.85",
    )
    group.add_argument("--blocks", type=int, default=None, help="of the untrained draft where --draft is left out (1)")


def run(args: argparse.Namespace) -> int:
    """Load, compare, print. Status 1 if a greedy text differs other than at a tie."""
    _check(args)
    comparison, prompts, settings = _prepare(args)
    with thread_count(args.threads):
        comparison.warm_up(prompts[0])
        for input_ids in tqdm(prompts, desc="bench", unit="prompt"):
            comparison.add(input_ids)
        tried = sweep(comparison, tqdm(prompts[:PROMPTS], desc="fixed budgets", unit="prompt")) if args.plot else None
        if tried is not None:
            settings["sweep_tokens_per_s"] = tried.as_dict()
        result = comparison.result(**settings)
        line = result.json_line()
    print(result.table())
    print(line)
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    if tried is not None:
        plots.draw(args.plot, result, [r for report in comparison.reports for r in report.rounds], tried)
        print(f"plot: {args.plot}")
    return int(result.differences > 0 and not args.do_sample)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded, with ValueError or ImportError."""
    synthetic = args.synthetic_acceptance is not None
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}.")
    if not synthetic and args.target in SHAPES:
        raise ValueError(f"--target {args.target} is a shape without weights; it needs --synthetic-acceptance RATE.")
    if not synthetic and args.draft is None:
        raise ValueError("--draft is missing; give one, or --synthetic-acceptance RATE to try without a trained draft.")
    if synthetic:
        probabilities(args.synthetic_acceptance)
        if args.do_sample:
            raise ValueError("--do-sample does not go with --synthetic-acceptance, whose tokens are drawn by lot.")
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if args.blocks is not None:
        if not synthetic or args.draft is not None:
            raise ValueError("--blocks is of the untrained draft of --synthetic-acceptance without --draft.")
        if args.blocks < 1:
            raise ValueError(f"--blocks must be at least 1, got {args.blocks}.")
    if args.plot is not None:
        plots.check_file(args.plot)


def _prepare(args: argparse.Namespace) -> tuple[Comparison, list[Tensor], dict[str, Any]]:
    """The comparison, its prompts, and what is kept with its result."""
    options = generate_options(args)
    if args.synthetic_acceptance is None:
        pair = load_pair(args)
        comparison = Comparison(pair.target, pair.draft, options, seed=args.seed)
    else:
        pair = _load_synthetic_pair(args)
        if not isinstance(pair.draft, DovetailDraft):
            raise ValueError(f"--synthetic-acceptance simulates drafts that read features, not a {args.draft}.")
        comparison = SyntheticComparison(
            pair.target, pair.draft, options, seed=args.seed, rate=args.synthetic_acceptance
        )
    if pair.tokenizer is None:
        prompts = random_prompts(args.count, pair.target.config.get_text_config(decoder=True).vocab_size)
    else:
        prompts = load_prompts(args.prompts, pair.tokenizer, args.count)
    settings = dict(
        target=pair.target.config.name_or_path.rstrip("/").rsplit("/", 1)[-1],
        parameters=pair.target.num_parameters(),
        draft_parameters=pair.draft.num_parameters(),
        dtype=str(pair.target.dtype).removeprefix("torch."),
        draft_device=str(pair.draft.device),
        budget=str(pair.draft.budget or "policy"),
        **options,
    )
    if pair.tokenizer is None:
        settings["weights"] = "random weights"
    return comparison, prompts, settings


def _load_synthetic_pair(args: argparse.Namespace) -> LoadedPair:
    """As `load_pair`; random weights and no tokenizer where only a config is given, an untrained draft where none is.

    Raises:
        ValueError: as `load_pair`; prompts of the user's own for a target without a tokenizer; too little memory.
    """
    check_device(args)
    untrained = args.draft is None
    if args.target and _is_config_only(args.target):
        if args.prompts is not None:
            raise ValueError(f"--prompts: {args.target} has no tokenizer to read them with; leave it out.")
        draft = None if untrained else load_draft(args)
        target, tokenizer = _random_target(args), None
    else:
        name = check_target(args) if args.target_ir else _named_target(args)
        draft = None if untrained else load_draft(args)
        target, tokenizer = load_target(args), AutoTokenizer.from_pretrained(name)
    if draft is None:
        draft = _untrained_draft(target, args)
    set_budget(draft, args)
    return LoadedPair(target, tokenizer, draft)


def _untrained_draft(target: Any, args: argparse.Namespace) -> DovetailDraft:
    device = args.draft_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    draft = DovetailDraft.for_target(target, blocks=args.blocks or 1).to(device)
    return draft if args.dtype == "auto" else draft.to(getattr(torch, args.dtype))


def _is_config_only(name: str) -> bool:
    """Whether this is a shape, a config file, or a directory without weights."""
    place = Path(name)
    return name in SHAPES or place.is_file() or (place.is_dir() and not _weights_in(place))


def _weights_in(directory: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir())


def _named_target(args: argparse.Namespace) -> str:
    """--target, which is there.

    Raises:
        ValueError: it is not; names the shapes that might have been meant.
    """
    try:
        load_config(args.target)
    except ValueError as error:
        raise ValueError(f"--target {error}") from error
    return args.target


def _random_target(args: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        config = load_config(args.target)
        if Path(args.target).is_file():
            config.name_or_path = Path(args.target).resolve().parent.name
        return random_model(config, dtype)
    except ValueError as error:
        raise ValueError(f"--target {args.target}: {error}") from error
