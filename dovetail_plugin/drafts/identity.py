"""Turns the config of a model into values that JSON can hold, for keys of measurements."""

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from transformers import PretrainedConfig


def config_identity(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a config as values that JSON can hold.

    Configs of remote code have fields that JSON cannot hold: dtypes, sets, paths, objects. The result is the same in
    every process: sets are sorted, and of an unknown object only the type counts.

    Args:
        config: of any model.
    """
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PretrainedConfig):
        return config_identity(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (os.PathLike, torch.dtype, torch.device, Enum)):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"
