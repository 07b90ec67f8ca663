"""Requests that cannot be drafted are refused at once, with value and remedy; a failing draft keeps the text."""

import warnings

import pytest
import torch
from families import VOCAB, prompt, tiny_target
from helpers import ROOT, run_python
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from dovetail_plugin import DovetailDraft, PromptLookupDraft, TreeBudget
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.targets.engine import engine_of

pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)


@pytest.fixture
def refused(llama, draft, monkeypatch):
    """A function that checks that a call of `generate` is refused with a message, before any forward pass."""

    def check(match, ids=None, target=llama, assistant=draft, error=ValueError, **options):
        def no_forward(*_args, **_kwargs):
            raise AssertionError("the target ran before the request was refused")

        monkeypatch.setattr(target, "forward", no_forward)
        if not isinstance(target, torch.nn.Module):  # the request is refused before the engine is opened
            monkeypatch.setattr(engine_of(target), "session", no_forward)
        ids = prompt() if ids is None else ids
        with pytest.raises(error, match=match) as raised:
            target.generate(ids, assistant_model=assistant, **(GREEDY | options))
        return str(raised.value)

    return check


def test_wrong_vocabulary(refused):
    message = refused("vocabulary is 50", assistant=DovetailDraft.for_target(tiny_target("llama", vocab_size=50)))
    assert str(VOCAB) in message
    assert "dovetail train" in message


def test_wrong_hidden_size(refused):
    message = refused("hidden size is 64", assistant=DovetailDraft.for_target(tiny_target("llama", hidden_size=64)))
    assert "32" in message
    assert "dovetail train" in message


@pytest.mark.torch_only("the name of an export is its directory, which does not identify the target")
def test_draft_of_another_target_warns(llama, draft, monkeypatch):
    """The sizes match but the names do not: one warning names both targets, and the text is the plain one."""
    monkeypatch.setattr(llama.config, "_name_or_path", "org/this-target")
    draft.config.target_name_or_path = "org/other-target"
    other = DovetailDraft(draft.config)  # not attached to a target, as after loading
    plain = llama.generate(prompt(), **GREEDY)
    with pytest.warns(UserWarning, match=r"'org/other-target'.*'org/this-target'") as caught:
        assert torch.equal(plain, llama.generate(prompt(), **GREEDY, assistant_model=other))
    assert len([w for w in caught if "other-target" in str(w.message)]) == 1


@pytest.mark.parametrize("here", ["org/this-target", "copies/This-Target", ""])
def test_copy_of_the_same_target_gives_no_warning(llama, draft, monkeypatch, here):
    """A local copy of the model that the draft names, or a target without a name, gives no warning."""
    monkeypatch.setattr(llama.config, "_name_or_path", here)
    draft.config.target_name_or_path = "org/this-target"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(prompt(), **GREEDY, assistant_model=DovetailDraft(draft.config))


@pytest.mark.torch_only("stored targets refuse all texts beyond their config's positions")
def test_prompt_beyond_the_table_of_positions(refused):
    target = tiny_target("gpt2", max_position_embeddings=64)
    message = refused("65 tokens", ids=prompt(65), target=target, assistant=PromptLookupDraft())
    assert "64" in message
    assert "Shorten" in message


@pytest.mark.parametrize("tokens", [17, 40])
@pytest.mark.torch_only("stored targets refuse prompts beyond their config's positions")
def test_texts_beyond_computed_positions(tokens, oracle):
    """Plain generate continues beyond max_position_embeddings; a draft does too, with the same text, and drafts."""
    target = tiny_target("llama", max_position_embeddings=32)
    plain = target.generate(prompt(tokens), **GREEDY)
    oracle(plain, tokens)
    draft = DovetailDraft.for_target(target)
    assert torch.equal(plain, target.generate(prompt(tokens), **GREEDY, assistant_model=draft))
    assert len(draft.report.rounds) < 12


OF_NEWER_TRANSFORMERS = pytest.mark.skipif(
    not hasattr(GenerationConfig(), "assistant_ensemble_weight"), reason="a newer option of transformers"
)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"dola_layers": "low"}, "Leave out dola_layers"),
        pytest.param({"assistant_ensemble_weight": 0.5}, "of the target alone", marks=OF_NEWER_TRANSFORMERS),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_options(refused, options, match):
    refused(match, **options)


def test_static_cache(refused, llama):
    message = refused("StaticCache", past_key_values=StaticCache(config=llama.config, max_cache_len=64))
    assert "Pass a DynamicCache" in message or "Pass what its own `generate` returned" in message


def test_empty_prompt(refused):
    refused("empty", ids=torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.torch_only("transformers refuses embeddings for other engines itself")
def test_embeddings_as_prompt(refused, llama):
    embeds = llama.get_input_embeddings()(prompt()).detach()
    assert "input_ids" in refused("inputs_embeds", inputs_embeds=embeds)


@pytest.mark.torch_only("devices of weights")
def test_weights_not_in_memory(refused, llama):
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(llama.config)
    message = refused("meta device", target=target)
    assert "lm_head.weight" in message or "embed_tokens.weight" in message
    assert 'device_map="cpu"' in message


@pytest.mark.torch_only("a transformers model that cannot be a target")
def test_encoder_decoder(refused):
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0)
    message = refused("encoder-decoder", target=AutoModelForSeq2SeqLM.from_config(config))
    assert "T5ForConditionalGeneration" in message
    assert "decoder-only" in message


RECURRENT = {
    "mamba": dict(state_size=4, num_hidden_layers=2),
    "lfm2": dict(num_hidden_layers=3, full_attn_idxs=[1]),
    "qwen3_next": dict(
        num_hidden_layers=4,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "bamba": dict(
        num_hidden_layers=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=4,
        num_key_value_heads=2,
    ),
}
"""State-space models, and hybrid models with a recurrent state beside attention: model type -> config fields."""


@pytest.mark.torch_only("transformers models that cannot be targets")
@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_state(refused, model_type):
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = AutoConfig.for_model(model_type, **(sizes | RECURRENT[model_type]))
    target = AutoModelForCausalLM.from_config(config)
    message = refused("rolled back|take back", target=target)
    assert type(target).__name__ in message
    assert "without a draft" in message


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engine_that_is_not_installed(engine):
    """The message names the extra to install; the rest of the package imports without the engine."""
    code = f"import dovetail_plugin, sys; sys.modules['{engine}'] = None; import dovetail_plugin.adapters.{engine}"
    done = run_python("-c", code, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: ")
    assert f"pip install '.[{engine}]'" in done.stderr


@pytest.mark.parametrize("field", ["nodes", "depth", "top_k"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8"])
def test_budget(field, value):
    with pytest.raises(ValueError, match=field) as error:
        TreeBudget(**{field: value})
    assert str(value) in str(error.value)


# --- a draft that fails while text is generated ------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_draft_of_nans(llama, draft, do_sample):
    options = GREEDY | {"do_sample": do_sample}
    torch.manual_seed(2)
    plain = llama.generate(prompt(), **options)
    draft.layers[0].mlp.down_proj.weight.data[3] = float("nan")
    torch.manual_seed(2)
    assert torch.equal(plain, llama.generate(prompt(), **options, assistant_model=draft))
    assert len(draft.report.warnings) == 1
    assert "not finite" in draft.report.warnings[0]


@pytest.mark.parametrize("failing_call", [1, 2, 5, 11])
def test_draft_that_runs_out_of_memory(llama, draft, oracle, monkeypatch, failing_call):
    """During the prompt, the first tree or a later round: the text stays the plain one, and one warning says why."""
    plain = llama.generate(prompt(), **GREEDY)
    oracle(plain, prompt().shape[1])
    calls, step = [], DraftNetwork.step

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing_call:
            raise RuntimeError("out of memory")
        return step(*args, **kwargs)

    monkeypatch.setattr(DraftNetwork, "step", failing)
    assert torch.equal(plain, llama.generate(prompt(), **GREEDY, assistant_model=draft))
    assert len(calls) == failing_call  # the draft is not called again
    assert len(draft.report.warnings) == 1
    assert "out of memory" in draft.report.warnings[0]
    assert draft.report.new_tokens == 24


def test_failure_is_forgotten_in_the_next_generation(llama, draft, monkeypatch):
    def failing(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DraftNetwork, "step", failing)
        llama.generate(prompt(), **GREEDY, assistant_model=draft)
    assert draft.report.nodes_per_round == 1
    llama.generate(prompt(), **GREEDY, assistant_model=draft)
    assert draft.report.warnings == []
    assert draft.report.nodes_per_round > 1


@pytest.mark.torch_only("transformers' cache classes and hooks")
def test_interrupting_the_draft_interrupts_generation(llama, draft, monkeypatch):
    """Ctrl-C inside the draft is not a failure of the draft; cache and hooks are restored."""

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DraftNetwork, "step", interrupted)
    cache = DynamicCache(config=llama.config)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(prompt(), **GREEDY, assistant_model=draft, past_key_values=cache)
    assert not llama.base_model._forward_hooks
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
