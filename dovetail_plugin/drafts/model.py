"""`DovetailDraft`: the project's own draft, as a transformers model that users load, attach, train and save.

The network is in `network.py`, trees grow in `feature_drafter.py`, and `runners.py` chooses what runs the steps.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import OccupiedError
from ..report import PhaseClock
from ..targets.base import Engine, Tables, TargetModel
from ..targets.engine import engine_of
from .base import Draft, Drafter, Setting, one_of, without_traces
from .card import model_card
from .checkpoints.load import (
    check_loaded,
    check_stored,
    dtype_for,
    frequent_tokens,
    loading_arguments,
    open_checkpoint,
    token_order,
)
from .compatibility import check_fits, note_positions, warn_of_other_target
from .config import DovetailConfig
from .feature_drafter import FeatureDrafter
from .identity import config_identity
from .network import DraftNetwork
from .runners import runner_for
from .saving import draft_directory


def _check_embedding_device(_draft: Any, value: Any) -> str | None:
    problem = 'a device such as "cpu", or None for the draft\'s own'
    if value is None:
        return None
    if not isinstance(value, (str, torch.device)):
        return problem
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the device
        return f"{problem}, that torch can use here"
    return None


def _check_draft_vocab_size(draft: "DovetailDraft", value: Any) -> str | None:
    if value is None:
        return None
    size = draft.config.vocab_size
    if draft.config.fusion == "eagle3":
        return "None for an EAGLE-3 draft, which has its own head"
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= size:
        return f"a number of tokens between 1 and {size}, or None for all of them"
    return None


class DovetailDraft(DraftNetwork, Draft):
    """A draft model for one target: pass it as `assistant_model` to the target's `generate`.

    ```python
    target = AutoModelForCausalLM.from_pretrained("path-or-hub-id", dtype="auto")
    draft = DovetailDraft.from_pretrained("path-or-hub-id", device_map="auto")
    out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
    print(draft.report)
    ```

    The settings of `Draft` and these are checked when they are set:

    Attributes:
        runner: `"auto"` (the fastest way on the draft's device: CUDA graphs on an NVIDIA GPU; on a CPU, the target's
            engine if it can run drafts, or packed weights, int8 or as the target's) or `"torch"`.
        embedding_device: device of the borrowed embedding table if it is not the draft's. `"cpu"` saves the table's
            bytes on a small GPU and costs a short wait per tree level.
        draft_vocab_size: number of tokens that the draft may propose, the most frequent ones of its training. It saves
            bytes and time of the head; None proposes all tokens.
        token_order: (V,) int32 ids of all tokens, the most frequent first, from the checkpoint. None means ascending
            ids, which is the order in byte-pair vocabularies.
    """

    runner: Setting[Literal["auto", "torch"]] = Setting("auto", one_of("auto", "torch"))
    embedding_device: Setting[str | None] = Setting(None, _check_embedding_device, after="_attach_again")  # type: ignore[assignment]
    draft_vocab_size: Setting[int | None] = Setting(None, _check_draft_vocab_size, after="_attach_again")

    token_order: Tensor | None = None

    supports_stock_loop = True
    supports_placement = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Check settings before torch takes modules and parameters among the values for its own."""
        if self._is_setting(name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what generations left here (see `Draft.__getstate__`) and the tables that the target lent."""
        state = without_traces(super().__getstate__())
        state["_rope"] = None  # a table of the positions that the latest text had
        borrowed = state["_non_persistent_buffers_set"]
        state["_buffers"] = {k: None if k in borrowed else v for k, v in state["_buffers"].items()}
        return state

    # --- the target's tables -------------------------------------------------------------------

    @classmethod
    def for_target(
        cls, target: PreTrainedModel, *, blocks: int = 1, fusion: Literal["dgf", "concat"] = "dgf", **overrides: Any
    ) -> "DovetailDraft":
        """Make an untrained draft that fits `target`, attached to it, on its device and in its dtype.

        Args:
            target: a decoder-only model with a head.
            blocks: decoder blocks of the draft.
            fusion: see `DovetailConfig`.
            overrides: single fields of `DovetailConfig`, for example `intermediate_size=1024`.
        """
        config = DovetailConfig.for_target(target.config, blocks=blocks, fusion=fusion, **overrides)
        draft = cls(config).to(device=target.device, dtype=target.dtype)
        draft.attach(target)
        return draft

    @property
    def is_attached(self) -> bool:
        """Whether the draft has its embedding table, so that it can run."""
        return self.embed_weight is not None

    def attach(self, target: TargetModel) -> None:
        """Take the embedding table and the head from `target`, in this draft's dtype and on its device.

        The tensors are shared and not copied if device and dtype are the target's. Warns if the draft was trained for
        another target.

        Raises:
            ValueError: the target's vocabulary or hidden size differs from this draft's, or the target has no usable
                tables.
        """
        check_fits(self.config, target.config)
        note_positions(self.config, target.config)
        if isinstance(target, PreTrainedModel):  # an exported model is named after its directory
            warn_of_other_target(self.config, target.config)
        tables = engine_of(target).tables()
        if not self.config.own_embedding:
            self._borrow_embedding(tables)
        if self.config.fusion != "eagle3":
            self._borrow_head(tables)
        super().attach(target)

    def _attach_again(self) -> None:
        """Apply a changed setting at once if the draft is attached to a target."""
        target = None if self._attached_to is None else self._attached_to()
        if target is not None:
            self.attach(target)

    def _borrow_embedding(self, tables: Tables) -> None:
        if tables.embedding.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"the target embeds tokens in {tables.embedding.shape[1]} dimensions and the draft reads "
                f"{self.config.hidden_size}. Such targets are not supported."
            )
        weight = next(self.layers.parameters())
        if self.embedding_device is None:
            self.embed_weight = tables.embedding.to(device=weight.device, dtype=weight.dtype)
        else:  # in the target's dtype, so that it is the target's own tensor on the target's device
            self.embed_weight = tables.embedding.to(self.embedding_device)

    def _borrow_head(self, tables: Tables) -> None:
        weight = next(self.layers.parameters())
        head, bias, self.token_ids = tables.head, tables.bias, None
        if head.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"the target's head reads {head.shape[1]} numbers and its hidden states have "
                f"{self.config.hidden_size}. Drafts that share the head do not fit it. Use PromptLookupDraft()."
            )
        if self.draft_vocab_size is not None:
            ids = frequent_tokens(self.token_order, self.draft_vocab_size, self.config.vocab_size).to(head.device)
            head, bias = head[ids], None if bias is None else bias[ids]
            self.token_ids = ids.to(weight.device)
        tied = head is tables.embedding and self.embedding_device is None
        self.head_weight = self.embed_weight if tied else head.to(device=weight.device, dtype=weight.dtype)
        self.head_bias = None if bias is None else bias.to(device=weight.device, dtype=weight.dtype)

    # --- the contract of drafts ----------------------------------------------------------------

    @property
    def calibration(self) -> Mapping[str, Sequence[float]] | None:
        """Acceptance rates that training measured on held-out text; see `DovetailConfig`."""
        return self.config.calibration

    def check_target(self, target: TargetModel) -> None:
        """Refuse a target whose sizes are not those of this draft.

        Raises:
            ValueError: vocabulary, hidden size or layers differ.
        """
        check_fits(self.config, target.config)

    def feature_layers(self, target: PretrainedConfig) -> tuple[int, ...] | None:
        """Return the layers that an EAGLE-3 draft reads; None for the others. See `Draft.feature_layers`."""
        return self.config.layers_of(target)

    def identity(self) -> list[Any]:
        """Return config, device, dtype, and the settings of the borrowed tables."""
        weight = next(self.parameters())
        parts = ["dovetail", config_identity(self.config), str(weight.device), str(weight.dtype)]
        settings = {"embedding_device": self.embedding_device, "draft_vocab_size": self.draft_vocab_size}
        return parts + [f"{name}={value}" for name, value in settings.items() if value is not None]

    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> FeatureDrafter:
        """Make a drafter. The `runner` setting selects what runs its steps."""
        runner = runner_for(self, engine, plainly=self.runner == "torch")
        return FeatureDrafter(self, runner, capacity=capacity, clock=clock)

    def can_resume(self, drafter: Drafter, engine: Engine) -> bool:
        """Return whether the drafter's rows lie where this draft's runner would put them. It then uses this runner."""
        assert isinstance(drafter, FeatureDrafter), "new_drafter made it"
        return drafter.takes(runner_for(self, engine, plainly=self.runner == "torch"))

    # --- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a draft of this project or of the Dovetail paper, an EAGLE-1, 2 or 3 head, or speculators' eagle3.

        Config, names, shapes and dtypes are checked before anything is built: what a file claims never takes more
        memory than the weights that it holds. Accepts the arguments of transformers' `from_pretrained` (`dtype`,
        `device_map`, `revision`, ...), and the settings of the draft (`budget`, ...).

        Raises:
            InputError: the format is unknown, a field of the config or a file cannot be used, or tensors are missing,
                unexpected or of the wrong shape (they are named). It is a `ValueError`.
            MissingFileError: there is no such directory or hub repository, or it has no weights. It is an `OSError`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        settings = {name: kwargs.pop(name) for name in list(kwargs) if cls._is_setting(name)}
        kwargs.setdefault("dtype", "auto")
        name, source, order = pretrained_model_name_or_path, [pretrained_model_name_or_path], None
        layout = None
        if name is not None and "state_dict" not in kwargs:
            opened = open_checkpoint(str(name), kwargs)
            with torch.device("meta"):
                expected = cls(copy.deepcopy(opened.config)).state_dict()
            check_stored(opened, expected)
            order = token_order(opened, kwargs)
            source, layout = [None], opened.kind
            kwargs |= loading_arguments(opened)
        draft, info = super().from_pretrained(
            *source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loaded(name, info)
        if name is not None:
            draft.name_or_path = draft.config.name_or_path = str(name)
        draft.token_order, draft.layout = order, layout
        if kwargs["dtype"] == "auto":
            draft.to(dtype_for(draft.dtype, draft.device))
        for setting, value in settings.items():
            setattr(draft, setting, value)
        return (draft, info) if wants_info else draft

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """Save the draft with its order of tokens and a model card, whole or not at all.

        A directory that does not exist appears when the draft is complete. In one with an older draft, its files are
        replaced when the new ones are complete; other files stay, and so does a README.md. Accepts the arguments of
        transformers' `save_pretrained`.

        Raises:
            OccupiedError: the directory is a file, or holds the checkpoint of another model.
            WriteError: the files cannot be written, for example because the disk is full. Nothing has changed.
        """
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise OccupiedError(f"{directory} is a file. Choose another name for the draft's directory.")
        hub = {name: kwargs.pop(name) for name in HUB_ONLY if name in kwargs}
        with draft_directory(directory, self.token_order, model_card(self.config)) as part:
            super().save_pretrained(part, *args, **kwargs)
        if push_to_hub:
            options = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(hub.pop("repo_id", directory.name), **hub, **options)


HUB_ONLY = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
"""Arguments of `save_pretrained` that only say how a draft is uploaded."""
