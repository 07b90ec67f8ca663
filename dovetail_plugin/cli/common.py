"""Options that several subcommands share: how they are declared, checked and turned into keyword arguments.

This module imports neither torch nor transformers; `loading.py` loads the models that the options name.
"""

import argparse
import difflib
import math
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..kernels import WEIGHTS

MOST_THREADS = 1024
MOST_NEW_TOKENS = 10_000_000
"""More than the context of any model; memory for the text is reserved when generation starts."""

MOST_BLOCKS = 6
"""Decoder blocks of the largest drafts that the method describes."""

OPENVINO = "openvino"
"""Name in --engines for the target, exported to OpenVINO in int8 for the comparison."""
ALL_ENGINES = (*WEIGHTS, OPENVINO)
"""Names that --engines takes."""

SWITCHES = ("exact", "same_kernels")
"""Settings of --engine that are true or false."""

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
"""Options of `generate` that have no effect on greedy decoding."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and a metavar once for all its aliases; keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            super(HelpFormatter, self)._fill_text(paragraph, width, indent)
            if "\n  " in paragraph or paragraph.startswith("  ")
            else textwrap.fill(paragraph, width, initial_indent=indent, subsequent_indent=indent)
            for paragraph in paragraphs
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """Reports a mistake on one line, and takes options by their full names only."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def refuse(self, argument: str) -> NoReturn:
        """End with an error about an argument that nothing takes, naming the option that was probably meant."""
        option = argument.partition("=")[0]
        if not option.startswith("-"):
            self.error(f"there is no use for the argument {argument!r}; quote text that contains spaces")
        known = [name for action in self._actions for name in action.option_strings]
        meant = difflib.get_close_matches(option.replace("_", "-"), known, n=1)
        self.error(f"there is no option {option}" + (f"; did you mean {meant[0]}?" if meant else ""))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


# --- values ------------------------------------------------------------------------------------------


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`, for the `type` of an option."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return parse


def number(least: float, most: float = math.inf, *, excluding_least: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from `least` to `most`, for the `type` of an option."""
    limits = f"between {least:g} and {most:g}" if math.isfinite(most) else f"at least {least:g}"
    if excluding_least:
        limits = f"above {least:g}" + (f" and at most {most:g}" if math.isfinite(most) else "")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not least <= value <= most or (excluding_least and value == least):
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    return parse


def model_name(text: str) -> str:
    """A directory or hub id; refuses an empty one, which is what an unset shell variable gives."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a directory or a hub id")
    return text


def given(text: str) -> str:
    """Any text; refuses an empty one, which is what an unset shell variable gives."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; leave the option out for its default")
    return text


def size(text: str) -> str:
    """An amount of memory, left as it is for `parse_bytes`, which names the remedy; 0 stands for no GPU."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a size such as 4GiB")
    return text


def engine_names(text: str) -> list[str] | str:
    """Names of engines, separated by commas, or "all"."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in (*ALL_ENGINES, "all")]:
        raise argparse.ArgumentTypeError(f"there is no engine {unknown[0]!r}; give {', '.join(ALL_ENGINES)} or all")
    return "all" if "all" in names else names


def parse_engine(text: str) -> tuple[str, dict[str, str]]:
    """An exported target: "NAME=DIR,key=value,..." -> the name and the settings, with DIR (or a hub id) as "dir".

    Settings that are not passed to the engine's `from_pretrained`: `budget` ("nodes/depth/top_k" or "policy"), `runner`
    (of the draft) and `group` (the group size of OpenVINO's dynamic quantization).
    """
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    pairs = [part.partition("=") for part in parts[1:]]
    if not name or not parts[0] or not all(value for _, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid engine; give NAME=DIR or NAME=DIR,key=value,...")
    settings = {"dir": parts[0]} | {key: value for key, _, value in pairs}
    for key in SWITCHES:
        if settings.get(key, "true") not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{key} is true or false, got {settings[key]!r}")
    if settings.get("budget", "policy") != "policy":
        from ..tree import TreeBudget

        try:
            TreeBudget.parse(settings["budget"])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return name, settings


# --- options -----------------------------------------------------------------------------------------


def add_target_argument(
    parser: Any, help: str = "the target model: its directory, GGUF file or hub id", **options: Any
) -> None:
    """Declare --target with the aliases that other programs use."""
    parser.add_argument("--target", "--model", "-m", type=model_name, metavar="DIR_OR_ID", help=help, **options)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --target, --draft, and where and how both are loaded."""
    group = parser.add_argument_group("models")
    targets = group.add_mutually_exclusive_group(required=True)
    add_target_argument(targets)
    targets.add_argument(
        "--target-ir",
        type=model_name,
        metavar="DIR_OR_ID",
        help="the target model, exported to OpenVINO or ONNX (see `dovetail export`)",
    )
    group.add_argument(
        "--draft",
        "--draft-model",
        "--assistant-model",
        "-md",
        type=model_name,
        metavar="DIR_OR_ID",
        help="the draft: one of Dovetail's, the Dovetail paper's, an EAGLE-1, 2 or 3 head, a speculators eagle3 "
        "checkpoint, a small model with the target's tokenizer, or `lookup`, which copies from the text; default: the "
        "draft that is known for the target, otherwise lookup",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *FLOAT_DTYPES],
        help="data type of both models (with --target-ir, of the draft); auto keeps the one that is stored",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="pack the target for a CPU while it is loaded. int8 and int4 quantize it: faster passes, a slightly other "
        "model; float keeps its numbers; default: the weights as they are stored",
    )
    group.add_argument(
        "--draft-device",
        default="auto",
        metavar="DEVICE",
        help="cuda, cuda:1 or cpu; auto takes the GPU if there is one, otherwise the CPU",
    )
    group.add_argument(
        "--vram",
        type=size,
        metavar="SIZE",
        help="place both models by a plan for this much GPU memory, for example 4GiB (see `dovetail plan`); memory "
        "that the draft does not need holds layers of the target",
    )
    group.add_argument(
        "--threads",
        "-t",
        type=whole_number(1, MOST_THREADS),
        metavar="N",
        help="number of CPU threads; default: torch's choice",
    )
    add_trust_argument(add_hub_arguments(parser, revisions={"--revision": "target", "--draft-revision": "draft"}))


def add_hub_arguments(parser: argparse.ArgumentParser, revisions: dict[str, str]) -> Any:
    """Declare the options that say how models are fetched from the hub, and return their group.

    Args:
        revisions: option -> the model whose branch, tag or commit it names.
    """
    group = parser.add_argument_group("hub")
    for option, model in revisions.items():
        text = f"branch, tag or commit of the {model}; default: main"
        group.add_argument(option, type=given, metavar="REV", help=text)
    group.add_argument(
        "--token",
        type=given,
        metavar="TOKEN",
        help="access token; prefer the environment variable HF_TOKEN, which `ps` hides",
    )
    group.add_argument(
        "--cache-dir", type=given, metavar="DIR", help="directory for downloads; default: the hub's own cache"
    )
    group.add_argument("--local-files-only", action="store_true", help="take files from that directory, download none")
    return group


def add_trust_argument(group: Any) -> None:
    """Declare --trust-remote-code."""
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model; read it first"
    )


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the size of draft trees, which replaces the policy's choice."""
    group = parser.add_argument_group(
        "draft tree",
        "By default every round drafts as much as pays off on this machine. If one of these options is given, all "
        "rounds draft the same.",
    )
    for options, dest, most, text in (
        (
            ("--tree-nodes", "--nodes"),
            "tree_nodes",
            1024,
            "tokens that the target verifies in a round; default: 16, or what fits the others",
        ),
        (
            ("--tree-depth", "--depth"),
            "tree_depth",
            128,
            "levels of the draft tree; default: what fits the others, 6 for 16 nodes",
        ),
        (
            ("--tree-top-k",),
            "tree_top_k",
            128,
            "nodes that are extended on each level; 1 drafts a chain; default: half of the nodes, at most 8",
        ),
    ):
        group.add_argument(*options, dest=dest, type=whole_number(1, most), metavar="N", help=text)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `generate` that people change most."""
    group = parser.add_argument_group(
        "generation",
        "Decoding is greedy unless --do-sample is given, whatever the model's generation_config.json says. With "
        "--do-sample, options that are not given keep the values of that file, as in transformers. Options that act "
        "on sampling only are refused without --do-sample.",
    )
    add = group.add_argument
    add(
        "--max-new-tokens",
        "--n-predict",
        "-n",
        type=whole_number(1, MOST_NEW_TOKENS),
        default=128,
        metavar="N",
        help="largest number of tokens to generate",
    )
    add("--do-sample", action="store_true", help="sample instead of taking the most likely token")
    positive = number(0, excluding_least=True)
    add("--temperature", "--temp", type=number(1e-5, 1e5), metavar="T", help="divides the logits before sampling")
    add("--top-k", type=whole_number(0), metavar="N", help="sample from the N most likely tokens; 0 turns this off")
    add("--top-p", type=number(0, 1), metavar="P", help="sample from the most likely tokens that add up to P")
    add("--min-p", type=number(0, 1), metavar="P", help="drop tokens below P times the best token's probability")
    add("--repetition-penalty", type=positive, metavar="X", help="above 1 avoids repetition; acts without sampling too")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N", help="seed for sampling")


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `generate`: those of `add_generation_arguments` that were given.

    Raises:
        ValueError: an option of sampling was given without --do-sample.
    """
    names = (*SAMPLING_ONLY, "repetition_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in SAMPLING_ONLY:
        if name in given and not args.do_sample:
            option = f"--{name.replace('_', '-')}"
            tree = " The width of the draft tree is --tree-top-k." if name == "top_k" else ""
            raise ValueError(f"{option} has an effect on sampling only; add --do-sample or leave it out.{tree}")
    return {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample} | given


def hub_options(args: argparse.Namespace, revision: str | None) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that say how a model is fetched: those that were given."""
    options = {"revision": revision, "token": args.token, "cache_dir": args.cache_dir}
    options["local_files_only"] = args.local_files_only or None
    return {name: value for name, value in options.items() if value is not None}


def check_writable(option: str, file: Path) -> None:
    """Refuse an output file that cannot be written, before long work.

    Raises:
        ValueError: it is a directory, there is no directory to put it in, or no permission.
    """
    if file.is_dir():
        raise ValueError(f"{option} {file} is a directory; name a file.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no directory {str(file.parent)!r}; create it first.")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {file}: there is no permission to write it; name another file.")
