"""One call of `generate` with a draft: checks, preparation, the loop, and the result in transformers' form.

Enters: what `GenerationMixin.generate` hands to a decoding method. Leaves: token ids or a
`GenerateDecoderOnlyOutput`. `hf.py` decides when this runs; `decoding.py` holds the loop itself.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..drafts.base import Assistant, DraftRunner
from ..drafts.cuda_graphs import runner_for
from ..drafts.feature_drafter import FeatureDrafter, TorchRunner
from ..drafts.model import DovetailDraft
from ..machine import thread_count
from ..policy import records
from ..policy.cost import Shape
from ..policy.device_split import DeviceSplitPolicy
from ..policy.planner import PLAIN, FixedPlanner, RoundPlanner
from ..report import GenerationReport
from ..targets.base import Engine
from ..targets.engine import engine_of
from .loop import Decoder
from .text import Text

DRAFT_ROWS = 1024
"""Rows the draft's cache makes room for beyond the prompt; it doubles when they are used up."""

OWN_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
"""Forward arguments that the target handles itself; all others go to the prompt's pass unchanged."""

NOT_OF_FORWARD = (*OWN_ARGUMENTS, "tokenizer", "assistant_tokenizer")
"""With what `generate` hands on beside forward arguments; it has read stop strings with them already."""


def check_request(model: PreTrainedModel, draft: Assistant, config: GenerationConfig) -> None:
    """Everything that can be refused before the prompt is looked at.

    Raises:
        ValueError: the draft does not fit the target, the target cannot be verified, or an option of
            `generate` does not go with drafting.
    """
    engine_of(model).check()
    draft.check_target(model)
    if draft.verification == "stock" and not isinstance(draft, DovetailDraft):
        raise ValueError(f'verification="stock" takes a DovetailDraft, not a {type(draft).__name__}; use "tree".')
    if draft.verification == "stock" and not isinstance(model, PreTrainedModel):
        raise ValueError(f'verification="stock" works with transformers\' own models, not with {type(model).__name__}.')
    check_options(config)


def check_options(config: GenerationConfig) -> None:
    """Refuse options of `generate` that our loop does not have.

    Raises:
        ValueError: names the option.
    """
    if config.use_cache is False:
        raise ValueError("drafting needs the key/value cache; leave out use_cache=False.")
    if config.num_beams > 1:
        raise ValueError(f"drafting works with greedy search and sampling, got num_beams={config.num_beams}.")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"drafting brings its own preallocated cache; leave out cache_implementation="
            f"{config.cache_implementation!r}."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "output_attentions and output_hidden_states are not available with a draft; generate without "
            "assistant_model, or run the finished sequence through the model once."
        )


def generate_with_draft(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Assistant | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generate with tree drafting and exact verification.

    Runs inside `generate`, either through `assistant_model=draft` once the package is imported, or
    without any patching of transformers as `generate(..., custom_generate=generate_with_draft, draft=draft)`
    (which passes no streamer).

    Args:
        model: the target.
        input_ids: (1, T) int64.
        draft: the draft model; its `report` is set when generation ends.

    Raises:
        ValueError: see `check_request`; more than one sequence; a prompt longer than the target's positions.
    """
    if draft is None:
        raise ValueError("no draft given: pass draft=DovetailDraft.from_pretrained(...).")
    check_request(model, draft, generation_config)
    if isinstance(draft, DovetailDraft):
        draft.attach_once(model)
    return _generate(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        draft,
        streamer,
        synced_gpus,
        model_kwargs,
    )


def generate_plainly(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The same loop without a draft, one token a pass: plain generation of engines that bring no loop of their own.

    Raises:
        ValueError: as `generate_with_draft`.
    """
    engine_of(model).check()
    check_options(generation_config)
    return _generate(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        None,
        streamer,
        synced_gpus,
        model_kwargs,
    )


def _generate(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    draft: Assistant | None,
    streamer: Any,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    engine = engine_of(model)
    cache = engine.cache(model_kwargs.get("past_key_values"))
    _check_prompt(model, input_ids, synced_gpus, model_kwargs)
    cached, mask = _cached_tokens(input_ids, cache, model_kwargs.get("attention_mask"), config)
    text = Text(input_ids, processors=processors, criteria=criteria, config=config, streamer=streamer)
    report, drafter = GenerationReport(), None
    planner: RoundPlanner = FixedPlanner(PLAIN)
    if draft is not None:
        draft.report = report
        draft.policy = draft.policy or DeviceSplitPolicy()
        drafter = _drafter_for(draft, engine, cache, text, report)
        planner = planner_for(draft, model, engine, getattr(drafter, "runner", None), config)
    past = cache.get_seq_length() - cached  # rows of turns that input_ids does not repeat
    session = engine.session(
        cache,
        max_length=past + config.max_length,
        max_nodes=planner.limits.nodes,
        prefill_chunk=config.prefill_chunk_size,
        model_kwargs={k: v for k, v in model_kwargs.items() if k not in NOT_OF_FORWARD and v is not None},
        feature_layers=draft.config.layers_of(model.config) if isinstance(draft, DovetailDraft) else None,
    )
    runner = getattr(drafter, "runner", None)
    in_torch = engine.runs_in_torch or (runner is not None and runner.runs_in_torch)
    # Threads that wait for torch's next small operation spin, on the cores that the other engine computes on.
    with session as target, torch.no_grad(), thread_count(None if in_torch else 1):
        decoder = Decoder(
            target,
            drafter,
            text,
            planner,
            report,
            cached=cached,
            attention_mask=mask,
            vary_threads=engine.runs_in_torch and draft is not None and draft.policy.threads == "auto",
        )
        decoder.run()
    text.end()
    if draft is not None and drafter is not None and decoder.drafter is drafter:  # it did not fail
        draft.turns[cache] = Turn(drafter, cache.get_seq_length())  # forgotten with the cache
    if not config.return_dict_in_generate:
        return text.ids.clone()
    return GenerateDecoderOnlyOutput(
        sequences=text.ids.clone(), scores=text.scores, logits=text.logits, past_key_values=cache
    )


@dataclass(frozen=True)
class Turn:
    """A drafter that has seen all `tokens` rows of a cache, kept for the next turn with that cache."""

    drafter: Any
    tokens: int


def _drafter_for(draft: Assistant, engine: Engine, cache: Cache, text: Text, report: GenerationReport) -> Any:
    """The drafter of the turn before, if this draft made the cache what it is; else a new one."""
    runner = draft_runner_for(draft, engine) if isinstance(draft, DovetailDraft) else None
    turn = draft.turns.pop(cache, None)
    followed = turn is not None and turn.tokens == cache.get_seq_length() > 0
    if turn is not None and followed and (runner is None or _same(turn.drafter.runner, runner)):
        turn.drafter.clock = report.clock
        return turn.drafter
    if isinstance(draft, DovetailDraft):
        return FeatureDrafter(draft, text.length + DRAFT_ROWS, report.clock, runner)
    return draft.new_drafter(text.length + DRAFT_ROWS, report.clock)


def draft_runner_for(draft: DovetailDraft, engine: Engine) -> DraftRunner:
    """What runs the draft's steps fastest: CUDA graphs on a GPU, the target's engine on a CPU, if it has a way."""
    if draft.runner == "auto" and draft.device.type == "cuda":
        return runner_for(draft)
    own = engine.draft_runner(draft) if draft.runner == "auto" and draft.device.type == "cpu" else None
    return own or TorchRunner(draft)


def planner_for(
    draft: Assistant, model: Any, engine: Engine, runner: DraftRunner | None, config: GenerationConfig
) -> RoundPlanner:
    """The user's budget every round if there is one, else the policy's."""
    if draft.budget is not None:
        return FixedPlanner(draft.budget)
    key = records.key_of(
        engine=type(engine).__name__,
        model=model.config.to_json_string(use_diff=False),  # the difference takes milliseconds to find
        name=model.config.name_or_path,
        rounding=engine.rounding,
        draft=draft.identity(),
        runner=None if runner is None else [type(runner).__name__, runner.device, runner.dtype, runner.weights],
        limits=asdict(draft.policy.limits),
        torch=torch.__version__,
    )
    return draft.policy.planner(
        key,
        temperature=(config.temperature or 1.0) if config.do_sample else 0.0,
        shape=lambda: _shape(model),
        calibration=draft.config.calibration if isinstance(draft, DovetailDraft) else None,
    )


def _shape(model: Any) -> Shape | None:
    """Sizes that tell what context costs; None for a model whose config does not give them."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers
    return Shape(model.num_parameters(), 2 * layers * kv_heads * head_dim, layers * heads * head_dim)


def _same(one: DraftRunner, other: DraftRunner) -> bool:
    """Whether the rows of one can be gone on with by the other."""
    return (type(one), one.device, one.dtype) == (type(other), other.device, other.dtype)


def _check_prompt(model: PreTrainedModel, input_ids: Tensor, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"drafting works on one sequence at a time, got a batch of {input_ids.shape[0]} "
            "(or num_return_sequences > 1). Call generate once for each, or leave out assistant_model."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("drafting needs the prompt's tokens: pass input_ids, not inputs_embeds.")
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; drafting needs at least one token.")
    if synced_gpus:
        raise ValueError("drafting does not support synced_gpus (DeepSpeed ZeRO-3 or FSDP over several GPUs).")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and input_ids.shape[1] > positions:
        raise ValueError(
            f"the prompt has {input_ids.shape[1]} tokens but the target has {positions} positions; shorten it."
        )


def _cached_tokens(
    input_ids: Tensor, cache: Cache, attention_mask: Tensor | None, config: GenerationConfig
) -> tuple[int, Tensor | None]:
    """How many tokens of `input_ids` the cache already holds, and the mask over cache and prompt.

    `input_ids` is either the whole text, earlier turns included, or only what is new; transformers tells
    the two apart by the length of the attention mask (dropped, but remembered, where it is all ones).
    """
    past = cache.get_seq_length()
    length = input_ids.shape[1]
    covered = attention_mask.shape[1] if attention_mask is not None else getattr(config, "_mask_length", length)
    cached = past if covered == length else 0
    if cached >= length > 0 and past:
        raise ValueError(
            f"past_key_values holds {past} tokens and input_ids has {length}: there is no new token to start from."
        )
    return cached, attention_mask
