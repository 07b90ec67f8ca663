"""Calibration of a draft, compared with a slow count of single nodes."""

import numpy as np
import pytest
import torch
from families import prompt, tiny_target

from dovetail_plugin import DovetailDraft
from dovetail_plugin.drafts.config import BINS, EDGES
from dovetail_plugin.policy.acceptance import prior
from dovetail_plugin.training.calibration import CHILDREN, RULE_WEIGHT, Calibration
from dovetail_plugin.training.data import Batch
from dovetail_plugin.training.features import target_features


@torch.no_grad()
def draft_logprobs(draft, features, ids, first, depth):
    """Log-probabilities (V,) after features up to `first` and then `depth` - 1 predictions along the text, slowly."""
    inputs = [features[i] for i in range(first + 1)]
    for _ in range(depth - 1):
        out = draft(torch.stack(inputs)[None], ids[None, 1 : len(inputs) + 1])
        inputs.append(out.features[0, -1])
    out = draft(torch.stack(inputs)[None], ids[None, 1 : len(inputs) + 1])
    return out.logits[0, -1].log_softmax(-1)


@torch.no_grad()
def rates_ref(draft, features, ids, passes):
    """The rates by bin, counted node by node."""
    nodes, greedy, sampling = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    target = draft.head(features).log_softmax(-1)
    for depth in range(1, passes + 1):
        for first in range(len(ids) - depth - 1):
            score, own, right = 0.0, 0.0, True
            for step in range(1, depth):
                token = int(ids[first + step + 1])
                score += float(draft_logprobs(draft, features, ids, first, step)[token])
                own += float(target[first + step][token])
                right &= int(target[first + step].argmax()) == token
            last = draft_logprobs(draft, features, ids, first, depth)
            for value, token in zip(*(t.tolist() for t in last.topk(CHILDREN)), strict=True):
                at = np.searchsorted(EDGES, np.exp(score + value))
                nodes[at] += 1
                greedy[at] += right and int(target[first + depth].argmax()) == token
                sampling[at] += np.exp(own + float(target[first + depth][token]))
    weights = nodes + RULE_WEIGHT
    return (greedy + RULE_WEIGHT * prior(None, 0)) / weights, (sampling + RULE_WEIGHT * prior(None, 1)) / weights


@pytest.mark.torch_only("training reads the features of torch targets")
def test_rates_equal_a_slow_count():
    torch.manual_seed(3)
    target = tiny_target("llama")
    draft = DovetailDraft.for_target(target, blocks=1)
    with torch.no_grad():
        ids = target.generate(prompt(6), max_new_tokens=8, min_new_tokens=8, do_sample=False)  # greedy text
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([ids.shape[1]]))
        features = target_features(target, batch)
        # This draft is right sometimes: it passes features on and halves the target's logits.
        draft.fusion.W_1.copy_(torch.eye(32))
        draft.head_weight = draft.head_weight * 0.5
    calibration = Calibration()
    calibration.add(draft, features, batch, passes=3)
    greedy, sampling = rates_ref(draft, features[0], ids[0], 3)
    assert calibration.greedy.sum() > 0  # without accepted nodes the comparison would show nothing
    np.testing.assert_allclose(calibration.rates()["greedy"], greedy, atol=2e-4)
    np.testing.assert_allclose(calibration.rates()["sampling"], sampling, atol=2e-4)
