"""Inflated pairs compute the function of their source at another shape, with dense weights.

Sources are tiny random models whose eps and norm weights matter, so that a wrongly scaled norm is noticed.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from dovetail_plugin import DovetailDraft, TreeBudget

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import inflate

ROOT = Path(__file__).resolve().parents[1]
H, V = 32, 40  # 4 heads on 2 key/value heads of width 8
SHAPE = "80,112,5"  # 10 heads on 5
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "fc")
PAIRS = [("dgf", 1), ("dgf", 2), ("concat", 1), ("concat", 2)]


def make_target(layers: int = 3, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=0.05,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        name_or_path="somewhere/tiny",
        **options,
    )
    return scrambled(LlamaForCausalLM(config))


def make_draft(target: LlamaForCausalLM, fusion: str = "dgf", blocks: int = 1) -> DovetailDraft:
    draft = scrambled(DovetailDraft.for_target(target, fusion=fusion, blocks=blocks))
    draft.budget = TreeBudget(nodes=40, depth=3, top_k=20)  # wide, so that some random drafts are accepted
    return draft


def scrambled(model: nn.Module) -> nn.Module:
    """Make all weights and biases random: matrices large enough for features to differ, norms around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("norm.weight")), 0.2)
    return model.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def prompt(length: int = 17) -> torch.Tensor:
    return torch.randint(1, V, (1, length), generator=torch.Generator().manual_seed(length))


# --- the same function -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, "32,48,3", "32,49,2", "96,48,4", "160,200,8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    ids=["plain", "biases", "tied"],
)
@torch.no_grad()
def test_target_gives_the_same_logits_and_features(shape, options):
    source = make_target(layers=2, **options)
    big = inflate.inflate_target(source, shape, dtype=torch.float32)
    assert_close(big(prompt()).logits, source(prompt()).logits)
    assert not big.config.tie_word_embeddings
    features = big.model(prompt()).last_hidden_state
    assert_close(features[..., :H], source.model(prompt()).last_hidden_state)
    assert not features[..., H:].any()


@pytest.mark.parametrize(("fusion", "blocks"), PAIRS)
@torch.no_grad()
def test_draft_gives_the_same_features_and_logits(fusion, blocks):
    source, draft = (target := make_target()), make_draft(target, fusion, blocks)
    big, big_draft = inflate.inflate_pair(source, draft, SHAPE, dtype=torch.float32)
    tokens = prompt()
    outputs = [
        d(features=t.model(tokens).last_hidden_state[:, :-1], input_ids=tokens[:, 1:])
        for t, d in ((source, draft), (big, big_draft))
    ]
    assert_close(outputs[1].features[..., :H], outputs[0].features)
    assert not outputs[1].features[..., H:].any()
    assert_close(outputs[1].logits, outputs[0].logits)
    assert len(big_draft.layers) == blocks
    assert big_draft.embed_weight is not None
    assert big_draft.embed_weight.data_ptr() == big.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(("fusion", "blocks"), PAIRS)
def test_generate_gives_the_same_tokens_and_acceptance(fusion, blocks):
    source = make_target()
    draft = make_draft(source, fusion, blocks)
    big, big_draft = inflate.inflate_pair(source, draft, SHAPE, dtype=torch.float32)
    options = dict(max_new_tokens=48, do_sample=False)
    plain = source.generate(prompt(), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this draft was trained for")
        assert torch.equal(source.generate(prompt(), assistant_model=draft, **options), plain)
        assert torch.equal(big.generate(prompt(), assistant_model=big_draft, **options), plain)
    assert big_draft.report.acceptance_length == draft.report.acceptance_length > 1.1
    assert big_draft.report.rounds == draft.report.rounds


def test_bfloat16_is_close_to_the_source():
    source = make_target()
    big = inflate.inflate_target(source, SHAPE)
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        actual, expected = big(prompt()).logits.float(), source(prompt()).logits
    assert torch.cosine_similarity(actual, expected, dim=-1).min() > 0.99


# --- the same cost: dense weights that share no storage --------------------------------------------


def test_weights_are_dense():
    big, big_draft = inflate.inflate_pair(make_target(), make_draft(make_target(), "concat", 2), SHAPE)
    seen = 0
    for model in (big, big_draft):
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in READERS:
                assert module.weight.any(dim=0).all(), f"{name} has a column of zeros"
                assert name == "fusion.fc" or module.weight.any(dim=1).all(), f"{name} has a row of zeros"
                seen += 1
    assert seen == 5 * 5 + 1 + 2 * 5 + 1
    _, dgf = inflate.inflate_pair(make_target(), make_draft(make_target()), SHAPE)
    fusion = dgf.fusion
    for weight in (fusion.W_1[:, :H], fusion.W_2[:, :H], fusion.W_z):
        assert weight.any(dim=0).all()
        assert weight.any(dim=1).all()
    assert not fusion.W_1[:, H:].any()
    assert not fusion.W_2[:, H:].any()


def test_added_layers_are_dense_and_change_nothing():
    big = inflate.inflate_target(make_target(layers=3), SHAPE)
    places = [parameter.data_ptr() for parameter in big.parameters()]
    assert len(set(places)) == len(places)
    added = [layer.mlp.down_proj.weight for layer in big.model.layers[3:]]
    assert len(added) == 2
    assert all(weight.any(dim=0).all() and weight.any(dim=1).all() for weight in added)
    assert not torch.equal(*added)
    states = big.model(input_ids=torch.arange(4)[None], output_hidden_states=True).hidden_states
    assert torch.equal(states[3], states[4])  # the last hidden state is after the final norm


def test_seed_decides_the_random_values():
    first, same, other = (inflate.inflate_target(make_target(), SHAPE, seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :H], other[:, :H])


def test_noise_fills_tensors_longer_than_its_block():
    noise = inflate.Noise(torch.float32, seed=0)
    long = noise.tensor((3, inflate.Noise.LENGTH // 2))
    assert abs(long.std().item() / inflate.Noise.STD - 1) < 0.01
    assert (long != 0).float().mean() > 0.999


# --- configs ---------------------------------------------------------------------------------------


def test_configs_record_the_source():
    source = make_target()
    source.generation_config.eos_token_id = [3, 5]
    draft = make_draft(source)
    big, big_draft = inflate.inflate_pair(source, draft, SHAPE)
    for config, layers in ((big.config, 5), (big_draft.config, 1)):
        assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (80, 112, layers)
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (10, 5, 8)
        assert config.rms_norm_eps == pytest.approx(0.05 * H / 80)
        assert config.inflated_from["hidden_size"] == H
    assert big.config.inflated_from == dict(name="tiny", hidden_size=H, intermediate_size=48, num_hidden_layers=3)
    assert big.config.name_or_path == big_draft.config.target_name_or_path == "tiny-inflated-80x112x5"
    assert big.generation_config.eos_token_id == [3, 5]
    assert big_draft.budget == draft.budget
    assert source.config.hidden_size == draft.config.hidden_size == H


@pytest.mark.parametrize(("name", "billions"), [("500m", 0.50), ("1b", 1.05), ("7b", 5.96), ("13b", 11.67)])
def test_named_shapes_have_the_parameters_that_the_help_says(name, billions):
    shape = inflate.Shape.parse(name)
    assert shape.hidden_size % 128 == 0  # heads of 64, two on each key/value head
    attention, mlp = 3 * shape.hidden_size**2, 3 * shape.hidden_size * shape.intermediate_size
    total = shape.num_hidden_layers * (attention + mlp) + 2 * 3072 * shape.hidden_size
    assert round(total / 1e9, 2) == billions
    assert f"{billions:.2f}" in inflate.EPILOG


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("84,112,5", "hidden_size 84 .* multiple of 16"),
        ("16,112,5", "hidden_size 16 .* use 32 or more"),
        ("80,40,5", "intermediate_size 40 .* use 48 or more"),
        ("80,112,2", "num_hidden_layers 2 .* use 3 or more"),
        ("3b", "'3b' is not a valid shape. Use 500m, 1b"),
        ("80,112", "is not a valid shape"),
        ("80,112,0", "is not a valid shape"),
        ("80,-112,5", "is not a valid shape"),
    ],
)
def test_bad_shapes_are_refused(shape, message):
    target = make_target()
    with pytest.raises(ValueError, match=message):
        inflate.inflate_pair(target, make_draft(target), shape)


def test_other_models_are_refused():
    sizes = dict(hidden_size=H, intermediate_size=48, num_hidden_layers=1, vocab_size=V)
    mistral = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"only LlamaForCausalLM .* MistralForCausalLM"):
        inflate.inflate_target(mistral, SHAPE)


# --- command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored_pair(tmp_path_factory):
    """A directory with a tiny target, its tokenizer, and its draft."""
    root = tmp_path_factory.mktemp("pair")
    target = make_target()
    target.save_pretrained(root / "tiny")
    words = {f"w{i}": i for i in range(V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "tiny")
    make_draft(target).save_pretrained(root / "draft")
    return root


def command(pair: Path, *options: object) -> subprocess.CompletedProcess:
    line = ["--target", pair / "tiny", "--draft", pair / "draft", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(ROOT / "benchmarks" / "inflate.py")]
    return subprocess.run(script + [str(part) for part in line], capture_output=True, text=True, env=env)


def test_command_line_writes_a_pair_that_loads(stored_pair, tmp_path):
    done = command(stored_pair, "--shape", SHAPE, "--out", tmp_path / "big", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "inflated" in done.stdout
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "big" / "target", dtype="auto")
    draft = DovetailDraft.from_pretrained(tmp_path / "big" / "draft")
    assert AutoTokenizer.from_pretrained(tmp_path / "big" / "target").encode("w3 w4") == [3, 4]
    stored = json.loads((tmp_path / "big" / "target" / "config.json").read_text())
    assert stored["inflated_from"]["name"] == "tiny"
    assert draft.config.inflated_from["name"] == "draft"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this draft was trained for")
        text = target.generate(prompt(), assistant_model=draft, max_new_tokens=16, do_sample=False)
    assert torch.equal(text, make_target().generate(prompt(), max_new_tokens=16, do_sample=False))

    again = command(stored_pair, "--shape", SHAPE, "--out", tmp_path / "big")
    assert again.returncode == 2
    assert "already holds a pair" in again.stderr


def test_command_line_explains_mistakes_in_one_line(stored_pair, tmp_path, capsys):
    pair = ["--target", str(stored_pair / "tiny"), "--draft", str(stored_pair / "draft")]
    assert inflate.main([*pair, "--shape", "84,112,5", "--out", str(tmp_path)]) == 2
    assert inflate.main([*pair, "--shape", SHAPE, "--out", str(tmp_path), "--target", str(tmp_path / "none")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("inflate.py: ")]
    assert len(lines) == 2
    assert "multiple of 16" in lines[0]
    assert "none is not a directory" in lines[1]
