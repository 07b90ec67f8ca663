"""The training loop: a frozen target, a draft, and accelerate for devices, precision and several processes.

Takes a `TrainingConfig` and writes a draft checkpoint that `DovetailDraft.from_pretrained` loads, with `training.json`
(config and history) and `loss.png` beside it. An interrupted run continues from its last saved state and ends with the
same weights as a run without interruption, because order and noise depend only on the seed and the step.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..drafts.checkpoints.claims import load_language_model, load_tokenizer
from ..drafts.model import DovetailDraft
from ..errors import InputError
from .calibration import Calibration
from .config import TrainingConfig
from .data import Batch, Sequence, batch_order, collate, encode, read_jsonl
from .features import FeatureCache, check_directory, digest, fingerprint, target_features
from .losses import Losses, count_rows, draft_losses, expected_acceptance_length
from .output import RECORD, Before, check_key, describe_data, look, save, settings_key
from .state import History, Progress, load_state, remove_state, save_state


class DraftWithLosses(nn.Module):
    """The draft with its losses as `forward`. accelerate wraps this module, so that processes share gradients."""

    def __init__(self, draft: DovetailDraft) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, features: Tensor, batch: Batch, **options: Any) -> Losses:
        return draft_losses(self.draft, features, batch, **options)


def train(
    config: TrainingConfig,
    *,
    resume: bool = False,
    overwrite_output_dir: bool = False,
    target_options: Mapping[str, Any] | None = None,
    draft_options: Mapping[str, Any] | None = None,
) -> DovetailDraft:
    """Train a draft and save it to `config.out`.

    Args:
        config: settings of the run.
        resume: continue the run in `config.out` if there is one. A finished run continues if `config.steps` is larger
            than the number of steps that it has done, with its draft and a new optimizer; otherwise nothing is done.
        overwrite_output_dir: start again although `config.out` holds a run, and replace its files. Files that training
            does not write stay.
        target_options: arguments of `from_pretrained` for the target and its tokenizer: `revision`, `token`,
            `cache_dir`, `local_files_only`, and `trust_remote_code`, without which no code that comes with them runs.
        draft_options: the same for the draft `config.init_from`, which has no code.

    Returns:
        The trained draft, in `config.save_dtype`.

    Raises:
        OccupiedError: `config.out` holds a run and neither of the two arguments is given, or something of somebody
            else.
        ValueError: the data, the target, `init_from` or the saved state do not fit the config.
        WriteError: a state or the draft cannot be written. The last state is unchanged.
    """
    before = look(config, resume=resume, overwrite=overwrite_output_dir)
    if before.is_finished(config.steps):
        return DovetailDraft.from_pretrained(config.out)
    if config.cache_features is not None:
        check_directory(config.cache_features)
    accelerator = _accelerator(config)
    source: dict[str, Any] = {"trust_remote_code": False} | dict(target_options or {})  # otherwise somebody is asked
    sequences, pad_id = _load_sequences(config, source)
    data = describe_data(config)
    torch.manual_seed(config.seed)
    start: DovetailDraft | None = None
    if before.progress is not None and before.state is None:  # it is finished
        start = _loaded_draft(config, str(config.out))
    elif config.init_from is not None:
        start = _loaded_draft(config, config.init_from, **(draft_options or {}))
    target = load_language_model(config.target, dtype=config.dtype, **source)
    target = target.eval().to(accelerator.device)
    target.requires_grad_(False)
    draft = _first_draft(config, target, start)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = _schedule(optimizer, config, 0)
    model, optimizer = accelerator.prepare(DraftWithLosses(draft), optimizer)
    run = _Run(config, accelerator, target, model, draft, optimizer, schedule, sequences, pad_id)
    run.go_on(before)
    if overwrite_output_dir and accelerator.is_main_process:
        remove_state(config.out)  # otherwise an interrupted run would be resumed with it
    run.train(len(run.history.steps))
    if accelerator.is_main_process:
        draft.config.calibration = run.calibration()
        draft.token_order = token_order(sequences, draft.config.vocab_size)
        save(config, draft, run.progress(), data, source)
        remove_state(config.out)
    accelerator.wait_for_everyone()
    return draft


def _accelerator(config: TrainingConfig) -> Accelerator:
    """Return what knows devices, precision and processes.

    Raises:
        ValueError: the batch cannot be divided over the processes.
    """
    # The buffers are the target's embedding and head. They never change, so they need not be broadcast.
    constant_buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[constant_buffers],
    )
    parts = config.accumulate * accelerator.num_processes
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size ({config.batch_size}) must be a multiple of accumulate times the number of processes "
            f"({config.accumulate} x {accelerator.num_processes})."
        )
    return accelerator


def _loaded_draft(config: TrainingConfig, source: str, **options: Any) -> DovetailDraft:
    """Return the draft of a checkpoint that training starts from, in float32.

    Raises:
        ValueError: it does not fit the settings, or is an EAGLE-3 draft.
    """
    draft = DovetailDraft.from_pretrained(source, dtype=torch.float32, **options)
    if draft.config.fusion == "eagle3":
        raise InputError(f"{source} is an EAGLE-3 draft, which has its own head. Training is for the other kinds.")
    for name, own in (("blocks", draft.config.num_hidden_layers), ("fusion", draft.config.fusion)):
        asked, default = getattr(config, name), TrainingConfig.__dataclass_fields__[name].default
        if asked not in (own, default):
            raise InputError(f"{name} is {asked}, and the draft {source} has {own}. Leave {name} out.")
    return draft


def _first_draft(config: TrainingConfig, target: PreTrainedModel, start: DovetailDraft | None) -> DovetailDraft:
    """Return the draft that training starts from, attached to the target, in float32: `start`, or a new one.

    Raises:
        ValueError: it does not fit the target.
    """
    if start is None:
        return DovetailDraft.for_target(target, blocks=config.blocks, fusion=config.fusion).to(torch.float32)
    start.to(target.device)
    start.attach(target)
    return start


def _schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig, done: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the learning rate after `done` steps."""
    return get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps, last_epoch=done - 1)


def _load_sequences(config: TrainingConfig, source: dict[str, Any]) -> tuple[list[Sequence], int]:
    """Usable sequences of the data and the token id for padding.

    A sequence is usable if it has at least one row in every pass and a token that the target writes.

    Raises:
        ValueError: there are too few of them.
    """
    rows = read_jsonl(config.data)  # before anything is loaded, so that mistakes come at once
    tokenizer = load_tokenizer(config.target, **source)
    sequences = [encode(row, tokenizer, config.max_length) for row in tqdm(rows, desc="tokenizing", unit="row")]
    sequences = [s for s in sequences if len(s) >= config.rollout + 3 and bool(s.written.any())]
    if len(sequences) < config.held_out + config.batch_size:
        raise ValueError(
            f"{len(sequences)} usable sequences are too few for {config.held_out} held-out sequences and a batch of "
            f"{config.batch_size}. Add data, or reduce held_out or batch_size."
        )
    return held_out_last(sequences, config.held_out), tokenizer.pad_token_id or 0


def held_out_last(sequences: list[Sequence], count: int) -> list[Sequence]:
    """Put `count` sequences at the end, which are held out. They are spread evenly over all files of the data."""
    picked = {(2 * number + 1) * len(sequences) // (2 * count) for number in range(count)}
    others = [sequence for number, sequence in enumerate(sequences) if number not in picked]
    return others + [sequences[number] for number in sorted(picked)]


@dataclass
class _Run:
    """The state of one run, with a method for each of its tasks."""

    config: TrainingConfig
    accelerator: Accelerator
    target: PreTrainedModel
    model: nn.Module
    draft: DovetailDraft
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sequences: list[Sequence]
    pad_id: int
    history: History = field(default_factory=History)
    seconds_before: float = 0.0
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        directory = self.config.cache_features
        with self.accelerator.main_process_first():  # the other processes read what it wrote
            self.cache = FeatureCache(directory, self.target, self.sequences, self.pad_id) if directory else None
        # The last sequences are held out. All sequences before them are used for training.
        self.train_count = len(self.sequences) - self.config.held_out
        self._lengths = [len(s) for s in self.sequences[: self.train_count]]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def train(self, first: int) -> None:
        """Run the steps `first` .. `config.steps` - 1."""
        config = self.config
        progress = tqdm(
            range(first, config.steps),
            desc="training",
            unit="step",
            initial=first,
            total=config.steps,
            disable=not self.accelerator.is_main_process,
        )
        for step in progress:
            loss = self._step(step)
            self.history.steps.append(step + 1)
            self.history.losses.append(loss)
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                self.history.eval_steps.append(step + 1)
                self.history.acceptance.append(self.held_out_acceptance())
            shown = self.history.acceptance[-1:] or [float("nan")]
            progress.set_postfix(loss=f"{loss:.3f}", held_out_acceptance=f"{shown[0]:.2f}")
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                self.save_state()

    def _step(self, step: int) -> float:
        """Run one optimizer step; returns its loss."""
        self.model.train()
        numbers = self._batch_numbers(step)
        # Each row has the same weight, however the step is cut. Processes average their gradients.
        processes = self.accelerator.num_processes
        row_counts = count_rows([self.sequences[n] for n in numbers], self.config.rollout) / processes
        own = numbers[self.accelerator.process_index :: processes]
        size = len(own) // self.config.accumulate
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(0, len(own), size):
            losses = self._losses(own[start : start + size], step, row_counts)
            loss = losses.feature + self.config.ce_weight * losses.token
            self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.draft.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.accelerator.reduce(total, "mean"))

    def _batch_numbers(self, step: int) -> list[int]:
        """Numbers of the sequences of a step, over all processes. They depend only on seed and step."""
        per_epoch = max(self.train_count // self.config.batch_size, 1)
        epoch, place = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            order = batch_order(self._lengths, self.config.batch_size, self.config.seed + epoch)
            self._epoch = (epoch, order)
        return self._epoch[1][place]

    def _features(self, numbers: list[int], batch: Batch) -> Tensor:
        features = self.cache.load(numbers) if self.cache else target_features(self.target, batch)
        return features.to(self.accelerator.device, torch.float32)

    def _losses(self, numbers: list[int], step: int, row_counts: Tensor) -> Losses:
        features, batch = self._inputs(numbers)
        noise = self._noise(features, numbers, step) if self.config.feature_noise else None
        row_counts = row_counts.to(features.device)
        with self.accelerator.autocast():
            return self.model(features, batch, passes=self.config.rollout, noise=noise, row_counts=row_counts)

    def _inputs(self, numbers: list[int]) -> tuple[Tensor, Batch]:
        device = self.accelerator.device
        batch = collate([self.sequences[n] for n in numbers], self.pad_id)
        features = self._features(numbers, batch)
        return features, Batch(batch.input_ids.to(device), batch.written.to(device), batch.lengths.to(device))

    def _noise(self, features: Tensor, numbers: list[int], step: int) -> Tensor:
        """Uniform noise (B, T, H), scaled by the RMS of each row. It depends only on seed, step and sequence."""
        noise = torch.zeros(features.shape)
        for row, number in enumerate(numbers):
            seed = (self.config.seed * 1_000_003 + step) * 1_000_003 + number
            generator = torch.Generator().manual_seed(seed % 2**63)
            real = noise[row, : len(self.sequences[number])]
            real.uniform_(-1, 1, generator=generator)
        return noise.to(features.device) * features.pow(2).mean(-1, keepdim=True).sqrt() * self.config.feature_noise

    @torch.no_grad()
    def held_out_acceptance(self) -> float:
        """Expected acceptance length of greedy chains of `rollout` tokens on the held-out sequences."""
        self.draft.eval()
        numbers = range(self.train_count, len(self.sequences))
        row_counts = count_rows([self.sequences[n] for n in numbers], self.config.rollout)
        agreement = torch.zeros(self.config.rollout)
        for number in numbers:
            features, batch = self._inputs([number])
            with self.accelerator.autocast():
                losses = draft_losses(self.draft, features, batch, passes=len(row_counts))
            agreement += losses.agreement.cpu() * count_rows([self.sequences[number]], len(row_counts))
        return expected_acceptance_length(agreement / row_counts.clamp(min=1))

    def calibration(self) -> dict[str, list[float]]:
        """Acceptance rates of the held-out sequences to a depth of `rollout`; see `Calibration.rates`."""
        self.draft.eval()
        calibration = Calibration()
        for number in range(self.train_count, len(self.sequences)):
            features, batch = self._inputs([number])
            calibration.add(self.draft, features, batch, passes=self.config.rollout)
        return calibration.rates()

    def key(self) -> dict[str, Any]:
        """Values that must be equal in a resumed run, so that it ends like an uninterrupted one."""
        made = {"blocks": self.draft.config.num_hidden_layers, "fusion": self.draft.config.fusion}
        trained_on = {"target": fingerprint(self.target), "sequences": digest(self.sequences[: self.train_count])}
        return settings_key(self.config) | made | trained_on

    def progress(self) -> Progress:
        """How far the run is."""
        seconds = self.seconds_before + time.monotonic() - self.started_s
        return Progress(len(self.history.steps), self.key(), self.history, seconds)

    def save_state(self) -> None:
        """Save the state after the steps that are done. It replaces the previous state once it is complete."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_state(self.config.out, self.progress(), self.draft, self.optimizer)

    def go_on(self, before: Before) -> None:
        """Continue an earlier run: restore its state, or only its history if it was finished.

        Raises:
            InputError: it belongs to a run with other settings, other data or another target, or is damaged.
        """
        if before.progress is None:
            return
        check_key(self.key(), before.progress, before.state or self.config.out / RECORD)
        if before.state is not None:
            load_state(before.state, self.draft, self.optimizer)
        self.history, self.seconds_before = before.progress.history, before.progress.seconds
        self.schedule = _schedule(self.schedule.optimizer, self.config, before.progress.step)


def token_order(sequences: list[Sequence], vocab_size: int) -> Tensor:
    """Token ids by descending frequency in these sequences, for drafts with a reduced head: (V,) int32."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sequence in sequences:
        counts += torch.bincount(sequence.input_ids, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True).to(torch.int32)
