"""Loads the models that the options of `common.py` name, and refuses what cannot be loaded before long work."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from ..drafts.auto import AutoDraft
from ..drafts.base import Draft
from ..drafts.checkpoints.claims import is_causal, load_language_model, load_tokenizer, model_config
from ..drafts.checkpoints.read import read_config
from ..drafts.config import DovetailConfig
from ..drafts.known_pairs import LOOKUP, draft_name_for
from ..drafts.model import DovetailDraft
from ..drafts.small_model import SmallModelDraft
from ..hf import register
from ..planning.apply import apply_plan
from ..planning.device_plan import parse_bytes
from ..policy.device_split import DeviceSplitPolicy
from ..targets.cpu_weights import METHOD, CpuWeights
from ..targets.gguf import is_gguf, load_gguf, planned_config
from ..tree import TreeBudget
from .common import hub_options

register()  # importing the package does not do this in the process of the command


@dataclass(frozen=True)
class LoadedPair:
    """A target, in torch or exported, with its tokenizer (None for random weights) and draft."""

    target: Any
    tokenizer: Any
    draft: Draft


def load_pair(args: argparse.Namespace) -> LoadedPair:
    """Load target, tokenizer and draft with the tree budget and the placement that were asked for.

    Raises:
        ValueError: a model does not exist, --target or --draft is something else, or the device is missing.
    """
    config = check_target(args)
    check_vram(args)
    draft = load_draft(args, config)
    tokenizer, target = load_target_tokenizer(args), load_target(args)
    if isinstance(draft, SmallModelDraft):
        draft.target_vocabulary = tokenizer.get_vocab()
    prepare_draft(args, target, draft)
    return LoadedPair(target, tokenizer, draft)


def check_model(option: str, name: str, read: Callable[..., Any] = model_config, **options: Any) -> Any:
    """Read the config of a model that is about to be loaded.

    Args:
        option: the option that named it, for messages.
        read: reads the config. Drafts of other projects have configs that transformers takes for whole models.
        options: for `read`.

    Raises:
        ValueError: there is no such model, or its config cannot be read.
    """
    if Path(name).is_file():
        raise ValueError(f"{option} {name} is a file; give the directory of the model.")
    try:
        return read(name, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{option} {name}: {error}") from error
        raise ValueError(f"{option} {name}: no such directory, and no hub model of that name within reach.") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{option} {name} comes with Python code, which runs only with --trust-remote-code. Read it first."
            ) from error
        raise ValueError(f"{option} {name}: {error}") from error


def check_target(args: argparse.Namespace) -> PretrainedConfig:
    """Read the config of --target or --target-ir.

    Raises:
        ValueError: there is no such model, or it is a draft.
    """
    weights = getattr(args, "weights", None)  # not an option of `train`
    option, name = ("--target", args.target) if args.target else ("--target-ir", args.target_ir)
    if not args.target and weights:
        raise ValueError("--weights packs the weights of --target. An exported target has the weights of its export.")
    if is_gguf(args.target):
        if weights:
            raise ValueError("--weights quantizes a target that has floats. A GGUF file has the weights that it holds.")
        return planned_config(args.target)
    config = check_model(option, name, **target_source(args))
    if is_draft(config):
        swapped = f"Check that {option} and --draft are not swapped." if "draft" in args else "Name the model itself."
        raise ValueError(f"{option} {name} is a draft, not a target. {swapped}")
    if args.target and not is_causal(config):
        raise ValueError(f"{option} {name} is a {config.model_type} model, and targets are decoder-only models.")
    stored = getattr(config, "quantization_config", None)
    if weights and stored:
        what = stored.get("weights") if stored.get("quant_method") == METHOD else stored.get("quant_method")
        raise ValueError(
            f"--weights {weights}: the weights of {option} {name} are quantized already ({what}). Leave out "
            "--weights, or name the original model."
        )
    return config


def target_source(args: argparse.Namespace) -> dict[str, Any]:
    """Where the target comes from. Its Python code runs only if that was allowed; transformers would ask on stdin."""
    return hub_options(args, args.revision) | {"trust_remote_code": args.trust_remote_code}


def is_draft(config: PretrainedConfig) -> bool:
    """Return whether a config belongs to a draft of any known format."""
    if isinstance(config, DovetailConfig) or hasattr(config, "speculators_model_type"):
        return True
    return any("eagle" in name.lower() for name in config.architectures or [])


def load_target(args: argparse.Namespace) -> Any:
    """Load the target, in torch or exported.

    Raises:
        ValueError: a file of it cannot be used.
    """
    if args.target_ir:
        from dovetail_plugin.adapters import load_exported

        return load_exported(args.target_ir, threads=args.threads, **target_source(args))
    if is_gguf(args.target):
        return load_gguf(args.target, dtype=torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype))
    packed = {} if args.weights is None else {"quantization_config": CpuWeights(args.weights)}
    return load_language_model(args.target, dtype=args.dtype, **packed, **target_source(args))


def load_target_tokenizer(args: argparse.Namespace) -> Any:
    """Load the target's tokenizer, from the same revision.

    Raises:
        ValueError: it cannot be read.
    """
    if is_gguf(args.target):
        return load_tokenizer(str(Path(args.target).parent), gguf_file=Path(args.target).name)
    return load_tokenizer(args.target or args.target_ir, **target_source(args))


def load_draft(args: argparse.Namespace, target_config: PretrainedConfig) -> Draft:
    """Load --draft, or the draft that is known for the target; says on stderr which that is.

    Raises:
        ValueError: --draft does not exist or is not a draft, or the device is missing.
    """
    check_device(args)
    hub = hub_options(args, args.draft_revision)
    options = hub | {
        "dtype": args.dtype,
        "device_map": args.draft_device,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.draft is not None:
        if args.draft != LOOKUP:
            check_model("--draft", args.draft, read_config, **hub)
        return AutoDraft.from_pretrained(args.draft, **options)
    name, why = draft_name_for(target_config)
    print(f"--draft not given: taking {name} ({why})", file=sys.stderr)
    try:
        return AutoDraft.from_pretrained(name, **options)
    except OSError as error:
        print(f"{name} cannot be loaded, looking up the text instead: {error}", file=sys.stderr)
        return AutoDraft.from_pretrained(LOOKUP)


def check_device(args: argparse.Namespace) -> None:
    """Refuse a --draft-device that does not exist.

    Raises:
        ValueError: torch finds no such device.
    """
    if args.draft_device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--draft-device {args.draft_device}: torch finds no CUDA device; give cpu or auto.")
    if args.draft_device != "auto":
        try:
            if torch.empty(1, device=args.draft_device).is_meta:
                raise RuntimeError("a meta device holds no numbers")
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise ValueError(
                f"--draft-device {args.draft_device!r} is not a device here; give cuda, cuda:1, cpu or auto."
            ) from error


def check_vram(args: argparse.Namespace) -> None:
    """Refuse a --vram that cannot be used, before models are loaded.

    Raises:
        ValueError: the size is not valid, there is no GPU, or --draft-device says where the draft goes.
    """
    if args.vram is None:
        return
    try:
        vram_bytes = parse_bytes(args.vram)
    except ValueError as error:
        raise ValueError(f"--vram: {error}") from error
    if args.draft_device != "auto":
        raise ValueError("--vram plans where the draft goes; leave out --draft-device.")
    if vram_bytes and not torch.cuda.is_available():
        raise ValueError(f"--vram {args.vram}: torch finds no CUDA device; give 0, or plan with `dovetail plan`.")


def prepare_draft(args: argparse.Namespace, target: Any, draft: Draft) -> None:
    """Give the draft the tree budget of --tree-nodes, --tree-depth and --tree-top-k, and place both by --vram."""
    given = {name: getattr(args, f"tree_{name}") for name in ("nodes", "depth", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    draft.budget = TreeBudget(**given) if given else None
    if args.vram is not None:
        place_by_plan(args, target, draft)


def place_by_plan(args: argparse.Namespace, target: Any, draft: Draft) -> None:
    """Place both models by the plan for --vram, and print the plan on stderr.

    Raises:
        ValueError: the models do not fit, or the draft cannot be placed.
    """
    if not draft.supports_placement:
        raise ValueError(f"--vram plans for drafts that read features, not for a {type(draft).__name__}.")
    draft.policy = DeviceSplitPolicy(vram_budget=args.vram)
    weights = {} if args.target_ir is None else {"dtype": "int8"}  # an exported target is not split, whatever it is
    placed = cast(DovetailDraft, draft)  # as `supports_placement` says
    plan = draft.policy.plan(target.config, placed.config, **weights)
    apply_plan(plan, target, placed)
    print(plan.table(), file=sys.stderr)
