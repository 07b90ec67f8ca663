"""Losses of the draft, compared with slow references: loops over rows, and the steps that drafting itself takes."""

import pytest
import torch
from families import VOCAB, tiny_target

from dovetail_plugin import DovetailDraft
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.training.data import Batch, Sequence, collate
from dovetail_plugin.training.features import target_features
from dovetail_plugin.training.losses import count_rows, draft_losses, expected_acceptance_length, rollout_mask


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_rollout_mask_shows_what_a_tree_node_sees(length, passes):
    """Row p of the last pass s sees true rows 0 .. p - s + 1 and one row of each later pass, itself included."""
    mask = rollout_mask(length, passes, torch.float32, torch.device("cpu"))
    assert mask.shape == (length, passes * length)
    for row in range(length):
        seen = {int(column) for column in (mask[row] == 0).nonzero()}
        assert set(mask[row].tolist()) <= {0.0, float("-inf")}
        if row < passes - 1:  # before the start of the pass: not counted, but softmax needs a row to see
            assert seen
            continue
        wanted = set(range(row - passes + 2))
        wanted |= {(r - 1) * length + row - passes + r for r in range(2, passes + 1)}
        assert seen == wanted


def draft_for(target, **options):
    torch.manual_seed(11)
    return DovetailDraft.for_target(target, initializer_range=0.3, **options)


def sequences(*lengths):
    """Sequences of random tokens. The first two are given, about 60 % of the others are written by the target."""
    generator = torch.Generator().manual_seed(4)
    out = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        written = torch.rand(length, generator=generator) < 0.6
        written[:2] = False
        out.append(Sequence(ids, written))
    return out


def predictions_ref(draft, features, ids, passes, monkeypatch):
    """Predictions of one sequence as {(pass, row): (H,)}, from drafting a chain of the true tokens below each row.

    The drafter's cache holds only true rows 0 .. q, and level s of its chain is row q + s - 1 of pass s. This is what a
    tree node at depth s - 1 sees.

    Args:
        features: (T, H) as read by the draft.
        ids: (T,) int64.
    """
    predicted, head = {}, draft.head
    for row in range(len(ids) - 2):
        depth = min(passes, len(ids) - 2 - row)
        seen = []

        def spy(output, seen=seen):
            seen.append(output[0])
            return head(output)

        def pick(logits, chosen, row=row):
            return ids[row + 2 + len(chosen)][None], logits

        drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
        monkeypatch.setattr(draft, "head", spy)
        drafter.begin(features[: row + 1], ids[: row + 2])
        drafter.grow_chain(depth, pick)
        monkeypatch.setattr(draft, "head", head)
        assert len(seen) == depth
        predicted |= {(level, row + level - 1): output for level, output in enumerate(seen, 1)}
    return predicted


def losses_ref(draft, target, batch_of, features, noise, passes, monkeypatch):
    """Feature loss, token loss and agreement by pass, from loops over passes, sequences and rows."""
    head = target.get_output_embeddings().weight
    predicted = []
    for number, sequence in enumerate(batch_of):
        length = len(sequence)
        read = features[number, :length] + noise[number, :length]
        predicted.append(predictions_ref(draft, read, sequence.input_ids, passes, monkeypatch))
    feature_loss, token_loss, agreement = [], [], []
    for level in range(1, passes + 1):
        smooth, cross, right = [], [], []
        for number, sequence in enumerate(batch_of):
            for row in range(level - 1, len(sequence) - 2):
                if not sequence.written[row + 2]:
                    continue
                wanted, got = features[number, row + 1], predicted[number][level, row]
                gap = (wanted - got).abs()
                smooth.append(torch.where(gap < 1, gap * gap / 2, gap - 0.5).mean())
                theirs, ours = head @ wanted, head @ got
                cross.append(-(theirs.softmax(0) * ours.log_softmax(0)).sum())
                right.append(float(theirs.argmax() == ours.argmax()))
        feature_loss.append(torch.stack(smooth).mean())
        token_loss.append(torch.stack(cross).mean())
        agreement.append(sum(right) / len(right))
    return torch.stack(feature_loss).mean(), torch.stack(token_loss).mean(), agreement


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"blocks": 1}, 1), ({"blocks": 1}, 2), ({"blocks": 2}, 4), ({"blocks": 1, "fusion": "concat"}, 3)],
)
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_losses_equal_the_reference(llama, options, passes, noisy, monkeypatch):
    """Passes over a padded batch equal drafting for each sequence, so training sees what a tree node sees."""
    draft = draft_for(llama, **options)
    batch_of = sequences(12, 7, 10)
    batch = collate(batch_of, 0)
    features = target_features(llama, batch)
    noise = torch.rand(features.shape, generator=torch.Generator().manual_seed(1)) - 0.5 if noisy else None
    with torch.no_grad():
        losses = draft_losses(draft, features, batch, passes=passes, noise=noise)
        zeros = torch.zeros_like(features) if noise is None else noise
        feature, token, agreement = losses_ref(draft, llama, batch_of, features, zeros, passes, monkeypatch)
    torch.testing.assert_close(losses.feature, feature, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.token, token, atol=1e-5, rtol=1e-5)
    assert losses.agreement.tolist() == pytest.approx(agreement, abs=1e-6)


def test_perfect_predictions_agree_everywhere(llama, monkeypatch):
    """If each pass predicts the true next feature, there is no feature loss and the agreement is 1."""
    draft = draft_for(llama)
    batch = collate(sequences(9, 9), 0)
    features = target_features(llama, batch)
    monkeypatch.setattr(draft, "step", lambda *_args: features[:, 1:-1])
    losses = draft_losses(draft, features, batch, passes=3)
    assert float(losses.feature) == 0
    assert losses.agreement.tolist() == pytest.approx([1.0] * 3)


def test_parts_add_up_to_the_step():
    """Losses and gradients do not depend on how a step is cut into parts."""
    target = tiny_target("llama").double()
    draft = draft_for(target)
    batch_of = sequences(12, 7, 10, 5)
    counts = count_rows(batch_of, 3)

    def gradients(parts):
        draft.zero_grad()
        totals = torch.zeros(2)
        for part in parts:
            batch = collate(part, 0)
            losses = draft_losses(draft, target_features(target, batch), batch, passes=3, row_counts=counts)
            (losses.feature + losses.token).backward()
            totals += torch.stack([losses.feature, losses.token]).detach()
        return totals, torch.cat([p.grad.flatten() for p in draft.parameters()])

    whole, whole_gradient = gradients([batch_of])
    parts, parts_gradient = gradients([batch_of[:1], batch_of[1:2], batch_of[2:]])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts_gradient, whole_gradient, atol=1e-6, rtol=1e-6)
    batch = collate(batch_of, 0)
    own = draft_losses(draft, target_features(target, batch), batch, passes=3)
    torch.testing.assert_close(torch.stack([own.feature, own.token]), whole, atol=1e-6, rtol=1e-6)


def test_gradients_reach_every_weight_through_every_pass(llama):
    """The last pass reads predictions, and its gradients flow through them to all weights."""
    draft = draft_for(llama, blocks=2)
    batch = collate(sequences(10), 0)
    features = target_features(llama, batch)
    only_last = Batch(batch.input_ids, torch.zeros_like(batch.written), batch.lengths)
    only_last.written[0, 4] = True  # row 2, the first one of pass 3
    inputs = features.clone().requires_grad_()
    losses = draft_losses(draft, inputs, only_last, passes=3)
    losses.token.backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert inputs.grad[0, 0].abs().sum() > 0  # the true row that pass 3 starts from


@pytest.mark.parametrize(("agreement", "length"), [([0.0], 1.0), ([1.0, 1.0], 3.0), ([0.5, 0.5, 0.4], 1.85)])
def test_expected_acceptance_length(agreement, length):
    assert expected_acceptance_length(torch.tensor(agreement)) == pytest.approx(length)


def test_logits_are_capped_like_the_targets():
    """The soft cross-entropy compares capped logits of draft and target."""
    target = tiny_target("gemma2", head_dim=8, final_logit_softcapping=2.0)
    draft = draft_for(target)
    batch = collate(sequences(8), 0)
    with torch.no_grad():
        features = target_features(target, batch)
        losses = draft_losses(draft, features, batch, passes=1)
        rope = draft.rope_at(torch.arange(6)[None], features.dtype)
        predicted = draft.step(features[:, :-2], batch.input_ids[:, 1:-1], rope)
        ours, theirs = (2 * torch.tanh(target.lm_head(f) / 2) for f in (predicted[0], features[0, 1:-1]))
        assert ours.abs().max() <= 2
        cross = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses.token, cross[batch.written[0, 2:]].mean())
