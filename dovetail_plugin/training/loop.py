"""The training loop: a frozen target, a draft, accelerate for devices, precision and several processes.

Enters: a `TrainingConfig`. Leaves: a draft checkpoint that `DovetailDraft.from_pretrained` loads, with
`training.json` (config and history) and `loss.png` beside it. A run that was interrupted continues from
its last saved state and ends with the same weights as one that was not: order and noise depend on the
seed and the step alone.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from ..modeling import DovetailDraft
from .config import TrainingConfig
from .data import Batch, Sequence, batch_order, collate, encode, read_jsonl
from .features import FeatureCache, target_features
from .losses import Losses, draft_losses, expected_acceptance_length

STATE = "resume"


@dataclass
class History:
    """What the progress bar showed, step by step; stored with the checkpoint and plotted."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)


def train(config: TrainingConfig, *, resume: bool = False) -> DovetailDraft:
    """Train a draft and save it to `config.out`.

    Args:
        config: all numbers of the run.
        resume: continue from the state in `config.out`, if there is one.

    Raises:
        ValueError: data, target or an earlier state do not fit the config.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed)
    target = AutoModelForCausalLM.from_pretrained(config.target, dtype=config.dtype).eval().to(accelerator.device)
    target.requires_grad_(False)
    sequences, pad_id = _load_sequences(config)
    draft = DovetailDraft.for_target(target, blocks=config.blocks, fusion=config.fusion).to(torch.float32)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    model, optimizer = accelerator.prepare(draft, optimizer)
    accelerator.register_for_checkpointing(schedule)
    run = _Run(config, accelerator, target, draft, optimizer, schedule, sequences, pad_id)
    first = run.load_state() if resume else 0
    run.train(model, first)
    if accelerator.is_main_process:
        _save(config, draft, run.history)
    return draft


def _load_sequences(config: TrainingConfig) -> tuple[list[Sequence], int]:
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    rows = read_jsonl(config.data)
    sequences = [encode(row, tokenizer, config.max_length) for row in tqdm(rows, desc="tokenizing", unit="row")]
    sequences = [s for s in sequences if len(s) >= config.rollout + 3 and bool(s.written.any())]
    if len(sequences) < config.held_out + config.batch_size:
        raise ValueError(
            f"{len(sequences)} usable sequences are too few for {config.held_out} held-out ones and a batch of "
            f"{config.batch_size}; give more data or smaller numbers."
        )
    return sequences, tokenizer.pad_token_id or 0


@dataclass
class _Run:
    """The parts of one run, and one method for each thing that happens in it."""

    config: TrainingConfig
    accelerator: Accelerator
    target: PreTrainedModel
    draft: DovetailDraft
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sequences: list[Sequence]
    pad_id: int
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        directory = self.config.cache_features
        self.cache = FeatureCache(directory, self.target, self.sequences, self.pad_id) if directory else None
        # The last sequences are held out; everything before them is trained on.
        self.train_count = len(self.sequences) - self.config.held_out
        self._lengths = [len(s) for s in self.sequences[: self.train_count]]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def train(self, model: torch.nn.Module, first: int) -> None:
        """Steps `first` .. `config.steps` - 1."""
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
            loss = self._step(model, step)
            self.history.steps.append(step + 1)
            self.history.losses.append(loss)
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                self.history.eval_steps.append(step + 1)
                self.history.acceptance.append(self.held_out_acceptance())
            shown = self.history.acceptance[-1:] or [float("nan")]
            progress.set_postfix(loss=f"{loss:.3f}", held_out_acceptance=f"{shown[0]:.2f}")
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                self.save_state(step + 1)

    def _step(self, model: torch.nn.Module, step: int) -> float:
        model.train()
        numbers = self._batch_numbers(step)
        size = len(numbers) // self.config.accumulate
        total = 0.0
        for start in range(0, len(numbers), size):
            losses = self._losses(numbers[start : start + size], step * len(numbers) + start)
            loss = (losses.feature + self.config.ce_weight * losses.token) / self.config.accumulate
            self.accelerator.backward(loss)
            total += loss.item()
        self.accelerator.clip_grad_norm_(self.draft.parameters(), self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _batch_numbers(self, step: int) -> list[int]:
        """This process's share of the sequences of a step; depends on seed and step only."""
        per_epoch = max(self.train_count // self.config.batch_size, 1)
        epoch, place = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            order = batch_order(self._lengths, self.config.batch_size, self.config.seed + epoch)
            self._epoch = (epoch, order)
        numbers = self._epoch[1][place % len(self._epoch[1])]
        return numbers[self.accelerator.process_index :: self.accelerator.num_processes]

    def _features(self, numbers: list[int], batch: Batch) -> Tensor:
        features = self.cache.load(numbers) if self.cache else target_features(self.target, batch)
        return features.to(self.accelerator.device, torch.float32)

    def _losses(self, numbers: list[int], noise_seed: int | None) -> Losses:
        device = self.accelerator.device
        batch = collate([self.sequences[n] for n in numbers], self.pad_id)
        features = self._features(numbers, batch)
        batch = Batch(batch.input_ids.to(device), batch.written.to(device), batch.lengths.to(device))
        noise = None
        if noise_seed is not None and self.config.feature_noise:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + noise_seed)
            scale = features.pow(2).mean(-1, keepdim=True).sqrt() * self.config.feature_noise
            noise = (torch.rand(features.shape, generator=generator) * 2 - 1).to(device) * scale
        with self.accelerator.autocast():
            return draft_losses(self.draft, features, batch, passes=self.config.rollout, noise=noise)

    @torch.no_grad()
    def held_out_acceptance(self) -> float:
        """Expected acceptance length of greedy chains as deep as the rollout, on the held-out sequences."""
        self.draft.eval()
        numbers = list(range(self.train_count, len(self.sequences)))
        parts = [self._losses([n], None).agreement for n in numbers]
        return expected_acceptance_length(torch.stack(parts).mean(0))

    def save_state(self, step: int) -> None:
        """Everything needed to continue after `step` steps."""
        directory = self.config.out / STATE
        self.accelerator.save_state(str(directory))
        if self.accelerator.is_main_process:
            (directory / "history.json").write_text(json.dumps({"step": step} | asdict(self.history)))

    def load_state(self) -> int:
        """Restore the last saved state; returns the number of steps done, 0 if there is none."""
        saved = self.config.out / STATE / "history.json"
        if not saved.exists():
            return 0
        self.accelerator.load_state(str(saved.parent))
        values = json.loads(saved.read_text())
        step = values.pop("step")
        self.history = History(**values)
        return step


def _save(config: TrainingConfig, draft: DovetailDraft, history: History) -> None:
    dtype = getattr(torch, config.save_dtype)
    draft.to(dtype).save_pretrained(config.out)
    AutoTokenizer.from_pretrained(config.target).save_pretrained(config.out)
    numbers = {k: v for k, v in asdict(config).items() if not isinstance(v, (Path, tuple))}
    numbers["target"] = draft.config.target_name_or_path
    (config.out / "training.json").write_text(json.dumps({"config": numbers, "history": asdict(history)}, indent=1))
    plot_history(history, config.out / "loss.png")


def plot_history(history: History, file: Path) -> None:
    """Loss and held-out acceptance over steps, as a PNG; skipped with a note if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write("no loss plot: install matplotlib (pip install 'dovetail-plugin[train]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(len(history.losses) // 100, 1)
    losses = torch.tensor(history.losses)[: len(history.losses) // window * window].view(-1, window).mean(1)
    axes.plot(history.steps[window - 1 :: window][: len(losses)], losses.tolist(), color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color="tab:blue")
    right = axes.twinx()
    right.plot(history.eval_steps, history.acceptance, color="tab:orange", marker="o", markersize=3)
    right.set_ylabel("held-out acceptance length (greedy chain)", color="tab:orange")
    figure.savefig(file, dpi=120)
