"""What the caller and the model give to the prompt's pass reaches verification passes too, as in plain generation."""

import pytest
import torch
import transformers
from families import VOCAB, prompt, tiny_model
from model_table.build import build
from model_table.discovery import family_of
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dovetail_plugin import DovetailDraft, PromptLookupDraft, TreeBudget, compat
from dovetail_plugin.targets.features import feature_module

pytestmark = [pytest.mark.torch_only("arguments of the forward pass"), pytest.mark.usefixtures("fixed_budget")]

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)


def check(model, oracle, ids=None, least=2.0, **arguments):
    """Plain text, an oracle's and lookup's are equal. Returns the oracle's report."""
    ids = prompt(21) if ids is None else ids
    plain = model.generate(ids, **GREEDY, **arguments)
    lookup = PromptLookupDraft(shortest=1)
    assert torch.equal(model.generate(ids, assistant_model=lookup, **GREEDY, **arguments), plain)
    oracle(plain, ids.shape[1])
    draft = DovetailDraft.for_target(model)
    draft.budget = TreeBudget(12, 5, 4)
    assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY, **arguments), plain)
    assert draft.report.acceptance_length > least
    return draft.report


def randomized(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.2)
    return model.eval()


def test_positions_of_the_caller(oracle):
    model = tiny_model("llama")
    spread = torch.arange(21)[None] * 2
    check(model, oracle, position_ids=spread)
    usual = model.generate(prompt(21), **GREEDY)
    assert not torch.equal(usual, model.generate(prompt(21), position_ids=spread, **GREEDY))


def gpt2(**fields):
    return randomized(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, **fields)))


def test_token_types(oracle):
    check(gpt2(), oracle, token_type_ids=torch.full((1, 21), 7))


def test_cross_attention(oracle):
    check(gpt2(add_cross_attention=True), oracle, encoder_hidden_states=torch.randn(1, 6, 32))


def test_an_argument_of_the_models_own_forward(oracle):
    class Louder(LlamaForCausalLM):
        def forward(self, input_ids, loudness=1.0, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits.roll(1, -1) * loudness
            return output

    model = tiny_model("llama")
    model.__class__ = Louder
    check(model, oracle, loudness=3.0)


def test_a_models_own_preparation(oracle):
    class Shifted(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
            inputs["position_ids"] = inputs["position_ids"] + 5 * (input_ids[:, :1] + 1)
            return inputs

    model = tiny_model("llama")
    model.__class__ = Shifted
    check(model, oracle)


def test_inputs_with_rows_that_nobody_knows(oracle):
    """A model makes an input with an entry for each row, which the nodes of a tree get by their depth."""

    class Scaled(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
            inputs["scales"] = (inputs["position_ids"] % 3 - 1)[..., None].float()
            return inputs

        def forward(self, input_ids, position_ids=None, scales=None, **kwargs):
            output = super().forward(input_ids, position_ids=position_ids, **kwargs)
            output.logits = output.logits * scales[:, -output.logits.shape[1] :]
            return output

    model = tiny_model("llama")
    model.__class__ = Scaled
    report = check(model, oracle)
    assert any(r.nodes > r.depth + 1 for r in report.rounds)


def test_inputs_for_the_whole_text(oracle):
    """Such as the mask of Llama 3.2 Vision's images. The forward pass takes the last rows, or those after its cache."""

    class Scaled(LlamaForCausalLM):
        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
            kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
            if (scales := model_kwargs.get("scales")) is not None:
                kwargs["scales"] = torch.cat([scales, -scales[:, -1:]], dim=1)
            return kwargs

        def forward(self, input_ids, scales=None, **kwargs):
            before = kwargs[compat.CACHE].get_seq_length() if kwargs.get(compat.CACHE) is not None else 0
            output = super().forward(input_ids, **kwargs)
            if scales is not None:
                rows = scales[:, before : before + input_ids.shape[1]]
                output.logits = output.logits * rows[:, -output.logits.shape[1] :, None]
            return output

    model = tiny_model("llama")
    model.__class__ = Scaled
    report = check(model, oracle, scales=torch.arange(21.0)[None] - 10.5)
    assert any(r.nodes > r.depth + 1 for r in report.rounds)


@pytest.mark.parametrize("hidden", [slice(0, 4), slice(18, 21), slice(8, 11)], ids=["left", "right", "middle"])
@pytest.mark.parametrize("window", [None, 12])
def test_masks_with_zeros_anywhere(hidden, window, oracle):
    mask = torch.ones(1, 21, dtype=torch.long)
    mask[:, hidden] = 0
    model = tiny_model("mistral", sliding_window=window)
    check(model, oracle, attention_mask=mask)


OLD = compat.version_of(transformers.__version__) < (5, 23)


@pytest.mark.skipif(OLD, reason="plain generation begins a new cache for each token beyond the boundary")
@pytest.mark.parametrize("tokens", [12, 20, 29, 30, 31, 45])
def test_longrope_where_the_embedding_changes(tokens, oracle):
    """Phi-3 runs its text again at the boundary, and all later rows are rotated by other factors."""
    rope = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=30)
    rope |= dict(short_factor=[1.0] * 4, long_factor=[float(i + 2) for i in range(4)])
    fields = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    fields |= dict(pad_token_id=0, max_position_embeddings=512, original_max_position_embeddings=30)
    model = randomized(Phi3ForCausalLM(Phi3Config(rope_parameters=rope, **fields)))
    check(model, oracle, prompt(tokens))


@pytest.mark.skipif(OLD, reason="plain generation depends on earlier texts")
@pytest.mark.parametrize("tokens", [20, 31])
def test_dynamic_ntk(tokens, oracle):
    """Beyond the boundary each token has another rotation, so nothing is drafted there.

    Longer prompts cannot be compared: their rotation depends on the longest text that the model has seen before.
    """
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    model = tiny_model("llama", max_position_embeddings=32, rope_parameters=rope)
    check(model, oracle, prompt(tokens), least=0)


def test_yarn_beyond_max_position_embeddings(oracle):
    """As model cards set it."""
    rope = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
    check(tiny_model("llama", max_position_embeddings=32, rope_parameters=rope), oracle, prompt(40))


def test_a_vision_tower_with_as_many_layers_as_the_decoder():
    """Features are looked for in the decoder: the tower would do by its shape, and text does not pass through it."""
    model = build(family_of("kosmos-2.5"))
    assert feature_module(model) is model.text_model.model
    plain = model.generate(prompt(21), **GREEDY)
    assert torch.equal(model.generate(prompt(21), assistant_model=DovetailDraft.for_target(model), **GREEDY), plain)


def test_images(oracle):
    """Positions of image tokens have three parts, and those of the text go on behind them."""
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    text = dict(vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, max_position_embeddings=512, rope_parameters=rope, pad_token_id=0)
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=64)
    vision |= dict(window_size=56, fullatt_block_indexes=[1])
    tokens = dict(image_token_id=190, video_token_id=191, vision_start_token_id=192, vision_end_token_id=193)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    model = randomized(Qwen2_5_VLForConditionalGeneration(config))
    image = torch.tensor([[192] + [190] * 8 + [193]])
    ids = torch.cat([prompt(5), image, prompt(9)], dim=1)
    options = dict(attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 190).long())
    options |= dict(pixel_values=torch.randn(32, 1176), image_grid_thw=torch.tensor([[1, 4, 8]]))
    check(model, oracle, ids, bad_words_ids=[[i] for i in range(188, 199)], **options)


# --- rows that influence each other ----------------------------------------------------------------


class ScaledOverRows(torch.nn.Linear):
    """Rounds its inputs to 8 bits with one scale for all rows of a pass, as dynamic quantisation does."""

    def forward(self, rows):
        scale = rows.abs().amax() / 127
        return super().forward((rows / scale).round() * scale)


def test_quantisation_over_all_rows_of_a_pass():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = ScaledOverRows
    draft = PromptLookupDraft(shortest=1)
    plain = model.generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), assistant_model=draft, **GREEDY), plain)
    assert "cannot verify several tokens in one pass" in draft.report.warnings[0]
    assert all(r.nodes == 1 for r in draft.report.rounds)


def test_a_model_that_treats_a_single_row_differently():
    """As GIT did with its positions before transformers 5.24."""

    class Alone(LlamaForCausalLM):
        def forward(self, input_ids, position_ids=None, **kwargs):
            alone = input_ids.shape[1] == 1
            return super().forward(input_ids, position_ids=position_ids * 2 if alone else position_ids, **kwargs)

    model = tiny_model("llama")
    model.__class__ = Alone
    draft = PromptLookupDraft(shortest=1)
    plain = model.generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), assistant_model=draft, **GREEDY), plain)
    assert "cannot verify several tokens in one pass" in draft.report.warnings[0]


def test_attention_that_ignores_the_mask():
    """transformers' documentation registers attention so. Without a mask function beside it, rows see each other."""
    AttentionInterface.register("ignores the mask", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    model = tiny_model("llama")
    model.set_attn_implementation("ignores the mask")
    draft = PromptLookupDraft(shortest=1)
    plain = model.generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), assistant_model=draft, **GREEDY), plain)
    assert all(r.nodes == 1 for r in draft.report.rounds)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_with_masks_gets_trees(attention, oracle):
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    report = check(model, oracle)
    assert any(r.nodes > r.depth + 1 for r in report.rounds)


def test_a_model_in_training_with_gradient_checkpointing_is_refused():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"keeps no key/value cache. Call model.eval\(\) first"):
        model.generate(prompt(), assistant_model=PromptLookupDraft(), **GREEDY)
