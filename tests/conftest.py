"""Fixtures that several test files use."""

import random

import engines
import pytest
import torch
from families import tiny_target
from helpers import save_pair

import dovetail_plugin.generation.generate
from dovetail_plugin import DovetailDraft, DraftTree, TreeBudget
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter


def pytest_addoption(parser):
    engines.add_options(parser)


def pytest_configure(config):
    engines.choose(config)


def pytest_ignore_collect(collection_path):
    return None if engines.runs(collection_path) else True


def pytest_collection_modifyitems(items):
    engines.skip_what_is_torchs(items)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from threads, and shared machines lose."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_budget(monkeypatch, tmp_path):
    """Rounds that do not depend on how fast the machine is; tests of the policy undo it, and keep their own records."""
    monkeypatch.setattr(DovetailDraft, "budget", TreeBudget())
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "records"))


@pytest.fixture(scope="session")
def llama():
    return tiny_target("llama")


@pytest.fixture
def draft(llama):
    torch.manual_seed(7)
    return DovetailDraft.for_target(llama, blocks=2)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A directory with the checkpoints `target` and `draft` in it."""
    directory = tmp_path_factory.mktemp("pair")
    save_pair(directory)
    return directory


@pytest.fixture
def here(pair, tmp_path, monkeypatch):
    """Run inside an empty directory with the pair linked into it; for commands that run in this process."""
    for name in ("target", "draft"):
        (tmp_path / name).symlink_to(pair / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def random_tree(root: int, truth: list[int], budget, rng: random.Random, vocab: int) -> DraftTree:
    """A random tree below `root` that holds a random stretch of the true continuation among decoys."""
    on_path, right = 0, rng.randint(0, min(len(truth), budget.depth))
    if budget.top_k == 1:
        return random_chain([root, *truth[:right]], budget, rng, vocab)
    tokens, parents, depths = [root], [-1], [0]
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


def random_chain(start: list[int], budget, rng: random.Random, vocab: int) -> DraftTree:
    """As many of the given tokens as the budget allows, then decoys, each below the one before."""
    nodes = min(budget.nodes, budget.depth + 1)
    tokens = [*start, *(rng.randrange(vocab) for _ in range(nodes))][:nodes]
    count = torch.arange(nodes)
    return DraftTree(torch.tensor(tokens), count - 1, count, torch.zeros(nodes))


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

            def grow(self, budget, judge=None):
                super().grow(budget, judge)
                return random_tree(text[self.known - 1], text[self.known :], budget, rng, vocab)

        monkeypatch.setattr(dovetail_plugin.generation.generate, "FeatureDrafter", OracleDrafter)

    return install
