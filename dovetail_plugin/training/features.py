"""Features of the frozen target, computed during training or once into safetensors shards.

Takes token ids and returns the last hidden state after the final norm, (B, T, H). The head is not run.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..drafts.checkpoints.files import read_json
from ..errors import InputError, OccupiedError
from ..files import refuse_unwritable, whole_directory, whole_file, write_text
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


INDEX = "index.json"
"""File that says for which target and sequences the features are."""


def check_directory(directory: Path) -> dict[str, Any] | None:
    """Refuse a directory that cannot be used for features, before a target is loaded.

    Returns:
        The content of its index; None if it has no complete features.

    Raises:
        InputError: its index is damaged.
        WriteError: it is a file, or nothing can be written there.
    """
    if directory.exists() and not directory.is_dir():
        raise OccupiedError(f"{directory} is a file. Name a directory for target features.")
    index = directory / INDEX
    if index.exists():
        return read_json(str(index), str(index))
    refuse_unwritable(directory)
    return None


class FeatureCache:
    """Target features of numbered sequences, stored in safetensors shards on first use.

    Each shard holds checksums of its features, and for which target and sequences they are. `index.json` is written
    when all shards are complete; without it they are written again.

    Args:
        directory: holds `features-*.safetensors` and `index.json`. It belongs to one target and one set of sequences.
        target: computes the features if the directory has none yet.
        sequences: all sequences; their positions are their numbers.
        pad_id: token id for padding.

    Raises:
        InputError: the directory was written for other sequences or another target, or its index is damaged.
        WriteError: a file cannot be written, for example because the disk is full.
    """

    def __init__(self, directory: Path, target: PreTrainedModel, sequences: list[Sequence], pad_id: int) -> None:
        self.directory = directory
        self._lengths = [len(sequence) for sequence in sequences]
        self._key = {"target": fingerprint(target), "sequences": digest(sequences)}
        found = check_directory(directory)
        if found is None:
            self._write(target, sequences, pad_id)
            write_text(directory / INDEX, json.dumps(self._key))
        elif found != self._key:
            raise InputError(
                f"{directory} holds features of another target, other data or another max_length. "
                "Delete it or use another directory."
            )

    def _write(self, target: PreTrainedModel, sequences: list[Sequence], pad_id: int) -> None:
        if not self.directory.is_dir():
            with whole_directory(self.directory):
                pass
        for start in tqdm(range(0, len(sequences), SHARD_SEQUENCES), desc="target features", unit="shard"):
            tensors = {}
            for number in range(start, min(start + SHARD_SEQUENCES, len(sequences))):
                tensors[str(number)] = target_features(target, collate([sequences[number]], pad_id))[0].cpu()
            checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
            with whole_file(self._shard(start)) as part:
                save_file(tensors, part, metadata=self._key | checksums)

    def _shard(self, number: int) -> Path:
        return self.directory / f"features-{number // SHARD_SEQUENCES:05d}.safetensors"

    def load(self, numbers: list[int]) -> Tensor:
        """Read the features of these sequences.

        Returns:
            (B, T, H) float, in the target's dtype, on the CPU, padded with zeros on the right.

        Raises:
            InputError: a shard is damaged, or not of this cache.
        """
        return torch.nn.utils.rnn.pad_sequence([self._load(number) for number in numbers], batch_first=True)

    def _load(self, number: int) -> Tensor:
        file, name = self._shard(number), str(number)
        remedy = f"Delete {self.directory} to have the features computed again."
        try:
            with safe_open(file, framework="pt") as shard:
                features, written = shard.get_tensor(name), shard.metadata() or {}
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise InputError(f"{file} is damaged or missing ({error}). {remedy}") from error
        if {key: written.get(key) for key in self._key} != self._key:
            raise InputError(f"{file} holds features of another target, other data or another max_length. {remedy}")
        whole = features.ndim == 2 and len(features) == self._lengths[number] and features.is_floating_point()
        if not whole or _checksum(features) != written.get(name):
            raise InputError(f"{file} is damaged: the features of sequence {name} have changed. {remedy}")
        return features


def _checksum(features: Tensor) -> str:
    """Checksum of dtype, shape and bytes, for damage by accident, as 8 hex digits."""
    about = f"{features.dtype} {tuple(features.shape)}".encode()
    return f"{zlib.crc32(features.contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(about)):08x}"


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
