"""Fixtures that several test files use."""

import random

import pytest
import torch
from families import tiny_target

import dovetail_plugin.generation
from dovetail_plugin import DovetailDraft, DraftTree
from dovetail_plugin.drafting import FeatureDrafter


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from threads, and shared machines lose."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama():
    return tiny_target("llama")


@pytest.fixture
def draft(llama):
    torch.manual_seed(7)
    return DovetailDraft.for_target(llama, blocks=2)


def random_tree(root: int, truth: list[int], budget, rng: random.Random, vocab: int) -> DraftTree:
    """A random tree below `root` that holds a random stretch of the true continuation among decoys."""
    tokens, parents, depths = [root], [-1], [0]
    on_path, right = 0, rng.randint(0, min(len(truth), budget.depth))
    while len(tokens) < budget.nodes:
        grow_right = depths[on_path] < right and rng.random() < 0.5
        shallow = [i for i, d in enumerate(depths) if d < budget.depth]
        parent = on_path if grow_right else rng.choice(shallow)
        token = truth[depths[on_path]] if grow_right else rng.randrange(vocab)
        siblings = {tokens[i] for i, p in enumerate(parents) if p == parent}
        if token in siblings:
            if len(siblings) >= vocab // 2:
                break
            continue
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        if grow_right:
            on_path = len(tokens) - 1
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(depths), torch.zeros(len(tokens)))


@pytest.fixture
def oracle(monkeypatch):
    """Call with the text plain `generate` gave: from then on drafts know it, in part, among decoys.

    Random drafts are hardly ever right and so test rejection only. With an oracle long paths are
    accepted, cache rows move, and generation stops in the middle of a path. The real drafter runs
    underneath, so its cache is exercised as well.
    """

    def install(plain: torch.Tensor, prompt_tokens: int, vocab: int = 97, seed: int = 0) -> None:
        rng = random.Random(seed)
        text = plain[0].tolist()

        class OracleDrafter(FeatureDrafter):
            known: int | None = None  # tokens of the text so far; None while the prompt is run

            def begin(self, features, input_ids):
                self.known = None
                super().begin(features, input_ids)
                self.known = prompt_tokens + 1

            def advance(self, features, tokens):
                super().advance(features, tokens)
                if self.known is not None:
                    self.known += len(tokens)

            def grow(self, budget):
                super().grow(budget)
                return random_tree(text[self.known - 1], text[self.known :], budget, rng, vocab)

        monkeypatch.setattr(dovetail_plugin.generation, "FeatureDrafter", OracleDrafter)

    return install
