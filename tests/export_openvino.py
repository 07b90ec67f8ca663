"""Export checkpoints to OpenVINO with optimum-intel: requests come in on stdin, one JSON object a line.

    {"source": DIR, "out": DIR, "kind": "f32" | "int8" | "int4" | "stateless" | "encoder"}

Each request is answered by one line on stdout: {"error": null} or {"error": "message"}. This is a separate process, so
that tests can run in an environment without optimum-intel, or with a transformers that it does not support, and take
their models from an environment that has it. `engines.Exporter` starts it.
"""

import json
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from optimum.exporters.openvino import model_configs
from optimum.intel import OVModelForCausalLM, OVModelForFeatureExtraction, OVWeightQuantizationConfig

# optimum-intel 2.2 refuses to export these with transformers above 5.0; the graphs are right all the same
# (tests compare their logits with torch's), and what matters here is that a stored one is driven rightly.
model_configs.GemmaOpenVINOConfig.MAX_TRANSFORMERS_VERSION = None
model_configs.Gemma2OpenVINOConfig.MAX_TRANSFORMERS_VERSION = None

KINDS: dict[str, dict[str, Any]] = {
    "f32": {"load_in_8bit": False},
    "int8": {"quantization_config": OVWeightQuantizationConfig(bits=8)},
    "int4": {"quantization_config": OVWeightQuantizationConfig(bits=4, group_size=16, ratio=1.0)},
    "stateless": {"load_in_8bit": False, "stateful": False},
    "encoder": {"load_in_8bit": False},
}


def export(source: str, out: str, kind: str) -> None:
    """Write the IR of the checkpoint in `source` into `out`."""
    auto_class = OVModelForFeatureExtraction if kind == "encoder" else OVModelForCausalLM
    auto_class.from_pretrained(source, export=True, compile=False, **KINDS[kind]).save_pretrained(out)


def main() -> None:
    """Answer requests until stdin ends; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        error = None
        try:
            export(**json.loads(line))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"error": error}), file=answers, flush=True)


if __name__ == "__main__":
    main()
