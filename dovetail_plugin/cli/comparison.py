"""Prepares what `dovetail bench` runs: loaded models, prompts, and the settings that are kept with the result.

Real pairs are loaded as for `dovetail generate`. For simulated acceptance, a target may be a config without weights,
which gets random ones and random prompts, and an untrained draft may stand in for a trained one.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.compare import Comparison
from ..bench.prompts import encode_chats, random_prompts, read_chats
from ..bench.random_model import random_model
from ..bench.synthetic import SyntheticComparison
from ..drafts.model import DovetailDraft
from ..planning.known_shapes import SHAPES, load_config
from ..targets.gguf import is_gguf
from .common import generate_options
from .loading import (
    LoadedPair,
    check_device,
    check_target,
    check_vram,
    load_draft,
    load_pair,
    load_target,
    load_target_tokenizer,
    prepare_draft,
)


def prepare(args: argparse.Namespace) -> tuple[Comparison, list[Tensor], dict[str, Any]]:
    """Return the comparison, its prompts (1, T), and the settings that are kept with its result.

    Raises:
        ValueError: an option does not fit the others, or a model or the prompts cannot be loaded.
    """
    options = generate_options(args)
    # Before anything is loaded, so that mistakes come at once.
    chats = [] if _is_without_tokenizer(args) else read_chats(args.prompts, args.count)
    if args.synthetic_acceptance is None:
        if args.target in SHAPES:
            raise ValueError(
                f"--target {args.target} is a shape without weights; it needs --synthetic-acceptance RATE."
            )
        pair = load_pair(args)
        comparison = Comparison(pair.target, pair.draft, options, seed=args.seed)
    else:
        pair = _load_synthetic_pair(args)
        comparison = SyntheticComparison(
            pair.target, pair.draft, options, seed=args.seed, rate=args.synthetic_acceptance
        )
    if pair.tokenizer is None:
        prompts = random_prompts(args.count, pair.target.config.get_text_config(decoder=True).vocab_size)
    else:
        prompts = encode_chats(chats, pair.tokenizer)
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
    """Load a pair as `load_pair`, with random weights where there is only a config, and an untrained draft by default.

    Raises:
        ValueError: see `load_pair`; --prompts is given for a target without a tokenizer; there is too little memory.
    """
    check_device(args)
    check_vram(args)
    if _is_without_tokenizer(args):
        if args.prompts is not None:
            raise ValueError(f"--prompts: {args.target} has no tokenizer to read them with; leave it out.")
        target, tokenizer = _random_target(args), None
        draft = load_draft(args, target.config) if args.draft is not None else _untrained_draft(target, args)
    else:
        try:
            config = check_target(args)
        except ValueError as error:
            raise ValueError(f"{error} A shape can be named, too: {', '.join(SHAPES)}.") from error
        trained = load_draft(args, config) if args.draft is not None else None
        target, tokenizer = load_target(args), load_target_tokenizer(args)
        draft = trained if trained is not None else _untrained_draft(target, args)
    prepare_draft(args, target, draft)
    return LoadedPair(target, tokenizer, draft)


def _untrained_draft(target: Any, args: argparse.Namespace) -> DovetailDraft:
    device = args.draft_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    draft = DovetailDraft.for_target(target, blocks=args.blocks or 1).to(device)
    return draft if args.dtype == "auto" else draft.to(getattr(torch, args.dtype))


def _is_without_tokenizer(args: argparse.Namespace) -> bool:
    """Return whether the target gets random weights and prompts, because there is only a config."""
    return args.synthetic_acceptance is not None and bool(args.target) and _is_config_only(args.target)


def _is_config_only(name: str) -> bool:
    """Whether this is a shape, a config file, or a directory without weights."""
    place = Path(name)
    return name in SHAPES or (place.is_file() and not is_gguf(place)) or (place.is_dir() and not _has_weights(place))


def _has_weights(directory: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir())


def _random_target(args: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        config = load_config(args.target)
        if Path(args.target).is_file():
            config.name_or_path = Path(args.target).resolve().parent.name
        return random_model(config, dtype)
    except ValueError as error:
        raise ValueError(f"--target {args.target}: {error}") from error
