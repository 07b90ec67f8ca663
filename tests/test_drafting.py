"""The draft model and its trees against the slow reference; where tensors live; what is never run again."""

import pytest
import torch
from reference import best_tree, draft_path, draft_sequence
from support.devices import FakeCuda, move
from support.drafts import make_draft, text_and_features
from torch._subclasses.fake_tensor import FakeTensorMode

from dovetail_plugin import DovetailConfig, DovetailDraft, TreeBudget
from dovetail_plugin.drafts.base import DraftError
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

DRAFTS = [("dgf", 1), ("dgf", 3), ("concat", 1), ("concat", 2)]


@pytest.mark.parametrize(("fusion", "blocks"), DRAFTS)
@torch.no_grad()
def test_forward_is_the_methods_equations(fusion, blocks):
    draft = make_draft(fusion, blocks)
    ids, features = text_and_features()
    out = draft(features=features[None], input_ids=ids[None, 1:])
    reference = draft_sequence(draft, list(features), ids[1:].tolist(), list(range(6)))
    torch.testing.assert_close(out.features[0], torch.stack(reference), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits, out.features @ draft.head_weight.T)


def paths_with_scores(tree):
    paths, scored = [], {}
    for token, parent, score in zip(*(t.tolist() for t in (tree.tokens, tree.parents, tree.scores)), strict=True):
        paths.append((*(paths[parent] if parent > 0 else ()), token) if parent >= 0 else ())
        scored[paths[-1]] = score
    return {path: score for path, score in scored.items() if path}


@pytest.mark.parametrize(("fusion", "blocks"), DRAFTS)
@pytest.mark.parametrize("budget", [TreeBudget(9, 3, 3), TreeBudget(4, 3, 1), TreeBudget(30, 2, 4)], ids=str)
@torch.no_grad()
def test_tree_is_the_methods_tree(fusion, blocks, budget):
    draft = make_draft(fusion, blocks)
    ids, features = text_and_features()
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    drafter.grow(TreeBudget(12, 4, 4))  # an earlier tree must leave no trace
    tree = paths_with_scores(drafter.grow(budget))
    wanted = best_tree(draft, list(features), ids.tolist(), budget.nodes, budget.depth, budget.top_k)
    assert tree.keys() == wanted.keys()
    for path, score in tree.items():
        assert score == pytest.approx(wanted[path], abs=1e-4)


@torch.no_grad()
def test_advancing_equals_beginning_anew():
    """Rows of accepted tokens, added a few at a time between trees, give what one pass over the text gives."""
    draft = make_draft("dgf", 2)
    ids, features = text_and_features(20)
    once = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    once.begin(features, ids)
    bits = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    bits.begin(features[:5], ids[:6])
    for start, end in ((5, 6), (6, 10), (10, 17), (17, 20)):
        bits.grow(TreeBudget(10, 4, 3))
        bits.advance(features[start:end], ids[start + 1 : end + 1])
    torch.testing.assert_close(
        once.grow(TreeBudget(12, 4, 3)).scores, bits.grow(TreeBudget(12, 4, 3)).scores, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_prompt_is_never_run_again():
    draft = make_draft()
    ids, features = text_and_features(30)
    sizes = []
    original = draft.step
    draft.step = lambda f, *args, **kwargs: (sizes.append(f.shape[1]), original(f, *args, **kwargs))[1]
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    for _ in range(3):
        drafter.grow(TreeBudget(16, 4, 5))
        drafter.advance(features[:2], ids[:2])
    # The prompt, then three levels below the first and two rows a round; the last two wait for a further tree.
    assert sizes == [30] + [5, 5, 5, 2] * 2 + [5, 5, 5]
    drafter.advance(features[:3], ids[:3])
    drafter.grow(TreeBudget(4, 1, 5))
    assert sizes[-1] == 5


@torch.no_grad()
def test_chain_scores_are_the_reference_logprobs():
    draft = make_draft()
    ids, features = text_and_features()
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    tokens, scores = drafter.grow_chain(4, lambda logits, _: (logits.argmax(-1), logits))
    picked = scores.log_softmax(-1)[torch.arange(4), tokens].tolist()
    wanted = draft_path(draft, list(features), ids.tolist(), tokens.tolist())
    assert picked == pytest.approx(wanted, abs=1e-4)


def test_nan_logits_are_noticed():
    draft = make_draft()
    draft.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    ids, features = text_and_features()
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    with torch.no_grad(), pytest.raises(DraftError, match="not finite"):
        drafter.begin(features, ids)
        drafter.grow(TreeBudget(8, 3, 3))


@pytest.mark.parametrize("fusion", ["dgf", "concat"])
def test_draft_step_mixes_no_devices(fusion):
    """On fake "cuda" tensors every operation between devices raises: features and tokens come from the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), FakeCuda(), torch.no_grad():
        config = DovetailConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, fusion=fusion,
        )  # fmt: skip
        draft = move(DovetailDraft(config), "cuda")
        draft.embed_weight = draft.head_weight = torch.empty(97, 32, device="cuda")
        drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
        assert drafter.device.type == "cuda"
        drafter.begin(torch.empty(6, 32), torch.arange(7))
        for _ in range(2):
            drafter.catch_up()
            tree = drafter.grow_on_device(TreeBudget(9, 3, 4))
            assert {t.device.type for t in (tree.tokens, tree.parents, tree.depths, tree.scores)} == {"cuda"}
            assert tree.to("cpu").tokens.device.type == "cpu"
            drafter.advance(torch.empty(3, 32), torch.arange(3))
        one = torch.zeros(1, 1, dtype=torch.long)
        with pytest.raises(RuntimeError, match="devices"):  # the check itself works
            draft.embed(one)
        with pytest.raises(RuntimeError, match="devices"):
            draft.head(torch.empty(1, 32))
