"""Features of the frozen target, computed during training or once into safetensors shards.

Takes token ids and returns the last hidden state after the final norm, (B, T, H). The head is not run.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .data import Batch, Sequence, collate

SHARD_SEQUENCES = 512
"""Sequences in one file of the cache."""


@torch.no_grad()
def target_features(target: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the target over a batch.

    Padding is on the right, so it does not need a mask: in a causal model no real token attends to it.

    Returns:
        (B, T, H) float, in the target's dtype, on its device.
    """
    output = target.base_model(input_ids=batch.input_ids.to(target.device), use_cache=False)
    return output.last_hidden_state


class FeatureCache:
    """Target features of numbered sequences, stored in safetensors shards on first use.

    Args:
        directory: holds `features-*.safetensors` and `index.json`. It belongs to one target and one set of sequences.
        target: computes the features if the directory has none yet.
        sequences: all sequences; their positions are their numbers.
        pad_id: token id for padding.

    Raises:
        ValueError: the directory was written for other sequences or another target.
    """

    def __init__(self, directory: Path, target: PreTrainedModel, sequences: list[Sequence], pad_id: int) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        index = directory / "index.json"
        key = {"target": fingerprint(target), "sequences": digest(sequences)}
        if not index.exists():
            self._write(target, sequences, pad_id)
            index.write_text(json.dumps(key))
        elif json.loads(index.read_text()) != key:
            raise ValueError(
                f"{directory} holds features of another target, other data or another max_length. "
                "Delete it or use another directory."
            )

    def _write(self, target: PreTrainedModel, sequences: list[Sequence], pad_id: int) -> None:
        for start in tqdm(range(0, len(sequences), SHARD_SEQUENCES), desc="target features", unit="shard"):
            tensors = {}
            for number in range(start, min(start + SHARD_SEQUENCES, len(sequences))):
                tensors[str(number)] = target_features(target, collate([sequences[number]], pad_id))[0].cpu()
            save_file(tensors, self._shard(start))

    def _shard(self, number: int) -> Path:
        return self.directory / f"features-{number // SHARD_SEQUENCES:05d}.safetensors"

    def load(self, numbers: list[int]) -> Tensor:
        """Read the features of these sequences.

        Returns:
            (B, T, H) float, in the target's dtype, on the CPU, padded with zeros on the right.
        """
        rows = []
        for number in numbers:
            with safe_open(self._shard(number), framework="pt") as shard:
                rows.append(shard.get_tensor(str(number)))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def fingerprint(target: PreTrainedModel) -> str:
    """Hash of the target's config and some of its weights, as 16 hex digits. It does not depend on the directory."""
    hashed = hashlib.sha256(json.dumps(target.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for _, parameter in sorted(target.named_parameters()):
        hashed.update(str(tuple(parameter.shape)).encode())
        hashed.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(sequences: list[Sequence]) -> str:
    """Hash of the tokens, lengths and masks of these sequences, as 16 hex digits."""
    hashed = hashlib.sha256()
    for sequence in sequences:
        hashed.update(len(sequence).to_bytes(8, "little"))
        hashed.update(sequence.input_ids.numpy().tobytes())
        hashed.update(sequence.written.numpy().tobytes())
    return hashed.hexdigest()[:16]
