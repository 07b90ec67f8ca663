"""Drafting with a small language model that has the target's tokenizer: trees from its logits.

```python
draft = SmallModelDraft.from_pretrained("Qwen/Qwen3-0.6B", device_map="auto")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

A small model reads tokens where a `DovetailDraft` reads pairs of feature and token. Everything else is the same, so
trees grow through the same `FeatureDrafter`. Token t of the text has position t here, and the first token is run too.
The model runs in a session like a target's, so whatever model can be a target can draft.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..report import PhaseClock
from ..runner import Pass, Predicted
from ..targets.base import Engine, ExtendingSession, TargetModel, TargetSession
from ..targets.engine import engine_of
from ..tree import DraftTree, TreeBudget
from .base import Draft, Drafter, DraftError, Judge
from .checkpoints.claims import load_language_model
from .checkpoints.load import hub_arguments
from .feature_drafter import FeatureDrafter
from .identity import config_identity
from .shared_tokens import SharedTokens, Vocabulary, shared_tokens, vocabulary_of
from .target_tokenizer import vocabulary_of_target

SHORT_TEXT = 64
"""Rows of new text that are run like a tree, in one pass with the root. More are run like a prompt."""


class SmallModelRows:
    """One text in a session of the small model, and the tree that grows behind it; implements `RowStorage`.

    As in a target's session, the last token of the text is the root of every tree, and its row is kept when the text
    goes on. Where the session can extend a tree, the rows of what `read` ran and of earlier levels stay, and a level
    runs its new nodes only. Elsewhere a level is run together with its ancestors.

    Args:
        engine: runs the small model.
        max_nodes: rows of the largest pass over a tree.
    """

    def __init__(self, engine: Engine, max_nodes: int) -> None:
        self._engine, self._max_nodes = engine, max(max_nodes, SHORT_TEXT)
        self._cache: Any = engine.cache(None)
        self._session: TargetSession | None = None
        self._extending: ExtendingSession | None = None  # the same, if it is one
        self._last_read: DraftTree | None = None  # its rows are not kept yet
        self._close: Callable[[], object] = lambda: None
        self._text: list[Tensor] = []  # all tokens, for the rare case that they have to be run again
        self.text_length = 0
        self._tree: DraftTree | None = None  # the root and all nodes that were run

    @property
    def length(self) -> int:
        """Tokens of the text and nodes of the tree. Setting it to the length of the text drops the tree."""
        return self.text_length + (0 if self._tree is None else len(self._tree) - 1)

    @length.setter
    def length(self, length: int) -> None:
        assert length == self.text_length, "a text never loses tokens"
        self._tree = _chain(self._text[-1][-1:]) if self._text else None

    def fitting(self, budget: TreeBudget) -> TreeBudget:
        """Return the part of a budget that the model can draft: chains only, or fewer levels near its last position."""
        assert self._session is not None, "read() comes first"
        if not self._session.supports_tree:
            budget = budget.as_chain()
        if self._session.max_length is None:
            return budget
        return budget.clipped(self._session.max_length - self.text_length + 2)  # the deepest level is not run

    def read(self, tokens: Tensor) -> Tensor:
        """Run the tokens (n,) int64 that the text gained and return the logits (1, rows) of the last one.

        Raises:
            DraftError: the text has outgrown the model's positions.
        """
        root = self._text[-1:]
        self._settle()
        self._text.append(tokens)
        self.text_length += len(tokens)
        new = torch.cat([*(last[-1:] for last in root), tokens])
        if self._session is None or len(new) > self._max_nodes:
            session, new = self._open(new), new[-1:]
        else:
            session = self._session
            self._check_positions(session)
        chain = _chain(new)
        output, self._last_read = session.score(chain), chain
        if self._extending is None:
            self._settle()
        return output.logits[-1:]

    def _settle(self) -> None:
        """Keep the rows of the text that `read` ran last, all but the root's."""
        if self._session is not None and self._last_read is not None:
            self._session.keep(list(range(len(self._last_read) - 1)))
        self._last_read = None

    def score(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Run a level of the tree and return its logits (K, rows).

        Args:
            tokens: (K,) int64 of the new nodes, which all have the same depth.
            visible: (K, earlier nodes + K) bool, each node's ancestors and itself. The root does not count.
        """
        assert self._tree is not None and self._session is not None, "read() comes first"
        device, count, earlier = tokens.device, len(tokens), len(self._tree)
        ancestors = torch.cat([visible.new_ones(count, 1), visible], dim=1)
        parents = (ancestors[:, :earlier] * torch.arange(earlier, device=device)).amax(dim=1)  # the latest ancestor
        self._tree = tree = DraftTree(
            torch.cat([self._tree.tokens, tokens]),
            torch.cat([self._tree.parents, parents]),
            torch.cat([self._tree.depths, self._tree.depths[parents] + 1]),
            torch.zeros(earlier + count, device=device),
        )
        if self._extending is not None and self._last_read is not None:
            whole = _below(self._last_read, tree)
            return self._extending.extend(whole, len(whole) - count).logits
        needed = ancestors.any(dim=0)
        places, rows = needed.cumsum(0) - 1, needed.nonzero()[:, 0]
        parents = torch.cat([tree.parents[:1], places[tree.parents[rows[1:]]]])
        part = DraftTree(tree.tokens[rows], parents, tree.depths[rows], tree.scores[rows])
        if len(part) > self._max_nodes:
            self._max_nodes = 2 * len(part)
            self._cache = self._engine.cache(None)
            self._open(torch.cat(self._text))
        output = self._session.score(part)
        self._session.keep([])
        return output.logits[-count:]

    def _open(self, tokens: Tensor) -> TargetSession:
        """Open a session behind the rows of the cache and run `tokens` (n,), 2 or more, all but the last."""
        self._close()
        stack = ExitStack()
        session = stack.enter_context(self._engine.session(self._cache, max_nodes=self._max_nodes, feature_layers=()))
        self._session = session
        self._extending = session if isinstance(session, ExtendingSession) and session.supports_tree else None
        self._close = weakref.finalize(self, stack.close)  # also when Python ends
        self._check_positions(session)
        session.prefill(tokens[None, :-1], None)
        return session

    def _check_positions(self, session: TargetSession) -> None:
        if session.max_length is not None and self.text_length > session.max_length:
            raise DraftError(f"the text has outgrown the {session.max_length} positions of the small model")


def _chain(tokens: Tensor) -> DraftTree:
    """Return a chain of tokens (n,) on their device; the first one is the root."""
    steps = torch.arange(len(tokens), device=tokens.device)
    return DraftTree(tokens, steps - 1, steps, torch.zeros(len(tokens), device=tokens.device))


def _below(chain: DraftTree, tree: DraftTree) -> DraftTree:
    """Return a tree whose root is the last token of a chain, with the chain above it."""
    above = len(chain) - 1
    shifted = tree.tokens, tree.parents + above, tree.depths + above, tree.scores
    columns = zip((chain.tokens, chain.parents, chain.depths, chain.scores), shifted, strict=True)
    return DraftTree(*(torch.cat([over, under[1:]]) for over, under in columns))


class SmallModelRunner:
    """Runs a causal language model as a `DraftRunner`. It ignores features and predicts none.

    Args:
        model: decoder-only model.
        shared: the tokens that it shares with the target; the runner reads and drafts the target's.
        max_nodes: rows of the largest pass over a tree.
    """

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, model: PreTrainedModel, shared: SharedTokens, max_nodes: int) -> None:
        self._engine, self._max_nodes = engine_of(model), max_nodes
        self.shared, self.tokens = shared, shared.to(model.device)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    def new_rows(self, capacity: int) -> SmallModelRows:  # noqa: ARG002 - rows are reserved as the text grows
        """Make rows for one text."""
        return SmallModelRows(self._engine, self._max_nodes)

    def run(self, step: Pass, rows: SmallModelRows) -> Predicted:
        """Run the model over the pass: new text, of which only the last logits can be had, or a level of the tree.

        Raises:
            DraftError: the text has outgrown the model's positions.
        """
        tokens = self.tokens.read(step.tokens)
        if step.is_level:
            assert step.mask is not None, "a level has a mask"
            logits = rows.score(tokens, step.mask[:, rows.text_length :] == 0)
        else:
            assert step.logits_from == step.rows - 1, "of the text only the last logits are computed"
            logits = rows.read(tokens)
        return Predicted(step.features.new_empty(step.rows, 0), self.tokens.drafted(logits))


class SmallModelDrafter(FeatureDrafter):
    """`FeatureDrafter` that reads tokens alone. The first token is run as well, although no feature belongs to it."""

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start a text with all its tokens, or continue with a turn. See `Drafter.begin`."""
        first = not self.committed and not self._pending
        self.advance(features, input_ids if first else input_ids[1:])

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Remember the tokens that the text gained. See `Drafter.advance`."""
        super().advance(features.new_empty(len(tokens), 0), tokens)

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Grow a tree, with fewer levels near the model's last position. See `FeatureDrafter.grow`."""
        self.catch_up()
        return super().grow(self.rows.fitting(budget), judge)

    def _causal(self, count: int) -> None:
        """Return None: the session makes the masks of the text."""


class SmallModelDraft(Draft):
    """A small causal language model as draft, made from a loaded model or by `from_pretrained`.

    Any model that can be a target can draft, with sliding windows too. Its tokenizer should be the target's. Single
    tokens that one of them lacks, or has under another id or name, cost a little speed: those that the small model
    lacks are never drafted, and read as another token.

    Tokenizers are compared when a target is met. That of the target is read from where its config says that it was
    loaded from (see `vocabulary_of_target`), or set as `target_vocabulary`. Where one of the two cannot be found, as
    for a model that was built in memory, only the number of embedding rows is compared: up to 2 % of difference is
    taken for padding, and equal ids for equal tokens.

    Args:
        model: decoder-only, on any device. Three short passes at once show whether it can draft.
        vocabulary: token -> id of its tokenizer, to compare with the target's; None compares the number of rows.
        cache_dirs: hub caches, besides the default one, in which the target's tokenizer is looked for.

    Raises:
        ValueError: the model cannot draft, with the reason.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary | None = None, cache_dirs: Sequence[str | Path] = ()
    ) -> None:
        self.model, self.vocabulary, self.config = model.eval(), vocabulary, model.config
        self._cache_dirs = tuple(cache_dirs)
        self._target_vocabulary: Vocabulary | None = None
        self._substitute = _known_token(self.config)
        _try_out(model, self._substitute)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "SmallModelDraft":
        """Load a model and its tokenizer, both from the same source. Without a tokenizer there is a warning.

        Code that comes with the model runs only with `trust_remote_code=True`; nobody is asked. The sizes in its
        config are compared with the weight files before memory is taken.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            kwargs: arguments of `AutoModelForCausalLM.from_pretrained`. Those that select where files come from
                (`revision`, `token`, `cache_dir`, `subfolder`, ...) and `trust_remote_code` hold for the tokenizer too.

        Raises:
            OSError: there is no such model.
            ValueError: the model cannot draft, comes with code that may not run, or has a config that describes more
                than its weight files can hold.
        """
        kwargs.setdefault("dtype", "auto")
        kwargs.setdefault("trust_remote_code", False)
        source, caches = hub_arguments(kwargs), [kwargs["cache_dir"]] if kwargs.get("cache_dir") else []
        model = load_language_model(pretrained_model_name_or_path, **kwargs)
        trusted = kwargs["trust_remote_code"]
        vocabulary = vocabulary_of(pretrained_model_name_or_path, trust_remote_code=trusted, **source)
        draft = cls(model, vocabulary, caches)
        draft.layout = "language model"
        return draft

    @property
    def target_vocabulary(self) -> Vocabulary | None:
        """Token -> id of the tokenizer of the targets that are met next; None finds that of each target."""
        return self._target_vocabulary

    @target_vocabulary.setter
    def target_vocabulary(self, vocabulary: Vocabulary | None) -> None:
        self._target_vocabulary = vocabulary
        self.__dict__.pop("_known", None)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def num_parameters(self) -> int:
        """Return the number of weights of the model."""
        return self.model.num_parameters()

    def check_target(self, target: TargetModel) -> None:
        """Refuse a target with another tokenizer.

        Raises:
            ValueError: the tokenizers differ in most tokens, or the target is the small model itself.
        """
        if target is self.model:
            raise ValueError("the target cannot be its own draft. Pass a smaller model.")
        self._shared_with(engine_of(target))

    def feature_layers(self, target: PretrainedConfig) -> tuple[int, ...]:  # noqa: ARG002
        """Return no layers: only tokens are read, so a target need not keep its hidden states."""
        return ()

    def identity(self) -> list[Any]:
        """Return config, device and dtype of the model."""
        return ["small model", config_identity(self.config), str(self.model.device), str(self.model.dtype)]

    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> SmallModelDrafter:
        """Make a drafter that proposes tokens of both vocabularies. The model runs when its first tree is asked for."""
        largest = self.budget or (TreeBudget() if self.policy is None else self.policy.limits)
        runner = SmallModelRunner(self.model, self._shared_with(engine), 1 + largest.top_k * largest.depth)
        return SmallModelDrafter(runner.tokens, runner, capacity=capacity, clock=clock)

    def can_resume(self, drafter: Drafter, engine: Engine) -> bool:
        """Return whether the model is where the drafter's rows are, and whether they were made for this target."""
        assert isinstance(drafter, SmallModelDrafter), "new_drafter made it"
        runner = drafter.runner
        assert isinstance(runner, SmallModelRunner), "new_drafter made it"
        now = (self.model.device, self.model.dtype, self._shared_with(engine))
        return (runner.device, runner.dtype) == now[:2] and runner.shared is now[2]

    def _shared_with(self, engine: Engine) -> SharedTokens:
        """Return what the tokenizers share; they are compared once for each target."""
        known: weakref.WeakKeyDictionary[Engine, SharedTokens] = self.__dict__.setdefault(
            "_known", weakref.WeakKeyDictionary()
        )
        shared = known.get(engine)
        if shared is None:
            target = self._target_vocabulary
            if target is None and self.vocabulary is not None:
                target = vocabulary_of_target(engine.config, self._cache_dirs)
            shared = known[engine] = shared_tokens(
                self.vocabulary,
                target,
                own_rows=_vocab_size(self.config),
                target_rows=_vocab_size(engine.config),
                substitute=self._substitute,
            )
        return shared


def _vocab_size(config: PretrainedConfig) -> int:
    return config.get_text_config(decoder=True).vocab_size


def _known_token(config: PretrainedConfig) -> int:
    """Return a token that the small model knows, to read for those that it lacks: padding, end or beginning of text."""
    text = config.get_text_config(decoder=True)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        ids = getattr(text, name, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and 0 <= token < text.vocab_size:
                return token
    return 0


def _try_out(model: PreTrainedModel, token: int) -> None:
    """Run three short passes as a drafter does.

    Raises:
        ValueError: the model cannot draft, with the reason.
    """
    name, engine = type(model).__name__, engine_of(model)
    try:
        engine.check()
    except ValueError as error:
        raise ValueError(f"{name} cannot draft: {error}") from error
    try:
        rows = SmallModelRows(engine, max_nodes=SHORT_TEXT)
        text = torch.full((3,), token, device=model.device)
        rows.read(text[:2])
        rows.length = 2
        rows.score(text[:1], torch.ones(1, 1, dtype=torch.bool, device=model.device))
        rows.read(text[2:])
    except Exception as error:  # whatever a model raises that was never tried as a target
        own = error.__cause__ or error
        raise ValueError(
            f"{name} cannot draft: a short pass fails with {type(own).__name__}: {own}. Use another small model, "
            "or PromptLookupDraft()."
        ) from error
