"""Targets and servers other than transformers' own models; imported as `dovetail_plugin.adapters`.

Each module imports its library when it is imported itself, and nothing else does.
"""

from typing import Any

from dovetail_plugin.compat import find_file
from dovetail_plugin.drafts.checkpoints.load import HUB_KWARGS

FILES = {"openvino_model.xml": "openvino", "model.onnx": "onnxruntime"}
"""What an exporter writes, and the module that drives it."""


def load_exported(name: str, **options: Any) -> Any:
    """The target of an exported model: a directory or hub id with an OpenVINO IR or an ONNX graph.

    Args:
        options: for the target's `from_pretrained`, for example `threads` or `revision`.

    Raises:
        ValueError: it has neither file, or the graph cannot be a target.
        ImportError: the engine is not installed; names the extra.
    """
    hub_kwargs = {key: value for key, value in options.items() if key in HUB_KWARGS}
    kinds = [kind for file, kind in FILES.items() if find_file(name, file, **hub_kwargs)]
    if not kinds:
        raise ValueError(f"{name} has none of {', '.join(FILES)}; export a model with `dovetail export`.")
    if kinds[0] == "openvino":
        from .openvino import OpenVINOTarget

        return OpenVINOTarget.from_pretrained(name, **options)
    from .onnxruntime import OnnxRuntimeTarget

    return OnnxRuntimeTarget.from_pretrained(name, **options)
