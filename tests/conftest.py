"""Fixtures that several test files use."""

import random
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import engines
import pytest
import torch
from families import tiny_target
from helpers import save_pair
from support import environments
from support.clock import FakeClock
from support.drafts import write_draft
from support.training import write_files, write_runs
from support.trees import random_tree

from dovetail_plugin import DovetailDraft, Draft, TreeBudget
from dovetail_plugin.drafts import cuda_graphs
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.kernels.library import library

pytest_plugins = ["pytester"]

FIRST = "test_compat.py"
"""The seam to transformers: where a new release breaks it, the first test that runs says so."""


def pytest_addoption(parser):
    engines.add_options(parser)
    environments.add_options(parser)


def pytest_configure(config):
    engines.choose(config)
    if config.getoption("--nightly") != "all" and find_spec("hypothesis"):  # nightly tests look for new examples
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True)
        settings.load_profile("repeatable")
    file = config.getoption("--summary")
    if file and not hasattr(config, "workerinput"):  # once, not in each worker of xdist
        config.pluginmanager.register(environments.Summary(Path(file)))


def pytest_ignore_collect(collection_path):
    return None if engines.runs(collection_path) else True


@pytest.hookimpl(tryfirst=True)  # before pytest's own selection by -m, which looks at the marks
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != FIRST)
    environments.mark_files(items)
    environments.select_nightly(config, items)
    engines.skip_torch_only(items)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models do not get faster with threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _grad_mode_stays():
    """A test that leaves torch's modes changed fails itself, instead of a later one that needs gradients."""
    yield
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert modes == (True, False), "the test left torch without gradients"


@pytest.fixture(autouse=True)
def _measurements_of_this_test(monkeypatch, tmp_path):
    """Measurements of the machine are stored for this test alone."""
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "records"))


@pytest.fixture
def offline_hub(monkeypatch):
    """The hub says at once that it cannot be reached; without a network it tries again for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def training_files(tmp_path_factory):
    """A directory with a target and its tokenizer, and 16 chats. It is not to be changed."""
    return write_files(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def training_runs(training_files, tmp_path_factory):
    """A finished run of 4 steps in `finished`, and one of 6 steps that was interrupted after 3 in `unfinished`."""
    return write_runs(training_files, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copied_run(training_runs, tmp_path):
    """A function that copies one of the runs; returns its directory."""
    return lambda name: shutil.copytree(training_runs / name, tmp_path / name)


@pytest.fixture(scope="session")
def valid_draft(llama, tmp_path_factory):
    """A directory with a draft of two blocks for `llama`. It is not to be changed."""
    return write_draft(tmp_path_factory.mktemp("draft"), llama)


@pytest.fixture
def copied_draft(valid_draft, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(valid_draft, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def fixed_budget(monkeypatch):
    """Every draft proposes the same tree in each round, so rounds do not depend on the machine's speed."""
    budget = TreeBudget()
    monkeypatch.setattr(vars(Draft)["budget"], "default", budget)
    return budget


@pytest.fixture
def fake_clock(monkeypatch):
    """`time.perf_counter` moves only with passes of target and draft, so the policy's decisions can be repeated."""
    clock = FakeClock()
    session = engines.current().session_class()
    for name, rows in (("prefill", lambda ids: ids.shape[1]), ("score", len)):
        monkeypatch.setattr(session, name, clock.charged_pass(getattr(session, name), rows))
    monkeypatch.setattr(time, "perf_counter", clock)
    with clock.charging_draft_blocks():
        yield clock


@pytest.fixture(scope="session")
def llama():
    """A tiny random Llama on the engine under test."""
    return tiny_target("llama")


@pytest.fixture
def draft(llama):
    """An untrained draft of two blocks for `llama`."""
    torch.manual_seed(7)
    return DovetailDraft.for_target(llama, blocks=2)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A directory with the checkpoints `target` and `draft` in it."""
    directory = tmp_path_factory.mktemp("pair")
    save_pair(directory)
    return directory


@pytest.fixture
def kernels(monkeypatch):
    """The library of CPU kernels. A test may set its instructions, and torch's number of threads."""
    found = library()
    if found is None:
        pytest.skip("this CPU has no AVX2, or there is no compiler")
    monkeypatch.setattr(found, "instructions", found.instructions)
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


@pytest.fixture
def here(pair, tmp_path, monkeypatch):
    """Run inside an empty directory with the pair linked into it; for commands that run in this process."""
    for name in ("target", "draft"):
        (tmp_path / name).symlink_to(pair / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def oracle(monkeypatch):
    """A function that makes every draft know a text: its trees contain random prefixes of it among wrong tokens.

    Call it with the text of plain `generate` and the number of tokens of the prompt. Untrained drafts are almost
    never right and so test rejection only. With an oracle long paths are accepted, cache rows move, and generation
    stops in the middle of a path. The real drafter runs underneath, so its cache is tested as well.
    """

    def install(plain: torch.Tensor, prompt_tokens: int, vocab: int = 97, seed: int = 0) -> None:
        rng = random.Random(seed)
        text = plain[0].tolist()

        new_drafter = DovetailDraft.new_drafter

        class OracleDrafter(FeatureDrafter):
            known: int | None = None  # tokens of the text so far; None during the prompt's pass

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

        def new_oracle(self, engine, *, capacity, clock):
            runner = new_drafter(self, engine, capacity=capacity, clock=clock).runner
            return OracleDrafter(self, runner, capacity=capacity, clock=clock)

        monkeypatch.setattr(DovetailDraft, "new_drafter", new_oracle)

    return install


@pytest.fixture(params=[256, 16], ids=["wide", "narrow"])
def min_columns(request, monkeypatch):
    """Smallest number of columns of a CUDA graph. With 16, short texts use several counts and outgrow their storage."""
    monkeypatch.setattr(cuda_graphs, "MIN_COLUMNS", request.param)
    return request.param
