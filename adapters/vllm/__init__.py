"""vLLM's plugin: drafts of this project as `speculative_config={"method": "eagle", "model": DIR, ...}`.

vLLM finds `register` by its entry point, in every process that it starts. This module is imported by all of them and
imports nothing of vLLM beyond its registry; the model is in `model.py`, which vLLM imports where it is needed.
"""

import logging
import os

import torch
from torch import Tensor

FIX_SAMPLING = "DOVETAIL_FIX_VLLM_SAMPLING"
"""Environment variable: 1 repairs sampling with speculation on builds where it is wrong (see `check_sampling`)."""

ARCHITECTURES = ("DovetailDraft", "EagleDovetailDraft")
"""The name in our config.json, which vLLM looks up first, and the one it makes of it for method "eagle"."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know Dovetail drafts. Idempotent; runs in every process of vLLM.

    Its transformers knows their config since this package was imported.
    """
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, "dovetail_plugin.adapters.vllm.model:DovetailForVLLM")


# --- sampling ---------------------------------------------------------------------------------------


def sampling_is_right() -> bool:
    """Whether this build gives every drafted token the temperature, top-k and top-p of its request.

    The CPU build of vLLM 0.32 writes them into a copy and leaves what is used uninitialised, whatever the draft.
    """
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values = torch.tensor([0.5, 0.0, 2.0])
    expected = torch.tensor([0.5, 0.5, 1.0, 2.0])
    for dtype in (torch.float32, torch.int32):
        for _ in range(2):  # memory that was never written may hold the right values once
            seen = expand_batch_to_tokens(values.to(dtype), torch.tensor([2, 3, 4], dtype=torch.int32), 4, 0, 1)
            wanted = expected if dtype == torch.float32 else torch.tensor([1, 1, 1, 2], dtype=dtype)
            if not torch.equal(seen, wanted):
                return False
            seen.fill_(7)  # so that the same memory would be wrong if it came again
    return True


def check_sampling() -> None:
    """Warn where sampling with speculation is wrong, or repair it if the user asked for that (`FIX_SAMPLING`).

    Only CPU builds are looked at: elsewhere vLLM runs other kernels. Greedy decoding is right on all of them.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or sampling_is_right():
        return
    if os.environ.get(FIX_SAMPLING) == "1":
        from vllm.triton_utils.dispatcher import register_kernels

        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})
        if sampling_is_right():
            logger.warning("%s=1: vLLM's kernel that hands out sampling parameters was replaced.", FIX_SAMPLING)
            return
    logger.warning(
        "this build of vLLM samples wrongly with any speculation: temperature, top-k and top-p of drafted tokens are "
        "uninitialised. Greedy decoding is right. Set %s=1 to replace the kernel at fault.",
        FIX_SAMPLING,
    )


def _expand(
    output: Tensor, values: Tensor, cu_num_tokens: Tensor, replace_from: float, replace_to: float, limit: int = 0
) -> None:
    """output (n,): every request's value (B,) for each of its tokens, which end at cu_num_tokens (B,)."""
    del limit  # of tokens a request, for kernels that need a fixed size
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    output.copy_(replaced.repeat_interleave(counts.long()))
