"""Reads draft checkpoints of other projects.

`load_checkpoint` takes a directory or hub id and returns a `DovetailConfig` and tensors under the names that
`DovetailDraft` uses. Config fields and tensor names determine the format; the name of the repository has no influence:

    paper        the Dovetail paper: tensors `W_1`, `W_2` and `W_z`
    eagle        EAGLE-1 and EAGLE-2: tensors `fc.weight` and `layers.0.*`
    eagle3       EAGLE-3: tensors `midlayer.*`
    speculators  vllm-project/speculators: its config; tensors as in EAGLE-3, but `layers.0.` instead of `midlayer.`

Pickled files are read with `weights_only=True`, which runs no code. This module does not know models or devices.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...compat import find_file, require_file
from ..config import DovetailConfig

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files, in the order in which they are looked for."""

BORROWED = ("embed_tokens.weight", "lm_head.weight")
"""Tables that some checkpoints copy from their target. They are left out, because the target has them."""


class UnknownFormat(ValueError):
    """The format of a checkpoint is unknown.

    Attributes:
        is_language_model: whether the config belongs to a causal language model.
    """

    def __init__(self, config: dict[str, Any], message: str) -> None:
        super().__init__(message)
        self.is_language_model = any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another project, translated.

    Attributes:
        kind: its format: "paper", "eagle", "eagle3" or "speculators".
        config: config of the draft.
        tensors: tensors under the names that `DovetailDraft` uses.
    """

    kind: str
    config: DovetailConfig
    tensors: dict[str, Tensor]


def read_config(name: str, **hub_kwargs: Any) -> dict[str, Any]:
    """Read the config.json of a checkpoint.

    Args:
        name: directory, hub id, or path of the file itself.
        hub_kwargs: see `load_checkpoint`.

    Raises:
        OSError: there is no such file, or the hub cannot be reached.
        ValueError: the file does not contain a JSON object.
    """
    try:
        file = name if Path(name).is_file() else require_file(name, "config.json", **hub_kwargs)
    except OSError as error:
        raise OSError(
            f"{name} has no config.json, neither as a directory nor on the hub ({error}). If the hub cannot be reached "
            "from here, download the repository on another machine and give the directory."
        ) from error
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: the config is not JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name}: the config is a JSON {type(config).__name__}, not an object. Download it again.")
    return config


def load_checkpoint(name: str, config: dict[str, Any] | None = None, **hub_kwargs: Any) -> Checkpoint:
    """Read a checkpoint of another project.

    Args:
        name: directory or hub id.
        config: result of `read_config`, if it was read already.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        ValueError: the format is unknown, a file is damaged or contains other things than tensors, or the ids of a
            reduced vocabulary are not valid.
        OSError: there are no weights.
    """
    config = read_config(name, **hub_kwargs) if config is None else config
    tensors = {key.removeprefix("model."): value for key, value in read_tensors(name, **hub_kwargs).items()}
    tensors = {key: value for key, value in tensors.items() if not key.endswith("rotary_emb.inv_freq")}
    return translate(name, config, tensors)


def translate(name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    """Translate config and tensors of another project.

    Args:
        name: of the checkpoint, for messages.
        config: content of config.json.
        tensors: all tensors, without the prefix `model.`.

    Raises:
        ValueError: see `load_checkpoint`.
    """
    try:
        kind = kind_of(config, tensors)
    except UnknownFormat as error:
        raise UnknownFormat(config, f"{name}: {error}") from error
    try:
        return Checkpoint(kind, *_READERS[kind](config, tensors))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} has the format {kind}, but its config lacks {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def kind_of(config: dict[str, Any], names: Any) -> str:
    """Return the format of a checkpoint.

    Args:
        config: content of config.json.
        names: tensor names, as a container.

    Raises:
        UnknownFormat: the format is unknown.
    """
    if "speculators_model_type" in config or "speculators_config" in config:
        return "speculators"
    if "W_1" in names and "W_z" in names:
        return "paper"
    if any(name.startswith("midlayer.") for name in names):
        return "eagle3"
    if "fc.weight" in names and any(name.startswith("layers.0.") for name in names):
        return "eagle"
    raise UnknownFormat(
        config,
        f"the format of this draft is unknown: its model_type is {config.get('model_type')!r}, and its first tensors "
        f"are {', '.join(sorted(names)[:6]) or 'none'}. Supported: W_1 and W_z (the Dovetail paper), fc.weight and "
        "layers.0.* (EAGLE-1, EAGLE-2), midlayer.* (EAGLE-3), speculators_config (speculators), model_type dovetail.",
    )


# --- files ------------------------------------------------------------------------------------------


def read_tensors(name: str, **hub_kwargs: Any) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, on the CPU.

    Args:
        name: directory or hub id.
        hub_kwargs: see `load_checkpoint`.

    Raises:
        OSError: there are no weight files.
        ValueError: a weight file is damaged, or contains other things than tensors.
    """
    for candidate in WEIGHT_FILES:
        file = find_file(name, candidate, **hub_kwargs)
        if file is None:
            continue
        files = [file]
        if candidate.endswith(".json"):
            shards = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
            found = {shard: find_file(name, shard, **hub_kwargs) for shard in shards}
            if missing := [shard for shard, path in found.items() if path is None]:
                raise OSError(
                    f"{name}: {candidate} names {', '.join(missing)}, which is missing. Download the checkpoint again."
                )
            files = [path for path in found.values() if path is not None]
        tensors: dict[str, Tensor] = {}
        for each in files:
            tensors |= _read_safetensors(each) if each.endswith(".safetensors") else _read_pickle(each)
        return tensors
    raise OSError(f"{name} has no weights. One of these files is needed: {', '.join(WEIGHT_FILES)}.")


def _read_safetensors(file: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not safetensors ({error}). Copy or download it again.") from error


def _read_pickle(file: str) -> dict[str, Tensor]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged, or a pickle with code, which is not run ({str(error).splitlines()[0]}). "
            "Download it again, or ask its author for safetensors."
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{file} contains other things than named tensors. Ask its author for safetensors.")
    return stored


# --- formats ----------------------------------------------------------------------------------------

_Translated = tuple[DovetailConfig, dict[str, Tensor]]


def _llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `DovetailConfig` that have the same meaning in all formats and are named as in Llama."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope = {key: value for key, value in rope.items() if key != "type"} | {"rope_type": kind}
    rope.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    fields = ["max_position_embeddings", "num_key_value_heads", "head_dim", "rms_norm_eps"]
    fields += ["bos_token_id", "eos_token_id", "pad_token_id"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "rope_parameters": rope,
        "attention_bias": bool(config.get("attention_bias") or config.get("qkv_bias")),
    } | {name: config[name] for name in fields if config.get(name) is not None}


def _blocks(tensors: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))


def _paper(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    ours = DovetailConfig(**_llama_fields(config), num_hidden_layers=_blocks(tensors), fusion="dgf")
    fused = ("W_1", "W_2", "W_z", "input_layernorm.weight")
    names = {name: f"fusion.{name}" if name in fused else name for name in tensors if name not in BORROWED}
    return ours, {new: tensors[old] for old, new in names.items()}


def _eagle(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    bias = "fc.bias" in tensors
    if config.get("bias", bias) != bias:
        raise ValueError(f"config.json has bias={config['bias']}, but fc.bias is {'present' if bias else 'missing'}.")
    ours = DovetailConfig(
        **_llama_fields(config), num_hidden_layers=_blocks(tensors), fusion="concat", fusion_bias=bias
    )
    names = {name: name.replace("fc.", "fusion.fc.", 1) if name.startswith("fc.") else name for name in tensors}
    return ours, {new: tensors[old] for old, new in names.items() if old not in BORROWED}


def _eagle3(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    width, target_width = config["hidden_size"], config.get("target_hidden_size") or config["hidden_size"]
    own = config.get("eagle_config") or {}
    layers = own.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    kept = tensors["lm_head.weight"].shape[0]
    ours = DovetailConfig(
        **_llama_fields(config),
        num_hidden_layers=1,
        fusion="eagle3",
        fusion_bias="fc.bias" in tensors,
        target_hidden_size=target_width if target_width != width else None,
        feature_layers=layers,
        draft_vocab_size=kept if kept != config["vocab_size"] else None,
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        own_embedding="embed_tokens.weight" in tensors,
    )
    renamed = {"lm_head.weight": "head_weight", "embed_tokens.weight": "embed_weight"}
    translated = {}
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        new = renamed.get(name, name)
        new = new.replace("midlayer.", "layers.0.", 1) if new.startswith("midlayer.") else new
        translated[f"fusion.{new}" if new.startswith("fc.") else new] = tensor
    if ours.draft_vocab_size is not None:
        translated["token_ids"] = _token_ids(tensors, ours)
    return ours, translated


def _token_ids(tensors: dict[str, Tensor], config: DovetailConfig) -> Tensor:
    """Return the target's id of each token of the head, (v,) int64: draft id + d2t[draft id].

    Raises:
        ValueError: d2t is missing, has the wrong shape, gives ids that are out of range or used twice, or contradicts
            t2d.
    """
    size = config.draft_vocab_size
    assert size is not None
    if "d2t" not in tensors:
        raise ValueError(f"the head has {size} of {config.vocab_size} tokens, but d2t, which lists them, is missing.")
    offsets = tensors["d2t"].long()
    if offsets.shape != (size,):
        raise ValueError(f"d2t has shape {tuple(offsets.shape)}, expected ({size},).")
    ids = torch.arange(size) + offsets
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(wrong):
        raise ValueError(f"d2t gives token {int(wrong[0])}, outside the vocabulary of {config.vocab_size}.")
    if len(ids.unique()) != size:
        raise ValueError("d2t gives two draft tokens the same id of the target.")
    mask = tensors.get("t2d")
    if mask is not None and not torch.equal(mask.bool().nonzero()[:, 0], ids.sort().values):
        raise ValueError("t2d and d2t name different tokens of the target.")
    return ids


def _speculators(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    algorithm = config.get("speculators_model_type", (config.get("speculators_config") or {}).get("algorithm"))
    if algorithm != "eagle3":
        raise ValueError(f"speculators drafts of type {algorithm!r} are not supported. Use one of type eagle3.")
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    flat = config["transformer_layer_config"] | {
        name: config[name]
        for name in (
            "draft_vocab_size",
            "norm_before_residual",
            "target_hidden_size",
            "eagle_aux_hidden_state_layer_ids",
        )
        if config.get(name) is not None
    }
    ours, translated = _eagle3(flat, tensors)
    ours.target_name_or_path = verifier.get("name_or_path")
    return ours, translated


_READERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], _Translated]] = {
    "paper": _paper,
    "eagle": _eagle,
    "eagle3": _eagle3,
    "speculators": _speculators,
}
