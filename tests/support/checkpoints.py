"""Random checkpoints of other projects, as those projects write them."""

import json
from dataclasses import dataclass

import torch
from families import VOCAB, prompt
from safetensors.torch import save_file
from torch import Tensor

H, INNER, HEADS, KV_HEADS, DIM, KEPT, TARGET_LAYERS = 32, 40, 4, 2, 8, 30, 8
EPS = 1e-5
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=H,
    intermediate_size=INNER,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    rms_norm_eps=EPS,
    rope_theta=500.0,
    max_position_embeddings=64,
)


def block(prefix: str, width: int = H, input_norm: bool = False) -> dict[str, Tensor]:
    """Random tensors of a Llama block whose attention reads `width` numbers."""
    sizes = {
        "self_attn.q_proj": (HEADS * DIM, width),
        "self_attn.k_proj": (KV_HEADS * DIM, width),
        "self_attn.v_proj": (KV_HEADS * DIM, width),
        "self_attn.o_proj": (H, HEADS * DIM),
        "mlp.gate_proj": (INNER, H),
        "mlp.up_proj": (INNER, H),
        "mlp.down_proj": (H, INNER),
        "post_attention_layernorm": (H,),
    }
    if input_norm:
        sizes["input_layernorm"] = (H,)
    return {f"{prefix}{name}.weight": weight(*size) for name, size in sizes.items()}


def weight(*size: int) -> Tensor:
    return torch.randn(*size) * 0.2 + (1.0 if len(size) == 1 else 0.0)


@dataclass
class Published:
    """A checkpoint as its project writes it. states: hidden states of the target that features are made of."""

    kind: str
    config: dict
    tensors: dict[str, Tensor]
    states: tuple[int, ...] | None = None
    file: str = "model.safetensors"

    def write(self, directory):
        (directory / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".bin"):
            torch.save(self.tensors, directory / self.file)
        else:
            save_file(self.tensors, directory / self.file)
        return directory


def paper(blocks: int = 2, file: str = "pytorch_model.bin", prefix: str = "") -> Published:
    tensors = {"W_1": weight(H, H), "W_2": weight(H, H), "W_z": weight(2 * H, H), "input_layernorm.weight": weight(H)}
    for index in range(blocks):
        tensors |= block(f"layers.{index}.", input_norm=index > 0)
    tensors |= {"embed_tokens.weight": weight(VOCAB, H), "lm_head.weight": weight(VOCAB, H)}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return Published("paper", LLAMA | {"num_hidden_layers": blocks}, tensors, file=file)


def eagle(bias: bool = True) -> Published:
    tensors = {"fc.weight": weight(H, 2 * H)} | block("layers.0.") | {"embed_tokens.weight": weight(VOCAB, H)}
    if bias:
        tensors["fc.bias"] = weight(H)
    return Published("eagle", LLAMA | ({} if bias else {"bias": False}), tensors)


def eagle3(kept: int = KEPT, states=None, own_embedding=False, norm_first=False, name="midlayer.") -> Published:
    tensors = {"fc.weight": weight(H, 3 * H), "norm.weight": weight(H), "lm_head.weight": weight(kept, H)}
    tensors |= block(name, 2 * H, input_norm=True) | {f"{name}hidden_norm.weight": weight(H)}
    config = LLAMA | {"draft_vocab_size": kept}
    if kept < VOCAB:
        ids = torch.randperm(VOCAB)[:kept].sort().values
        tensors |= {
            "d2t": ids - torch.arange(kept),
            "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True),
        }
    if own_embedding:
        tensors["embed_tokens.weight"] = weight(VOCAB, H)
    if norm_first:
        config["norm_before_residual"] = True
    if states:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(states), "use_aux_hidden_state": True}
    return Published("eagle3", config, tensors, states or (2, TARGET_LAYERS // 2, TARGET_LAYERS - 3))


def eagle31(nested: bool) -> Published:
    made = eagle3()
    made.config |= {"eagle_config": {"norm_output": True}} if nested else {"norm_output": True}
    return made


def speculators() -> Published:
    made = eagle3(norm_first=True, own_embedding=True, name="layers.0.")
    config = {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "some/target"}},
        "transformer_layer_config": LLAMA,
        "draft_vocab_size": KEPT,
        "norm_before_residual": True,
    }
    return Published("speculators", config, made.tensors, made.states)


FORMATS = {
    "paper": paper,
    "paper, safetensors, one block, prefixed": lambda: paper(1, "model.safetensors", "model."),
    "eagle": eagle,
    "eagle without bias": lambda: eagle(bias=False),
    "eagle3": eagle3,
    "eagle3, whole vocabulary": lambda: eagle3(VOCAB),
    "eagle3, other layers": lambda: eagle3(states=(1, 3, 7)),
    "eagle3, own embedding, norm first": lambda: eagle3(own_embedding=True, norm_first=True),
    "eagle3.1, norm_output": lambda: eagle31(nested=False),
    "eagle3.1, norm_output in eagle_config": lambda: eagle31(nested=True),
    "speculators": speculators,
}


def text(states) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return prompt(6)[0], torch.randn(5, H * (len(states) if states else 1), generator=generator)
