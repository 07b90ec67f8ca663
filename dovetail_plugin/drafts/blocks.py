"""The parts of a draft network: fusions of feature and token, and Llama decoder blocks.

They turn features, embeddings, rotary tables and a mask into hidden states. Each part knows only its own weights;
`network.py` puts the parts together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import LlamaRotaryEmbedding, apply_rotary_pos_emb
from .config import DovetailConfig
from .kv_rows import AttentionRows

Rope = tuple[Tensor, Tensor]
"""Rotary cosines and sines, (B, n, head_dim) each."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # .to: autocast gives bf16


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding, whose frequencies stay fp32 when the draft is cast: rounding spoils far positions."""

    def _apply(self, fn, recurse=True):
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and not buffer.is_meta and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over stored rows if there are any.

    Args:
        config: of the draft.
        width: size of the input; default `hidden_size` (H).
    """

    def __init__(self, config: DovetailConfig, width: int | None = None) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None and config.head_dim is not None  # the config fills them in
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, bias = width or config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope, rows: AttentionRows | None, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = (table.to(query.dtype) for table in rope)  # under autocast the query is bf16
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if rows is not None:
            rows.append(key, value)
            key, value = rows.keys, rows.values
        out = attend(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute grouped-query attention without repeating keys and values.

    Args:
        query: (B, Hq, n, d).
        key: (B, Hkv, m, d).
        value: (B, Hkv, m, d).
        mask: (n, m) additive; None means causal over n = m rows.

    Returns:
        (B, Hq, n, d)
    """
    groups = query.shape[1] // key.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1)
    if torch.jit.is_tracing():  # for engines that recognize repeated heads of this form and read them only once
        key, value = (rows[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for rows in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # The query heads of a group become rows of one head, so keys and values are read once.
    batch, heads, n, d = query.shape
    folded = query.reshape(batch, heads // groups, groups * n, d)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask.repeat(groups, 1))
    return out.reshape(batch, heads, n, d)


class MLP(nn.Module):
    """Llama's SwiGLU."""

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A Llama decoder block. The first one of a draft has no input norm: it reads the fused input directly."""

    def __init__(self, config: DovetailConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if index else nn.Identity()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, rows: AttentionRows | None, mask: Tensor | None) -> Tensor:
        x = within_range(x + self.self_attn(self.input_layernorm(x), rope, rows, mask))
        return within_range(x + self.mlp(self.post_attention_layernorm(x)))


class Eagle3Block(nn.Module):
    """The single block of an EAGLE-3 head (Li et al. 2025): attention reads embedding and feature side by side.

    Its input is the output (B, n, 2H) of `Eagle3Fusion`. The residual stream begins with the feature half, before its
    norm, or after it if `config.norm_before_residual`. With `config.norm_output` (EAGLE-3.1) the block ends with the
    norm of the output, so that the next step reads the normed state; the logits are the same.
    """

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.self_attn = Attention(config, 2 * width)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(config)
        self.norm_before_residual = config.norm_before_residual
        self.output_norm = RMSNorm(width, eps) if config.norm_output else None

    def forward(self, x: Tensor, rope: Rope, rows: AttentionRows | None, mask: Tensor | None) -> Tensor:
        embeddings, features = x.chunk(2, dim=-1)
        normed = self.hidden_norm(features)
        residual = normed if self.norm_before_residual else features
        both = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        x = within_range(residual + self.self_attn(both, rope, rows, mask))
        x = within_range(x + self.mlp(self.post_attention_layernorm(x)))
        return x if self.output_norm is None else self.output_norm(x)


def within_range(x: Tensor) -> Tensor:
    """Keep the residual stream finite in fp16: bf16 weights may drive it beyond fp16's range."""
    return x.clamp(-65504.0, 65504.0) if x.dtype == torch.float16 else x


class GatedFusion(nn.Module):
    """Dynamic Gating Fusion (Dovetail, section 3): a learned gate mixes feature and token.

        h1 = f W_1;  h2 = SiLU(RMSNorm(e) W_2);  z = sigmoid([h1 ; h2] W_z);  x0 = z h1 + (1 - z) h2

    `W_1`, `W_2` (H, H) and `W_z` (2H, H) multiply from the right, as in the reference checkpoints.
    """

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.W_1 = nn.Parameter(torch.empty(width, width))
        self.W_2 = nn.Parameter(torch.empty(width, width))
        self.W_z = nn.Parameter(torch.empty(2 * width, width))

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        h1 = self.times(features, "W_1")
        h2 = F.silu(self.times(self.input_layernorm(embeddings), "W_2"))
        gate = torch.sigmoid(self.times(torch.cat([h1, h2], dim=-1), "W_z"))
        return torch.lerp(h2, h1, gate)

    def times(self, x: Tensor, name: str) -> Tensor:
        """Return x (..., K) times the matrix (K, M) of this name."""
        return x @ getattr(self, name)


class ConcatFusion(nn.Module):
    """Fusion of EAGLE-1 and EAGLE-2: `fc([e ; f])`, with a bias if `config.fusion_bias`."""

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fusion_bias)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return self.fc(torch.cat([embeddings, features], dim=-1))


class Eagle3Fusion(nn.Module):
    """Input of EAGLE-3: features of several layers become one of width H; feature and token stay side by side.

    Features of the target pass through `project` once. Predictions of the draft have width H already.
    """

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=config.fusion_bias)

    def project(self, features: Tensor) -> Tensor:
        """Project features: (..., F) -> (..., H)."""
        return self.fc(features)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return torch.cat([embeddings, features], dim=-1)


FUSIONS = {"dgf": GatedFusion, "concat": ConcatFusion, "eagle3": Eagle3Fusion}
"""`DovetailConfig.fusion` -> class."""
