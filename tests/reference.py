"""A slow, independent implementation of the method's equations: loops over positions and heads, without a cache.

It follows the published equations (Dovetail, section 3; Llama for the blocks) and shares no code with the package;
only the draft's weights are read.
"""

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head (d,) in the half-split form."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def fuse(draft, feature: Tensor, token: int) -> Tensor:
    state, config = draft.state_dict(), draft.config
    e = draft.embed_weight[token]
    if config.fusion == "concat":
        return state["fusion.fc.weight"] @ torch.cat([e, feature]) + state["fusion.fc.bias"]
    e_hat = rms(e, state["fusion.input_layernorm.weight"], config.rms_norm_eps)
    h1 = feature @ state["fusion.W_1"]
    h2 = torch.nn.functional.silu(e_hat @ state["fusion.W_2"])
    z = torch.sigmoid(torch.cat([h1, h2]) @ state["fusion.W_z"])
    return z * h1 + (1 - z) * h2


def draft_sequence(draft, features: list[Tensor], tokens: list[int], positions: list[int]) -> list[Tensor]:
    """Predictions (H,) of n causally ordered pairs (feature, next token), recomputed from nothing."""
    state, config = draft.state_dict(), draft.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    theta, d = config.rope_parameters["rope_theta"], config.head_dim
    xs = [fuse(draft, f, t) for f, t in zip(features, tokens, strict=True)]
    for index in range(config.num_hidden_layers):
        at = lambda name, i=index: state[f"layers.{i}.{name}.weight"]  # noqa: E731
        normed = xs if index == 0 else [rms(x, at("input_layernorm"), config.rms_norm_eps) for x in xs]
        queries = [(at("self_attn.q_proj") @ x).view(heads, d) for x in normed]
        keys = [(at("self_attn.k_proj") @ x).view(-1, d) for x in normed]
        values = [(at("self_attn.v_proj") @ x).view(-1, d) for x in normed]
        out = []
        for i, x in enumerate(xs):
            mixed = []
            for head in range(heads):
                query = rotate(queries[i][head], positions[i], theta)
                seen = [rotate(keys[j][head // groups], positions[j], theta) for j in range(i + 1)]
                weights = torch.softmax(torch.stack([query @ key / math.sqrt(d) for key in seen]), 0)
                mixed.append(sum(w * values[j][head // groups] for j, w in enumerate(weights)))
            h = x + at("self_attn.o_proj") @ torch.cat(mixed)
            m = rms(h, at("post_attention_layernorm"), config.rms_norm_eps)
            gate = torch.nn.functional.silu(at("mlp.gate_proj") @ m) * (at("mlp.up_proj") @ m)
            out.append(h + at("mlp.down_proj") @ gate)
        xs = out
    return xs


def draft_path(draft, features: list[Tensor], tokens: list[int], path: list[int]) -> list[float]:
    """Draft log-probabilities along a path below a text: every step recomputed, predictions fed back.

    features f_0 .. f_{T-1} of the text x_0 .. x_T; path x_{T+1}, x_{T+2}, ... Returns log p of each.
    """
    pairs, following = list(features), list(tokens[1:])
    logprobs = []
    for token in path:
        predicted = draft_sequence(draft, pairs, following, list(range(len(pairs))))[-1]
        logprobs.append(float(draft.head(predicted).log_softmax(-1)[token]))
        pairs, following = [*pairs, predicted], [*following, token]
    return logprobs


def best_tree(draft, features: list[Tensor], tokens: list[int], nodes: int, depth: int, top_k: int):
    """The tree of the method by its definition: {path: cumulative log-probability}, root excluded."""
    vocab = draft.config.vocab_size
    candidates: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(depth):
        level: dict[tuple[int, ...], float] = {}
        for path, score in frontier:
            pairs, following = list(features), list(tokens[1:])
            for token in path:
                predicted = draft_sequence(draft, pairs, following, list(range(len(pairs))))[-1]
                pairs, following = [*pairs, predicted], [*following, token]
            predicted = draft_sequence(draft, pairs, following, list(range(len(pairs))))[-1]
            logprobs = draft.head(predicted).log_softmax(-1)
            for token in sorted(range(vocab), key=lambda t: -float(logprobs[t]))[:top_k]:
                level[(*path, token)] = score + float(logprobs[token])
        candidates |= level
        frontier = sorted(level.items(), key=lambda item: -item[1])[:top_k]
    best = sorted(candidates.items(), key=lambda item: (-item[1], len(item[0])))[: nodes - 1]
    return dict(best)
