"""Reads draft checkpoints of other projects.

`load_checkpoint` takes a directory or hub id and returns a `DovetailConfig` and tensors under the names that
`DovetailDraft` uses. Config fields and tensor names determine the format; the name of the repository has no influence:

    paper        the Dovetail paper: tensors `W_1`, `W_2` and `W_z`
    eagle        EAGLE-1 and EAGLE-2: tensors `fc.weight` and `layers.0.*`
    eagle3       EAGLE-3: tensors `midlayer.*`
    speculators  vllm-project/speculators: its config; tensors as in EAGLE-3, but `layers.0.` instead of `midlayer.`

The translation needs names and shapes only: given tensors on the meta device, it gives config and tensors there.
`files.py` reads the files. This module does not know models or devices.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, require_file
from ...errors import InputError, MissingFileError
from ..config import DovetailConfig
from ..fields import DRAFT_ONLY, PUBLISHED, anything, check_fields, either, flag, mapping_of, null, shown, text
from .files import WEIGHT_FILES, Weights, read_json

__all__ = ["WEIGHT_FILES", "Checkpoint", "UnknownFormat", "kind_of", "load_checkpoint", "read_config", "translate"]

BORROWED = ("embed_tokens.weight", "lm_head.weight")
"""Tables that some checkpoints copy from their target. They are left out, because the target has them."""


class UnknownFormat(InputError):
    """The format of a checkpoint is unknown.

    Attributes:
        is_language_model: whether the config belongs to a causal language model.
    """

    def __init__(self, config: dict[str, Any], message: str) -> None:
        super().__init__(message)
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # among them names such as GPT2LMHeadModel
        names = architectures_of(config)
        self.is_language_model = any(name.endswith("ForCausalLM") or name in known for name in names)


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
        MissingFileError: there is no such file, or the hub cannot be reached.
        InputError: it is not a JSON object, or a field that only drafts have is of a wrong kind.
    """
    try:
        file = name if Path(name).is_file() else require_file(name, "config.json", **hub_kwargs)
        if file is None:  # which transformers returns for an optional file of a directory
            raise FileNotFoundError("no such file")
    except OSError as error:
        raise MissingFileError(
            f"{name} has no config.json, neither as a directory nor on the hub ({error}). If the hub cannot be reached "
            "from here, download the repository on another machine and give the directory."
        ) from error
    config = read_json(file, f"{name}: the config")
    try:
        _check_published(config)
    except InputError as error:
        raise InputError(f"{name}: config.json cannot be used: {error} Download it again.") from error
    return config


def _check_published(config: dict[str, Any]) -> None:
    """Check the fields of a config that can only belong to a draft of another project."""
    of_draft = {field: config[field] for field in DRAFT_ONLY.keys() & config.keys()}
    if of_draft or any("eagle" in name.lower() for name in architectures_of(config)):
        check_fields(of_draft, DRAFT_ONLY)
        sizes = config.get("transformer_layer_config") or config
        check_fields({field: value for field, value in sizes.items() if value is not None}, PUBLISHED)


def load_checkpoint(name: str, config: dict[str, Any] | None = None, **hub_kwargs: Any) -> Checkpoint:
    """Read a checkpoint of another project.

    Args:
        name: directory or hub id.
        config: result of `read_config`, if it was read already.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        InputError: the format is unknown, a file is damaged or contains other things than tensors, or the ids of a
            reduced vocabulary are not valid.
        MissingFileError: there are no weights.
    """
    config = read_config(name, **hub_kwargs) if config is None else config
    weights = Weights(name, **hub_kwargs)
    translate(name, config, own_names(weights.stand_ins))
    return translate(name, config, own_names(weights.read()))


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix `model.` and without tables that every model computes itself."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith("rotary_emb.inv_freq")}


def translate(name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    """Translate config and tensors of another project.

    Args:
        name: of the checkpoint, for messages.
        config: content of config.json.
        tensors: all tensors, without the prefix `model.`; on the meta device if only their shapes are known.

    Raises:
        InputError: see `load_checkpoint`.
    """
    try:
        kind = kind_of(config, tensors)
    except UnknownFormat as error:
        raise UnknownFormat(config, f"{name}: {error}") from error
    try:
        refuse_others(config, tensors)
        return Checkpoint(kind, *_READERS[kind](config, tensors))
    except KeyError as error:
        raise InputError(
            f"{name} has the format {kind}, but its config lacks {error}. Download config.json again."
        ) from error
    except ValueError as error:
        raise InputError(f"{name} (format {kind}): {error}") from error


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """Return the architectures of a config; none if the field has a wrong type."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def kind_of(config: dict[str, Any], names: Iterable[str]) -> str:
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
        f"the format of this draft is unknown: its model_type is {shown(config.get('model_type'))}, and its first "
        f"tensors are {', '.join(sorted(names)[:6]) or 'none'}. Supported: W_1 and W_z (the Dovetail paper), fc.weight "
        "and layers.0.* (EAGLE-1, EAGLE-2), midlayer.* (EAGLE-3), speculators_config (speculators), model_type "
        "dovetail.",
    )


OTHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DFlash, DFlash2 or DSpark": (
        ("dflash_config", "dspark_config", "markov_rank", "markov_head_type", "dspark_block_size"),
        ("DFlash", "DSpark"),
    ),
    "P-EAGLE": (("pard_token", "ptd_token_id"), ("PEagle",)),
    "EAGLE-3.1 with norms before fc (norm_before_fc, fc_norm)": (("norm_before_fc", "fc_norm", "use_aux_norm"), ()),
    "Medusa": (("medusa_num_heads", "medusa_num_layers"), ("Medusa",)),
}
"""Kinds of drafts that are not supported and whose tensors look like those of supported ones: config fields, where any
value other than null and false counts, and parts of an architecture's name."""


def refuse_others(config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse drafts of kinds that look like supported ones and compute something else.

    Raises:
        InputError: the config has a field of another kind of draft.
    """
    parts = [config, config.get("eagle_config"), config.get("transformer_layer_config")]
    for kind, (fields, words) in OTHERS.items():
        found = [f for f in fields for part in parts if isinstance(part, dict) and part.get(f) not in (None, False)]
        found += [name for name in architectures_of(config) if any(word in name for word in words)]
        if found:
            raise InputError(f"it is a draft of the kind {kind} ({found[0]}), which is not supported.")
    if "mask_hidden" in names:
        raise InputError("it is a draft of the kind P-EAGLE (mask_hidden), which is not supported.")


# --- formats ----------------------------------------------------------------------------------------

_Translated = tuple[DovetailConfig, dict[str, Tensor]]


def _llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `DovetailConfig` that have the same meaning in all formats and are named as in Llama."""
    check_fields({name: value for name, value in config.items() if value is not None}, PUBLISHED)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
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
    """Return the number of blocks. The file must hold tensors of each, so that a name cannot ask for thousands.

    Raises:
        InputError: a block has no tensors.
    """
    found = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    if wanted := found - {str(index) for index in range(len(found))}:
        raise InputError(f"layers.{min(wanted)} is not one of {len(found)} blocks that are numbered from 0.")
    return len(found)


def _paper(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    ours = DovetailConfig(**_llama_fields(config), num_hidden_layers=_blocks(tensors), fusion="dgf")
    fused = ("W_1", "W_2", "W_z", "input_layernorm.weight")
    names = {name: f"fusion.{name}" if name in fused else name for name in tensors if name not in BORROWED}
    return ours, {new: tensors[old] for old, new in names.items()}


def _eagle(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    bias = "fc.bias" in tensors
    if config.get("bias", bias) != bias:
        raise InputError(f"config.json has bias={config['bias']}, but fc.bias is {'present' if bias else 'missing'}.")
    ours = DovetailConfig(
        **_llama_fields(config), num_hidden_layers=_blocks(tensors), fusion="concat", fusion_bias=bias
    )
    names = {name: name.replace("fc.", "fusion.fc.", 1) if name.startswith("fc.") else name for name in tensors}
    return ours, {new: tensors[old] for old, new in names.items() if old not in BORROWED}


def _eagle3(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    fields = _llama_fields(config)
    width, target_width = config["hidden_size"], config.get("target_hidden_size") or config["hidden_size"]
    own = config.get("eagle_config") or {}
    layers = own.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    if "lm_head.weight" not in tensors or tensors["lm_head.weight"].ndim != 2:
        raise InputError("the weights have no matrix lm_head.weight. Download them again.")
    kept = tensors["lm_head.weight"].shape[0]
    check_fields(own, {"norm_output": either(null, flag)}, "eagle_config.")
    norm_output = bool(config.get("norm_output") or own.get("norm_output"))
    ours = DovetailConfig(
        **fields,
        num_hidden_layers=1,
        fusion="eagle3",
        fusion_bias="fc.bias" in tensors,
        target_hidden_size=target_width if target_width != width else None,
        feature_layers=layers,
        draft_vocab_size=kept if kept != config["vocab_size"] else None,
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_output=norm_output,
        own_embedding="embed_tokens.weight" in tensors,
    )
    renamed = {"lm_head.weight": "head_weight", "embed_tokens.weight": "embed_weight"}
    if norm_output:
        renamed["norm.weight"] = "layers.0.output_norm.weight"
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
        InputError: d2t is missing, has the wrong shape, gives ids that are out of range or used twice, or contradicts
            t2d.
    """
    size = config.draft_vocab_size
    assert size is not None
    if "d2t" not in tensors:
        raise InputError(f"the head has {size} of {config.vocab_size} tokens, but d2t, which lists them, is missing.")
    stored = tensors["d2t"]
    if stored.shape != (size,):
        raise InputError(f"d2t has shape {tuple(stored.shape)}, expected ({size},).")
    if stored.is_meta:
        return torch.empty(size, dtype=torch.int64, device="meta")
    ids = torch.arange(size) + stored.long()
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(wrong):
        raise InputError(f"d2t gives token {int(wrong[0])}, outside the vocabulary of {config.vocab_size}.")
    if len(ids.unique()) != size:
        raise InputError("d2t gives two draft tokens the same id of the target.")
    mask = tensors.get("t2d")
    if mask is not None and (mask.ndim != 1 or not torch.equal(mask.bool().nonzero()[:, 0], ids.sort().values)):
        raise InputError("t2d and d2t name different tokens of the target.")
    return ids


def _speculators(config: dict[str, Any], tensors: dict[str, Tensor]) -> _Translated:
    own = config.get("speculators_config") or {}
    algorithm = config.get("speculators_model_type", own.get("algorithm"))
    if algorithm != "eagle3":
        raise InputError(f"speculators drafts of type {shown(algorithm)} are not supported. Use one of type eagle3.")
    check_fields(config, DRAFT_ONLY)
    verifier = own.get("verifier") or {}
    check_fields({"speculators_config.verifier": verifier}, {"speculators_config.verifier": mapping_of(anything)})
    check_fields(verifier, {"name_or_path": either(null, text)}, "speculators_config.verifier.")
    flat = dict(config["transformer_layer_config"] or {}) | {
        name: config[name]
        for name in (
            "draft_vocab_size",
            "norm_before_residual",
            "norm_output",
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
