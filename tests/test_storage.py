"""How weights are stored: dtypes of composite configs, quantized checkpoints, what is refused."""

import pytest
import torch
from families import tiny_model
from transformers import AutoConfig

from dovetail_plugin.planning.known_shapes import shape_config
from dovetail_plugin.planning.make_plan import make_plan
from dovetail_plugin.planning.memory import target_sizes
from dovetail_plugin.planning.storage import storage_of, stored_dtype

pytestmark = pytest.mark.torch_only("configs of targets in torch")

GIB = 2**30
MATRICES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
"""(outputs, inputs) in a layer of the tiny Llama."""
NORMS = 2 * 32
TABLE = 97 * 32


def quantized(**fields):
    config = tiny_model("llama").config
    config.dtype, config.quantization_config = torch.float16, fields
    return config


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_at_the_top_of_a_composite_config(field):
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = AutoConfig.for_model("gemma3", text_config=text, **{field: "bfloat16"})
    config.text_config.dtype = None
    assert stored_dtype(config) == "bfloat16"
    assert make_plan(config, None, vram_bytes=0).target_dtype == "bfloat16"


def test_gemma_3_27b_as_published():
    """Its config names the dtype at the top level only."""
    config = shape_config("gemma-3-27b-shape")
    assert config.text_config.dtype is None
    assert storage_of(config, "auto").name == "bfloat16"


def test_gpt_oss_20b_as_published():
    """The published files hold 13.76 GB: experts in mxfp4, the rest in bfloat16."""
    config = shape_config("gpt-oss-20b-shape")
    sizes = target_sizes(config, storage_of(config, "auto"))
    assert sizes.weights_bytes == pytest.approx(13.76e9, rel=0.005)
    assert sizes.weights["embedding"] == 201088 * 2880 * 2
    assert sizes.storage.name == "mxfp4 (4 bits)"


def grouped(bits, group, scale_bits):
    """Bytes of a layer's matrices with one scale per group of inputs."""
    return sum(o * i * bits // 8 + o * -(-i // (group or i)) * scale_bits // 8 for o, i in MATRICES)


@pytest.mark.parametrize(
    ("fields", "matrix_bytes"),
    [
        (dict(quant_method="awq", bits=4, group_size=16, zero_point=True), grouped(4, 16, 20)),
        (dict(quant_method="gptq", bits=8, group_size=-1), grouped(8, None, 24)),
        (dict(quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False), grouped(8, None, 32)),
        (dict(quant_method="bitsandbytes", load_in_4bit=True), grouped(4, 64, 32)),
        (dict(quant_method="fp8", weight_block_size=[16, 16]), grouped(8, 16, 2)),
        (dict(quant_method="fp8"), grouped(8, None, 32)),
        (dict(quant_method="fbgemm_fp8"), grouped(8, None, 32)),
        (
            dict(
                quant_method="compressed-tensors",
                config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
                ignore=["lm_head"],
            ),
            grouped(4, 16, 16),
        ),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else None,
)
def test_quantized_checkpoints_are_counted_as_stored(fields, matrix_bytes):
    config = quantized(**fields)
    sizes = target_sizes(config, storage_of(config, "auto"))
    assert sizes.layers[0].weights_bytes == pytest.approx(matrix_bytes + NORMS * 2, abs=len(MATRICES))
    assert sizes.weights["embedding"] == sizes.weights["head"] == TABLE * 2
    assert sizes.storage.run_bytes == 2 and config.quantization_config == fields
    plan = make_plan(config, None, vram_bytes=8 * GIB)
    assert plan.gpu_layers == () and any("stay on the CPU" in note for note in plan.notes)
    assert "the target's weights are counted as stored" in plan.notes[-1]
    assert plan.draft_dtype == "float16"


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("modules_to_not_convert", "model.layers.*.self_attn"),
        ("modules_to_not_convert", "self_attn"),
        ("ignore", "re:.*self_attn.*"),
    ],
)
def test_modules_that_are_not_converted_keep_their_dtype(name, entry):
    config = quantized(quant_method="fbgemm_fp8", **{name: [entry]})
    attention, mlp = MATRICES[:4], MATRICES[4:]
    expected = sum(o * i * 2 for o, i in attention) + sum(o * (i + 4) for o, i in mlp) + NORMS * 2
    assert target_sizes(config, storage_of(config, None)).layers[0].weights_bytes == expected


def test_a_named_dtype_overrides_the_quantization():
    config = quantized(quant_method="awq", bits=4, group_size=128)
    plain = tiny_model("llama").config
    weights = [target_sizes(c, storage_of(c, "bfloat16")).weights_bytes for c in (config, plain)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(quant_method="hqq"), r"quant_method 'hqq', whose size cannot be read.*awq, gptq.*--dtype"),
        (dict(bits=4), "quant_method 'None'"),
        (dict(quant_method="awq"), r"method 'awq' cannot be used: KeyError\('bits'\)"),
        (
            dict(
                quant_method="compressed-tensors",
                config_groups={"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
            ),
            "its groups of layers have different formats",
        ),
    ],
)
def test_unknown_quantization_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_plan(quantized(**fields), None, vram_bytes=0)
