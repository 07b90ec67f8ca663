"""Drafts that leave the embedding table on the CPU, or propose only the most frequent tokens."""

import numpy as np
import pytest
import torch
from families import VOCAB, prompt, tiny_target
from support.devices import FakeCuda, move
from support.drafts import make_draft, text_and_features
from torch._subclasses.fake_tensor import FakeTensorMode

from dovetail_plugin import DovetailConfig, DovetailDraft, TreeBudget, machine
from dovetail_plugin.drafts.checkpoints.load import TOKEN_ORDER, dtype_for, frequent_tokens
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

pytestmark = pytest.mark.usefixtures("fixed_budget")


def grown(draft):
    ids, features = text_and_features(8)
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    return drafter.grow(TreeBudget(16, 4, 5))


def test_embedding_elsewhere_changes_nothing():
    target, draft = tiny_target("llama"), make_draft(blocks=2)
    whole = grown(draft)
    draft.embedding_device = "cpu"
    draft.attach(target)
    apart = grown(draft)
    for name in ("tokens", "parents", "depths", "scores"):
        assert torch.equal(getattr(whole, name), getattr(apart, name))


@pytest.mark.torch_only("shares memory with a torch target")
def test_embedding_elsewhere_takes_no_memory_of_its_own():
    target = tiny_target("llama")
    draft = DovetailDraft.for_target(target).to(torch.bfloat16)
    draft.embedding_device = "cpu"
    draft.attach(target)
    assert draft.embed_weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    assert draft.embed(torch.tensor([3])).dtype == torch.bfloat16


def test_embedding_on_the_cpu_beside_a_draft_on_the_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True), FakeCuda(), torch.no_grad():
        config = DovetailConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
        )
        draft = move(DovetailDraft(config), "cuda")
        draft.embedding_device = "cpu"
        draft.embed_weight, draft.head_weight = torch.empty(97, 32), torch.empty(97, 32, device="cuda")
        drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
        drafter.begin(torch.empty(6, 32), torch.arange(7))
        drafter.catch_up()
        tree = drafter.grow_on_device(TreeBudget(9, 3, 4))
        assert tree.tokens.device.type == "cuda" and draft.embed_weight.device.type == "cpu"


def test_a_cut_head_proposes_the_whole_heads_best_of_its_tokens(tmp_path):
    target, draft = tiny_target("llama"), make_draft()
    order = np.random.default_rng(0).permutation(VOCAB).astype(np.int32)
    draft.save_pretrained(tmp_path)
    np.save(tmp_path / TOKEN_ORDER, order)
    draft = type(draft).from_pretrained(tmp_path)
    draft.attach(target)
    kept = sorted(order[:20].tolist())
    ids, features = text_and_features(8)
    logits = draft(features=features[None], input_ids=ids[None, 1:]).logits[0, -1]
    wanted = [kept[i] for i in logits[kept].topk(5).indices.tolist()]
    draft.draft_vocab_size = 20
    draft.attach(target)
    assert draft.head_weight.shape == (20, 32)
    tree = grown(draft)
    assert set(tree.tokens[1:].tolist()) <= set(kept)
    assert set(tree.tokens[tree.parents == 0].tolist()) <= set(wanted)
    whole = draft.over_vocabulary(draft.head(torch.randn(3, 32)))
    assert whole.shape == (3, VOCAB) and whole.isfinite().sum() == 60
    assert whole[:, kept].isfinite().all()


@pytest.mark.parametrize("verification", ["tree", "stock"])
@pytest.mark.torch_only("the stock loop runs torch targets")
def test_texts_stay_the_same(verification):
    target, draft = tiny_target("llama"), make_draft()
    if verification == "stock":
        pytest.importorskip("transformers", minversion="5.8")
    draft.draft_vocab_size, draft.embedding_device, draft.verification = 30, "cpu", verification
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(prompt(), **options)
    assert torch.equal(target.generate(prompt(), assistant_model=draft, **options), plain)
    assert draft.token_ids.tolist() == list(range(30))


@pytest.mark.parametrize("count", [0, VOCAB + 1])
def test_impossible_sizes(count):
    with pytest.raises(ValueError, match=f"between 1 and the target's {VOCAB} tokens, got {count}"):
        frequent_tokens(None, count, VOCAB)


def test_fp16_stays_finite():
    draft = make_draft(blocks=2).half()
    for layer in draft.layers:
        layer.mlp.up_proj.weight.data.mul_(100)
        layer.mlp.down_proj.weight.data.mul_(2000)
    with torch.no_grad():
        out = draft(features=torch.randn(1, 4, 32).half() * 50, input_ids=torch.tensor([[3, 4, 5, 6]]))
    assert out.features.isfinite().all()
    assert out.features.abs().max() > 60000  # it would have overflowed


@pytest.mark.parametrize("able", [True, False])
def test_old_gpus_run_bf16_drafts_in_fp16(able, monkeypatch):
    monkeypatch.setattr(machine, "gpu_supports_bf16", lambda: able)
    wanted = torch.bfloat16 if able else torch.float16
    assert dtype_for(torch.bfloat16, torch.device("cuda")) == wanted
    assert dtype_for(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    assert dtype_for(torch.float32, torch.device("cuda")) == torch.float32
