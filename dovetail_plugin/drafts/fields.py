"""Types and bounds of the fields of draft configs, in one table, and the check of a config against it.

`FIELDS` describes the fields of `DovetailConfig`, `PUBLISHED` the fields that configs of other projects add, and `ROPE`
the parameters of rotary embeddings. `check_fields` compares values with such a table. The bounds are far above every
published draft and keep what a config can ask for within the memory of any computer; what the weights really hold is
compared afterwards (see `checkpoints/load.py`). This module does not know files or models.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError

MOST_TOKENS = 2**22
MOST_WIDTH = 2**20
MOST_BLOCKS = 2**10
MOST_HEADS = 2**14
MOST_TEXT = 4096


@dataclass(frozen=True)
class Kind:
    """Values that a field may have.

    Attributes:
        words: completes the sentence "the field must be ...".
        accepts: whether a value is one of them. It does not fail, whatever the value is.
    """

    words: str
    accepts: Callable[[Any], bool]


anything = Kind("anything", lambda _: True)


def whole(low: int, high: int) -> Kind:
    """Return the kind of whole numbers from `low` to `high`. True and False are not numbers."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, *, open_below: bool = False) -> Kind:
    """Return the kind of finite numbers from `low` (or above it, if `open_below`) to `high`."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return low <= value <= high and not (open_below and value == low)

    bounds = f"above {low:g} and up to {high:g}" if open_below else f"from {low:g} to {high:g}"
    return Kind(f"a number {bounds}", accepts)


def one_of(*values: str) -> Kind:
    """Return the kind of these strings."""
    words = ", ".join(f'"{value}"' for value in values)
    return Kind(f"one of {words}", lambda value: isinstance(value, str) and value in values)


def list_of(kind: Kind, shortest: int, longest: int) -> Kind:
    """Return the kind of lists (or tuples) of `shortest` to `longest` values of a kind."""
    return Kind(
        f"a list of {shortest} to {longest} values, each {kind.words}",
        lambda value: (
            isinstance(value, (list, tuple))
            and shortest <= len(value) <= longest
            and all(kind.accepts(entry) for entry in value)
        ),
    )


def mapping_of(kind: Kind, longest: int = 2**16) -> Kind:
    """Return the kind of JSON objects whose values are of a kind."""
    return Kind(
        "an object" if kind is anything else f"an object with values that are {kind.words}",
        lambda value: (
            isinstance(value, Mapping)
            and len(value) <= longest
            and all(isinstance(key, (str, int)) and kind.accepts(entry) for key, entry in value.items())
        ),
    )


def either(*kinds: Kind) -> Kind:
    """Return the kind of values that one of these kinds accepts."""
    return Kind(" or ".join(kind.words for kind in kinds), lambda value: any(kind.accepts(value) for kind in kinds))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_label_table(value: Any) -> bool:
    if not isinstance(value, Mapping) or len(value) > 2**16:
        return False
    return all(_is_label(key) and isinstance(label, str) for key, label in value.items())


def _is_label(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 10
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize >= 2


null = Kind("null", lambda value: value is None)
flag = Kind("true or false", lambda value: isinstance(value, bool))
text = Kind(f"a text of at most {MOST_TEXT} characters", _is_text)
labels = Kind("an object from numbers to labels", _is_label_table)
float_dtype = either(one_of("float32", "bfloat16", "float16", "float64"), Kind("such a torch.dtype", _is_dtype))
token_id = whole(-(2**31), 2**31)  # out of range in some published configs, and not used by drafts
rates = list_of(number(0, 1), 1, 1024)  # the config knows how many
size = whole(1, MOST_WIDTH)

FIELDS: dict[str, Kind] = {
    "vocab_size": whole(1, MOST_TOKENS),
    "hidden_size": size,
    "intermediate_size": whole(1, 4 * MOST_WIDTH),
    "num_hidden_layers": whole(1, MOST_BLOCKS),
    "num_attention_heads": whole(1, MOST_HEADS),
    "num_key_value_heads": either(null, whole(1, MOST_HEADS)),
    "head_dim": either(null, whole(1, MOST_HEADS)),
    "rms_norm_eps": number(0, 1),
    "rope_parameters": either(null, mapping_of(anything)),  # see `ROPE`
    "rope_scaling": either(null, mapping_of(anything)),
    "rope_theta": either(null, number(1, 1e30)),
    "max_position_embeddings": whole(1, 2**40),
    "initializer_range": number(0, 100),
    "fusion": one_of("dgf", "concat", "eagle3"),
    "fusion_bias": flag,
    "attention_bias": flag,
    "logit_softcap": either(null, number(0, 1e30, open_below=True)),
    "logit_scale": Kind(
        "a number other than 0, from -1e+06 to 1e+06", lambda value: number(-1e6, 1e6).accepts(value) and value != 0
    ),
    "target_name_or_path": either(null, text),
    "target_hidden_size": either(null, size),
    "feature_layers": either(null, list_of(whole(0, MOST_BLOCKS), 0, 64)),
    "draft_vocab_size": either(null, whole(1, MOST_TOKENS)),
    "norm_before_residual": flag,
    "norm_output": flag,
    "own_embedding": flag,
    "calibration": either(null, mapping_of(rates, 2)),
    "pad_token_id": either(null, token_id),
    "bos_token_id": either(null, token_id),
    "eos_token_id": either(null, token_id, list_of(token_id, 0, 1024)),
    "tie_word_embeddings": flag,
    # fields that every config of transformers has
    "architectures": either(null, list_of(text, 0, 64)),
    "transformers_version": either(null, text),
    "output_hidden_states": either(null, flag),
    "return_dict": either(null, flag),
    "dtype": either(null, float_dtype),
    "torch_dtype": either(null, float_dtype),
    "chunk_size_feed_forward": whole(0, 2**31),
    "is_encoder_decoder": Kind("false", lambda value: value is False),
    "id2label": either(null, labels),
    "label2id": either(null, mapping_of(either(token_id, text))),
    "problem_type": null,
    "quantization_config": Kind("null, because quantized drafts are not supported", lambda value: value is None),
}
"""Fields of `DovetailConfig`."""

OVERRIDES = FIELDS.keys() - {"dtype", "torch_dtype", "quantization_config"}
"""Fields that arguments of `from_pretrained` replace. The others mean something else there."""

_layers = either(null, list_of(whole(0, MOST_BLOCKS), 0, 64))
_object = either(null, mapping_of(anything))

DRAFT_ONLY: dict[str, Kind] = {
    "draft_vocab_size": FIELDS["draft_vocab_size"],
    "target_hidden_size": FIELDS["target_hidden_size"],
    "norm_before_residual": either(null, flag),
    "norm_output": either(null, flag),
    "eagle_config": _object,
    "eagle_aux_hidden_state_layer_ids": _layers,
    "speculators_config": _object,
    "speculators_model_type": either(null, text),
    "transformer_layer_config": _object,
}
"""Fields of configs of other projects that only drafts have."""

_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "architectures"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "attention_bias", "quantization_config"),
)

PUBLISHED: dict[str, Kind] = (
    {name: FIELDS[name] for name in _SHARED}
    | DRAFT_ONLY
    | {
        "qkv_bias": flag,
        "bias": flag,
        "hidden_act": one_of("silu", "swish"),
        "partial_rotary_factor": number(1, 1),
    }
)
"""Fields of configs of other projects, for values other than null. Other fields have no meaning for a draft."""

_positive = number(0, 1e30, open_below=True)
_factors = list_of(_positive, 1, MOST_HEADS)
_scalar = either(null, flag, text, number(-1e30, 1e30))

ROPE: dict[str, Kind] = {
    "rope_theta": number(1, 1e30),
    "rope_type": text,
    "factor": number(1, 1e9),
    "attention_factor": _positive,
    "beta_fast": _positive,
    "beta_slow": _positive,
    "mscale": number(0, 1e9),
    "mscale_all_dim": number(0, 1e9),
    "truncate": flag,
    "low_freq_factor": _positive,
    "high_freq_factor": _positive,
    "original_max_position_embeddings": number(1, 2**40),
    "short_factor": _factors,
    "long_factor": _factors,
    "partial_rotary_factor": number(0, 1, open_below=True),
}
"""Parameters of rotary embeddings, for values other than null. Others may be numbers, text, or lists of these."""

ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}
"""Type of a rotary embedding -> parameters that it needs."""


def shown(value: Any) -> str:
    """Return a value for a message, in at most about 80 characters, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, 60, 60, 60
    return short.repr(value).encode("ascii", "backslashreplace").decode("ascii")


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> None:
    """Compare values with a table. Fields that are not in the table are not checked.

    Args:
        values: field -> value.
        kinds: field -> kind.
        where: name of the object that holds the fields, with a dot behind it, for messages.

    Raises:
        InputError: names the first field that has a value of another kind.
    """
    for name, kind in kinds.items():
        if name in values and not kind.accepts(values[name]):
            raise InputError(f"{where}{name} must be {kind.words}, got {shown(values[name])}.")


def check_rope(rope: Mapping[str, Any], head_dim: int, where: str = "rope_parameters.") -> None:
    """Check the parameters of a rotary embedding.

    Args:
        rope: parameters in transformers' format.
        head_dim: width of a head.
        where: see `check_fields`.

    Raises:
        InputError: the type is unknown, or a parameter is missing or of the wrong kind.
    """
    others = {name: either(_scalar, list_of(_scalar, 0, MOST_HEADS)) for name in rope if name not in ROPE}
    check_fields({name: value for name, value in rope.items() if value is not None}, ROPE | others, where)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_NEEDS:
        raise InputError(f"{where}rope_type must be {one_of(*ROPE_NEEDS).words}, got {shown(kind)}.")
    if missing := [name for name in ROPE_NEEDS[kind] if rope.get(name) is None]:
        raise InputError(f'{where}rope_type is "{kind}", which needs {", ".join(missing)} as well.')
    for name in ("short_factor", "long_factor"):
        if kind == "longrope" and len(rope[name]) != head_dim // 2:
            raise InputError(f"{where}{name} must have {head_dim // 2} numbers for heads of {head_dim}.")
