"""Layers of a target on another device: what crosses, how often, how it is undone; texts stay the same."""

import pytest
import torch
from families import FULL_ATTENTION, prompt, tiny_model
from support.devices import FakeCuda, move
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.targets.features import decoder_layers
from dovetail_plugin.targets.layers_on_gpu import Border, final_norm, place_layers

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
    border, crossed = place_layers(model, [1, 2], "cpu").border, []  # one device, so the border names another
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
    with pytest.raises(ValueError, match=r"placed already\. Call remove\(\)"):
        place_layers(model, [2], "cpu")


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_placement_can_be_undone():
    model = tiny_model("llama")
    before, attributes = model(prompt(7)).logits, set(vars(model))
    with place_layers(model, [1, 2], "cpu") as placed:
        assert placed.active and set(vars(model)) == attributes
        assert torch.equal(model(prompt(7)).logits, before)
    assert hooks_of(model) == 0 and not placed.active and set(vars(model)) == attributes
    assert torch.equal(model(prompt(7)).logits, before)
    placed.remove()  # the second time does nothing
    with place_layers(model, [2], "cpu"):
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0


def test_a_failed_placement_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    norm = final_norm(model)

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(norm, "register_forward_pre_hook", fail)
    with pytest.raises(torch.OutOfMemoryError):
        place_layers(model, [1, 2], "cpu")
    assert hooks_of(model) == 0
    monkeypatch.undo()
    place_layers(model, [2], "cpu").remove()


def test_modules_go_back_to_their_device(monkeypatch):
    model, moves = tiny_model("llama"), []
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "to", lambda module, device: moves.append((module, torch.device(device))))
        place_layers(model, [2], "cuda").remove()
    moved = [decoder_layers(model)[2], final_norm(model)]
    assert moves == [(module, torch.device("cuda")) for module in moved] + [
        (module, torch.device("cpu")) for module in reversed(moved)
    ]


def test_layers_that_cannot_be_told_apart():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 lists of 7 modules"):
        place_layers(model, [6], "cpu")
