"""Target layers on another device: what crosses, how often, and that texts stay the same."""

import pytest
import torch
from families import FULL_ATTENTION, prompt, tiny_model
from test_drafting import FakeCuda, move
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.targets.layers_on_gpu import Border, decoder_layers, final_norm, place_layers

pytestmark = pytest.mark.torch_only("layers of torch targets")


class FakeCudaForTargets(FakeCuda):
    """Targets call a little more than drafts do."""

    ON_SHAPES = (*FakeCuda.ON_SHAPES, torch.Tensor.contiguous)


class Moved(torch.nn.Module):
    """Fake parameters cannot be moved with `.to`; they are moved before, and this stands in for it."""

    def to(self, *_args, **_kwargs):
        return self


@pytest.mark.parametrize("model_type", sorted(set(FULL_ATTENTION) - {"gpt2"}))
def test_states_cross_and_logits_come_back(model_type, monkeypatch):
    """On fake "cuda" tensors every operation between devices raises, so whatever a layer needs must have crossed."""
    config = tiny_model(model_type).config
    with FakeTensorMode(allow_non_fake_inputs=True), FakeCudaForTargets(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        layers = decoder_layers(model)
        for module in (*layers[1:], final_norm(model)):
            move(module, "cuda")
        monkeypatch.setattr(torch.nn.Module, "to", Moved.to)
        place_layers(model, [1, 2], "cuda")
        seen = []
        model.base_model.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state.device.type))
        output = model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
        assert output.logits.device.type == "cpu" and seen == ["cuda"]
        assert [layer.keys.device.type for layer in output.past_key_values.layers] == ["cpu", "cuda", "cuda"]


def test_nothing_crosses_twice(monkeypatch):
    """Two layers behind the border: their hidden states, mask and rotary tables cross once, in every pass anew."""
    model = tiny_model("llama")
    place_layers(model, [1, 2], "cpu")  # same device: nothing has to cross, so the border is told that it has to
    border, crossed = model._dovetail_border, []
    border.device = torch.device("meta")
    monkeypatch.setattr(
        "dovetail_plugin.targets.layers_on_gpu.send_to_device", lambda value, *_, **__: crossed.append(value) or value
    )
    ids = prompt(5)
    for _ in range(2):
        crossed.clear()
        model(input_ids=ids, position_ids=torch.arange(5)[None], attention_mask=torch.zeros(1, 1, 5, 5))
        states = [v for v in crossed if isinstance(v, torch.Tensor) and v.dtype == torch.float32 and v.ndim == 3]
        masks = [v for v in crossed if isinstance(v, torch.Tensor) and v.ndim == 4]
        tables = [v for v in crossed if isinstance(v, tuple)]
        # Here every layer's output "is not on the device" either, so two layers and the norm make three states.
        assert (len(states), len(masks), len(tables)) == (3, 1, 1)


def test_caches_are_not_copied():
    cache = DynamicCache()
    assert Border(torch.device("meta")).cross(cache) is cache


@pytest.mark.parametrize("model_type", sorted(FULL_ATTENTION))
def test_texts_stay_the_same(model_type, oracle):
    plain = tiny_model(model_type).generate(prompt(17), max_new_tokens=24, do_sample=False)
    placed = tiny_model(model_type)
    place_layers(placed, [2], "cpu")
    assert torch.equal(placed.generate(prompt(17), max_new_tokens=24, do_sample=False), plain)
    draft = DovetailDraft.for_target(placed)
    draft.budget = TreeBudget(12, 4, 4)
    oracle(plain, 17)
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(placed.generate(prompt(17), assistant_model=draft, **options), plain)
    assert draft.report.acceptance_length > 1.2


def test_only_the_last_layers_and_only_once():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"must be the model's last ones, \[2\], got \[0\]"):
        place_layers(model, [0], "cpu")
    place_layers(model, [], "cpu")
    place_layers(model, [2], "cpu")
    with pytest.raises(ValueError, match="moved before; load it anew"):
        place_layers(model, [2], "cpu")


def test_layers_that_cannot_be_told():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 lists of 7 modules"):
        place_layers(model, [6], "cpu")
