"""Configs without weights: well-known shapes, files, directories."""

import pytest

from dovetail_plugin.planning.known_shapes import SHAPES, load_config, shape_config
from dovetail_plugin.planning.memory import target_sizes
from dovetail_plugin.planning.storage import storage_of

pytestmark = pytest.mark.torch_only("configs of targets in torch")


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llama-2-7b-shape", 6.74),
        ("llama-2-13b-shape", 13.0),
        ("llama-2-70b-shape", 68.98),
        ("llama-3.1-8b-shape", 8.03),
        ("llama-3.1-70b-shape", 70.6),
        ("llama-3.2-1b-shape", 1.24),
        ("llama-3.2-3b-shape", 3.21),
        ("qwen2.5-7b-shape", 7.62),
        ("qwen2.5-14b-shape", 14.8),
        ("qwen2.5-32b-shape", 32.8),
        ("qwen3-8b-shape", 8.19),
        ("qwen3-14b-shape", 14.8),
        ("qwen3-32b-shape", 32.8),
        ("mistral-7b-shape", 7.25),
        ("mixtral-8x7b-shape", 46.7),
        ("gemma-2-9b-shape", 9.24),
        ("gemma-3-27b-shape", 27.4),
        ("gpt-oss-20b-shape", 20.9),
    ],
)
def test_shapes_have_the_published_parameters(shape, billions):
    config = shape_config(shape)
    assert target_sizes(config, storage_of(config, "float16")).weights_bytes / 2e9 == pytest.approx(billions, rel=0.01)


def test_every_shape_is_tested():
    (marks,) = (m for m in test_shapes_have_the_published_parameters.pytestmark if m.name == "parametrize")
    assert {shape for shape, _ in marks.args[1]} == set(SHAPES)


def test_load_config(tmp_path):
    config = load_config("qwen2.5-7b-shape")
    assert (config.model_type, config.num_hidden_layers, config.name_or_path) == ("qwen2", 28, "qwen2.5-7b-shape")
    config.save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json", str(tmp_path / "config.json")):
        assert load_config(place).hidden_size == 3584


def test_load_config_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"there is no shape 'gpt-5'.*llama-2-7b-shape"):
        shape_config("gpt-5")
    with pytest.raises(ValueError, match=r"not/to/be/found.*local copy.*llama-2-7b-shape"):
        load_config("not/to/be/found")
    with pytest.raises(ValueError, match="does not contain a config that can be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ValueError, match="does not contain a config that can be read"):
        load_config(tmp_path)
