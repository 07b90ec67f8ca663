"""A plugin of vLLM that runs Dovetail drafts: `speculative_config={"method": "eagle", "model": DIR, ...}`.

vLLM finds `register` by its entry point and calls it in every process that it starts. All of them import this module,
so it imports vLLM only inside its functions. The model is in `model.py`, which vLLM imports where it is needed.
"""

import logging
import os

import torch
from torch import Tensor

FIX_SAMPLING = "DOVETAIL_FIX_VLLM_SAMPLING"
"""Environment variable. Set to 1, it repairs sampling with speculation on builds where it is wrong; see
`check_sampling`."""

ARCHITECTURES = ("DovetailDraft", "EagleDovetailDraft")
"""The name in a draft's config.json, which vLLM looks up first, and the name it makes of it for method "eagle"."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Register Dovetail drafts with vLLM. Can be called several times.

    The config of the drafts is known to transformers as soon as this package is imported.
    """
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, "dovetail_plugin.adapters.vllm.model:DovetailForVLLM")


# --- sampling ---------------------------------------------------------------------------------------


def sampling_is_right() -> bool:
    """Return whether this build of vLLM gives every drafted token the temperature, top-k and top-p of its request.

    The CPU build of vLLM 0.32 writes them into a copy and reads uninitialized memory, with any kind of draft.
    """
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values = torch.tensor([0.5, 0.0, 2.0])
    expected = torch.tensor([0.5, 0.5, 1.0, 2.0])
    for dtype in (torch.float32, torch.int32):
        for _ in range(2):  # uninitialized memory can hold the right values once
            seen = expand_batch_to_tokens(values.to(dtype), torch.tensor([2, 3, 4], dtype=torch.int32), 4, 0, 1)
            wanted = expected if dtype == torch.float32 else torch.tensor([1, 1, 1, 2], dtype=dtype)
            if not torch.equal(seen, wanted):
                return False
            seen.fill_(7)  # makes the values wrong if the same memory is used again
    return True


def check_sampling() -> None:
    """Warn if sampling with speculation is wrong in this build, or repair it if `FIX_SAMPLING` is set.

    Only CPU builds are checked, because vLLM runs other kernels elsewhere. Greedy decoding is right on all builds.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or sampling_is_right():
        return
    if os.environ.get(FIX_SAMPLING) == "1":
        from vllm.triton_utils.dispatcher import register_kernels

        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand})
        if sampling_is_right():
            logger.warning("%s=1: vLLM's kernel that expands sampling parameters was replaced.", FIX_SAMPLING)
            return
    logger.warning(
        "this build of vLLM samples wrongly with any speculation: temperature, top-k and top-p of drafted tokens are "
        "uninitialized. Greedy decoding is right. Set %s=1 to replace the faulty kernel.",
        FIX_SAMPLING,
    )


def _expand(
    output: Tensor, values: Tensor, cu_num_tokens: Tensor, replace_from: float, replace_to: float, limit: int = 0
) -> None:
    """Write the value of each request to all of its tokens. Replaces a kernel of vLLM and has its arguments.

    Args:
        output: (n,) values of the tokens, written in place.
        values: (B,) values of the requests.
        cu_num_tokens: (B,) index behind the last token of each request.
        replace_from: value of a request that is replaced.
        replace_to: value that replaces it.
        limit: largest number of tokens in a request. Unused: this is for kernels that need a fixed size.
    """
    del limit
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    output.copy_(replaced.repeat_interleave(counts.long()))
