"""Export checkpoints to ONNX with optimum-onnx: requests come in on stdin, one JSON object a line.

    {"source": DIR, "out": DIR, "kind": KIND}

KIND is "f32"; "int8" or "int4" for packed weights, with "_rounded" for products in eight bits too; "dynamic",
"without_cache" or "encoder" for what cannot be a target.
Answers and purpose as in tests/export_openvino.py. optimum-onnx wants a transformers below 4.58, so this runs in an
environment of its own. The checkpoint's config is rewritten to what that reads.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import onnx
from onnxruntime.quantization import quant_utils, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from optimum.exporters.onnx import main_export

TASKS = {"without_cache": "text-generation", "encoder": "feature-extraction"}
"""Kind -> task of the exporter; "text-generation-with-past" where it is not named."""

BLOCK = 16
"""Weights that share a scale; the smallest that ONNX Runtime has, because tiny models have small matrices."""


def as_transformers_4_has_it(config: dict[str, Any]) -> dict[str, Any]:
    """A config that transformers 5 wrote, with rotary embeddings under their former names."""
    rope = config.get("rope_parameters") or {}
    theta = {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]} if "rope_theta" in rope else {}
    part = {"rotary_pct": rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {}
    return config | theta | part


def export(source: str, out: str, kind: str) -> None:
    """Write the graph of the checkpoint in `source`, and its configs, into `out`."""
    config = Path(source) / "config.json"
    config.write_text(json.dumps(as_transformers_4_has_it(json.loads(config.read_text()))))
    main_export(source, out, task=TASKS.get(kind, "text-generation-with-past"), do_validation=False)
    file = Path(out) / "model.onnx"
    if kind == "dynamic":
        quantize_dynamic(str(file), str(file))
    if kind.startswith("int"):
        onnx.save(quantised(onnx.load(file), bits=int(kind[3]), rounded=kind.endswith("_rounded")), file)


def quantised(model: "onnx.ModelProto", bits: int, rounded: bool) -> "onnx.ModelProto":
    """The model with MatMulNBits for its products and, in four bits, GatherBlockQuantized for its embedding.

    rounded: activations are rounded to eight bits in the products, which is how fast ones are made.
    """
    kinds = ("MatMul", "Gather") if bits == 4 else ("MatMul",)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        is_symmetric=bits == 4,  # both ways of zero points are met
        accuracy_level=4 if rounded else 0,
        quant_format=quant_utils.QuantFormat.QOperator,
        op_types_to_quantize=kinds,
        bits=bits,
    )
    quantiser = MatMulNBitsQuantizer(model, algo_config=config)
    quantiser.process()
    return quantiser.model.model


def main() -> None:
    """Answer requests until stdin ends; whatever libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        error = None
        try:
            export(**json.loads(line))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"error": error}), file=answers, flush=True)


if __name__ == "__main__":
    main()
