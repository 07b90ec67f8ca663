"""Sizes of configs, whatever the architecture calls them."""

import pytest
from families import FULL_ATTENTION, tiny_model
from transformers import AutoConfig

from dovetail_plugin import DovetailConfig
from dovetail_plugin.targets.config_sizes import ConfigSizes, sizes_of

pytestmark = pytest.mark.torch_only("configs of targets in torch")


@pytest.mark.parametrize("model_type", sorted(FULL_ATTENTION))
def test_sizes_of_every_family(model_type):
    config = tiny_model(model_type).config
    sizes = sizes_of(config)
    kv_heads = 4 if FULL_ATTENTION[model_type].get("num_key_value_heads", 2) is None else 2
    assert sizes == ConfigSizes(32, 97, 3, 4, kv_heads, 8, 48, sizes.positions, sizes.norm_eps)
    assert 0 < sizes.norm_eps < 1e-4


def test_composite_configs_give_the_sizes_of_their_text_model():
    config = AutoConfig.for_model("gemma3", text_config={"hidden_size": 64, "num_attention_heads": 2, "head_dim": 48})
    assert (sizes_of(config).hidden_size, sizes_of(config).head_dim) == (64, 48)


def test_the_widest_mlp_counts_where_layers_differ():
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=2, intermediate_size=[64, 96])
    assert sizes_of(config).intermediate_size == 96
    assert DovetailConfig.for_target(config).intermediate_size == 96


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mamba", {}, "MambaConfig has no num_attention_heads"),
        ("t5", {}, "t5 models are encoder-decoders"),
        ("llama", {"num_attention_heads": 0}, "LlamaConfig has num_attention_heads=0"),
    ],
)
def test_unusable_configs_are_refused_by_name(model_type, fields, message):
    config = AutoConfig.for_model(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        sizes_of(config)
    with pytest.raises(ValueError, match=message):
        DovetailConfig.for_target(config)
