"""Train the bundled pair's target: a 16-layer Llama of 12 million parameters, from random weights.

Enters: the chats of `corpus.py`. Leaves: a directory that `AutoModelForCausalLM` and `AutoTokenizer`
load. The first part of the training runs with half the layers, which are then doubled (progressive
stacking, Gong et al. 2019): a deep model at little more than half the price on a CPU.
"""

import argparse
import copy
import math
import random
from pathlib import Path

import torch
from corpus import load_chats, train_tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM


def target_config(vocab_size: int, layers: int) -> LlamaConfig:
    """Narrow and deep: a step costs many times a one-block draft step, as with large targets."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )


def double_depth(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every layer twice in a row; the copy's output projections are halved together with the original's."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers *= 2
    config.layer_types = None
    deep = LlamaForCausalLM(type(config)(**{k: v for k, v in config.to_dict().items() if k != "layer_types"}))
    layers = [copy.deepcopy(layer) for layer in model.model.layers for _ in range(2)]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_(0.5)
    deep.model.layers = nn.ModuleList(layers)
    deep.model.embed_tokens, deep.model.norm, deep.lm_head = (
        model.model.embed_tokens,
        model.model.norm,
        model.lm_head,
    )
    return deep


def pack(documents: list[list[int]], length: int) -> Tensor:
    """Concatenate token lists and cut them into rows of `length` tokens: (rows, length) int64."""
    flat = torch.tensor([token for document in documents for token in document])
    rows = len(flat) // length
    return flat[: rows * length].view(rows, length)


def batches(documents: list[list[int]], length: int, tokens: int, seed: int):
    """Endless batches (tokens // length, length); the documents are shuffled anew every epoch."""
    rng = random.Random(seed)
    while True:
        rng.shuffle(documents)
        rows = pack(documents, length)
        size = tokens // length
        for start in range(0, len(rows) - size + 1, size):
            yield rows[start : start + size]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean cross-entropy (nats per token) over rows (R, T)."""
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(16)]
    model.train()
    return sum(losses) / len(losses)


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def run_stage(model, documents, held_out, *, steps, length, tokens, lr, final_lr, seed) -> None:
    """One stage of constant depth: warm-up, then cosine from `lr` to `final_lr`."""
    opts = optimizers(model, lr)
    stream = batches(documents, length, tokens, seed)
    progress = tqdm(range(steps), desc=f"{model.config.num_hidden_layers} layers, {length} tokens", mininterval=30)
    for step in progress:
        rate = final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50)
        rows = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 200 == 199 or step == steps - 1:
            held = held_out_loss(model, held_out)
            progress.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{held:.3f}")
            progress.write(f"step {step + 1}: loss {loss.item():.3f}, held-out {held:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the trained target")
    parser.add_argument("--layers", type=int, default=16, help="layers of the finished target (even)")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--shallow-steps", type=int, default=2000, help="steps with half the layers")
    parser.add_argument("--deep-steps", type=int, default=1300, help="steps with all layers, 256 tokens a row")
    parser.add_argument("--long-steps", type=int, default=200, help="last steps, 512 tokens a row")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train, rest = load_chats()
    tokenizer = train_tokenizer(train, vocab_size=args.vocab_size)
    tokenizer.save_pretrained(args.out)
    encode = lambda chats: tokenizer.apply_chat_template(chats, return_dict=False)  # noqa: E731
    documents, held_out = encode(train), pack(encode(rest), 256)
    print(f"{sum(map(len, documents)):,} training tokens, {held_out.numel():,} held out")

    stage = dict(documents=documents, held_out=held_out, tokens=args.tokens)
    model = LlamaForCausalLM(target_config(args.vocab_size, args.layers // 2))
    run_stage(model, **stage, steps=args.shallow_steps, length=256, lr=3e-3, final_lr=1.5e-3, seed=1)
    model = double_depth(model)
    run_stage(model, **stage, steps=args.deep_steps, length=256, lr=2e-3, final_lr=3e-4, seed=2)
    model.save_pretrained(args.out)
    run_stage(model, **stage, steps=args.long_steps, length=512, lr=3e-4, final_lr=3e-5, seed=3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 0
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
