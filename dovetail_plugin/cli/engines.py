"""Loads what `dovetail bench --engines` compares: the target on every engine that is installed, with a draft each."""

import argparse
import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..bench.engines import Contender, EnginesResult, compare_engines, linear_bytes
from ..bench.engines_memory import engines_bytes, exported_bytes, refuse_without_memory
from ..bench.llamacpp import LlamaCpp
from ..bench.prompts import encode_chats, read_chats
from ..drafts.base import Draft
from ..drafts.checkpoints.claims import load_language_model
from ..drafts.small_model import SmallModelDraft
from ..kernels import FLOAT, KINDS, WEIGHTS
from ..kernels.library import library
from ..planning.memory import target_sizes
from ..planning.storage import EXPORTED
from ..targets.cpu_weights import CpuWeights
from ..targets.gguf import is_gguf
from ..tree import TreeBudget
from . import export
from .common import ALL_ENGINES, OPENVINO, SWITCHES, generate_options
from .loading import check_target, load_draft, load_target_tokenizer, prepare_draft, target_source

OWN_SETTINGS = ("dir", "budget", "group", "runner")
"""Settings of --engine that this module reads itself; see `common.parse_engine`."""


@dataclass
class Chosen:
    """The engines that are compared, beside the target in torch.

    Attributes:
        kinds: kinds of packed weights.
        exported: name of an exported target -> its settings; see `common.parse_engine`.
        export: whether the target is to be exported to OpenVINO.
        left_out: name of an engine -> why it is not compared.
    """

    kinds: list[str] = field(default_factory=list)
    exported: dict[str, dict[str, str]] = field(default_factory=dict)
    export: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


def choose(args: argparse.Namespace) -> Chosen:
    """Return the engines of --engines and --engine that can run here.

    Raises:
        ValueError: an engine that was named cannot run here, or two have one name.
    """
    asked = list(ALL_ENGINES) if args.engines == "all" else args.engines
    chosen = Chosen(exported=dict(args.engine))
    if len(chosen.exported) < len(args.engine):
        raise ValueError("--engine: two engines have the same name; name them differently.")
    taken = {"torch", "torch, dovetail", OPENVINO if OPENVINO in asked else "", *(f"packed {kind}" for kind in WEIGHTS)}
    for name in taken & chosen.exported.keys():
        raise ValueError(f"--engine: {name!r} is another engine's name; take another one.")
    if library() is None:
        chosen.left_out |= {kind: "the CPU kernels were not built" for kind in KINDS if kind in asked}
    chosen.kinds = [kind for kind in WEIGHTS if kind in asked and kind not in chosen.left_out]
    if OPENVINO in asked:
        reason = _no_export(args, chosen)
        chosen.export = reason is None
        if reason is not None:
            chosen.left_out[OPENVINO] = reason
    if args.engines != "all" and chosen.left_out:
        raise ValueError("; ".join(f"--engines {name}: {reason}" for name, reason in chosen.left_out.items()) + ".")
    return chosen


def _no_export(args: argparse.Namespace, chosen: Chosen) -> str | None:
    """Return why the target cannot be exported to OpenVINO here, or None if it can."""
    if not export.is_installed("openvino"):
        return "openvino is not installed"
    if any((Path(settings["dir"]) / "openvino_model.xml").exists() for settings in chosen.exported.values()):
        return "--engine names an OpenVINO target already"
    if not export.is_installed(export.NEEDS["openvino"][0]):
        return "optimum-intel, which exports targets, is not installed; name an exported one with --engine"
    if not Path(args.target).is_dir():
        return "only a target in a directory is exported here; name an exported one with --engine"
    return None


def run_engines(args: argparse.Namespace) -> EnginesResult:
    """Load all engines, compare them and return the figures.

    Raises:
        ValueError: an option does not fit the others, a model or the prompts cannot be loaded, or there is not enough
            memory.
    """
    options, chats = generate_options(args), read_chats(args.prompts, args.count)
    if is_gguf(args.target):
        raise ValueError(
            f"--engines compares engines from float weights, and {args.target} has packed ones. Give the original "
            "model as --target, and the file as --engine NAME=FILE.gguf."
        )
    config, chosen = check_target(args), choose(args)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"--engines compares engines from float weights, and {args.target} is quantized already. Give the original "
            "model."
        )
    for name, reason in chosen.left_out.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    draft, tokenizer = load_draft(args, config), load_target_tokenizer(args)
    if isinstance(draft, SmallModelDraft):
        draft.target_vocabulary = tokenizer.get_vocab()
    refuse_without_memory(_needed(args, config, chosen, draft))
    prompts = encode_chats(chats, tokenizer)
    with _exported(args, chosen) as exported:
        stock = load_language_model(args.target, dtype=args.dtype, **target_source(args))
        files = {name: settings for name, settings in exported.items() if is_gguf(settings["dir"])}
        drafting = {name: settings for name, settings in exported.items() if name not in files}
        most = max(args.context, max(ids.shape[1] for ids in prompts) + args.max_new_tokens)
        others = [llamacpp_engine(name, one, stock, most, threads=args.threads) for name, one in files.items()]
        contenders = list(_contenders(args, stock, draft, chosen.kinds, drafting))
        result = compare_engines(
            contenders,
            stock,
            prompts,
            options,
            kernels=library(),
            others=others,
            context=args.context,
            repeats=args.repeats,
            seed=args.seed,
        )
    result.settings = {
        "target": Path(args.target).name,
        "dtype": str(stock.dtype).removeprefix("torch."),
        "draft_device": str(draft.device),
        "left_out": chosen.left_out,
    } | options
    return result


def _needed(args: argparse.Namespace, config: PretrainedConfig, chosen: Chosen, draft: Draft) -> dict[str, int]:
    """Return the bytes of each part of the comparison."""
    exported = {name: exported_bytes(Path(settings["dir"])) for name, settings in chosen.exported.items()}
    if chosen.export:
        exported[OPENVINO] = target_sizes(config, EXPORTED["int8"]).weights_bytes
    own = sum(tensor.nbytes for tensor in draft.parameters()) if isinstance(draft, nn.Module) else 0
    return engines_bytes(
        config,
        dtype=args.dtype,
        kinds=chosen.kinds,
        exported=exported,
        draft_bytes=own,
        context=args.context,
    )


@contextmanager
def _exported(args: argparse.Namespace, chosen: Chosen) -> Iterator[dict[str, dict[str, str]]]:
    """Yield the exported targets by name, with one that is made for the comparison if it was chosen.

    Raises:
        ValueError: the export fails.
    """
    with contextlib.ExitStack() as stack:
        exported = dict(chosen.exported)
        if chosen.export:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dovetail-engines-"))
            export_for_comparison(args.target, Path(folder) / "openvino-int8", trust=args.trust_remote_code)
            exported[OPENVINO] = {"dir": str(Path(folder) / "openvino-int8")}
        yield exported


def export_for_comparison(target: str, out: Path, *, trust: bool = False) -> None:
    """Export a target to OpenVINO in int8.

    Args:
        target: directory.
        out: directory that does not exist.
        trust: whether Python code that comes with the model may run.

    Raises:
        ValueError: optimum fails; it has said why on standard error.
    """
    print(f"exporting {target} to OpenVINO", file=sys.stderr)
    passed_on = ["--trust-remote-code"] if trust else []
    request = argparse.Namespace(target=target, to="openvino", passed_on=passed_on)
    if export.run_optimum(request, "int8", out, output=sys.stderr) != 0:
        raise ValueError(f"{target} cannot be exported to OpenVINO. Leave {OPENVINO!r} out of --engines.")


def _contenders(
    args: argparse.Namespace, stock: Any, draft: Draft, kinds: list[str], exported: dict[str, dict[str, str]]
) -> Iterator[Contender]:
    """Load the target on each engine, with a copy of the draft each."""
    copies = [copy.deepcopy(draft) for _ in range(len(kinds) + len(exported))]
    prepare_draft(args, stock, draft)
    yield torch_contender(stock, draft, draft.budget)
    for kind in kinds:
        yield packed_contender(kind, args.target, copies.pop(), draft.budget, dtype=args.dtype, **target_source(args))
    for name, settings in exported.items():
        yield exported_contender(name, settings, copies.pop(), draft.budget, stock, threads=args.threads)


def llamacpp_engine(
    name: str, settings: dict[str, str], stock: Any, most_tokens: int, *, threads: int | None = None
) -> LlamaCpp:
    """Load a GGUF file of the target `stock` for llama.cpp; see `LlamaCpp`.

    Raises:
        ValueError: it is not a file that llama.cpp loads, or there are settings.
        ImportError: xllamacpp is not installed.
    """
    if len(settings) > 1:
        raise ValueError(f"--engine {name}: a GGUF file has no settings; leave out {', '.join(list(settings)[1:])}.")
    share = _linear_share(stock)
    return LlamaCpp(name, Path(settings["dir"]), stock.config, most_tokens=most_tokens, threads=threads, share=share)


def _linear_share(stock: Any) -> float:
    """Return the share of the linear layers in a target's bytes; files hold the embedding, too, in as many bits."""
    linear, table = linear_bytes(stock), stock.get_input_embeddings().weight
    tied = stock.get_output_embeddings().weight is table
    return linear / (linear + (0 if tied else table.nbytes))


def torch_contender(stock: Any, draft: Draft, budget: TreeBudget | None) -> Contender:
    """Return the target in torch with this package's session."""
    kind = "float" if stock.dtype.itemsize == 4 else None
    return Contender("torch, dovetail", stock, draft, budget, linear_bytes(stock), kind)


def packed_contender(kind: str, target: str, draft: Draft, budget: TreeBudget | None, **options: Any) -> Contender:
    """Load a target with packed weights.

    Args:
        kind: one of `WEIGHTS`.
        target: directory or hub id.
        draft: for this contender alone.
        budget: of all rounds, or None.
        options: of `from_pretrained`.
    """
    packed = load_language_model(target, quantization_config=CpuWeights(kind), **options)
    known = kind if kind != FLOAT or packed.dtype.itemsize == 4 else None  # as in torch, in 16 bits
    return Contender(f"packed {kind}", packed, draft, budget, linear_bytes(packed), known)


def exported_contender(
    name: str, settings: dict[str, str], draft: Draft, budget: TreeBudget | None, stock: Any, **options: Any
) -> Contender:
    """Load an exported target.

    Args:
        name: names the engine.
        settings: see `common.parse_engine`.
        draft: for this contender alone.
        budget: of all rounds, or None, where the settings have none.
        stock: the target in torch.
        options: of the engine's `from_pretrained`, beside those in `settings`.
    """
    from dovetail_plugin.adapters import load_exported

    options |= {key: value for key, value in settings.items() if key not in OWN_SETTINGS}
    options |= {key: options[key] == "true" for key in SWITCHES if key in options}
    if "group" in settings:
        options["ov_config"] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": settings["group"]}
    if "budget" in settings:
        budget = None if settings["budget"] == "policy" else TreeBudget.parse(settings["budget"])
    target = load_exported(settings["dir"], **options)
    if "runner" in settings:
        setattr(draft, "runner", settings["runner"])  # noqa: B010 - drafts without the setting say so
    stored = exported_bytes(Path(settings["dir"])) if Path(settings["dir"]).is_dir() else 0
    return Contender(name, target, draft, budget, int(stored * _linear_share(stock)) or None, None)
