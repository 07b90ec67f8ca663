"""Training: text to masked sequences, target features, losses against slow references, and the loop itself."""

import json

import pytest
import torch
from families import prompt, tiny_target
from helpers import (
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    byte_target,
    byte_tokenizer,
    chat,
    run_python,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from dovetail_plugin import DovetailDraft
from dovetail_plugin.drafting import FeatureDrafter
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.training import TrainingConfig, train
from dovetail_plugin.training import loop as loop_module
from dovetail_plugin.training.data import Batch, Sequence, batch_order, collate, encode, read_jsonl
from dovetail_plugin.training.features import FeatureCache, fingerprint, target_features
from dovetail_plugin.training.losses import count_rows, draft_losses, expected_acceptance_length, rollout_mask
