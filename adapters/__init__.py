"""Targets on other engines than torch, and drafts in other servers. Imported as `dovetail_plugin.adapters`.

`openvino` and `onnxruntime` run exported models as targets, `vllm` runs drafts of this project in vLLM. Each of them
imports its library; this module imports none of them.
"""

from typing import TYPE_CHECKING, Any

from dovetail_plugin.compat import find_file
from dovetail_plugin.drafts.checkpoints.load import HUB_KWARGS

if TYPE_CHECKING:
    from .stored_target import StoredTarget

FILES = {"openvino_model.xml": "OpenVINO", "model.onnx": "ONNX Runtime"}
"""File that an exporter writes -> the engine that runs it."""


def load_exported(name: str, **options: Any) -> "StoredTarget":
    """Load an exported model as a target.

    Args:
        name: directory or hub id with an OpenVINO IR or an ONNX graph.
        options: of `OpenVINOTarget.from_pretrained` or `OnnxRuntimeTarget.from_pretrained`, for example `threads` or
            `revision`.

    Raises:
        ValueError: `name` has neither file, or the graph cannot be a target.
        ImportError: the engine is not installed. The message names the extra to install.
    """
    hub_kwargs = {key: value for key, value in options.items() if key in HUB_KWARGS}
    engine = next((engine for file, engine in FILES.items() if find_file(name, file, **hub_kwargs)), None)
    if engine is None:
        raise ValueError(f"{name} has none of {', '.join(FILES)}. Export a model with `dovetail export`.")
    if engine == "OpenVINO":
        from .openvino import OpenVINOTarget

        return OpenVINOTarget.from_pretrained(name, **options)
    from .onnxruntime import OnnxRuntimeTarget

    return OnnxRuntimeTarget.from_pretrained(name, **options)
