"""The contract of drafts: users pass a `Draft` as `assistant_model`, and a `Drafter` is its state for one text.

Generation works with these two classes alone. To add a draft, subclass both and implement their abstract methods; see
docs/developer/add-a-draft.md. A draft knows nothing of how its target runs, and never sees the target's logits.
"""

import copy
import difflib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import getattr_static
from typing import Any, ClassVar, Generic, Literal, NoReturn, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import InputError
from ..report import GenerationReport, PhaseClock
from ..targets.base import Engine, TargetModel
from ..tree import DraftTree, TreeBudget

MADE_POLICY = "_made_policy"
"""Attribute of a draft: the policy that its first generation made, because nobody had set one."""

DRAFT_ROWS = 1024
"""Rows that a draft's cache has room for beyond the prompt. The cache doubles when they are used up."""

Value = TypeVar("Value")


class DraftError(RuntimeError):
    """The draft cannot continue, for example because its logits are not finite. The text is not affected."""


class Judge(Protocol):
    """Decides while a tree grows, from cumulative log-probabilities of candidates, on the CPU."""

    def width(self, scores: np.ndarray) -> int:
        """Return the number of rows of the next level below these candidates (M,); 0 stops."""

    def rows(self, scores: np.ndarray) -> int:
        """Return the number of nodes to verify, the root included, out of all candidates (M,)."""


class Drafter(ABC):
    """Proposes trees for one text. Implementations own their state; the loop owns the order of the calls.

    Attributes:
        clock: where the seconds of this drafter are counted.
        device: where the draft computes.
        runs_in_torch: whether it needs torch's threads.
    """

    clock: PhaseClock
    device: torch.device = torch.device("cpu")
    runs_in_torch: bool = False

    @abstractmethod
    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start a text or a turn.

        Args:
            features: (T, F) of the last T tokens before the newest one.
            input_ids: (T + 1,) int64, these tokens and the newest one.
        """

    @abstractmethod
    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Return a tree below the last token, on the CPU, as large as the budget allows or as the judge selects.

        Raises:
            Exception: any exception stops drafting for this text, and generation continues without a draft.
        """

    @abstractmethod
    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Record that the text grew.

        Args:
            features: (A, F) of the accepted rows.
            tokens: (A,) int64, the token emitted after each of them.
        """

    def catch_up(self) -> None:  # noqa: B027 - most drafters have nothing to do here
        """Process the text that `begin` and `advance` have passed. `grow` does this too, if it was not done before."""

    def identity(self) -> list[Any] | None:
        """Describe how this drafter computes, for keys of measurements; None if the draft's identity is enough."""
        return None


@runtime_checkable
class BudgetPolicy(Protocol):
    """Chooses the budget of each round; `dovetail_plugin.DeviceSplitPolicy` is the one that ships."""

    limits: TreeBudget
    threads: str

    def planner(self, key: str, *, temperature: float, shape: Any, calibration: Any) -> Any:
        """Return what plans the rounds of one generation; see `DeviceSplitPolicy.planner`."""


class Setting(Generic[Value]):
    """An attribute of drafts that is checked when it is set.

    Args:
        default: value of a draft on which it was never set.
        check: returns what is wrong with a value and the remedy, or None if it is valid.
        after: name of a method that is called after a change, or None.
    """

    def __init__(self, default: Value, check: Callable[[Any, Any], str | None], after: str | None = None) -> None:
        self.default, self._check, self._after = default, check, after

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def with_default(self, default: Value) -> "Setting[Value]":
        """Return the same setting with another default.

        Raises:
            ValueError: the default is not valid.
        """
        if problem := self._check(None, default):
            raise ValueError(f"{self._name} must be {problem}, got {default!r}.")
        return Setting(default, self._check, self._after)

    @overload
    def __get__(self, draft: None, owner: type) -> Value: ...
    @overload
    def __get__(self, draft: object, owner: type) -> Value: ...
    def __get__(self, draft: Any, owner: type) -> Value:
        return self.default if draft is None else draft.__dict__.get(self._name, self.default)

    def __set__(self, draft: Any, value: Value) -> None:
        if problem := self._check(draft, value):
            raise ValueError(f"{self._name} must be {problem}, got {value!r}.")
        before = self.__get__(draft, type(draft))
        draft.__dict__[self._name] = value
        if self._after is None or value == before:
            return
        try:
            getattr(draft, self._after)()
        except BaseException:
            draft.__dict__[self._name] = before
            raise


def without_traces(state: dict[str, Any]) -> dict[str, Any]:
    """Return a draft's state without what belongs to this process or came from generations, for copies and pickles."""
    of_this_process = (weakref.ref, weakref.WeakKeyDictionary, type(threading.RLock()))
    left_out = {MADE_POLICY, "report"}
    if state.get("policy") is state.get(MADE_POLICY):
        left_out.add("policy")
    return {k: v for k, v in state.items() if k not in left_out and not isinstance(v, of_this_process)}


def one_of(*names: str) -> Callable[[Any, Any], str | None]:
    """Return a check for a `Setting` that accepts only these names."""
    listed = " or ".join(f'"{name}"' for name in names)
    return lambda _draft, value: None if isinstance(value, str) and value in names else listed


def _check_budget(_draft: Any, value: Any) -> str | None:
    if value is None or isinstance(value, TreeBudget):
        return None
    return "a TreeBudget, for example TreeBudget(nodes=8, depth=4, top_k=4), or None for the policy"


def _check_policy(_draft: Any, value: Any) -> str | None:
    return None if value is None or isinstance(value, BudgetPolicy) else "a DeviceSplitPolicy or None"


def _check_verification(draft: "Draft", value: Any) -> str | None:
    if problem := one_of("tree", "stock")(draft, value):
        return problem
    if value == "stock" and not draft.supports_stock_loop:
        return f'"tree" for a {type(draft).__name__}, which transformers\' own assisted loop cannot use'
    return None


class Draft(ABC):
    """Base class of drafts.

    Settings are checked when they are set, and a misspelled one raises an `AttributeError`.

    Attributes:
        report: the `GenerationReport` of the latest generation with this draft, or None.
        budget: `TreeBudget` of every round; None lets the policy choose each round's.
        policy: the `DeviceSplitPolicy` that chooses budgets. Drafts on one machine may share one. The first
            generation creates one if it is None.
        layout: what the draft was read from, a key of `auto.LAYOUTS`; None for a draft that was made here.
        verification: `"tree"` (Dovetail's loop inside `generate`) or `"stock"` (transformers' assisted loop, which
            verifies chains; transformers 5.8 or later).
        supports_stock_loop: whether `verification="stock"` is possible.
        supports_placement: whether a plan can say where the draft's parts go; see `planning.apply_plan`.
    """

    budget: Setting[TreeBudget | None] = Setting(None, _check_budget)
    policy: Setting[Any] = Setting(None, _check_policy)
    verification: Setting[Literal["tree", "stock"]] = Setting("tree", _check_verification)
    report: GenerationReport | None = None
    layout: str | None = None
    supports_stock_loop: ClassVar[bool] = False
    supports_placement: ClassVar[bool] = False

    _attached_to: "weakref.ref[TargetModel] | None" = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep a setting checked where a subclass gives it another default, as in `budget = TreeBudget(8, 4, 4)`."""
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            inherited = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
            if isinstance(inherited, Setting) and not isinstance(value, Setting):
                setting = inherited.with_default(value)
                setting.__set_name__(cls, name)
                setattr(cls, name, setting)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what generations left here: targets, drafters of conversations, report, policy.

        So copies and pickles hold no text and no tensor of a target, and calls of `generate` do not change them. The
        draft that is made from them has to meet a target first.
        """
        return without_traces(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draft":
        """Copy what a pickle holds, and share the policy, so that a copy for each request measures nothing again."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        if self.policy is not None:
            memo[id(self.policy)] = self.policy
        state = copy.deepcopy(self.__getstate__(), memo)
        if hasattr(copied, "__setstate__"):  # of torch's modules
            copied.__setstate__(state)
        else:
            copied.__dict__.update(state)
        copied.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("policy", MADE_POLICY)})
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self.__dict__ and not hasattr(type(self), name):
            self._refuse_misspelled(name)
        super().__setattr__(name, value)

    @classmethod
    def _is_setting(cls, name: str) -> bool:
        return isinstance(getattr_static(cls, name, None), Setting)

    def _refuse_misspelled(self, name: str) -> None:
        settings = [n for base in type(self).__mro__ for n, v in vars(base).items() if isinstance(v, Setting)]
        if near := difflib.get_close_matches(name, settings, n=1, cutoff=0.8):
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}. Did you mean {near[0]!r}?")

    @property
    def device(self) -> torch.device:
        """Device that the draft runs on."""
        return torch.device("cpu")

    @property
    def calibration(self) -> Mapping[str, Sequence[float]] | None:
        """Measured acceptance by bin of `config.EDGES`, under "greedy" and "sampling"; None if unknown."""
        return None

    @property
    def turns(self) -> "weakref.WeakKeyDictionary[Any, Any]":
        """Cache of a conversation -> the drafter that has followed it."""
        return self.__dict__.setdefault("_turns", weakref.WeakKeyDictionary())

    def num_parameters(self) -> int:
        """Return the number of weights that the draft brings itself."""
        return 0

    def generate(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: a draft proposes tokens, and its target generates.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"a {type(self).__name__} does not generate by itself. Call target.generate(..., assistant_model=draft), "
            "or attach_draft(target, draft) and then target.generate(...)."
        )

    def check_target(self, target: TargetModel) -> None:  # noqa: B027 - a draft may fit any target
        """Refuse a target that this draft cannot propose tokens for. Runs before any other work.

        Raises:
            ValueError: with the reason and the remedy.
        """

    def attach(self, target: TargetModel) -> None:
        """Take what the draft borrows from `target`, for example its embedding table.

        Implementations must call this method too, because it remembers the target.
        """
        self._attached_to = weakref.ref(target)

    def ensure_attached(self, target: TargetModel) -> None:
        """Call `attach`, unless `target` is the one that this draft is attached to.

        Of several threads that need it at once, one attaches the draft and the others wait.
        """
        with self.__dict__.setdefault("_attaching", threading.RLock()):
            if self._attached_to is None or self._attached_to() is not target:
                self.attach(target)

    def feature_layers(self, target: PretrainedConfig) -> tuple[int, ...] | None:  # noqa: ARG002
        """Return the hidden states that features consist of, in transformers' numbering (0 is the embeddings).

        None is the last hidden state, after the final norm. () is for drafts that read tokens only: features have F 0
        then, or a size that the engine chooses.

        Args:
            target: the target's config.

        Raises:
            ValueError: the target does not have these layers.
        """
        return None

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return what distinguishes drafts whose speed or acceptance may differ, as values that JSON can hold."""

    @abstractmethod
    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> Drafter:
        """Make a drafter for one text.

        Args:
            engine: runs the target; it may offer a faster way to run the draft.
            capacity: tokens to make room for at once.
            clock: where the drafter's seconds are counted.
        """

    def can_resume(self, drafter: Drafter, engine: Engine) -> bool:  # noqa: ARG002
        """Return whether a drafter of this draft can continue its text in another call of `generate`."""
        return True
