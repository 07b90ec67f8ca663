"""Drafts on the CPU run with packed weights, and the text stays the same."""

import copy
import gc
import weakref

import pytest
import torch
from families import prompt, tiny_model
from support import checkpoints
from support.bundled import DRAFT, TARGET
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dovetail_plugin import CpuWeights, DovetailDraft, TreeBudget
from dovetail_plugin.drafts import runners
from dovetail_plugin.drafts.packed_runner import PackedRunner
from dovetail_plugin.drafts.runners import runner_for
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.kernels import WEIGHTS
from dovetail_plugin.kernels.library import library
from dovetail_plugin.kernels.linear import PackedLinear
from dovetail_plugin.planning.make_plan import make_plan
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.runner import Pass
from dovetail_plugin.targets.engine import engine_of

pytestmark = [
    pytest.mark.torch_only("weights are packed in transformers' own models"),
    pytest.mark.skipif(library() is None, reason="the CPU kernels were not built"),
]

DRAFTS = {
    "dgf": {"blocks": 2},
    "concat": {"fusion": "concat", "fusion_bias": True},
    "biases": {"attention_bias": True},
}


@pytest.fixture(scope="module")
def packed_target(tmp_path_factory):
    """Makes a tiny Llama with packed weights of a kind."""

    def make(kind, modules_to_not_convert=None, **fields):
        directory = tmp_path_factory.mktemp("target")
        tiny_model("llama", **fields).save_pretrained(directory)
        weights = CpuWeights(kind, modules_to_not_convert)
        return AutoModelForCausalLM.from_pretrained(directory, quantization_config=weights, dtype=torch.float32)

    return make


def random_draft(target, **fields):
    torch.manual_seed(0)
    draft = DovetailDraft.for_target(target, **fields)
    for parameter in draft.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    return draft


def predictions(runner, draft, rows=5):
    """Of a prompt, and of a level of a tree behind it."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(rows, draft.config.feature_size, generator=generator)
    stored, tokens = runner.new_rows(32), prompt(rows)[0]
    first = runner.run(Pass(draft.project(features), tokens, 1), stored)
    mask = torch.zeros(2, rows + 2)
    mask[0, rows + 1] = mask[1, rows] = float("-inf")
    level = Pass(first.features[-1:].expand(2, -1), tokens[:2], rows + 1, is_level=True, mask=mask)
    second = runner.run(level, stored)
    return torch.cat([first.features, second.features]), torch.cat([first.logits, second.logits])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("fields", DRAFTS.values(), ids=DRAFTS)
def test_predictions_are_those_of_the_draft(packed_target, kind, fields):
    target = packed_target(kind)
    draft = random_draft(target, **fields)
    runner = runner_for(draft, engine_of(target))
    assert type(runner) is PackedRunner and runner.weights == ("int4" if kind == "int4" else "int8")
    tolerance = 0.4 if kind == "int4" else 0.03
    for found, wanted in zip(predictions(runner, draft), predictions(TorchRunner(draft), draft), strict=True):
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_every_matrix_is_packed_and_the_draft_stays_as_it_was(packed_target):
    target = packed_target("int8")
    draft = random_draft(target, blocks=2, fusion="concat")
    before, random = copy.deepcopy(draft.state_dict()), torch.get_rng_state()
    trains = [parameter.requires_grad for parameter in draft.parameters()]
    network = runner_for(draft, engine_of(target))._draft
    assert torch.equal(torch.get_rng_state(), random)  # or the first sampled text would be another one
    assert network.packed_head.packed_weight is target.lm_head.packed_weight
    packed = {name for name, module in network.named_modules() if isinstance(module, PackedLinear)}
    linear = {name for name, module in draft.named_modules() if isinstance(module, nn.Linear)}
    assert packed == linear | {"packed_head"}
    assert not [name for name, module in network.named_modules() if type(module) is nn.Linear]
    assert draft.state_dict().keys() == before.keys()
    assert trains == [parameter.requires_grad for parameter in draft.parameters()] and any(trains)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


def test_reduced_vocabularies_have_their_own_head(packed_target):
    target = packed_target("int8")
    draft = random_draft(target)
    draft.draft_vocab_size = 40
    runner = runner_for(draft, engine_of(target))
    assert runner._draft.packed_head.out_features == 40
    found, wanted = (predictions(each, draft)[1] for each in (runner, TorchRunner(draft)))
    assert found.shape == wanted.shape and (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("kept", [40, 96])
def test_eagle3_drafts_have_their_own_head(packed_target, kept, tmp_path):
    target = packed_target("int8", num_hidden_layers=checkpoints.TARGET_LAYERS)
    draft = DovetailDraft.from_pretrained(checkpoints.eagle3(kept=kept).write(tmp_path))
    draft.budget = TreeBudget(6, 3, 3)
    options = {"max_new_tokens": 12, "do_sample": False}
    out = target.generate(prompt(), assistant_model=draft, **options)
    runner = runner_for(draft, engine_of(target))
    assert runner._draft.packed_head.out_features == draft.head_weight.shape[0] == kept
    assert runner._draft.fusion is draft.fusion  # what projects features runs in the draft itself
    assert torch.equal(out, target.generate(prompt(), **options)) and not draft.report.warnings
    found, wanted = (predictions(each, draft) for each in (runner, TorchRunner(draft)))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("kept", [None, ["lm_head"]], ids=["all", "head kept"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_plan_counts_the_packed_copy(packed_target, kind, kept):
    target = packed_target(kind, kept, hidden_size=64, intermediate_size=128)
    draft = random_draft(target)
    network = runner_for(draft, engine_of(target))._draft
    layers = [layer for name, layer in network.named_modules() if isinstance(layer, PackedLinear)]
    if kept is None:
        layers.remove(network.packed_head)
    copied = sum(layer.packed_weight.numel() * layer.packed_weight.element_size() for layer in layers)
    parts = {part.name: part.bytes for part in make_plan(target.config, draft.config, vram_bytes=0).parts}
    vectors = sum(parameter.nbytes for parameter in draft.parameters() if parameter.ndim == 1)
    assert copied <= parts["draft: blocks again"] <= copied + vectors + sum(b.nbytes for b in draft.rotary.buffers())
    assert parts.get("draft: embedding and head", 0) == (draft.head_weight.nbytes if kept is None else 0)
    assert draft.embed_weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()


def test_hooks_of_the_target_see_its_own_rows_only(packed_target):
    target = packed_target("int8")
    draft, seen = random_draft(target), []
    draft.budget = TreeBudget(6, 3, 2)
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_model": draft}
    target.generate(prompt(), **options)  # the first call finds out what the target supports
    target.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[-2]))
    target.generate(prompt(), **options)
    assert len(seen) == 1 + len(draft.report.rounds)


def _hooked(draft):
    draft.layers[0].mlp.register_forward_hook(lambda *_: None)


def _patched(draft):
    draft.step = draft.step


def _wrapped(draft):
    draft.layers[0].mlp.up_proj = type("Own", (nn.Linear,), {})(32, 48, bias=False)


@pytest.mark.parametrize("change", [_hooked, _patched, _wrapped])
def test_drafts_that_somebody_changed_run_with_their_own_modules(packed_target, change):
    """A copy would call another object's hook, or leave out what somebody put there."""
    target = packed_target("int8")
    draft = random_draft(target)
    assert type(runner_for(draft, engine_of(target))) is PackedRunner
    change(draft)
    assert type(runner_for(draft, engine_of(target))) is TorchRunner


def _other_weights(draft):
    with torch.no_grad():
        draft.layers[0].mlp.up_proj.weight.mul_(3)


def _fewer_tokens(draft):
    draft.draft_vocab_size = 40


@pytest.mark.parametrize("change", [_other_weights, _fewer_tokens])
def test_a_later_turn_runs_the_changed_draft(packed_target, change):
    target, cache = packed_target("int8"), DynamicCache()
    draft = random_draft(target)
    draft.budget = TreeBudget(6, 3, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache, "assistant_model": draft}
    first = target.generate(prompt(), **options)
    change(draft)
    target.generate(torch.cat([first, prompt(4)], dim=1), **options)
    assert not draft.report.warnings
    assert draft.turns[cache].drafter.runner is runner_for(draft, engine_of(target))


@pytest.mark.parametrize("tokens", [None, 40])
def test_beside_heads_that_are_not_packed(packed_target, tokens):
    """The draft multiplies with the target's own numbers."""
    for target in (packed_target("int4", modules_to_not_convert=["lm_head"]), tiny_model("llama")):
        draft = random_draft(target)
        draft.draft_vocab_size = tokens
        runner = runner_for(draft, engine_of(target))
        assert runner.weights == "int8" and runner._draft.packed_head is None
        (found, logits), (wanted, _) = (predictions(each, draft) for each in (runner, TorchRunner(draft)))
        assert (found - wanted).norm() < 0.03 * wanted.norm()
        torch.testing.assert_close(logits[-2:], draft.head(found[-2:]))


def test_when_weights_stay_as_they_are(packed_target, monkeypatch, caplog):
    """`runner` says so, the kernels are missing, or the weights have no scale."""
    target = packed_target("int8")
    draft, engine = random_draft(target), engine_of(target)
    assert type(runner_for(draft, engine, plainly=True)) is TorchRunner
    drafter = lambda: draft.new_drafter(engine, capacity=8, clock=PhaseClock())  # noqa: E731
    assert drafter().identity()[0] == "PackedRunner"
    draft.runner = "torch"
    assert drafter().identity()[0] == "TorchRunner"
    broken = random_draft(target)
    broken.layers[0].mlp.up_proj.weight.data[1, 2] = float("inf")
    assert type(runner_for(broken, engine)) is TorchRunner
    assert "not finite" in caplog.text
    monkeypatch.setattr(runners, "library", lambda: None)
    assert type(runner_for(random_draft(target), engine)) is TorchRunner


def test_a_runner_follows_the_drafts_weights_and_goes_with_the_draft(packed_target):
    target = packed_target("int8")
    draft = random_draft(target)
    runner = runner_for(draft, engine_of(target))
    assert runner_for(draft, engine_of(target)) is runner
    draft.layers[0].mlp.up_proj.weight.data = draft.layers[0].mlp.up_proj.weight.data * 2
    after = runner_for(draft, engine_of(target))
    assert after is not runner
    packed = [each._draft.layers[0].mlp.up_proj.unpacked() for each in (after, runner)]
    torch.testing.assert_close(packed[0], packed[1] * 2)
    gone = weakref.ref(after)
    del runner, after, draft
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bundled_pair(kind, dtype):
    """Packed drafts are accepted about as often, and sampled texts are the plain ones, too."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, quantization_config=CpuWeights(kind), dtype=dtype)
    draft = DovetailDraft.from_pretrained(DRAFT, dtype=dtype)
    draft.budget = TreeBudget(nodes=8, depth=4, top_k=4)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = tokenizer("Natalia sold clips to 48 of her friends in April, and then", return_tensors="pt").input_ids
    options = {"max_new_tokens": 48, "do_sample": False}
    rates = []
    for runner in ("torch", "auto"):
        draft.runner = runner
        out = target.generate(ids, assistant_model=draft, **options)
        if kind != "float" or dtype == torch.float32:  # oneDNN's sums depend on the number of rows, which bf16 shows
            assert torch.equal(out, target.generate(ids, **options))
        rates.append(draft.report.acceptance_length)
    assert rates[1] > 0.8 * rates[0]
    sampled = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8}
    if kind != "float":
        torch.manual_seed(4)
        plain = target.generate(ids, **sampled)
        torch.manual_seed(4)
        assert torch.equal(target.generate(ids, assistant_model=draft, **sampled), plain)
