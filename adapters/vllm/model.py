"""A Dovetail draft built from vLLM's layers, and the loading of its weights.

A step is the same as in `drafts.network.DraftNetwork`: fuse features and next tokens, then run the blocks. The pair of
feature i and token i + 1 has position i; vLLM shifts the tokens and feeds predictions back itself. Embedding table and
head are the target's, which vLLM sets after loading.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsEagle
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import maybe_prefix

from dovetail_plugin import DovetailConfig, DovetailDraft
from dovetail_plugin.drafts.blocks import FUSIONS, within_range
from dovetail_plugin.drafts.checkpoints.load import check_loaded
from dovetail_plugin.drafts.compatibility import check_fits, warn_of_other_target

from . import check_sampling

PACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Matrix of the checkpoint -> the matrix that vLLM packs it into, and its part there."""


class DovetailForVLLM(nn.Module, SupportsEagle):
    """The model that vLLM builds for a directory with `model_type: "dovetail"`.

    Args:
        vllm_config: config of the engine, with the target's and the draft's.
        prefix: prefix of the names of layers.

    Raises:
        ValueError: the draft does not fit this target, or vLLM cannot run it; see `check_supported`.
    """

    has_own_lm_head = False
    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.speculative_config.draft_model_config
        self.config: DovetailConfig = model_config.hf_config.model
        self.source = model_config.model
        check_supported(self.config, self.source)
        check_fits(self.config, vllm_config.model_config.hf_config)
        warn_of_other_target(self.config, vllm_config.model_config.hf_config)
        self.model = DovetailModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=self.config.logit_scale, soft_cap=self.config.logit_softcap
        )
        check_sampling()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return rows of the target's embedding table: (n,) int64 -> (n, H)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the next features.

        Args:
            input_ids: (n,) int64, the token after each feature.
            positions: (n,) int64 positions of the features.
            hidden_states: (n, H) features of the target after its final norm, or predictions.
            inputs_embeds: must be None.

        Returns:
            Predicted features (n, H) for the head, and the same tensor as the next `hidden_states`.

        Raises:
            NotImplementedError: `inputs_embeds` is given.
        """
        if inputs_embeds is not None:
            raise NotImplementedError("Dovetail drafts do not support inputs_embeds. Pass token ids.")
        predicted = self.model(input_ids, positions, hidden_states)
        return predicted, predicted

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits (n, V) of predicted features (n, H), scaled and capped like the target's."""
        head = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens  # Gemma has no separate head
        return self.logits_processor(head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the checkpoint.

        Args:
            weights: names and tensors.

        Raises:
            ValueError: tensors are missing, unexpected or have wrong shapes. The message names all of them; vLLM
                itself does not check this.
        """
        tensors = dict(weights)
        check_tensors(self.config, tensors, self.source)
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            *path, kind, field = name.split(".")
            packed, *part = PACKED.get(kind, (kind,))
            parameter = parameters[".".join([*path, packed, field])]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *part)


@support_torch_compile
class DovetailModel(nn.Module):
    """Fusion and blocks, with the names of the checkpoint."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: DovetailConfig = vllm_config.speculative_config.draft_model_config.hf_config.model
        self.embed_tokens = BorrowedTable(config.vocab_size, config.hidden_size)
        self.fusion = FUSIONS[config.fusion](config)
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)  # the target's layers come first
        self.layers = nn.ModuleList(
            Block(config, vllm_config, index, maybe_prefix(prefix, f"layers.{first + index}"))
            for index in range(config.num_hidden_layers)
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Predict the next features (n, H); see `DovetailForVLLM.forward`."""
        x = self.fusion(hidden_states, self.embed_tokens(input_ids))
        for layer in self.layers:
            x = layer(positions, x)
        return x


class Block(nn.Module):
    """A decoder block like `blocks.Block`. The first one has no input norm."""

    def __init__(self, config: DovetailConfig, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=config.attention_bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = LlamaMLP(config.hidden_size, config.intermediate_size, "silu", prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if index else nn.Identity()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Run the block over x (n, H) at positions (n,) int64."""
        x = within_range(x + self.self_attn(positions, self.input_layernorm(x)))
        return within_range(x + self.mlp(self.post_attention_layernorm(x)))


class BorrowedTable(nn.Module):
    """Placeholder for the target's embedding table, without memory. vLLM compares its width with the target's."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width, device="meta"), requires_grad=False)

    def forward(self, _: Tensor) -> Tensor:
        """Raise an error: vLLM replaces this module after loading."""
        raise RuntimeError("vLLM has not set this draft's embedding table. It has to be the target's.")


# --- checks -----------------------------------------------------------------------------------------


def check_supported(config: DovetailConfig, source: str) -> None:
    """Refuse drafts and settings that this model does not support.

    Args:
        config: config of the draft.
        source: name of the draft, for messages.

    Raises:
        ValueError: the draft is an EAGLE-3 draft, or the target runs as a pipeline on several devices.
    """
    if config.fusion == "eagle3":
        raise ValueError(
            f"{source} is an EAGLE-3 draft, which vLLM runs itself. Convert it with `dovetail convert {source} DIR "
            '--to vllm` and pass DIR with "method": "eagle3".'
        )
    size = get_pp_group().world_size
    if size > 1:
        raise ValueError(
            f"{source} does not work with pipeline_parallel_size={size}: the draft needs the target's embedding "
            "table, which is on another device of the pipeline. Use tensor_parallel_size."
        )


def check_tensors(config: DovetailConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Compare a checkpoint with the tensors that the draft's architecture stores.

    Args:
        config: config of the draft.
        tensors: tensors of the checkpoint by name.
        source: name of the draft, for messages.

    Raises:
        ValueError: tensors are missing, unexpected or have wrong shapes. The message names all of them.
    """
    with torch.device("meta"):
        expected = DovetailDraft(config).state_dict()
    shapes = [(name, tensors[name].shape, expected[name].shape) for name in sorted(tensors.keys() & expected.keys())]
    check_loaded(
        source,
        {
            "missing_keys": expected.keys() - tensors.keys(),
            "unexpected_keys": tensors.keys() - expected.keys(),
            "mismatched_keys": [(name, found, wanted) for name, found, wanted in shapes if found != wanted],
        },
    )
